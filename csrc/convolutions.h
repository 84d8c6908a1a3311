// Tensors of Python made into what the kernels of conv3x3 and conv1x1 are told.
#pragma once

#include <string>

#include "cpu/convolution.h"
#include "dispatch.h"
#include "images.h"
#include "tensors.h"

namespace ddpm::cpu {

inline int checked_tile(int64_t tile, bool or_none) {
  if (tile == 2 || tile == 4 || (tile == 0 && or_none)) return int(tile);
  throw py::value_error("tile: " + std::to_string(tile) + ", where 2 and 4 are possible");
}

inline bool is_half(const Tensor& tensor, const char* name) {
  if (tensor.given && (tensor.dtype == Dtype::float32 || tensor.dtype == Dtype::bf16)) return tensor.dtype == Dtype::bf16;
  throw py::value_error(std::string(name) + ": neither float32 nor bfloat16");
}

// Float32 numbers that lie together.
inline float* numbers_of(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.given || tensor.dtype != Dtype::float32 || !tensor.has_shape(shape) || !tensor.contiguous()) {
    throw py::value_error(std::string(name) + ": not float32 of the shape that x asks for, or not contiguous");
  }
  return static_cast<float*>(tensor.data);
}

// A weight [K, C, 3, 3], or [K, C, 1, 1] without a tile; or with `gradient` as the one with which a result's gradient makes
// that of x: K and C change places, and rows and columns are turned round. Without `to` only its size counts.
inline ConvolutionWeights weights_of(const Tensor& weight, const Tensor& to, int64_t tile, bool half, bool gradient) {
  const int64_t side = weight.given && weight.dims == 4 && weight.size[2] == 1 && tile == 0 ? 1 : 3;
  if (!weight.given || weight.dims != 4 || weight.size[2] != side || weight.size[3] != side) {
    throw py::value_error("weight: not [K, C, 3, 3], or [K, C, 1, 1] without a tile");
  }
  const int64_t *size = weight.size, *stride = weight.stride;
  ConvolutionWeights w{size[1], size[0], int(side * side), checked_tile(tile, true), half, is_half(weight, "weight"),
                       weight.data, stride[0], stride[1], stride[2], stride[3], to.data};
  if (gradient) {
    std::swap(w.channels, w.out_channels);
    std::swap(w.out_stride, w.in_stride);
    const int64_t last = (side - 1) * (stride[2] + stride[3]) * (w.from_half ? 2 : 4);
    w.data = static_cast<const char*>(weight.data) + last;
    w.row_stride = -stride[2];
    w.column_stride = -stride[3];
  }
  return w;
}

// An image tensor that kernels take, or none: in channels_last, its rows as far apart as their pixels.
inline Image image_of(const Tensor& tensor, const char* name, const Tensor& like, int64_t channels) {
  if (!tensor.given) return {};
  const int64_t *size = tensor.size, *stride = tensor.stride;
  if (tensor.dims != 4 || tensor.dtype != like.dtype || size[0] != like.size[0] || size[1] != channels ||
      size[2] != like.size[2] || size[3] != like.size[3]) {
    throw py::value_error(std::string(name) + ": another dtype or shape than x asks for");
  }
  const int64_t pixel = size[3] == 1 ? stride[2] : stride[3];
  if ((size[1] > 1 && stride[1] != 1) || (size[2] > 1 && stride[2] != size[3] * pixel)) {
    throw py::value_error(std::string(name) + ": not in channels_last");
  }
  return {tensor.data, stride[0], 1, pixel};
}

// The weights are as convolution_weights laid them out, of so many taps, for tiles or not. `moments` is None, or where y's
// mean and squares around it go, [2, N, K].
inline Convolution convolution_of(py::handle x, py::handle x2, py::handle weights, py::handle bias, py::handle residual,
                                  py::handle y, py::handle moments, int taps, int tile, const Kernels& kernels) {
  const Tensor from(x, "x"), more(x2, "x2"), laid_out(weights, "weights"), add(bias, "bias"), sum(residual, "residual"),
      to(y, "y");
  if (!from.given || from.dims != 4 || !to.given || to.dims != 4) throw py::value_error("x, y: not of four dimensions");
  if (more.given && more.dims != 4) throw py::value_error("x2: not of four dimensions");
  Convolution of{};
  of.images = from.size[0];
  of.height = from.size[2];
  of.width = from.size[3];
  of.channels_1 = from.size[1];
  of.channels = of.channels_1 + (more.given ? more.size[1] : 0);
  of.out_channels = to.size[1];
  of.half = is_half(from, "x");
  of.x = image_of(from, "x", from, of.channels_1);
  of.x2 = image_of(more, "x2", from, of.channels - of.channels_1);
  of.y = image_of(to, "y", from, of.out_channels);
  of.residual = image_of(sum, "residual", from, of.out_channels);
  ConvolutionWeights expected{};
  expected.channels = of.channels;
  expected.out_channels = of.out_channels;
  expected.taps = taps;
  expected.tile = tile;
  expected.half = of.half;
  int64_t numbers;
  kernels.convolution_room(expected, &numbers);
  if (is_half(laid_out, "weights") != of.half || !laid_out.contiguous() || laid_out.elements() != numbers) {
    throw py::value_error("weights: not laid out for these channels and tiles");
  }
  if (add.given && (add.dtype != Dtype::float32 || add.elements() != of.out_channels || !add.contiguous())) {
    throw py::value_error("bias: not float32 [K]");
  }
  of.weights = laid_out.data;
  if (!moments.is_none()) {
    of.mean = numbers_of(Tensor(moments, "moments"), "moments", {2, of.images, of.out_channels});
    of.squares = of.mean + of.images * of.out_channels;
  }
  of.bias = static_cast<const float*>(add.data);
  if (of.channels == 0) throw py::value_error("x: without channels");
  return of;
}

// Of weights that are `transformed` for this tile or not. `norm` is empty, or has scale and shift, [2, N, C], and an
// activation.
inline Conv3x3 in_tiles(const Convolution& plain, const py::tuple& norm, int tile, bool transformed) {
  Conv3x3 of{};
  static_cast<Convolution&>(of) = plain;
  of.tile = tile;
  of.transformed = transformed;
  if (!norm.empty()) {
    of.scale = numbers_of(Tensor(norm[0], "norm"), "norm", {2, of.images, of.channels});
    of.shift = of.scale + of.images * of.channels;
    of.activation = activation_of(py::cast<int>(norm[1]));
  }
  return of;
}

// To the gradient of a weight, [K, C, 3, 3]; all in float32.
inline Conv3x3Gradient gradient_of(const Tensor& x, const Tensor& dy, const Tensor& to, int64_t tile) {
  if (!x.given || x.dims != 4 || !dy.given || dy.dims != 4) throw py::value_error("x, dy: not of four dimensions");
  if (is_half(x, "x")) throw py::value_error("x: not float32");
  const Conv3x3Gradient of{x.size[0], x.size[2], x.size[3], x.size[1], dy.size[1], checked_tile(tile, false),
                           image_of(x, "x", x, x.size[1]), image_of(dy, "dy", x, dy.size[1]),
                           whole<float>(to, Dtype::float32, "to")};
  if (!to.has_shape({of.out_channels, of.channels, 3, 3})) throw py::value_error("to: not [K, C, 3, 3]");
  if (dy.elements() == 0 || x.elements() == 0) throw py::value_error("x, dy: empty");
  return of;
}

}  // namespace ddpm::cpu
