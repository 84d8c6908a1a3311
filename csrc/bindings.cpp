// The Python module ddpm_fast._C. Tensors come as addresses with sizes, so no torch header is needed and one build serves
// every torch version; ddpm_fast/ops checks dtypes, devices and strides, the checks here guard what C++ relies on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "dispatch.h"

namespace py = pybind11;
using ddpm::cpu::kernels;

namespace {

template <class T>
T* pointer(uintptr_t address, int64_t count, const char* name) {
  if (count > 0 && address == 0) throw py::value_error(std::string(name) + ": null address for a non-empty array");
  if (address % alignof(T) != 0) throw py::value_error(std::string(name) + ": address is not aligned to its type");
  return reinterpret_cast<T*>(address);
}

int64_t count(int64_t num_samples, int64_t size) {
  if (num_samples < 0 || size < 0) throw py::value_error("num_samples and size must not be negative");
  int64_t total;
  if (__builtin_mul_overflow(num_samples, size, &total)) throw py::value_error("num_samples * size overflows 64 bits");
  return total;
}

ddpm::Counter counter(uintptr_t seed, uintptr_t draw, uint64_t first_sample, int stream) {
  if (stream < 0 || stream > 255) throw py::value_error("stream must be in [0, 255], got " + std::to_string(stream));
  // Seed and draw are read through their addresses: they are device scalars everywhere.
  const auto seed_value = *pointer<const int64_t>(seed, 1, "seed"), draw_value = *pointer<const int64_t>(draw, 1, "draw");
  return {uint64_t(seed_value), first_sample, uint32_t(draw_value), uint32_t(stream)};
}

void noise(uintptr_t out, int64_t num_samples, int64_t size, uintptr_t seed, uintptr_t draw, uint64_t first_sample,
           int stream, int threads) {
  auto* data = pointer<float>(out, count(num_samples, size), "out");
  const auto at = counter(seed, draw, first_sample, stream);
  const auto run = kernels().noise;
  py::gil_scoped_release unlocked;
  run(data, num_samples, size, at, threads);
}

void timesteps(uintptr_t out, int64_t num_samples, int64_t num_timesteps, uintptr_t seed, uintptr_t draw,
               uint64_t first_sample, int stream) {
  if (num_timesteps < 1 || num_timesteps > int64_t{1} << 32) {
    throw py::value_error("num_timesteps must be in [1, 2^32], got " + std::to_string(num_timesteps));
  }
  auto* data = pointer<int64_t>(out, count(num_samples, 1), "out");
  kernels().timesteps(data, num_samples, num_timesteps, counter(seed, draw, first_sample, stream));
}

void dropout_mask(uintptr_t out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, uintptr_t seed,
                  uintptr_t draw, uint64_t first_sample, int stream, int threads) {
  auto* data = pointer<float>(out, count(num_samples, size), "out");
  const auto at = counter(seed, draw, first_sample, stream);
  const auto run = kernels().dropout_mask;
  py::gil_scoped_release unlocked;
  run(data, num_samples, size, threshold, scale, at, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of ddpm_fast; called by ddpm_fast.ops, which checks and allocates.";
  using namespace py::literals;
  m.def("isa", [] { return kernels().isa; }, "The instruction set whose kernels run.");
  m.def("isas", &ddpm::cpu::available, "Those that this processor has, the best one last.");
  m.def("force_isa", &ddpm::cpu::force_isa, "name"_a);
  m.def("noise", &noise, "out"_a, "num_samples"_a, "size"_a, "seed"_a, "draw"_a, "first_sample"_a, "stream"_a,
        "threads"_a);
  m.def("timesteps", &timesteps, "out"_a, "num_samples"_a, "num_timesteps"_a, "seed"_a, "draw"_a, "first_sample"_a,
        "stream"_a);
  m.def("dropout_mask", &dropout_mask, "out"_a, "num_samples"_a, "size"_a, "threshold"_a, "scale"_a, "seed"_a, "draw"_a,
        "first_sample"_a, "stream"_a, "threads"_a);
}
