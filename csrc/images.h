// Image tensors of Python made into what the kernels of group_norm_silu are told.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "arrays.h"

namespace ddpm::cpu {

inline std::array<int64_t, 4> four(const py::tuple& numbers, const char* name) {
  if (numbers.size() != 4) throw py::value_error(std::string(name) + ": not of four dimensions");
  return {at(numbers, 0), at(numbers, 1), at(numbers, 2), at(numbers, 3)};
}

template <class T>
T* data(py::handle tensor, const char* name) {
  return pointer<T>(address(tensor), 0, name);
}

// [N, C, H, W] with rows that are as far apart as their pixels.
inline Image image(py::handle tensor, bool half, const char* name, int64_t expected_images, int64_t expected_channels,
                   int64_t expected_pixels) {
  if (tensor.is_none()) return {};
  const auto [per_image, per_channel, per_row, per_pixel] = four(strides_of(tensor), name);
  const auto [images, channels, height, width] = four(shape_of(tensor), name);
  if (images != expected_images || channels != expected_channels || height * width != expected_pixels) {
    throw py::value_error(std::string(name) + ": another shape than x asks for");
  }
  const int64_t step = width == 1 ? per_row : per_pixel;
  if (height > 1 && per_row != width * step) throw py::value_error(std::string(name) + ": rows are not adjacent");
  return {half ? static_cast<void*>(data<uint16_t>(tensor, name)) : data<float>(tensor, name), per_image, per_channel,
          step};
}

// What forward and backward are told in the same way: x; x2; weight, bias, add, scale, shift; statistics; groups; eps;
// activation; bf16; channels_last; threshold, factor, state's tensors, first sample and stream of dropout.
using Norm = std::tuple<py::object, py::object, std::array<py::object, 5>, py::object, int64_t, double, int, bool, bool,
                        std::tuple<uint32_t, float, py::object, py::object, uint64_t, int>>;

inline GroupNorm group_norm(const Norm& norm) {
  const auto& [x, x2, parameters, statistics, groups, eps, activation, half, channels_last, dropout] = norm;
  const auto [images, channels_1, height, width] = four(shape_of(x), "x");
  const int64_t channels_2 = x2.is_none() ? 0 : four(shape_of(x2), "x2")[1], channels = channels_1 + channels_2;
  const int64_t pixels = height * width;
  if (groups < 1 || channels % groups != 0) throw py::value_error("groups must divide the channels");
  if (activation < 0 || activation > 3) throw py::value_error("activation must be in [0, 3]");
  const auto& [weight, bias, add, scale, shift] = parameters;
  const auto& [threshold, factor, seed, draw, first_sample, stream] = dropout;
  return {images, pixels, channels, channels_1, groups, eps, Activation(activation), half,
          channels_last, image(x, half, "x", images, channels_1, pixels),
          image(x2, half, "x2", images, channels_2, pixels), data<const float>(weight, "weight"),
          data<const float>(bias, "bias"), data<const float>(add, "add"),
          !add.is_none() && add.attr("ndim").cast<int>() == 2 ? channels : 0, data<const float>(scale, "scale"),
          data<const float>(shift, "shift"), data<double>(statistics, "statistics"), threshold, factor,
          threshold == 0 ? Counter{} : counter(address(seed), address(draw), first_sample, stream)};
}

// Another image of the call, of all channels or of some.
inline Image image(py::handle tensor, const GroupNorm& g, const char* name, int64_t channels) {
  return image(tensor, g.half, name, g.images, channels, g.pixels);
}

}  // namespace ddpm::cpu
