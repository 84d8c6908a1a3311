// The tensors of ema_update, checked and cut for its kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "ready.h"

namespace ddpm::cpu {

// Pairs of an average and what goes into it. Empty ones are left out; not fit where the kernel can't take them.
class Averages {
 public:
  Averages(py::handle averages, py::handle values) {
    if (!PyList_CheckExact(averages.ptr()) || !PyList_CheckExact(values.ptr())) return;
    const Py_ssize_t count = PyList_GET_SIZE(averages.ptr());
    if (PyList_GET_SIZE(values.ptr()) != count) return;
    pairs_.reserve(size_t(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      const Tensor to(PyList_GET_ITEM(averages.ptr(), i)), from(PyList_GET_ITEM(values.ptr(), i));
      if (!plain(to) || !plain(from) || !to.like(from) || !to.dense()) return;
      for (int d = 0; d < to.dims; ++d) {
        if (to.size[d] > 1 && to.stride[d] != from.stride[d]) return;
      }
      if (to.elements() > 0) {
        pairs_.push_back({static_cast<float*>(to.data), static_cast<const float*>(from.data), to.elements()});
      }
    }
    fit = apart();
  }

  // In stretches that are worth a thread's turn.
  std::vector<Stretch> stretches() const {
    constexpr int64_t kStretch = 1 << 14;
    std::vector<Stretch> cut;
    for (const Stretch& pair : pairs_) {
      for (int64_t first = 0; first < pair.count; first += kStretch) {
        cut.push_back({pair.average + first, pair.value + first, std::min(kStretch, pair.count - first)});
      }
    }
    return cut;
  }

  bool fit = false;

 private:
  static bool plain(const Tensor& tensor) { return tensor.plain() && tensor.dtype == Dtype::float32; }

  // Whether no average shares memory with another tensor, so that their order is of no importance.
  bool apart() const {
    std::vector<Stretch> sorted = pairs_;
    std::sort(sorted.begin(), sorted.end(), [](const Stretch& a, const Stretch& b) { return a.average < b.average; });
    for (size_t i = 1; i < sorted.size(); ++i) {
      if (sorted[i].average < sorted[i - 1].average + sorted[i - 1].count) return false;
    }
    return std::all_of(sorted.begin(), sorted.end(), [&](const Stretch& pair) {
      // The first average that ends after this value begins.
      const auto before_end = [](const float* at, const Stretch& other) { return at < other.average + other.count; };
      const auto met = std::upper_bound(sorted.begin(), sorted.end(), pair.value, before_end);
      return met == sorted.end() || met->average >= pair.value + pair.count || pair.value == pair.average;
    });
  }

  std::vector<Stretch> pairs_;
};

inline bool ema_update_ready(py::handle averages, py::handle values, py::handle decay) {
  return finite_above(decay, 0) && PyFloat_AS_DOUBLE(decay.ptr()) <= 1 && Averages(averages, values).fit;
}

}  // namespace ddpm::cpu
