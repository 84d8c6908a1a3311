// Tensors of Python made into the kernels' arrays; None into one without data.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "cpu/kernels.h"
#include "tensors.h"

namespace ddpm::cpu {

enum Stream { kPerturb = 1, kReverse = 3 };  // as in ddpm_fast/reference/philox.py

template <class T>
T* pointer(uintptr_t address, int64_t count, const char* name) {
  if (count > 0 && address == 0) throw py::value_error(std::string(name) + ": null address for a non-empty array");
  if (address % alignof(T) != 0) throw py::value_error(std::string(name) + ": address is not aligned to its type");
  return reinterpret_cast<T*>(address);
}

inline int64_t count(int64_t num_samples, int64_t size) {
  if (num_samples < 0 || size < 0) throw py::value_error("num_samples and size must not be negative");
  int64_t total;
  if (__builtin_mul_overflow(num_samples, size, &total)) throw py::value_error("num_samples * size overflows 64 bits");
  return total;
}

inline Counter counter(uintptr_t seed, uintptr_t draw, uint64_t first_sample, int stream) {
  if (stream < 0 || stream > 255) throw py::value_error("stream must be in [0, 255], got " + std::to_string(stream));
  // Seed and draw are read through their addresses: they are device scalars everywhere.
  const auto seed_value = *pointer<const int64_t>(seed, 1, "seed");
  const auto draw_value = *pointer<const int64_t>(draw, 1, "draw");
  return {uint64_t(seed_value), first_sample, uint32_t(draw_value), uint32_t(stream)};
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
      batch.size = count(batch.size, size_[d]);
    }
    count(batch.num_samples, batch.size);
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

inline Counter counter(py::handle seed, py::handle draw, uint64_t first_sample, int stream) {
  const Tensor seed_of(seed, "seed"), draw_of(draw, "draw");
  return counter(reinterpret_cast<uintptr_t>(seed_of.data), reinterpret_cast<uintptr_t>(draw_of.data), first_sample,
                 stream);
}

// Noise given as a tensor, or as (seed, draw, first sample), tensors or values, to be drawn, or not at all.
inline Noise noise_of(const Shape& shape, py::handle noise, Stream stream) {
  if (!PyTuple_Check(noise.ptr())) return {shape.array(Tensor(noise, "noise"), "noise"), false, {}};
  const auto parts = py::reinterpret_borrow<py::tuple>(noise);
  const auto first_sample = parts[2].cast<uint64_t>();
  if (!PyLong_Check(parts[0].ptr())) return {{}, true, counter(parts[0], parts[1], first_sample, stream)};
  const auto seed = uint64_t(parts[0].cast<int64_t>());
  return {{}, true, {seed, first_sample, uint32_t(parts[1].cast<int64_t>()), uint32_t(stream)}};
}

}  // namespace ddpm::cpu
