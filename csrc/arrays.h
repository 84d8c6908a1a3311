// Tensors of Python made into the kernels' arrays; None into one without data.
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

inline Counter counter(uintptr_t seed, uintptr_t draw, uint64_t first_sample, int stream) {
  if (stream < 0 || stream > 255) throw py::value_error("stream must be in [0, 255], got " + std::to_string(stream));
  // Seed and draw are read through their addresses: they are device scalars everywhere.
  const auto seed_value = *pointer<const int64_t>(seed, 1, "seed"), draw_value = *pointer<const int64_t>(draw, 1, "draw");
  return {uint64_t(seed_value), first_sample, uint32_t(draw_value), uint32_t(stream)};
}

// Tensors that come as such are asked for what they are, by names that are made once.
inline py::object ask(py::handle tensor, py::handle method) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

inline uintptr_t address(py::handle tensor) {
  static const py::handle data_ptr = PyUnicode_InternFromString("data_ptr");
  return tensor.is_none() ? 0 : PyLong_AsSize_t(ask(tensor, data_ptr).ptr());
}

inline int element_size(py::handle tensor) {
  static const py::handle element_size = PyUnicode_InternFromString("element_size");
  return int(PyLong_AsLong(ask(tensor, element_size).ptr()));
}

inline py::tuple shape_of(py::handle tensor) {
  static const py::handle size = PyUnicode_InternFromString("size");
  return py::reinterpret_steal<py::tuple>(ask(tensor, size).release());
}

inline py::tuple strides_of(py::handle tensor) {
  static const py::handle stride = PyUnicode_InternFromString("stride");
  return py::reinterpret_steal<py::tuple>(ask(tensor, stride).release());
}

inline int64_t at(const py::tuple& numbers, int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), i)); }

// A shape [N, ...], and the order in which its elements are taken.
class Shape {
 public:
  explicit Shape(py::handle tensor) {
    const py::tuple shape = shape_of(tensor);
    dims_ = int(shape.size()) - 1;
    if (dims_ < 0 || dims_ > kDims) throw py::value_error("a shape [N, ...] has at most 8 dimensions");
    batch = {at(shape, 0), 1};
    for (int d = 0; d < dims_; ++d) {
      size_[d] = at(shape, d + 1);
      order_[d] = d;
      batch.size = count(batch.size, size_[d]);
    }
    count(batch.num_samples, batch.size);
  }

  // From now on by the strides of this tensor: what lies alike is then worked on in the order of memory.
  void order_by(py::handle tensor) {
    const py::tuple strides = strides_of(tensor);
    int64_t stride[kDims];
    for (int d = 0; d < dims_; ++d) stride[d] = at(strides, d + 1);
    std::stable_sort(order_.begin(), order_.begin() + dims_, [&](int a, int b) { return stride[a] > stride[b]; });
  }

  Array array(py::handle tensor, const char* name) const {
    Array a{};
    if (tensor.is_none()) return a;
    const py::tuple shape = shape_of(tensor), strides = strides_of(tensor);
    bool fits = int(shape.size()) == dims_ + 1 && at(shape, 0) == batch.num_samples;
    for (int d = 0; fits && d < dims_; ++d) fits = at(shape, d + 1) == size_[d];
    if (!fits) throw py::value_error(std::string(name) + ": another shape than the batch");
    const int bytes = element_size(tensor);
    if (bytes != 4 && bytes != 2) throw py::value_error(std::string(name) + ": elements must have 4 or 2 bytes");
    a.type = bytes == 4 ? Type::float32 : Type::bf16;
    const int64_t elements = batch.num_samples * batch.size;
    if (bytes == 4) a.data = reinterpret_cast<char*>(pointer<float>(address(tensor), elements, name));
    if (bytes == 2) a.data = reinterpret_cast<char*>(pointer<uint16_t>(address(tensor), elements, name));
    a.sample_stride = at(strides, 0);
    for (int i = 0; i < dims_; ++i) {
      const int64_t size = size_[order_[i]], stride = at(strides, order_[i] + 1);
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
inline Noise noise_of(const Shape& shape, py::handle noise, Stream stream) {
  if (!PyTuple_CheckExact(noise.ptr())) return {shape.array(noise, "noise"), false, {}};
  const auto parts = py::reinterpret_borrow<py::tuple>(noise);
  const auto seed = uint64_t(parts[0].cast<int64_t>()), first_sample = parts[2].cast<uint64_t>();
  return {{}, true, {seed, first_sample, uint32_t(parts[1].cast<int64_t>()), uint32_t(stream)}};
}

}  // namespace ddpm::cpu
