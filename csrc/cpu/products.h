// Products of matrices that fit the registers: rows of tiles times a panel of weights, summed in float32. Weights are read
// as vectors of output channels, tiles one number at a time; in bf16 two input channels make a pair, which is one number.
#pragma once

#include "../math.h"
#include "vec.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kPanel = 2 * kVec;        // output channels of a panel
constexpr int64_t kDepth = 64;              // input channels that lie together in a row
constexpr int kRows = kVec >= 16 ? 12 : 6;  // most rows at once: two sums each are in registers
constexpr int64_t kLine = 64;               // bytes that are fetched at once
constexpr int kFetches = kPanel * 4 / kLine > 1 ? 2 : 1;  // lines that a step's weights take

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(first, count) for the parts, as alike as possible, in which so many rows fit the registers.
template <class Body>
inline void in_parts(int64_t rows, const Body& body) {
  const int64_t each = up(rows, up(rows, kRows));
  for (int64_t first = 0; first < rows; first += each) body(first, least(rows - first, each));
}

// Input channels that one step takes.
template <class T>
constexpr int64_t kStep = int64_t(sizeof(float) / sizeof(T));

template <class To, class From>
inline To read_as(const From* p) {
  To v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats low_halves(Words32 pairs) { return (Floats)(pairs << 16); }
inline Floats high_halves(Words32 pairs) { return (Floats)(pairs & 0xFFFF0000u); }

// Two vectors, rounded, as pairs.
inline Words32 paired(Floats low, Floats high) {
#if defined(__AVX512BF16__)
  const __m256i a = (__m256i)_mm512_cvtneps_pbh((__m512)low), b = (__m256i)_mm512_cvtneps_pbh((__m512)high);
  return (Words32)_mm512_maskz_cvtepu16_epi32(0xFFFF, a) | (Words32)_mm512_maskz_cvtepu16_epi32(0xFFFF, b) << 16;
#else
  bf16 a[kVec], b[kVec];
  store(a, low);
  store(b, high);
  return (Words32)load(a) >> 16 | (Words32)load(b);
#endif
}

// sum + a b.
inline Floats step(const float* a, const float* b, Floats sum) { return fma(broadcast(*a), load(b), sum); }

inline Floats step(const bf16* a, const bf16* b, Floats sum) {
  const auto pair = read_as<uint32_t>(a);
  const auto weights = read_as<Words32>(b);
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)weights);
#else
  sum = fma(broadcast(as<float>(pair << 16)), low_halves(weights), sum);
  return fma(broadcast(as<float>(pair & 0xFFFF0000u)), high_halves(weights), sum);
#endif
}

// Rows of tiles: kDepth channels of a row lie together, then those of the next row; `block` further on the next channels.
template <class T>
struct Rows {
  const T* data;
  int64_t block;
};

// Sums: those of a row's two vectors of output channels are `half` apart, rows `row`.
struct Sums {
  float* data;
  int64_t row, half;
};

// to = v u, or where more is set to += v u, of R rows and so many channels of u, [channels][kPanel]. Float32 sums of kDepth
// channels are added up, as one chain of all of them would round more; bf16 products have lost more than that before. If it
// is asked to, it meanwhile fetches what lies ahead, as many bytes in each step: a line, or as many lines as its weights.
template <int R, bool More, bool Fetch, class T>
__attribute__((noinline)) void product(Rows<T> v, const T* u, int64_t channels, Sums to, const char* ahead,
                                       int64_t bytes) {
  constexpr bool kInParts = sizeof(T) == sizeof(float);
  Floats sum[R][2];
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      sum[r][h] = More && !kInParts ? load(to.data + r * to.row + h * to.half) : Floats{};
    }
  }
  for (int64_t first = 0; first < channels; first += kDepth, v.data += v.block) {
    const int64_t count = channels - first < kDepth ? channels - first : kDepth;
#pragma GCC unroll 2
    for (int64_t c = 0; c < count; c += kStep<T>, u += kPanel * kStep<T>) {
      if (Fetch) {
        __builtin_prefetch(ahead, 0, 2);
        if (kFetches > 1) __builtin_prefetch(ahead + bytes - kLine, 0, 2);
        ahead += bytes;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sum[r][0] = step(v.data + r * kDepth + c, u, sum[r][0]);
        sum[r][1] = step(v.data + r * kDepth + c, u + kVec * kStep<T>, sum[r][1]);
      }
    }
    if (!kInParts && first + kDepth < channels) continue;
    const bool added = kInParts && (More || first > 0);
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < 2; ++h) {
        float* const m = to.data + r * to.row + h * to.half;
        store(m, added ? load(m) + sum[r][h] : sum[r][h]);
        sum[r][h] = Floats{};
      }
    }
  }
}

// As `product`, of `rows` in [1, kRows].
template <bool More, bool Fetch, class T, int R = kRows>
inline void product_of(int64_t rows, Rows<T> v, const T* u, int64_t channels, Sums to, const char* ahead, int64_t bytes) {
  if (rows == R) return product<R, More, Fetch>(v, u, channels, to, ahead, bytes);
  if constexpr (R > 1) product_of<More, Fetch, T, R - 1>(rows, v, u, channels, to, ahead, bytes);
}

// As `product`, of any number of rows, in parts that fit the registers. The first parts fetch the weights that come next, if
// any, a line in each step; a single one all of their lines, as the weights of few rows are what takes the time.
template <bool More, class T>
inline void products(int64_t rows, Rows<T> v, const T* u, int64_t channels, Sums to, const T* next = nullptr) {
  const int64_t at_once = rows <= kRows ? kFetches : 1;
  const char* ahead = reinterpret_cast<const char*>(next);
  int64_t left = next != nullptr ? kFetches : 0;  // of a step's lines
  in_parts(rows, [&](int64_t row, int64_t count) {
    const Rows<T> of{v.data + row * kDepth, v.block};
    const Sums sums{to.data + row * to.row, to.row, to.half};
    if (left == 0) return product_of<More, false>(count, of, u, channels, sums, nullptr, 0);
    product_of<More, true>(count, of, u, channels, sums, ahead, at_once * kLine);
    ahead += up(channels, kStep<T>) * at_once * kLine;
    left -= at_once;
  });
}

// to = v' u, or where more is set to += v' u, of R neighbouring columns of v and a panel of u, both with rows kDepth apart.
// What is there is added last: sums of many rows round less in parts.
template <int R, bool More>
__attribute__((noinline)) void outer_product(const float* v, const float* u, int64_t rows, Sums to) {
  Floats sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Floats{};
#pragma GCC unroll 2
  for (int64_t row = 0; row < rows; ++row, v += kDepth, u += kDepth) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sum[r][0] = step(v + r, u, sum[r][0]);
      sum[r][1] = step(v + r, u + kVec, sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* const m = to.data + r * to.row;
    store(m, More ? load(m) + sum[r][0] : sum[r][0]);
    store(m + to.half, More ? load(m + to.half) + sum[r][1] : sum[r][1]);
  }
}

// As `outer_product`, of `columns` in [1, kRows].
template <bool More, int R = kRows>
inline void outer_product_of(int64_t columns, const float* v, const float* u, int64_t rows, Sums to) {
  if (columns == R) return outer_product<R, More>(v, u, rows, to);
  if constexpr (R > 1) outer_product_of<More, R - 1>(columns, v, u, rows, to);
}

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
