// Arrays of any layout, worked on by pieces of a sample in element order: each operand's piece as dense floats.
#pragma once

#include "kernels.h"
#include "normals.h"
#include "parallel.h"
#include "vec.h"

namespace ddpm::cpu {

static_assert(kPiece % kNormals == 0 && kPiece % kVec == 0, "whole batches of normals, and whole vectors");

struct Piece {
  int64_t sample, first, count;
};

typedef float Buffer[kPiece] __attribute__((aligned(64)));

// Calls body(piece, number of the piece) for every piece of a batch.
template <class Body>
static inline void each_piece(const Batch& batch, int threads, const Body& body) {
  const int64_t per_sample = pieces_of(batch.size), tasks = batch.num_samples * per_sample;
  parallel(tasks, worth(threads, batch.num_samples * batch.size, 1 << 14), [&](int64_t task) {
    const int64_t first = task % per_sample * kPiece, rest = batch.size - first;
    body(Piece{task / per_sample, first, rest < kPiece ? rest : kPiece}, task);
  });
}

// Calls run(offset, stride, i, count) for the runs that a piece consists of: elements i, i + 1... lie `stride` apart.
template <class Run>
static inline void each_run(const Array& a, const Piece& p, const Run& run) {
  const int last = a.dims - 1;
  int64_t at[kDims], rest = p.first, offset = p.sample * a.sample_stride;
  for (int d = last; d >= 0; --d) {
    at[d] = rest % a.size[d];
    rest /= a.size[d];
    offset += at[d] * a.stride[d];
  }
  for (int64_t i = 0; i < p.count;) {
    const int64_t row = a.size[last] - at[last], left = p.count - i, count = row < left ? row : left;
    run(offset, a.stride[last], i, count);
    i += count;
    at[last] += count;
    offset += count * a.stride[last];
    for (int d = last; d > 0 && at[d] == a.size[d]; --d) {
      offset += a.stride[d - 1] - a.size[d] * a.stride[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

template <class T>
static inline void copy(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, size_t(count) * sizeof(T));
  } else if (to_stride == 1 && from_stride == 3) {  // three channels, channels last: vector code
    for (int64_t i = 0; i < count; ++i) to[i] = from[3 * i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// Where the piece lies as whole vectors without gaps, or null.
template <class T>
static inline T* in_place(const Array& a, const Piece& p) {
  const bool dense = a.dims == 1 && a.stride[0] == 1 && p.count % kVec == 0;
  return dense ? reinterpret_cast<T*>(a.data) + p.sample * a.sample_stride + p.first : nullptr;
}

// Asks for `count` elements where they lie dense; those past the end of the array do no harm.
DDPM_INLINE void prefetch(const Array& a, int64_t sample, int64_t first, int64_t count) {
  if (a.data == nullptr || a.dims != 1 || a.stride[0] != 1) return;
  const int64_t bytes = a.type == Type::float32 ? 4 : 2;
  const auto begin = uintptr_t(a.data) + uintptr_t((sample * a.sample_stride + first) * bytes);
  const auto end = begin + uintptr_t(count * bytes);
  for (auto line = begin; line < end; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(line));
}

// The piece in place or gathered; the last vector is filled up with zeros.
template <class T>
static inline const T* gathered(const Array& a, const Piece& p, T* buffer) {
  if (const T* data = in_place<const T>(a, p)) return data;
  each_run(a, p, [&](int64_t offset, int64_t stride, int64_t i, int64_t count) {
    copy(buffer + i, 1, reinterpret_cast<const T*>(a.data) + offset, stride, count);
  });
  for (int64_t i = p.count; i % kVec; ++i) buffer[i] = T{};
  return buffer;
}

template <class T>
static inline void scatter(const Array& a, const Piece& p, const T* from) {
  each_run(a, p, [&](int64_t offset, int64_t stride, int64_t i, int64_t count) {
    copy(reinterpret_cast<T*>(a.data) + offset, stride, from + i, 1, count);
  });
}

// The piece of an array as floats, to be read by whole vectors; null without an array.
static inline const float* read(const Array& a, const Piece& p, Buffer& buffer) {
  if (a.data == nullptr) return nullptr;
  if (a.type == Type::float32) return gathered(a, p, buffer);
  bf16 narrow[kPiece];
  const bf16* from = gathered(a, p, narrow);
  for (int64_t i = 0; i < p.count; i += kVec) store(buffer + i, load(from + i));
  return buffer;
}

// The same of noise. Drawing it takes as long as memory takes to bring what is read or written next: both at once.
template <class... Arrays>
static inline const float* read(const Noise& noise, const Piece& p, Buffer& buffer, const Arrays&... next) {
  if (!noise.drawn) return read(noise.given, p, buffer);
  Counter at = noise.at;
  at.sample += uint64_t(p.sample);
  for (int64_t i = 0; i < p.count; i += kNormals) {
    (prefetch(next, p.sample, p.first + i, kNormals), ...);
    normals(at, uint32_t((p.first + i) / 4), buffer + i);
  }
  return buffer;
}

// As `store`, but the same bits on every instruction set: the instruction for it drops subnormal numbers.
static inline void store_exact(bf16* p, Floats v) {
  const Words32 bits = (Words32)v;
  const Words32 rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16;
  const Halves h = narrowed(v == v ? rounded : (bits >> 16) | 0x40);
  std::memcpy(p, &h, sizeof h);
}

// Where to write the piece of an array by whole vectors, to be followed by `written`; null without an array.
static inline float* to_write(const Array& a, const Piece& p, Buffer& buffer) {
  if (a.data == nullptr) return nullptr;
  float* data = a.type == Type::float32 ? in_place<float>(a, p) : nullptr;
  return data ? data : buffer;
}

// Takes the piece from its buffer to the array, if that is where it was written.
static inline void written(const Array& a, const Piece& p, const float* from, const Buffer& buffer) {
  if (from != buffer) return;
  if (a.type == Type::float32) return scatter(a, p, from);
  bf16 narrow[kPiece];
  bf16* const data = in_place<bf16>(a, p);
  bf16* const to = data ? data : narrow;
  for (int64_t i = 0; i < p.count; i += kVec) store_exact(to + i, load(from + i));
  if (!data) scatter(a, p, narrow);
}

}  // namespace ddpm::cpu
