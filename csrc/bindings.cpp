// The Python module ddpm_fast._C. Tensors come as addresses with sizes, so no torch header is needed and one build serves
// every torch version; ddpm_fast/ops checks dtypes, devices and strides, the checks here guard what C++ relies on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "images.h"
#include "math.h"

namespace py = pybind11;
using namespace ddpm::cpu;

namespace {

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

void group_norm_silu(const Norm& norm, const py::object& residual, const py::object& y, const py::object& h,
                     int threads) {
  const auto g = group_norm(norm);
  const ddpm::cpu::GroupNormForward f = {image(residual, g, "residual", g.channels), image(y, g, "y", g.channels),
                                         image(h, g, "h", g.channels)};
  const auto run = kernels().group_norm_silu;
  py::gil_scoped_release unlocked;
  run(g, f, threads);
}

void group_norm_silu_backward(const Norm& norm, const py::object& dy, const py::object& dh, const py::object& dx,
                              const py::object& dx2, const std::array<py::object, 5>& gradients, int threads) {
  const auto g = group_norm(norm);
  const auto& [dweight, dbias, dadd, dscale, dshift] = gradients;
  const ddpm::cpu::GroupNormBackward b = {
      image(dy, g, "dy", g.channels), image(dh, g, "dh", g.channels), image(dx, g, "dx", g.channels_1), image(dx2, g, "dx2", g.channels - g.channels_1),
      data<float>(dweight, "dweight"), data<float>(dbias, "dbias"), data<float>(dadd, "dadd"),
      data<float>(dscale, "dscale"), data<float>(dshift, "dshift")};
  if (g.statistics == nullptr) throw py::value_error("statistics: the backward needs those of the forward");
  const auto run = kernels().group_norm_silu_backward;
  py::gil_scoped_release unlocked;
  run(g, b, threads);
}

template <class T>
float value(T x) {
  return float(x);
}

float value(uint16_t bf16) { return ddpm::as<float>(uint32_t{bf16} << 16); }

template <class T>
void read_row(SamplerStep& step, uintptr_t rows, int64_t first, int64_t apart) {
  const T* row = pointer<const T>(rows, 1, "rows") + first;
  float* const columns[] = {&step.p_x, &step.p_m, &step.c_x, &step.c_0, &step.c_h, &step.c_z};
  for (int i = 0; i < 6; ++i) *columns[i] = value(row[(i + 2) * apart]);  // after t and c_in
}

void read_row(SamplerStep& step, py::handle rows, uintptr_t k) {
  const auto num_rows = at(shape_of(rows), 0), row = *pointer<const int64_t>(k, 1, "k");
  if (row < 0 || row >= num_rows) throw py::value_error("k must lie in [0, " + std::to_string(num_rows) + ")");
  const py::tuple strides = strides_of(rows);
  const auto first = row * at(strides, 0), apart = at(strides, 1);
  switch (element_size(rows)) {
    case 8: return read_row<double>(step, address(rows), first, apart);
    case 4: return read_row<float>(step, address(rows), first, apart);
    case 2: return read_row<uint16_t>(step, address(rows), first, apart);
    default: throw py::value_error("rows: elements must have 8, 4 or 2 bytes");
  }
}

// False, and nothing done, where a result would be written over what is still to be read.
bool sampler_step(py::handle out, py::handle x0_out, py::handle x, py::handle model_out, py::handle hist,
                  py::handle noise, py::handle rows, uintptr_t k, double clip, int threads) {
  Shape shape(x);
  if (!PyTuple_CheckExact(noise.ptr())) shape.order_by(out);
  SamplerStep step{};
  step.batch = shape.batch;
  step.out = shape.array(out, "out");
  step.x0_out = shape.array(x0_out, "x0_out");
  step.x = shape.array(x, "x");
  step.model_out = shape.array(model_out, "model_out");
  step.hist = shape.array(hist, "hist");
  step.noise = noise_of(shape, noise, kReverse);
  for (const Array& in : {step.x, step.model_out, step.hist, step.noise.given}) {
    if (shape.clash(step.out, in) || shape.clash(step.x0_out, in)) return false;
  }
  if (step.out.data == step.x0_out.data ? step.out.data != nullptr : shape.clash(step.out, step.x0_out)) return false;
  read_row(step, rows, k);
  step.clip = float(clip);
  if (step.c_z == 0.0f) step.noise.drawn = false;  // what is drawn is finite
  const auto run = kernels().sampler_step;
  py::gil_scoped_release unlocked;
  run(step, threads);
  return true;
}

void q_sample(py::handle out, py::handle x_start, uintptr_t t, uintptr_t signal, uintptr_t sigma,
              int64_t num_timesteps, py::handle noise, int threads) {
  Shape shape(x_start);
  if (!PyTuple_CheckExact(noise.ptr())) shape.order_by(out);
  QSample of{};
  of.batch = shape.batch;
  of.out = shape.array(out, "out");
  of.x_start = shape.array(x_start, "x_start");
  of.noise = noise_of(shape, noise, kPerturb);
  of.t = pointer<const int64_t>(t, of.batch.num_samples, "t");
  of.signal = pointer<const float>(signal, num_timesteps, "signal");
  of.sigma = pointer<const float>(sigma, num_timesteps, "sigma");
  for (int64_t n = 0; n < of.batch.num_samples; ++n) {
    if (of.t[n] < 0 || of.t[n] >= num_timesteps) {
      throw py::value_error("t must lie in [0, " + std::to_string(num_timesteps) + "), got " + std::to_string(of.t[n]));
    }
  }
  const auto run = kernels().q_sample;
  py::gil_scoped_release unlocked;
  run(of, threads);
}

DiffusionLoss loss_of(const Shape& shape, py::handle model_out, py::handle noise, uintptr_t noise_coef,
                      uintptr_t x_coef, py::handle x_start, bool l1) {
  DiffusionLoss of{};
  of.batch = shape.batch;
  of.model_out = shape.array(model_out, "model_out");
  of.noise = noise_of(shape, noise, kPerturb);
  of.noise_coef = pointer<const float>(noise_coef, 0, "noise_coef");
  of.x_coef = pointer<const float>(x_coef, x_start.is_none() ? 0 : of.batch.num_samples, "x_coef");
  of.x_start = shape.array(x_start, "x_start");
  of.l1 = l1;
  return of;
}

// Always in element order, so that the same numbers have the same sum in any layout.
void diffusion_loss(uintptr_t loss, py::handle model_out, py::handle noise, uintptr_t noise_coef, uintptr_t x_coef,
                    py::handle x_start, bool l1, int threads) {
  const auto of = loss_of(Shape(model_out), model_out, noise, noise_coef, x_coef, x_start, l1);
  float* const to = pointer<float>(loss, 1, "loss");
  const auto run = kernels().diffusion_loss;
  py::gil_scoped_release unlocked;
  std::vector<double> sums(size_t(of.batch.num_samples * pieces_of(of.batch.size)));
  run(of, sums.data(), threads);
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *to = float(total / double(of.batch.num_samples * of.batch.size));
}

void diffusion_loss_backward(py::handle out, uintptr_t grad_loss, py::handle model_out, py::handle noise,
                             uintptr_t noise_coef, uintptr_t x_coef, py::handle x_start, bool l1, int threads) {
  Shape shape(model_out);
  if (!PyTuple_CheckExact(noise.ptr())) shape.order_by(out);
  const auto of = loss_of(shape, model_out, noise, noise_coef, x_coef, x_start, l1);
  const auto to = shape.array(out, "out");
  const double grad = *pointer<const float>(grad_loss, 1, "grad_loss");
  const auto factor = float(grad / double(of.batch.num_samples * of.batch.size));
  const auto run = kernels().diffusion_loss_backward;
  py::gil_scoped_release unlocked;
  run(of, factor, to, threads);
}

template <class T>
void scaled(std::vector<double>& to, py::handle t, double scale) {
  const auto* from = pointer<const T>(address(t), int64_t(to.size()), "t");
  const int64_t apart = at(strides_of(t), 0);
  for (size_t n = 0; n < to.size(); ++n) {
    const double angle = double(from[int64_t(n) * apart]) * scale;
    to[n] = std::abs(angle) <= FLT_MAX ? angle : NAN;  // as where it is computed in float32
  }
}

void timestep_embedding(uintptr_t out, py::handle t, bool floating, int64_t half, double scale, double ratio,
                        int threads) {
  std::vector<double> times(size_t(at(shape_of(t), 0)));
  if (floating) {
    scaled<float>(times, t, scale);
  } else if (element_size(t) == 8) {
    scaled<int64_t>(times, t, scale);
  } else {
    scaled<int32_t>(times, t, scale);
  }
  auto* data = pointer<float>(out, count(int64_t(times.size()), 2 * half), "out");
  std::vector<double> frequencies(static_cast<size_t>(half), 1.0);
  for (size_t i = 1; i < frequencies.size(); ++i) frequencies[i] = frequencies[i - 1] * ratio;
  const auto run = kernels().timestep_embedding;
  py::gil_scoped_release unlocked;
  run(data, times.data(), int64_t(times.size()), frequencies.data(), half, threads);
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
  m.def("sampler_step", &sampler_step, "out"_a, "x0_out"_a, "x"_a, "model_out"_a, "hist"_a, "noise"_a, "rows"_a, "k"_a,
        "clip"_a, "threads"_a);
  m.def("q_sample", &q_sample, "out"_a, "x_start"_a, "t"_a, "signal"_a, "sigma"_a, "num_timesteps"_a, "noise"_a,
        "threads"_a);
  m.def("diffusion_loss", &diffusion_loss, "loss"_a, "model_out"_a, "noise"_a, "noise_coef"_a, "x_coef"_a, "x_start"_a,
        "l1"_a, "threads"_a);
  m.def("diffusion_loss_backward", &diffusion_loss_backward, "out"_a, "grad_loss"_a, "model_out"_a, "noise"_a,
        "noise_coef"_a, "x_coef"_a, "x_start"_a, "l1"_a, "threads"_a);
  m.def("timestep_embedding", &timestep_embedding, "out"_a, "t"_a, "floating"_a, "half"_a, "scale"_a, "ratio"_a,
        "threads"_a);
}
