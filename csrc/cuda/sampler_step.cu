// One row of a plan, its noise drawn where it is used. A thread has a counter's four elements, in the sample's own order, and
// takes them at once where they lie together. The row is read from device memory, so a captured step serves every row.
#include "sampler_step.h"

#include "vectors.h"

namespace ddpm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // elements

struct alignas(8) Half4 {
  uint32_t w[2];
};

// Four elements of a sample, first and following; those that there are.
struct Elements {
  int64_t n;
  int first, count, channels, pixels;

  DDPM_DEVICE int64_t place(const Array& a, int i) const {
    const int e = first + i;
    return n * a.sample + (a.last ? e % pixels * channels + e / pixels : e);
  }

  // Whether they lie together and begin where a load of four may.
  DDPM_DEVICE bool together(const Array& a) const {
    const size_t bytes = kEach * (a.type == Type::float32 ? sizeof(float) : sizeof(uint16_t));
    const auto at = reinterpret_cast<uintptr_t>(a.data) + uint64_t(n * a.sample + first) * (bytes / kEach);
    return count == kEach && !a.last && at % bytes == 0;
  }

  DDPM_DEVICE void load(const Array& a, float (&v)[kEach]) const {
    if (together(a)) {
      const int64_t at = n * a.sample + first;
      if (a.type == Type::float32) {
        Vector<float>::unpack(cuda::load<Vector<float>>(static_cast<const float*>(a.data) + at), v);
      } else if (a.type == Type::bf16) {
        halves<Bf16>(a, at, v);
      } else {
        halves<Float16>(a, at, v);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = i < count ? element(a.data, a.type, place(a, i)) : 0.0f;
  }

  DDPM_DEVICE void store(const Array& a, const float (&v)[kEach]) const {
    if (together(a)) {
      const int64_t at = n * a.sample + first;
      if (a.type == Type::float32) {
        cuda::store<Vector<float>>(static_cast<float*>(a.data) + at, Vector<float>::pack(v));
        return;
      }
      const bool bf16 = a.type == Type::bf16;
      const Half4 raw = {{bf16 ? to_bf16(v[0], v[1]) : to_float16(v[0], v[1]),
                          bf16 ? to_bf16(v[2], v[3]) : to_float16(v[2], v[3])}};
      *reinterpret_cast<Half4*>(static_cast<uint16_t*>(a.data) + at) = raw;
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= count) continue;
      const int64_t at = place(a, i);
      switch (a.type) {
        case Type::bf16: put(static_cast<Bf16*>(a.data)[at], v[i]); break;
        case Type::float16: put(static_cast<Float16*>(a.data)[at], v[i]); break;
        default: put(static_cast<float*>(a.data)[at], v[i]);
      }
    }
  }

 private:
  template <class T>
  static DDPM_DEVICE void halves(const Array& a, int64_t at, float (&v)[kEach]) {
    const Half4 raw = *reinterpret_cast<const Half4*>(static_cast<const T*>(a.data) + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[2 * i] = number(T{uint16_t(raw.w[i])});
      v[2 * i + 1] = number(T{uint16_t(raw.w[i] >> 16)});
    }
  }
};

DDPM_DEVICE void draw(const Counter& at, uint32_t block, float (&z)[kEach]) {
  const Words of = words(at, block);
  const Pair first = box_muller(of.w[0], of.w[1]), second = box_muller(of.w[2], of.w[3]);
  z[0] = first.first;
  z[1] = first.second;
  z[2] = second.first;
  z[3] = second.second;
}

template <bool kLearned>
DDPM_DEVICE void step(const SamplerStep& of) {
  const int blocks = (of.size + kThreads * kEach - 1) / (kThreads * kEach);
  const int64_t n = block() / blocks;
  const int counter_block = block() % blocks * kThreads + thread(), first = counter_block * kEach, left = of.size - first;
  if (left <= 0) return;
  const Elements at{n, first, left < kEach ? left : kEach, of.channels, of.pixels};
  const int64_t row = *of.k * of.columns;
  const auto column = [&](int i) { return element(of.rows, of.rows_type, row + i); };
  const float p_x = column(2), p_m = column(3), c_x = column(4), c_0 = column(5), c_h = column(6), c_z = column(7);

  float x[kEach], m[kEach], x0[kEach], hist[kEach] = {}, z[kEach] = {};
  at.load(of.x, x);
  at.load(of.model_out, m);
  if (of.hist.data != nullptr) at.load(of.hist, hist);
  if (of.noise.data != nullptr) at.load(of.noise, z);
  if (of.drawn) draw(counter(of.draws, n), uint32_t(counter_block), z);
  if constexpr (kLearned) {
    const float c_v = column(8);
    float v[kEach];
    at.load(of.variance, v);
#pragma unroll
    for (int i = 0; i < kEach; ++i) z[i] = power_of_2(c_v * v[i] * kLog2E) * z[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float v = p_x * x[i] + p_m * m[i];
    x0[i] = v > of.clip ? of.clip : v < -of.clip ? -of.clip : v;  // NaN stays
    x[i] = c_x * x[i] + c_0 * x0[i];
    if (of.hist.data != nullptr) x[i] = x[i] + c_h * hist[i];
    if (of.noise.data != nullptr || of.drawn) x[i] = x[i] + c_z * z[i];
  }
  if (of.x0_out.data != nullptr) at.store(of.x0_out, x0);
  at.store(of.out, x);
}

// The variance costs registers that most steps need not wait for.
DDPM_KERNEL(kThreads, 1) sampler_step_kernel(DDPM_ARGUMENT SamplerStep of) { step<false>(of); }
DDPM_KERNEL(kThreads, 1) sampler_step_learned_kernel(DDPM_ARGUMENT SamplerStep of) { step<true>(of); }

}  // namespace

Error sampler_step(const SamplerStep& of, Stream stream) {
  const int64_t blocks = (of.size + kThreads * kEach - 1) / (kThreads * kEach);
  const bool learned = of.variance.data != nullptr;
  return launch(learned ? sampler_step_learned_kernel : sampler_step_kernel, Grid{of.samples * blocks, 1, kThreads, 0},
                of, stream);
}

}  // namespace ddpm::cuda
