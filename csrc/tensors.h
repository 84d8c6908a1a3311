// Tensors of Python as C++ sees them, without torch's headers: by DLPack's table of C functions where torch has one
// (since 2.10), else by asking for each attribute, which takes ten times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace ddpm::cpu {

namespace py = pybind11;

// A name that is looked up often.
class Name {
 public:
  explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object of(py::handle object) const { return owned(PyObject_GetAttr(object.ptr(), name_)); }
  py::object call(py::handle object) const { return owned(PyObject_CallMethodNoArgs(object.ptr(), name_)); }

 private:
  static py::object owned(PyObject* answer) {
    if (answer == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
  }
  PyObject* name_;
};

// What a module holds, for as long as the process lives.
inline py::handle member(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release();
}

// Of the interface that DLPack 1 defines, what is needed here.
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Table {
  uint32_t major, minor;
  Table* older;
  void *allocate, *take, *give;
  int (*look)(void* object, Tensor* to);
  void* stream;
};

constexpr int32_t kCpu = 1;

inline const Table* table() {
  const py::object capsule = py::getattr(member("torch", "Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* found = static_cast<Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found != nullptr && found->major != 1) found = found->older;
  return found;
}

}  // namespace dlpack

enum class Dtype { float32, bf16, float64, int64, int32, other };

// Only of a plain one is more known than whether it is given: torch's own tensor or parameter with memory of the CPU.
class Tensor {
 public:
  explicit Tensor(py::handle object) : object(object), given(!object.is_none()) {
    static const py::handle kind = member("torch", "Tensor"), parameter = member("torch.nn", "Parameter");
    const py::handle type = py::type::handle_of(object);
    if (!type.is(kind) && !type.is(parameter)) return;
    plain_ = table() == nullptr ? ask() : look();
    if (PyErr_Occurred() != nullptr) PyErr_Clear();  // it has no memory
  }

  // One that has to be plain, or None.
  Tensor(py::handle object, const char* name) : Tensor(object) {
    if (given && !plain_) throw py::value_error(std::string(name) + ": not a plain tensor of the CPU");
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // And its numbers those that are written there.
  bool plain() const {
    static const Name is_neg("is_neg");
    return plain_ && is_neg.call(object).ptr() == Py_False;
  }
  bool has_shape(std::initializer_list<int64_t> expected) const {
    return dims == int(expected.size()) && std::equal(expected.begin(), expected.end(), size);
  }
  bool like(const Tensor& other) const {
    return dims == other.dims && std::equal(size, size + dims, other.size);
  }
  bool requires_grad() const {
    static const Name requires_grad("requires_grad");
    return given && requires_grad.of(object).ptr() == Py_True;
  }
  bool contiguous() const {
    if (elements() == 0) return true;
    int64_t step = 1;
    for (int d = dims; d-- > 0;) {
      if (size[d] != 1 && stride[d] != step) return false;
      step *= size[d];
    }
    return true;
  }
  // Whether its elements fill its memory, in whatever order of dimensions.
  bool dense() const {
    if (contiguous()) return true;
    std::array<int, 8> order{};
    if (dims > int(order.size())) return false;
    for (int d = 0; d < dims; ++d) order[size_t(d)] = d;
    const auto end = order.begin() + dims;
    std::stable_sort(order.begin(), end, [&](int a, int b) { return stride[a] < stride[b]; });
    int64_t step = 1;
    return std::all_of(order.begin(), end, [&](int d) {
      const bool fits = size[d] == 1 || stride[d] == step;
      step *= size[d];
      return fits;
    });
  }
  int64_t element_bytes() const {
    switch (dtype) {
      case Dtype::bf16: return 2;
      case Dtype::float32: case Dtype::int32: return 4;
      case Dtype::float64: case Dtype::int64: return 8;
      case Dtype::other: break;
    }
    return 0;
  }
  int64_t elements() const {
    int64_t product = 1;
    for (int d = 0; d < dims; ++d) product *= size[d];
    return product;
  }
  static void read_by_attributes(bool always) { table() = always ? nullptr : dlpack::table(); }

  py::handle object;
  bool given;
  Dtype dtype = Dtype::other;
  int dims = 0;
  const int64_t *size = nullptr, *stride = nullptr;
  void* data = nullptr;

 private:
  static const dlpack::Table*& table() {
    static const dlpack::Table* found = dlpack::table();
    return found;
  }

  bool look() {
    dlpack::Tensor seen;
    if (table()->look(object.ptr(), &seen) != 0 || seen.device_type != dlpack::kCpu) return false;
    enum { kInt = 0, kFloat = 2, kBfloat = 4 };
    const auto is = [&](int code, int bits) { return seen.code == code && seen.bits == bits && seen.lanes == 1; };
    dtype = is(kFloat, 32)    ? Dtype::float32
            : is(kBfloat, 16) ? Dtype::bf16
            : is(kFloat, 64)  ? Dtype::float64
            : is(kInt, 64)    ? Dtype::int64
            : is(kInt, 32)    ? Dtype::int32
                              : Dtype::other;
    dims = seen.dims;
    size = seen.shape;
    stride = seen.strides;
    data = static_cast<char*>(seen.data) + seen.byte_offset;
    return true;
  }

  bool ask() {
    static const Name dtype_name("dtype"), is_cpu("is_cpu"), shape("shape"), strides("stride"), data_ptr("data_ptr");
    static const std::array<py::handle, 5> dtypes = {member("torch", "float32"), member("torch", "bfloat16"),
                                                     member("torch", "float64"), member("torch", "int64"),
                                                     member("torch", "int32")};
    try {
      if (is_cpu.of(object).ptr() != Py_True) return false;
      const py::object its = dtype_name.of(object);
      const auto found = std::find_if(dtypes.begin(), dtypes.end(), [&](py::handle known) { return its.is(known); });
      dtype = Dtype(found - dtypes.begin());
      const auto sizes = py::reinterpret_steal<py::tuple>(shape.of(object).release());
      const auto steps = py::reinterpret_steal<py::tuple>(strides.call(object).release());
      dims = int(sizes.size());
      for (int d = 0; d < dims; ++d) {
        own_[size_t(d)] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), d));
        own_[size_t(kMost + d)] = PyLong_AsLongLong(PyTuple_GET_ITEM(steps.ptr(), d));
      }
      size = own_.data();
      stride = own_.data() + kMost;
      data = reinterpret_cast<void*>(PyLong_AsSize_t(data_ptr.call(object).ptr()));
    } catch (const py::error_already_set&) {
      return false;
    }
    return true;
  }

  static constexpr int kMost = 64;  // dimensions that torch has
  std::array<int64_t, 2 * kMost> own_;
  bool plain_ = false;
};

}  // namespace ddpm::cpu
