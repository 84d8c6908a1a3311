// Elements as they are stored, and vectors of them: what a thread loads and stores at once.
#pragma once

#include "../math.h"
#include "numbers.h"

namespace ddpm::cuda {

struct Bf16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

struct alignas(16) Quad {
  uint32_t w[4];
};

DDPM_DEVICE float number(float x) { return x; }
DDPM_DEVICE float number(Bf16 x) { return as<float>(uint32_t{x.bits} << 16); }
DDPM_DEVICE float number(Float16 x) { return from_float16(x.bits); }

DDPM_DEVICE uint32_t pair(Bf16, float low, float high) { return to_bf16(low, high); }
DDPM_DEVICE uint32_t pair(Float16, float low, float high) { return to_float16(low, high); }

DDPM_DEVICE void put(float& to, float x) { to = x; }
template <class T>
DDPM_DEVICE void put(T& to, float x) {
  to = {uint16_t(pair(T{}, x, 0.0f))};
}

// One element at a time.
template <class T>
struct Single {
  static constexpr int kCount = 1;
  using Element = T;
  using Raw = T;
  static DDPM_DEVICE void unpack(const Raw& raw, float (&v)[1]) { v[0] = number(raw); }
  static DDPM_DEVICE Raw pack(const float (&v)[1]) {
    Raw raw;
    put(raw, v[0]);
    return raw;
  }
};

// 16 bytes at a time.
template <class T>
struct Vector {
  static constexpr int kCount = 8;
  using Element = T;
  using Raw = Quad;
  static DDPM_DEVICE void unpack(const Raw& raw, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = number(T{uint16_t(raw.w[i])});
      v[2 * i + 1] = number(T{uint16_t(raw.w[i] >> 16)});
    }
  }
  static DDPM_DEVICE Raw pack(const float (&v)[8]) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.w[i] = pair(T{}, v[2 * i], v[2 * i + 1]);
    return raw;
  }
};

template <>
struct Vector<float> {
  static constexpr int kCount = 4;
  using Element = float;
  using Raw = Quad;
  static DDPM_DEVICE void unpack(const Raw& raw, float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = as<float>(raw.w[i]);
  }
  static DDPM_DEVICE Raw pack(const float (&v)[4]) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.w[i] = as<uint32_t>(v[i]);
    return raw;
  }
};

// A sample's counter; `n` counts from the first one.
DDPM_DEVICE Counter counter(const Draws& draws, int64_t n) {
  const int64_t first = draws.first_sample == nullptr ? draws.first : *draws.first_sample;
  return {uint64_t(*draws.seed), uint64_t(first) + uint64_t(n), uint32_t(*draws.draw), draws.stream};
}

// Element i of an array of some dtype.
DDPM_DEVICE float element(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::bf16: return number(static_cast<const Bf16*>(data)[i]);
    case Type::float16: return number(static_cast<const Float16*>(data)[i]);
    case Type::float64: return float(static_cast<const double*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

template <class S>
DDPM_DEVICE typename S::Raw load(const typename S::Element* at) {
  return *reinterpret_cast<const typename S::Raw*>(at);
}

template <class S>
DDPM_DEVICE void store(typename S::Element* to, const typename S::Raw& raw) {
  *reinterpret_cast<typename S::Raw*>(to) = raw;
}

// Numbers side by side, 16 bytes at a time where they are as many.
template <int V>
DDPM_DEVICE void load_numbers(const float* from, float (&v)[V]) {
  if constexpr (V % 4 != 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = from[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const Quad raw = load<Vector<float>>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = as<float>(raw.w[j]);
    }
  }
}

template <int V>
DDPM_DEVICE void store_numbers(float* to, const float (&v)[V]) {
  if constexpr (V % 4 != 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = v[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      store<Vector<float>>(to + i, {{as<uint32_t>(v[i]), as<uint32_t>(v[i + 1]), as<uint32_t>(v[i + 2]),
                                     as<uint32_t>(v[i + 3])}});
    }
  }
}

}  // namespace ddpm::cuda
