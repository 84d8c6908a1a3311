// The Python module ddpm_fast._C. Tensors come as addresses with sizes, so no torch header is needed and one build serves
// every torch version; ddpm_fast/ops checks dtypes, devices and strides, the checks here guard what C++ relies on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "dispatch.h"

namespace py = pybind11;
using ddpm::cpu::kernels;

namespace {

template <class T>
T* pointer(uintptr_t address, int64_t count, const char* name) {
  if (count > 0 && address == 0) throw py::value_error(std::string(name) + ": null address for a non-empty array");
  if (address % alignof(T) != 0) throw py::value_error(std::string(name) + ": address is not aligned to its type");
  return reinterpret_cast<T*>(address);
}

int64_t count(int64_t num_samples, int64_t size) {
  if (num_samples < 0 || size < 0) throw py::value_error("num_samples and size must not be negative");
  int64_t total;
  if (__builtin_mul_overflow(num_samples, size, &total)) throw py::value_error("num_samples * size overflows 64 bits");
  return total;
}

ddpm::Counter counter(uintptr_t seed, uintptr_t draw, uint64_t first_sample, int stream) {
  if (stream < 0 || stream > 255) throw py::value_error("stream must be in [0, 255], got " + std::to_string(stream));
  // Seed and draw are read through their addresses: they are device scalars everywhere.
  const auto seed_value = *pointer<const int64_t>(seed, 1, "seed"), draw_value = *pointer<const int64_t>(draw, 1, "draw");
  return {uint64_t(seed_value), first_sample, uint32_t(draw_value), uint32_t(stream)};
}

void noise(uintptr_t out, int64_t num_samples, int64_t size, uintptr_t seed, uintptr_t draw, uint64_t first_sample,
           int stream, int threads) {
  auto* data = pointer<float>(out, count(num_samples, size), "out");
  const auto at = counter(seed, draw, first_sample, stream);
  const auto run = kernels().noise;
  py::gil_scoped_release unlocked;
  run(data, num_samples, size, at, threads);
}

void timesteps(uintptr_t out, int64_t num_samples, int64_t num_timesteps, uintptr_t seed, uintptr_t draw,
               uint64_t first_sample, int stream) {
  if (num_timesteps < 1 || num_timesteps > int64_t{1} << 32) {
    throw py::value_error("num_timesteps must be in [1, 2^32], got " + std::to_string(num_timesteps));
  }
  auto* data = pointer<int64_t>(out, count(num_samples, 1), "out");
  kernels().timesteps(data, num_samples, num_timesteps, counter(seed, draw, first_sample, stream));
}

void dropout_mask(uintptr_t out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, uintptr_t seed,
                  uintptr_t draw, uint64_t first_sample, int stream, int threads) {
  auto* data = pointer<float>(out, count(num_samples, size), "out");
  const auto at = counter(seed, draw, first_sample, stream);
  const auto run = kernels().dropout_mask;
  py::gil_scoped_release unlocked;
  run(data, num_samples, size, threshold, scale, at, threads);
}

// Tensors that come as such are asked for what they are, by names that are made once.
py::object ask(py::handle tensor, py::handle method) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

std::array<int64_t, 4> four(const py::object& numbers, const char* name) {
  if (!PyTuple_Check(numbers.ptr()) || PyTuple_GET_SIZE(numbers.ptr()) != 4) {
    throw py::value_error(std::string(name) + ": not of four dimensions");
  }
  std::array<int64_t, 4> values;
  for (int i = 0; i < 4; ++i) values[size_t(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), i));
  return values;
}

uintptr_t address(py::handle tensor) {
  static const py::handle data_ptr = PyUnicode_InternFromString("data_ptr");
  return tensor.is_none() ? 0 : PyLong_AsSize_t(ask(tensor, data_ptr).ptr());
}

std::array<int64_t, 4> shape_of(py::handle tensor, const char* name) {
  static const py::handle size = PyUnicode_InternFromString("size");
  return four(ask(tensor, size), name);
}

template <class T>
T* data(py::handle tensor, const char* name) {
  return pointer<T>(address(tensor), 0, name);
}

// [N, C, H, W] with rows that are as far apart as their pixels.
ddpm::cpu::Image image(py::handle tensor, bool half, const char* name) {
  static const py::handle stride = PyUnicode_InternFromString("stride");
  if (tensor.is_none()) return {};
  const auto [per_image, per_channel, per_row, per_pixel] = four(ask(tensor, stride), name);
  const auto [images, channels, height, width] = shape_of(tensor, name);
  const int64_t step = width == 1 ? per_row : per_pixel;
  if (height > 1 && per_row != width * step) throw py::value_error(std::string(name) + ": rows are not adjacent");
  return {half ? static_cast<void*>(data<uint16_t>(tensor, name)) : data<float>(tensor, name), per_image, per_channel,
          step};
}

