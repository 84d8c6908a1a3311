// Tensors as ddpm_fast.ops hands them over, (address, bytes of an element, strides) or None, made into the kernels' arrays.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>

#include "cpu/kernels.h"

namespace ddpm::cpu {

namespace py = pybind11;

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

// A shape [N, ...], and the order in which its elements are taken.
class Shape {
 public:
  explicit Shape(const py::tuple& shape) : dims_(int(shape.size()) - 1) {
    if (dims_ < 0 || dims_ > kDims) throw py::value_error("a shape has 1 to " + std::to_string(kDims + 1) + " dimensions");
    batch = {shape[0].cast<int64_t>(), 1};
    for (int d = 0; d < dims_; ++d) {
      size_[d] = shape[d + 1].cast<int64_t>();
      order_[d] = d;
      batch.size = count(batch.size, size_[d]);
    }
    count(batch.num_samples, batch.size);
  }

  // From now on by the strides of this tensor: what lies alike is then worked on in the order of memory.
  void order_by(const py::tuple& view) {
    const auto strides = view[2].cast<py::tuple>();
    int64_t stride[kDims];
    for (int d = 0; d < dims_; ++d) stride[d] = strides[d + 1].cast<int64_t>();
    std::stable_sort(order_.begin(), order_.begin() + dims_, [&](int a, int b) { return stride[a] > stride[b]; });
  }

  Array array(const py::object& view, const char* name) const {
    Array a{};
    if (view.is_none()) return a;
    const auto parts = view.cast<py::tuple>();
    const auto strides = parts[2].cast<py::tuple>();
    const auto address = parts[0].cast<uintptr_t>(), bytes = parts[1].cast<uintptr_t>();
    if (bytes != 4 && bytes != 2) throw py::value_error(std::string(name) + ": elements must have 4 or 2 bytes");
    if (int(strides.size()) != dims_ + 1) throw py::value_error(std::string(name) + ": as many strides as dimensions");
    a.type = bytes == 4 ? Type::float32 : Type::bf16;
    const int64_t elements = batch.num_samples * batch.size;
    a.data = reinterpret_cast<char*>(bytes == 4 ? (void*)pointer<float>(address, elements, name)
                                                : (void*)pointer<uint16_t>(address, elements, name));
    a.sample_stride = strides[0].cast<int64_t>();
    for (int i = 0; i < dims_; ++i) {
      const int64_t size = size_[order_[i]], stride = strides[order_[i] + 1].cast<int64_t>();
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

// Noise given as a tensor, or as (seed, draw, first sample) to be drawn, or not at all.
inline Noise noise_of(const Shape& shape, const py::object& given, const py::object& state, Stream stream) {
  if (state.is_none()) return {shape.array(given, "noise"), false, {}};
  const auto parts = state.cast<py::tuple>();
  const auto seed = uint64_t(parts[0].cast<int64_t>()), first_sample = parts[2].cast<uint64_t>();
  return {{}, true, {seed, first_sample, uint32_t(parts[1].cast<int64_t>()), uint32_t(stream)}};
}

}  // namespace ddpm::cpu
