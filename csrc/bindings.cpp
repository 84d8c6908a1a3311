// The Python module ddpm_fast._C. It needs no torch header, so one build serves every torch version; ddpm_fast/ops checks
// what users gave, the checks here guard what C++ relies on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

#include "arrays.h"
#include "averages.h"
#include "convolutions.h"
#include "digests.h"
#include "dispatch.h"
#include "images.h"
#include "losses.h"
#include "math.h"
#include "ready.h"

namespace py = pybind11;
using namespace ddpm::cpu;

namespace {

// How many numbers of a result each image has.
int64_t each(const Tensor& to) { return to.elements() / std::max<int64_t>(to.size[0], 1); }

void noise(py::handle out, const py::tuple& state, int stream, int threads) {
  const Tensor to(out, "out");
  auto* data = whole<float>(to, Dtype::float32, "out");
  const auto at = counter(state, stream);
  const auto run = kernels().noise;
  py::gil_scoped_release unlocked;
  run(data, to.size[0], each(to), at, threads);
}

void timesteps(py::handle out, int64_t num_timesteps, const py::tuple& state, int stream) {
  if (num_timesteps < 1 || num_timesteps > int64_t{1} << 32) {
    throw py::value_error("num_timesteps must be in [1, 2^32], got " + std::to_string(num_timesteps));
  }
  const Tensor to(out, "out");
  kernels().timesteps(whole<int64_t>(to, Dtype::int64, "out"), to.elements(), num_timesteps, counter(state, stream));
}

void dropout_mask(py::handle out, uint32_t threshold, float scale, const py::tuple& state, int stream, int threads) {
  const Tensor to(out, "out");
  auto* data = whole<float>(to, Dtype::float32, "out");
  const auto at = counter(state, stream);
  const auto run = kernels().dropout_mask;
  py::gil_scoped_release unlocked;
  run(data, to.size[0], each(to), threshold, scale, at, threads);
}

// These two answer whether they could take the memory as it lies; if not, nothing is done.
bool group_norm_silu(py::handle x, py::handle x2, py::handle residual, const py::tuple& parameters,
                     py::handle statistics, py::handle y, py::handle h, int64_t groups, double eps, int activation,
                     py::handle dropout, int threads) {
  const NormArguments of(Pixels(x, "x"), Pixels(x2, "x2"), parameters, statistics, groups, eps, activation, dropout);
  const auto& g = of.g;
  GroupNormForward f;
  if (!of.fit || !Pixels(residual, "residual").placed(g, g.channels_1, f.residual) ||
      !Pixels(y, "y").placed(g, g.channels, f.y) || !Pixels(h, "h").placed(g, g.channels_1, f.h)) {
    return false;
  }
  if (g.images * g.pixels == 0) return true;
  const auto run = kernels().group_norm_silu;
  py::gil_scoped_release unlocked;
  run(g, f, threads);
  return true;
}

// rows and moments: [2, N, C]; parameters: weight, bias and add.
void norm_of_moments(py::handle rows, py::handle moments, const py::tuple& parameters, int64_t groups, double pixels,
                     double eps, int threads) {
  const Tensor to(rows, "rows"), from(moments, "moments");
  if (!to.given || to.dims != 3) throw py::value_error("rows: not of three dimensions");
  NormOfMoments of{};
  of.images = to.size[1];
  of.channels = to.size[2];
  of.groups = groups;
  of.pixels = pixels;
  of.eps = eps;
  if (groups < 1 || of.channels % groups != 0) throw py::value_error("groups must divide the channels");
  of.scale = numbers_of(to, "rows", {2, of.images, of.channels});
  of.shift = of.scale + of.images * of.channels;
  of.mean = numbers_of(from, "moments", {2, of.images, of.channels});
  of.squares = of.mean + of.images * of.channels;
  const Row weight(parameters[0]), bias(parameters[1]), add(parameters[2]);
  for (const Row* row : {&weight, &bias, &add}) {
    const int64_t size = row->elements();
    if (!row->fit) throw py::value_error("parameters: neither float32 nor bfloat16, or not contiguous");
    if (size != of.channels && size != 0 && (row != &add || size != of.images * of.channels)) {
      throw py::value_error("parameters: not of as many channels");
    }
  }
  of.weight = weight.data();
  of.bias = bias.data();
  of.add = add.data();
  of.add_stride = add.elements() == of.channels ? 0 : of.channels;
  const auto run = kernels().norm_of_moments;
  py::gil_scoped_release unlocked;
  run(of, threads);
}

bool group_norm_silu_backward(py::handle x, py::handle x2, py::handle dy, py::handle dh, const py::tuple& parameters,
                              py::handle statistics, py::handle dx, py::handle dx2, const py::tuple& gradients,
                              int64_t groups, double eps, int activation, py::handle dropout, int threads) {
  const NormArguments of(Pixels(x, "x"), Pixels(x2, "x2"), parameters, statistics, groups, eps, activation, dropout);
  const auto& g = of.g;
  GroupNormBackward b;
  if (!of.fit || !Pixels(dy, "dy").placed(g, g.channels, b.dy) || !Pixels(dh, "dh").placed(g, g.channels_1, b.dh) ||
      !Pixels(dx, "dx").placed(g, g.channels_1, b.dx) ||
      !Pixels(dx2, "dx2").placed(g, g.channels - g.channels_1, b.dx2)) {
    return false;
  }
  const bool empty = g.images * g.pixels == 0;
  const Gradients to(gradients, b, empty);
  if (empty) return true;
  if (g.statistics == nullptr) throw py::value_error("statistics: the backward needs those of the forward");
  const auto run = kernels().group_norm_silu_backward;
  py::gil_scoped_release unlocked;
  run(g, b, threads);
  to.narrow();
  return true;
}

template <class T>
float value(T x) {
  return float(x);
}

float value(uint16_t bf16) { return ddpm::as<float>(uint32_t{bf16} << 16); }

template <class T>
void read_row(SamplerStep& step, const Tensor& rows, int64_t row) {
  const T* first = static_cast<const T*>(rows.data) + row * rows.stride[0];
  float* const columns[] = {&step.p_x, &step.p_m, &step.c_x, &step.c_0, &step.c_h, &step.c_z};
  for (int i = 0; i < 6; ++i) *columns[i] = value(first[(i + 2) * rows.stride[1]]);  // after t and c_in
  if (step.variance.data != nullptr) step.c_v = value(first[8 * rows.stride[1]]);
}

void read_row(SamplerStep& step, const Tensor& rows, const Tensor& k) {
  const int64_t row = *static_cast<const int64_t*>(k.data);
  if (row < 0 || row >= rows.size[0]) {
    throw py::value_error("k must lie in [0, " + std::to_string(rows.size[0]) + "), got " + std::to_string(row));
  }
  if (rows.size[1] < (step.variance.data == nullptr ? 8 : 9)) throw py::value_error("rows: too few columns");
  switch (rows.dtype) {
    case Dtype::float64: return read_row<double>(step, rows, row);
    case Dtype::float32: return read_row<float>(step, rows, row);
    case Dtype::bf16: return read_row<uint16_t>(step, rows, row);
    default: throw py::value_error("rows: neither float64, float32 nor bfloat16");
  }
}

// False, and nothing done, where a result would be written over what is still to be read.
bool sampler_step(py::handle out, py::handle x0_out, py::handle x, py::handle model_out, py::handle hist,
                  py::handle noise, py::handle variance, py::handle rows, py::handle k, double clip, int threads) {
  const Tensor state(x, "x"), to(out, "out");
  Shape shape(state);
  if (!PyTuple_Check(noise.ptr())) shape.order_by(to);
  SamplerStep step{};
  step.batch = shape.batch;
  step.out = shape.array(to, "out");
  step.x0_out = shape.array(Tensor(x0_out, "x0_out"), "x0_out");
  step.x = shape.array(state, "x");
  step.model_out = shape.array(Tensor(model_out, "model_out"), "model_out");
  step.hist = shape.array(Tensor(hist, "hist"), "hist");
  step.noise = noise_of(shape, noise, kReverse);
  if (!noise.is_none()) step.variance = shape.array(Tensor(variance, "variance"), "variance");
  for (const Array& in : {step.x, step.model_out, step.hist, step.variance, step.noise.given}) {
    if (shape.clash(step.out, in) || shape.clash(step.x0_out, in)) return false;
  }
  if (step.out.data == step.x0_out.data ? step.out.data != nullptr : shape.clash(step.out, step.x0_out)) return false;
  read_row(step, Tensor(rows, "rows"), Tensor(k, "k"));
  step.clip = float(clip);
  if (step.c_z == 0.0f && step.variance.data == nullptr) step.noise.drawn = false;  // what is drawn is finite
  const auto run = kernels().sampler_step;
  py::gil_scoped_release unlocked;
  run(step, threads);
  return true;
}

// t, signal and sigma are contiguous, int64 and float32.
void q_sample(py::handle out, py::handle x_start, py::handle t, py::handle signal, py::handle sigma, py::handle noise,
              int threads) {
  const Tensor start(x_start, "x_start"), to(out, "out"), factor(signal, "signal");
  Shape shape(start);
  if (!PyTuple_Check(noise.ptr())) shape.order_by(to);
  QSample of{};
  of.batch = shape.batch;
  of.out = shape.array(to, "out");
  of.x_start = shape.array(start, "x_start");
  of.noise = noise_of(shape, noise, kPerturb);
  of.t = static_cast<const int64_t*>(Tensor(t, "t").data);
  of.signal = static_cast<const float*>(factor.data);
  of.sigma = static_cast<const float*>(Tensor(sigma, "sigma").data);
  const int64_t num_timesteps = factor.elements();
  for (int64_t n = 0; n < of.batch.num_samples; ++n) {
    if (of.t[n] < 0 || of.t[n] >= num_timesteps) {
      throw py::value_error("t must lie in [0, " + std::to_string(num_timesteps) + "), got " + std::to_string(of.t[n]));
    }
  }
  const auto run = kernels().q_sample;
  py::gil_scoped_release unlocked;
  run(of, threads);
}

// Always in element order, so that the same numbers have the same sum in any layout.
void diffusion_loss(py::handle loss, py::handle model_out, py::handle noise, py::handle noise_coef, py::handle x_coef,
                    py::handle x_start, int loss_type, int threads) {
  const Tensor from(model_out, "model_out");
  const auto of = loss_of(Shape(from), from, noise, noise_coef, x_coef, x_start, loss_type);
  const Means to(loss, "loss", of.batch);
  const auto run = kernels().diffusion_loss;
  py::gil_scoped_release unlocked;
  std::vector<double> sums(size_t(of.batch.num_samples * pieces_of(of.batch.size)));
  run(of, sums.data(), threads);
  const double* sum = sums.data();
  for (int64_t i = 0; i < to.number; ++i) {
    double total = 0.0;
    for (const double* const end = sum + to.images * pieces_of(of.batch.size); sum != end; ++sum) total += *sum;
    to.data[i * to.step] = float(total / to.elements);
  }
}

void diffusion_loss_backward(py::handle out, py::handle grad_loss, py::handle model_out, py::handle noise,
                             py::handle noise_coef, py::handle x_coef, py::handle x_start, int loss_type, int threads) {
  const Tensor from(model_out, "model_out"), room(out, "out");
  Shape shape(from);
  if (!PyTuple_Check(noise.ptr())) shape.order_by(room);
  const auto of = loss_of(shape, from, noise, noise_coef, x_coef, x_start, loss_type);
  const auto to = shape.array(room, "out");
  const Means grad(grad_loss, "grad_loss", of.batch);
  const auto run = kernels().diffusion_loss_backward;
  py::gil_scoped_release unlocked;
  run(of, grad.data, grad.step, grad.elements, to, threads);
}

// [N, S, C] each, float32, with adjacent channels.
void attention(py::handle q, py::handle k, py::handle v, py::handle out, double scale, int threads) {
  const Tensor query(q, "q"), key(k, "k"), value(v, "v"), to(out, "out");
  const auto rows = [&](const Tensor& t, const char* name) {
    if (!t.given || t.dtype != Dtype::float32 || t.dims != 3 || !t.like(query) || (t.size[2] > 1 && t.stride[2] != 1)) {
      throw py::value_error(std::string(name) + ": not float32 [N, S, C] like q, with adjacent channels");
    }
    return Rows3{static_cast<const float*>(t.data), t.stride[0], t.stride[1]};
  };
  if (query.elements() == 0) return;  // strides mean nothing
  Attention of{};
  of.q = rows(query, "q");
  of.k = rows(key, "k");
  of.v = rows(value, "v");
  const Rows3 result = rows(to, "out");
  of.out = static_cast<float*>(to.data);
  of.out_image = result.image;
  of.out_token = result.token;
  of.images = query.size[0];
  of.tokens = query.size[1];
  of.channels = query.size[2];
  of.scale = float(scale);
  const auto run = kernels().attention;
  py::gil_scoped_release unlocked;
  run(of, std::max(threads, 1));
}

// How many numbers a weight is once laid out; its memory may lie anywhere.
int64_t convolution_room(py::handle weight, int64_t tile, bool half, bool gradient) {
  const Tensor from(weight, "weight"), none(py::none{});
  int64_t numbers;
  kernels().convolution_room(weights_of(from, none, tile, half, gradient), &numbers);
  return numbers;
}

void convolution_weights(py::handle weight, py::handle to, int64_t tile, bool gradient, int threads) {
  const Tensor from(weight, "weight"), room(to, "to");
  const auto of = weights_of(from, room, tile, is_half(room, "to"), gradient);
  int64_t numbers;
  kernels().convolution_room(of, &numbers);
  if (!room.contiguous() || room.elements() != numbers) throw py::value_error("to: of another size, or not contiguous");
  const auto run = kernels().convolution_weights;
  py::gil_scoped_release unlocked;
  run(of, threads);
}

void conv3x3(py::handle x, py::handle x2, const py::tuple& norm, py::handle weights, py::handle bias,
             py::handle residual, py::handle y, py::handle moments, int64_t tile, bool transformed, int threads) {
  const int of_tile = checked_tile(tile, false), taps = 9;
  const auto plain = convolution_of(x, x2, weights, bias, residual, y, moments, taps, transformed ? of_tile : 0, kernels());
  const auto of = in_tiles(plain, norm, of_tile, transformed);
  if (of.images * of.out_channels * of.height * of.width == 0) return;
  const auto run = kernels().conv3x3;
  py::gil_scoped_release unlocked;
  run(of, std::max(threads, 1));
}

void conv1x1(py::handle x, py::handle x2, py::handle weights, py::handle bias, py::handle residual, py::handle y,
             py::handle moments, int threads) {
  const auto of = convolution_of(x, x2, weights, bias, residual, y, moments, 1, 0, kernels());
  if (of.images * of.out_channels * of.height * of.width == 0) return;
  const auto run = kernels().conv1x1;
  py::gil_scoped_release unlocked;
  run(of, std::max(threads, 1));
}

void conv3x3_gradient(py::handle x, py::handle dy, py::handle to, int64_t tile, int threads) {
  const auto of = gradient_of(Tensor(x, "x"), Tensor(dy, "dy"), Tensor(to, "to"), tile);
  const auto run = kernels().conv3x3_gradient;
  py::gil_scoped_release unlocked;
  run(of, threads);
}

void ema_update(py::handle averages, py::handle values, double weight, int threads) {
  const Averages of(averages, values);
  if (!of.fit) throw py::value_error("not lists of pairs that the kernel takes");
  const auto stretches = of.stretches();
  const auto run = kernels().ema_update;
  py::gil_scoped_release unlocked;
  run(stretches.data(), int64_t(stretches.size()), float(weight), threads);
}

py::list digests(const py::list& tensors, int threads) { return digests_of(tensors, kernels(), threads); }

template <class T>
void scaled(std::vector<double>& to, const Tensor& t, double scale) {
  const auto* from = static_cast<const T*>(t.data);
  for (size_t n = 0; n < to.size(); ++n) {
    const double angle = double(from[int64_t(n) * t.stride[0]]) * scale;
    to[n] = std::abs(angle) <= FLT_MAX ? angle : NAN;  // as where it is computed in float32
  }
}

void timestep_embedding(py::handle out, py::handle t, int64_t half, double scale, double ratio, int threads) {
  const Tensor from(t, "t");
  std::vector<double> times(size_t(from.elements()));
  switch (from.dtype) {
    case Dtype::float32: scaled<float>(times, from, scale); break;
    case Dtype::int64: scaled<int64_t>(times, from, scale); break;
    case Dtype::int32: scaled<int32_t>(times, from, scale); break;
    default: throw py::value_error("t: neither float32, int64 nor int32");
  }
  const Tensor to(out, "out");
  auto* data = whole<float>(to, Dtype::float32, "out");
  if (to.elements() != from.elements() * 2 * half) throw py::value_error("out: not [N, 2 half]");
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
  m.def("read_by_attributes", &Tensor::read_by_attributes, "always"_a,
        "Whether tensors are read without DLPack's table, as under a torch that has none.");
  m.def("noise", &noise, "out"_a, "state"_a, "stream"_a, "threads"_a);
  m.def("timesteps", &timesteps, "out"_a, "num_timesteps"_a, "state"_a, "stream"_a);
  m.def("dropout_mask", &dropout_mask, "out"_a, "threshold"_a, "scale"_a, "state"_a, "stream"_a, "threads"_a);
  m.def("draw_ready", &draw_ready, "shape"_a, "state"_a, "stream"_a);
  m.def("sampler_step_ready", &sampler_step_ready, "x"_a, "model_out"_a, "rows"_a, "k"_a, "noise"_a, "hist"_a,
        "variance"_a, "clip"_a, "return_x0"_a, "out"_a, "x0_out"_a, "grads"_a);
  m.def("q_sample_ready", &q_sample_ready, "x_start"_a, "t"_a, "signal"_a, "sigma"_a, "noise"_a, "grads"_a);
  m.def("diffusion_loss_ready", &diffusion_loss_ready, "model_out"_a, "noise"_a, "loss_type"_a, "noise_coef"_a,
        "x_coef"_a, "x_start"_a, "reduction"_a, "grads"_a);
  m.def("ema_update_ready", &ema_update_ready, "averages"_a, "values"_a, "decay"_a);
  m.def("group_norm_silu_ready", &group_norm_silu_ready, "x"_a, "weight"_a, "bias"_a, "groups"_a, "eps"_a, "x2"_a,
        "add"_a, "residual"_a, "scale"_a, "shift"_a, "activation"_a, "dropout"_a);
  m.def("group_norm_silu", &group_norm_silu, "x"_a, "x2"_a, "residual"_a, "parameters"_a, "statistics"_a, "y"_a, "h"_a,
        "groups"_a, "eps"_a, "activation"_a, "dropout"_a, "threads"_a);
  m.def("norm_of_moments", &norm_of_moments, "rows"_a, "moments"_a, "parameters"_a, "groups"_a, "pixels"_a, "eps"_a,
        "threads"_a);
  m.def("group_norm_silu_backward", &group_norm_silu_backward, "x"_a, "x2"_a, "dy"_a, "dh"_a, "parameters"_a,
        "statistics"_a, "dx"_a, "dx2"_a, "gradients"_a, "groups"_a, "eps"_a, "activation"_a, "dropout"_a, "threads"_a);
  m.def("sampler_step", &sampler_step, "out"_a, "x0_out"_a, "x"_a, "model_out"_a, "hist"_a, "noise"_a, "variance"_a,
        "rows"_a, "k"_a, "clip"_a, "threads"_a);
  m.def("q_sample", &q_sample, "out"_a, "x_start"_a, "t"_a, "signal"_a, "sigma"_a, "noise"_a, "threads"_a);
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "out"_a, "scale"_a, "threads"_a);
  m.def("convolution_room", &convolution_room, "weight"_a, "tile"_a, "half"_a, "gradient"_a);
  m.def("convolution_weights", &convolution_weights, "weight"_a, "to"_a, "tile"_a, "gradient"_a, "threads"_a);
  m.def("conv3x3", &conv3x3, "x"_a, "x2"_a, "norm"_a, "weights"_a, "bias"_a, "residual"_a, "y"_a, "moments"_a,
        "tile"_a, "transformed"_a, "threads"_a);
  m.def("conv1x1", &conv1x1, "x"_a, "x2"_a, "weights"_a, "bias"_a, "residual"_a, "y"_a, "moments"_a, "threads"_a);
  m.def("conv3x3_gradient", &conv3x3_gradient, "x"_a, "dy"_a, "to"_a, "tile"_a, "threads"_a);
  m.def("diffusion_loss", &diffusion_loss, "loss"_a, "model_out"_a, "noise"_a, "noise_coef"_a, "x_coef"_a, "x_start"_a,
        "loss_type"_a, "threads"_a);
  m.def("diffusion_loss_backward", &diffusion_loss_backward, "out"_a, "grad_loss"_a, "model_out"_a, "noise"_a,
        "noise_coef"_a, "x_coef"_a, "x_start"_a, "loss_type"_a, "threads"_a);
  m.def("ema_update", &ema_update, "averages"_a, "values"_a, "weight"_a, "threads"_a);
  m.def("digests", &digests, "tensors"_a, "threads"_a);
  m.def("timestep_embedding", &timestep_embedding, "out"_a, "t"_a, "half"_a, "scale"_a, "ratio"_a, "threads"_a);
}