// What forward and backward are told in the same way: x; x2; weight, bias, add, scale, shift; statistics; groups; eps;
// activation; bf16; channels_last; threshold, factor, state's tensors, first sample and stream of dropout.
using Norm = std::tuple<py::object, py::object, std::array<py::object, 5>, py::object, int64_t, float, int, bool, bool,
                        std::tuple<uint32_t, float, py::object, py::object, uint64_t, int>>;

ddpm::cpu::GroupNorm group_norm(const Norm& norm) {
  const auto& [x, x2, parameters, statistics, groups, eps, activation, half, channels_last, dropout] = norm;
  const auto [images, channels_1, height, width] = shape_of(x, "x");
  const int64_t channels = channels_1 + (x2.is_none() ? 0 : shape_of(x2, "x2")[1]);
  if (groups < 1 || channels % groups != 0) throw py::value_error("groups must divide the channels");
  if (activation < 0 || activation > 3) throw py::value_error("activation must be in [0, 3]");
  const auto& [weight, bias, add, scale, shift] = parameters;
  const auto& [threshold, factor, seed, draw, first_sample, stream] = dropout;
  return {images, height * width, channels, channels_1, groups, eps, ddpm::cpu::Activation(activation), half,
          channels_last, image(x, half, "x"), image(x2, half, "x2"), data<const float>(weight, "weight"),
          data<const float>(bias, "bias"), data<const float>(add, "add"),
          !add.is_none() && add.attr("ndim").cast<int>() == 2 ? channels : 0, data<const float>(scale, "scale"),
          data<const float>(shift, "shift"), data<double>(statistics, "statistics"), threshold, factor,
          threshold == 0 ? ddpm::Counter{} : counter(address(seed), address(draw), first_sample, stream)};
}

void group_norm_silu(const Norm& norm, const py::object& residual, const py::object& y, const py::object& h,
                     int threads) {
  const auto g = group_norm(norm);
  const ddpm::cpu::GroupNormForward f = {image(residual, g.half, "residual"), image(y, g.half, "y"),
                                         image(h, g.half, "h")};
  const auto run = kernels().group_norm_silu;
  py::gil_scoped_release unlocked;
  run(g, f, threads);
}

void group_norm_silu_backward(const Norm& norm, const py::object& dy, const py::object& dh, const py::object& dx,
                              const py::object& dx2, const std::array<py::object, 5>& gradients, int threads) {
  const auto g = group_norm(norm);
  const auto& [dweight, dbias, dadd, dscale, dshift] = gradients;
  const ddpm::cpu::GroupNormBackward b = {
      image(dy, g.half, "dy"), image(dh, g.half, "dh"), image(dx, g.half, "dx"), image(dx2, g.half, "dx2"),
      data<float>(dweight, "dweight"), data<float>(dbias, "dbias"), data<float>(dadd, "dadd"),
      data<float>(dscale, "dscale"), data<float>(dshift, "dshift")};
  if (g.statistics == nullptr) throw py::value_error("statistics: the backward needs those of the forward");
  const auto run = kernels().group_norm_silu_backward;
  py::gil_scoped_release unlocked;
  run(g, b, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of ddpm_fast; called by ddpm_fast.ops, which checks and allocates.";
  using namespace py::literals;
  m.def("isa", [] { return kernels().isa; }, "The instruction set whose kernels run.");
  m.def("isas", &ddpm::cpu::available, "Those that this processor has, the best one last.");
  m.def("force_isa", &ddpm::cpu::force_isa, "name"_a);
  m.def("noise", &noise, "out"_a, "num_samples"_a, "size"_a, "seed"_a, "draw"_a, "first_sample"_a, "stream"_a,
        "threads"_a);
  m.def("timesteps", &timesteps, "out"_a, "num_samples"_a, "num_timesteps"_a, "seed"_a, "draw"_a, "first_sample"_a,
        "stream"_a);
  m.def("dropout_mask", &dropout_mask, "out"_a, "num_samples"_a, "size"_a, "threshold"_a, "scale"_a, "seed"_a, "draw"_a,
        "first_sample"_a, "stream"_a, "threads"_a);
  m.def("group_norm_silu", &group_norm_silu, "norm"_a, "residual"_a, "y"_a, "h"_a, "threads"_a);
  m.def("group_norm_silu_backward", &group_norm_silu_backward, "norm"_a, "dy"_a, "dh"_a, "dx"_a, "dx2"_a, "gradients"_a,
        "threads"_a);
}
