// The arguments of diffusion_loss, checked and made into its kernel's.
#pragma once

#include <algorithm>
#include <string>

#include "arrays.h"

namespace ddpm::cpu {

// The coefficients are contiguous and float32.
inline DiffusionLoss loss_of(const Shape& shape, const Tensor& model_out, py::handle noise, py::handle noise_coef,
                             py::handle x_coef, py::handle x_start, int loss_type) {
  if (loss_type < 0 || loss_type > 2) throw py::value_error("loss_type must be in [0, 2]");
  DiffusionLoss of{};
  of.batch = shape.batch;
  of.model_out = shape.array(model_out, "model_out");
  of.noise = noise_of(shape, noise, kPerturb);
  of.noise_coef = static_cast<const float*>(Tensor(noise_coef, "noise_coef").data);
  of.x_coef = static_cast<const float*>(Tensor(x_coef, "x_coef").data);
  of.x_start = shape.array(Tensor(x_start, "x_start"), "x_start");
  of.loss = Loss(loss_type);
  return of;
}

// A loss or its gradient, float32: of shape [], or [N], each the mean of as many images.
struct Means {
  Means(py::handle object, const char* name, const Batch& batch) {
    const Tensor of(object, name);
    if (of.dtype != Dtype::float32 || !(of.dims == 0 || of.has_shape({batch.num_samples}))) {
      throw py::value_error(std::string(name) + ": not float32, [] or [N]");
    }
    data = static_cast<float*>(of.data);
    number = of.elements();
    step = of.dims == 0 ? 0 : of.stride[0];
    images = batch.num_samples / std::max<int64_t>(number, 1);
    elements = double(images * batch.size);
  }
  float* data;
  int64_t number, step, images;
  double elements;
};

}  // namespace ddpm::cpu
