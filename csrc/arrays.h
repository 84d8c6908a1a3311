// Tensors of Python made into the kernels' arrays; None into one without data.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "cpu/kernels.h"
#include "tensors.h"

namespace ddpm::cpu {

enum Stream { kPerturb = 1, kReverse = 3 };  // as in ddpm_fast/reference/philox.py

// The memory of a result that is to be written from end to end.
template <class T>
T* whole(const Tensor& to, Dtype dtype, const char* name) {
  if (!to.given || to.dtype != dtype || to.dims < 1 || !to.contiguous()) {
    throw py::value_error(std::string(name) + ": of another dtype, or not contiguous");
  }
  return static_cast<T*>(to.data);
}

// A shape [N, ...], and the order in which its elements are taken.
class Shape {
 public:
  explicit Shape(const Tensor& tensor) {
    dims_ = tensor.dims - 1;
    if (dims_ < 0 || dims_ > kDims) throw py::value_error("a shape [N, ...] has at most 8 dimensions");
    batch = {tensor.size[0], 1};
    for (int d = 0; d < dims_; ++d) {
      size_[d] = tensor.size[d + 1];
      order_[d] = d;
      batch.size *= size_[d];
    }
  }

  // From now on by the strides of this tensor: what lies alike is then worked on in the order of memory.
  void order_by(const Tensor& tensor) {
    const int64_t* stride = tensor.stride + 1;
    std::stable_sort(order_.begin(), order_.begin() + dims_, [&](int a, int b) { return stride[a] > stride[b]; });
  }

  Array array(const Tensor& tensor, const char* name) const {
    Array a{};
    if (!tensor.given) return a;
    bool fits = tensor.dims == dims_ + 1 && tensor.size[0] == batch.num_samples;
    for (int d = 0; fits && d < dims_; ++d) fits = tensor.size[d + 1] == size_[d];
    if (!fits) throw py::value_error(std::string(name) + ": another shape than the batch");
    a.type = tensor.dtype == Dtype::float32 ? Type::float32 : Type::bf16;
    if (a.type == Type::bf16 && tensor.dtype != Dtype::bf16) {
      throw py::value_error(std::string(name) + ": neither float32 nor bfloat16");
    }
    a.data = static_cast<char*>(tensor.data);
    a.sample_stride = tensor.stride[0];
    for (int i = 0; i < dims_; ++i) {
      const int64_t size = size_[order_[i]], stride = tensor.stride[order_[i] + 1];
      if (size == 1) continue;
      if (a.dims > 0 && a.stride[a.dims - 1] == size * stride) {  // lies on like the dimension outside
        a.size[a.dims - 1] *= size;
        a.stride[a.dims - 1] = stride;
      } else {
        a.size[a.dims] = size;
        a.stride[a.dims++] = stride;
      }
    }
    if (a.dims == 0) a.size[0] = a.stride[0] = a.dims = 1;
    return a;
  }

  // Whether an element of `out` may lie where another one of `in` does.
  bool clash(const Array& out, const Array& in) const {
    if (out.data == nullptr || in.data == nullptr) return false;
    const bool apart = end(out) <= in.data || end(in) <= out.data;
    bool same = out.data == in.data && out.type == in.type && out.dims == in.dims &&
                (out.sample_stride == in.sample_stride || batch.num_samples == 1);
    for (int d = 0; same && d < out.dims; ++d) same = out.size[d] == in.size[d] && out.stride[d] == in.stride[d];
    return !apart && !same;
  }

  Batch batch;

 private:
  const char* end(const Array& a) const {
    int64_t last = (batch.num_samples - 1) * a.sample_stride;
    for (int d = 0; d < a.dims; ++d) last += (a.size[d] - 1) * a.stride[d];
    return a.data + (last + 1) * (a.type == Type::float32 ? 4 : 2);
  }

  int dims_;
  std::array<int64_t, kDims> size_;
  std::array<int, kDims> order_;
};

// Of a state (seed, draw, first sample): tensors, or values.
inline Counter counter(const py::tuple& state, int stream) {
  if (stream < 0 || stream > 255) throw py::value_error("stream must be in [0, 255], got " + std::to_string(stream));
  const auto value = [&](size_t i, const char* name) {
    const py::handle given = PyTuple_GET_ITEM(state.ptr(), Py_ssize_t(i));
    if (PyLong_Check(given.ptr())) return given.cast<int64_t>();
    const Tensor number(given, name);
    if (number.dtype != Dtype::int64 || number.elements() != 1) throw py::value_error(std::string(name) + ": no int64");
    return *static_cast<const int64_t*>(number.data);
  };
  if (state.size() != 3) throw py::value_error("a state is (seed, draw, first sample)");
  return {uint64_t(value(0, "seed")), uint64_t(value(2, "first_sample")), uint32_t(value(1, "draw")), uint32_t(stream)};
}

// Noise given as a tensor, or as a state, to be drawn, or not at all.
inline Noise noise_of(const Shape& shape, py::handle noise, Stream stream) {
  if (!PyTuple_Check(noise.ptr())) return {shape.array(Tensor(noise, "noise"), "noise"), false, {}};
  return {{}, true, counter(py::reinterpret_borrow<py::tuple>(noise), stream)};
}

}  // namespace ddpm::cpu
