// Tensors of Python made into what the kernels of group_norm_silu are told.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "cpu/group_norm_silu.h"
#include "math.h"
#include "tensors.h"

namespace ddpm::cpu {

// An image tensor [N, C, H, W] as it came, or none.
class Pixels : public Tensor {
 public:
  Pixels(py::handle object, const char* name) : Tensor(object, name), name_(name) {
    if (given && dims != 4) throw py::value_error(std::string(name) + ": not of four dimensions");
  }

  int64_t channels() const { return given ? size[1] : 0; }

  // For the kernels, if it lies so that they take it: with rows as far apart as their pixels, and adjacent channels
  // in channels_last, else pixels. Another shape than expected is an error.
  bool placed(const GroupNorm& g, int64_t channels, Image& to) const {
    to = {};
    if (!given) return true;
    if (dtype != (g.half ? Dtype::bf16 : Dtype::float32)) {
      throw py::value_error(std::string(name_) + ": another dtype than x");
    }
    if (size[0] != g.images || size[1] != channels || size[2] * size[3] != g.pixels) {
      throw py::value_error(std::string(name_) + ": another shape than x asks for");
    }
    if (elements() == 0) return true;  // its strides mean nothing
    const int64_t pixel = size[3] == 1 ? stride[2] : stride[3];
    const bool adjacent = g.channels_last ? channels == 1 || stride[1] == 1 : g.pixels == 1 || pixel == 1;
    if (!adjacent || (size[2] > 1 && stride[2] != size[3] * pixel)) return false;
    to = {data, stride[0], stride[1], pixel};
    return true;
  }

 private:
  const char* name_;
};

// Numbers side by side, or none: float32, or converted to it.
class Row {
 public:
  explicit Row(py::handle object) : of_(object, "a parameter") {
    fit = !of_.given || (of_.contiguous() && (of_.dtype == Dtype::float32 || of_.dtype == Dtype::bf16));
    if (!fit || !of_.given || of_.dtype == Dtype::float32) return;
    const auto* from = static_cast<const uint16_t*>(of_.data);
    converted_.resize(size_t(of_.elements()));
    for (size_t i = 0; i < converted_.size(); ++i) converted_[i] = as<float>(uint32_t{from[i]} << 16);
  }

  int dims() const { return of_.dims; }
  int64_t elements() const { return of_.given ? of_.elements() : 0; }
  const float* data() const { return converted_.empty() ? static_cast<const float*>(of_.data) : converted_.data(); }

  bool fit;

 private:
  Tensor of_;
  std::vector<float> converted_;
};

inline Activation activation_of(int number) {
  if (number < 0 || number > 3) throw py::value_error("activation must be in [0, 3]");
  return Activation(number);
}

// The arguments that forward and backward share. Keeps what was converted for as long as the kernel runs.
class NormArguments {
 public:
  // parameters: weight, bias, add, scale, shift. dropout: None or (threshold, factor, state, stream).
  // Not fit where memory must be copied first.
  NormArguments(const Pixels& x, const Pixels& x2, const py::tuple& parameters, py::handle statistics, int64_t groups,
                double eps, int activation, py::handle dropout) {
    const int64_t channels = x.channels() + x2.channels();
    if (!x.given) throw py::value_error("x: None");
    if (groups < 1 || channels % groups != 0) throw py::value_error("groups must divide the channels");
    g.images = x.size[0];
    g.pixels = x.size[2] * x.size[3];
    g.channels = channels;
    g.channels_1 = x.channels();
    g.groups = groups;
    g.eps = eps;
    g.activation = activation_of(activation);
    g.half = x.dtype == Dtype::bf16;
    g.channels_last = x.stride[1] == 1 && x.size[1] > 1;
    fit = x.placed(g, g.channels_1, g.x) && x2.placed(g, channels - g.channels_1, g.x2);
    const float** const rows[] = {&g.weight, &g.bias, &g.add, &g.scale, &g.shift};
    for (size_t i = 0; i < 5 && fit; ++i) {
      rows_[i].emplace(parameters[i]);
      fit = rows_[i]->fit;
      *rows[i] = rows_[i]->data();
      if (i == 2 && rows_[i]->dims() == 2) g.add_stride = channels;
    }
    g.statistics = static_cast<double*>(Tensor(statistics, "statistics").data);
    if (!dropout.is_none()) {
      const auto given = py::reinterpret_borrow<py::tuple>(dropout);
      g.threshold = given[0].cast<uint32_t>();
      g.factor = given[1].cast<float>();
      g.at = counter(given[2], given[3].cast<int>());
    }
  }

  GroupNorm g{};
  bool fit;

 private:
  std::array<std::optional<Row>, 5> rows_;
};

// Where the gradients of the parameters go, or none: in place, or where they are bf16 by way of float32.
class Gradients {
 public:
  // Without images they are zeros, and nobody else writes them.
  Gradients(const py::tuple& tensors, GroupNormBackward& b, bool empty) {
    float** const rows[] = {&b.dweight, &b.dbias, &b.dadd, &b.dscale, &b.dshift};
    for (size_t i = 0; i < 5; ++i) {
      const Tensor to(tensors[i], "a gradient");
      *rows[i] = static_cast<float*>(to.data);
      if (empty && to.given) std::memset(to.data, 0, size_t(to.elements()) * (to.dtype == Dtype::bf16 ? 2 : 4));
      if (!to.given || to.dtype == Dtype::float32) continue;
      if (to.dtype != Dtype::bf16) throw py::value_error("a gradient: neither float32 nor bfloat16");
      rooms_[i].resize(size_t(to.elements()));
      narrow_[i] = static_cast<uint16_t*>(to.data);
      *rows[i] = rooms_[i].data();
    }
  }

  void narrow() const {
    for (size_t i = 0; i < 5; ++i) {
      for (size_t j = 0; j < rooms_[i].size(); ++j) {
        const float v = rooms_[i][j];
        const auto bits = as<uint32_t>(v);
        narrow_[i][j] = uint16_t(v == v ? (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16 : bits >> 16 | 0x40);
      }
    }
  }

 private:
  std::array<std::vector<float>, 5> rooms_;
  std::array<uint16_t*, 5> narrow_{};
};

}  // namespace ddpm::cpu
