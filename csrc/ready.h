// Which calls need no checks in Python: their arguments are as they nearly always are, and valid. The answer takes a
// tenth of the time of those checks; false may also mean that they are needed to tell.
#pragma once

#include <algorithm>
#include <cmath>

#include "arrays.h"

namespace ddpm::cpu {

inline bool integer_in(py::handle number, int64_t least, int64_t most) {
  if (!PyLong_CheckExact(number.ptr())) return false;
  int overflow;
  const int64_t value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  return overflow == 0 && value >= least && value <= most;
}

inline bool finite_above(py::handle number, double least) {
  if (!PyFloat_CheckExact(number.ptr())) return false;
  const double value = PyFloat_AS_DOUBLE(number.ptr());
  return value >= least && value < HUGE_VAL;
}

inline bool one_of(py::handle text, std::initializer_list<const char*> choices) {
  return PyUnicode_CheckExact(text.ptr()) && std::any_of(choices.begin(), choices.end(), [&](const char* choice) {
           return PyUnicode_CompareWithASCIIString(text.ptr(), choice) == 0;
         });
}

// Of a dtype that the kernels take.
inline bool fit(const Tensor& tensor) {
  return tensor.plain() && (tensor.dtype == Dtype::float32 || tensor.dtype == Dtype::bf16);
}

// An argument without a gradient, where one could be asked for.
inline bool constant(const Tensor& tensor, bool grads) { return !grads || !tensor.requires_grad(); }

inline bool like(const Tensor& tensor, const Tensor& x, bool grads) {
  return fit(tensor) && tensor.like(x) && constant(tensor, grads);
}

inline bool like_or_none(py::handle object, const Tensor& x, bool grads) {
  return object.is_none() || like(Tensor(object), x, grads);
}

inline bool batch(const Tensor& x) { return fit(x) && x.dims >= 1 && x.dims <= kDims + 1; }

inline bool state_ready(py::handle state) {
  static const py::handle kind = member("ddpm_fast.reference.philox", "NoiseState");
  if (!py::type::handle_of(state).is(kind)) return false;
  const auto scalar = [&](Py_ssize_t i) {
    const Tensor number(PyTuple_GET_ITEM(state.ptr(), i));
    return number.plain() && number.dtype == Dtype::int64 && number.dims == 0;
  };
  return scalar(0) && scalar(1) && integer_in(PyTuple_GET_ITEM(state.ptr(), 2), 0, (int64_t{1} << 56) - 1);
}

inline bool noise_ready(py::handle noise, const Tensor& x, bool grads) {
  return PyTuple_Check(noise.ptr()) ? state_ready(noise) : like(Tensor(noise), x, grads);
}

// Not where it draws from torch's generator.
inline bool dropout_ready(py::handle dropout) {
  static const py::handle kind = member("ddpm_fast.reference.philox", "Dropout");
  if (!py::type::handle_of(dropout).is(kind)) return false;
  const py::handle p = PyTuple_GET_ITEM(dropout.ptr(), 0);
  return finite_above(p, 0) && PyFloat_AS_DOUBLE(p.ptr()) <= 1 && state_ready(PyTuple_GET_ITEM(dropout.ptr(), 1)) &&
         integer_in(PyTuple_GET_ITEM(dropout.ptr(), 2), 0, 255);
}

// One number for each sample, or for each timestep.
inline bool table_ready(const Tensor& table, int64_t count, bool grads) {
  return table.plain() && table.dtype == Dtype::float32 && table.contiguous() && table.has_shape({count}) &&
         constant(table, grads);
}

inline bool group_norm_silu_ready(py::handle x, py::handle weight, py::handle bias, py::handle groups, py::handle eps,
                                  py::handle x2, py::handle add, py::handle residual, py::handle scale,
                                  py::handle shift, py::handle activation, py::handle dropout) {
  if (!dropout.is_none() && !dropout_ready(dropout)) return false;
  if (!one_of(activation, {"silu", "none", "relu", "mish"})) return false;
  const Tensor of(x), second(x2), added(residual);
  if (!finite_above(eps, 0) || !fit(of) || of.dims != 4 || weight.is_none() != bias.is_none()) return false;
  const int64_t n = of.size[0], height = of.size[2], width = of.size[3];
  int64_t channels = of.size[1];
  if (n == 0 || channels == 0 || height == 0 || width == 0) return false;
  const auto image = [&](const Tensor& more, int64_t its_channels) {
    return more.plain() && more.dtype == of.dtype && more.has_shape({n, its_channels, height, width});
  };
  if (second.given) {
    if (!second.plain() || second.dims != 4 || !image(second, second.size[1])) return false;
    channels += second.size[1];
  }
  if (added.given && !image(added, of.size[1])) return false;
  if (!integer_in(groups, 1, channels) || channels % PyLong_AsLongLong(groups.ptr()) != 0) return false;
  const auto parameter = [&](py::handle object, bool shared, bool each) {
    if (object.is_none()) return true;
    const Tensor row(object);
    return fit(row) && ((shared && row.has_shape({channels})) || (each && row.has_shape({n, channels})));
  };
  return parameter(weight, true, false) && parameter(bias, true, false) && parameter(add, true, true) &&
         parameter(scale, false, true) && parameter(shift, false, true);
}

inline bool sampler_step_ready(py::handle x, py::handle model_out, py::handle rows, py::handle k, py::handle noise,
                               py::handle hist, py::handle variance, py::handle clip, py::handle return_x0,
                               py::handle out, py::handle x0_out, bool grads) {
  const Tensor of(x);
  const bool two = return_x0.ptr() == Py_True;
  if (!batch(of) || !constant(of, grads) || !like(Tensor(model_out), of, grads) || !like_or_none(hist, of, grads) ||
      !like_or_none(variance, of, grads) ||
      !(noise.is_none() || noise_ready(noise, of, grads)) || !(two || return_x0.ptr() == Py_False)) {
    return false;
  }
  const auto room = [&](py::handle object) {
    if (object.is_none()) return true;
    const Tensor to(object);
    return like(to, of, grads) && to.dtype == of.dtype && to.contiguous();
  };
  if (!room(out) || !room(x0_out) || (!x0_out.is_none() && (!two || x0_out.is(out)))) return false;
  if (!clip.is_none() && !(finite_above(clip, 0) && PyFloat_AS_DOUBLE(clip.ptr()) > 0)) return false;
  const Tensor plan(rows), row(k);
  if (!plan.plain() || !(plan.dtype == Dtype::float64 || fit(plan)) || !constant(plan, grads)) return false;
  if (plan.dims != 2 || !(plan.size[1] == 9 || (plan.size[1] == 8 && variance.is_none()))) return false;
  if (!row.plain() || row.dtype != Dtype::int64 || row.dims != 0) return false;
  const int64_t at = *static_cast<const int64_t*>(row.data);
  return at >= 0 && at < plan.size[0];
}

inline bool q_sample_ready(py::handle x_start, py::handle t, py::handle signal, py::handle sigma, py::handle noise,
                           bool grads) {
  const Tensor of(x_start), time(t), factor(signal);
  if (!batch(of) || !constant(of, grads) || !noise_ready(noise, of, grads) || !factor.plain() || factor.dims != 1 ||
      !table_ready(factor, factor.size[0], grads) || !table_ready(Tensor(sigma), factor.size[0], grads) ||
      !time.plain() || time.dtype != Dtype::int64 || !time.has_shape({of.size[0]}) || !time.contiguous()) {
    return false;
  }
  const auto* first = static_cast<const int64_t*>(time.data);
  return std::all_of(first, first + time.size[0], [&](int64_t at) { return at >= 0 && at < factor.size[0]; });
}

inline bool draw_ready(py::handle shape, py::handle state, py::handle stream) {
  if (!PyTuple_Check(shape.ptr()) || !integer_in(stream, 0, 255)) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  constexpr int64_t kMost = int64_t{1} << 34;  // elements of a sample
  int64_t size = 1;
  for (Py_ssize_t d = 0; d < dims; ++d) {
    const py::handle of = PyTuple_GET_ITEM(shape.ptr(), d);
    if (!integer_in(of, 0, d == 0 ? INT64_MAX : kMost)) return false;
    if (d > 0 && (size *= PyLong_AsLongLong(of.ptr())) > kMost) return false;
  }
  return dims > 0 && state_ready(state);
}

inline bool diffusion_loss_ready(py::handle model_out, py::handle noise, py::handle loss_type, py::handle noise_coef,
                                 py::handle x_coef, py::handle x_start, py::handle reduction, bool grads) {
  const Tensor of(model_out);
  if (!one_of(loss_type, {"l2", "l1", "huber"}) || !one_of(reduction, {"mean", "none"})) return false;
  if (!batch(of) || !noise_ready(noise, of, grads)) return false;
  if (x_coef.is_none() != x_start.is_none()) return false;
  const auto each = [&](py::handle object) {
    return object.is_none() || table_ready(Tensor(object), of.size[0], grads);
  };
  return each(noise_coef) && each(x_coef) && like_or_none(x_start, of, grads);
}

}  // namespace ddpm::cpu
