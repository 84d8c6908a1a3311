// What forward and backward of group_norm_silu share. A task is one image's slab of channels, small enough for a
// cache. In channels_last a vector holds neighbouring channels of a pixel, else neighbouring pixels of a channel.
#pragma once

#include <cfloat>

#include "factors.h"
#include "group_norm_silu.h"
#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

#define DDPM_INLINED __attribute__((always_inline))

template <class T>
constexpr Precision kPrecision = sizeof(T) == sizeof(float) ? Precision::fine : Precision::coarse;

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(first, Count<vectors>, last) over the channels in tiles of `Tile` vectors, then of half as many and so on;
// `last` are the numbers in use of the last, partial vector, kVec elsewhere.
template <int Tile, class Body>
DDPM_INLINED inline void tiles(int64_t channels, const Body& body, int64_t c = 0) {
  for (; c + Tile * kVec <= channels; c += Tile * kVec) body(c, Count<Tile>{}, int64_t{kVec});
  if constexpr (Tile > 1) {
    tiles<Tile / 2>(channels, body, c);
  } else if (c < channels) {
    body(c, Count<1>{}, channels - c);
  }
}

constexpr int64_t kBlock = 32;

// Calls body(first, count) for blocks of pixels, few enough to stay in the first cache.
template <class Body>
DDPM_INLINED inline void blocks(int64_t pixels, const Body& body) {
  for (int64_t p = 0; p < pixels; p += kBlock) body(p, pixels - p < kBlock ? pixels - p : kBlock);
}

// Calls body(first, k, last) for each vector of `count` numbers; k goes round four accumulators.
template <class Body>
DDPM_INLINED inline void vectors(int64_t count, const Body& body) {
  int64_t p = 0;
  for (; p + 4 * kVec <= count; p += 4 * kVec) {
    for (int k = 0; k < 4; ++k) body(p + k * kVec, k, int64_t{kVec});
  }
  for (; p < count; p += kVec) body(p, 0, count - p < kVec ? count - p : int64_t{kVec});
}

template <class T>
DDPM_INLINED inline Floats load_some(const T* p, int64_t last) {
  return last < kVec ? load_part(p, last) : load(p);
}

template <class T>
DDPM_INLINED inline void store_some(T* p, Floats v, int64_t last) {
  last < kVec ? store_part(p, v, last) : store(p, v);
}

template <int V, class T>
DDPM_INLINED inline void load_tile(Floats (&v)[V], const T* p, int64_t last) {
  for (int i = 0; i < V; ++i) v[i] = load_some(p + i * kVec, V == 1 ? last : kVec);
}

template <int V, class T>
DDPM_INLINED inline void store_tile(T* p, const Floats (&v)[V], int64_t last) {
  if constexpr (V == 1) {
    store_some(p, v[0], last);
  } else {
    for (int i = 0; i < V; i += 2) store(p + i * kVec, v[i], v[i + 1]);
  }
}

constexpr int64_t kAhead = 8;  // pixels from what is written to what is asked for

// Asks for the lines of V vectors, in the second cache, or in the first to be written; any address will do.
template <int V, class T>
DDPM_INLINED inline void prefetch(const T* p) {
  for (int i = 0; i < V; i += 64 / kVecBytes * int(sizeof(float) / sizeof(T))) __builtin_prefetch(p + i * kVec, 0, 2);
}

template <int V, class T>
DDPM_INLINED inline void prefetch_to_write(const T* p) {
  for (int i = 0; i < V; i += 64 / kVecBytes * int(sizeof(float) / sizeof(T))) __builtin_prefetch(p + i * kVec, 1, 3);
}

inline Floats zeroed(Floats v, int64_t last) {
  for (int64_t i = last; i < kVec; ++i) v[i] = 0;
  return v;
}

inline float total(const Floats (&sums)[4]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// e^z, held where (1 + e^z)^2 is finite: with u = (1 + e^z)^2 - 1, mish is z u / (u + 2).
template <Precision P>
inline Floats mish_exp(Floats z) {
  const Power e = power<P>(smaller(broadcast(30.0f), z * kLog2E));
  return e.scale * e.part;
}

template <Activation A, Precision P>
inline Floats activate(Floats z) {
  if constexpr (A == Activation::silu) {
    const Power e = power<P>(z * -kLog2E);
    return quotient<P>(z, fma(e.scale, e.part, broadcast(1.0f)));
  }
  if constexpr (A == Activation::relu) return larger(Floats{}, z);
  if constexpr (A == Activation::mish) {
    const Floats e = mish_exp<P>(z), u = e * (e + 2.0f);
    return z * (u / (u + 2.0f));
  }
  return z;
}

// dy times the activation's derivative at z.
template <Activation A, Precision P>
inline Floats through(Floats dy, Floats z) {
  if constexpr (A == Activation::silu) {
    const Power e = power<P>(z * -kLog2E);
    const Floats s = quotient<P>(broadcast(1.0f), fma(e.scale, e.part, broadcast(1.0f)));
    Floats rest = 1.0f - s;
    if (P == Precision::coarse) rest = smaller(broadcast(0x1p126f), e.scale * e.part) * s;  // 1 - s: many ulp of this s
    return dy * s * fma(z, rest, broadcast(1.0f));
  }
  if constexpr (A == Activation::relu) return z <= 0.0f ? Floats{} : dy;
  if constexpr (A == Activation::mish) {
    const Floats e = mish_exp<P>(z), u = e * (e + 2.0f), v = u + 2.0f;
    const Floats held = z > 21.0f ? 21.0f + (z - z) : z;  // from there on the rest is 0; inf becomes NaN
    return dy * ((u + held * (4.0f * e * (e + 1.0f) / v)) / v);
  }
  return dy;
}

// How a call is cut. A slab is an image's channels, or as many of them as a cache takes at `bytes` an element. In
// channels_last that is the second cache, and they are no fewer than make long rows: short ones with gaps between cost more
// than what the cache does not hold; its pixels come in pieces. Else a slab is one stretch of memory, and the first cache
// takes a few groups. The pieces don't depend on the threads, so neither does a bit of the result.
struct Cut {
  int64_t width;         // channels of a slab
  int64_t slabs;         // of an image
  int64_t piece, pieces;  // pixels of a piece, pieces of a slab
  int threads;
  bool together;  // a thread has whole slabs; else threads share them
};

inline Cut cut(const GroupNorm& g, int64_t bytes, int threads) {
  constexpr int64_t kPiece = 128;     // four blocks
  constexpr int64_t kRowBytes = 512;  // of a pixel in a slab
  constexpr int64_t kSlabBytes = int64_t{64} << 20;  // at most: the backward's scratch grows with it
  Cut to;
  to.threads = worth(threads, g.images * g.pixels * g.channels, 1 << 12);
  to.piece = g.channels_last ? kPiece : g.pixels;
  to.pieces = (g.pixels + to.piece - 1) / to.piece;
  const int64_t per_group = g.channels / g.groups;
  int64_t least = per_group;  // whole vectors, if that can be
  while (g.channels_last && least % kVec != 0 && least < g.channels) least += per_group;
  // Dropout draws for neighbouring channels together: of a few it would throw most away.
  const bool wide = g.channels_last || g.threshold != 0;
  const int64_t room = wide ? second_cache() / 4 * 3 : first_cache();
  const int64_t of_image = g.channels * g.pixels * bytes;
  const int64_t row = g.channels * (g.half ? sizeof(bf16) : sizeof(float)), rows = row < kRowBytes ? 1 : row / kRowBytes;
  const int64_t parts = (of_image + room - 1) / room, long_rows = g.channels_last && rows < parts ? rows : parts;
  const int64_t for_scratch = (of_image + kSlabBytes - 1) / kSlabBytes;
  const int64_t for_cache = long_rows < for_scratch ? for_scratch : long_rows;
  const int64_t for_threads = (to.threads + g.images - 1) / g.images;
  const int64_t wanted = to.pieces > 1 || for_cache > for_threads ? for_cache : for_threads;
  to.width = (g.channels + wanted * least - 1) / (wanted * least) * least;
  to.slabs = (g.channels + to.width - 1) / to.width;
  to.together = to.pieces == 1 || g.images * to.slabs >= to.threads;
  return to;
}

// Runs begin(slab, room), measure(slab, piece, room) for all pieces, conclude(slab, room), and finish(slab, piece, room) for
// all pieces; `room` is a slab's part of the scratch memory, `each` numbers.
template <class Begin, class Measure, class Conclude, class Finish>
inline void run_cut(const Cut& to, int64_t images, int64_t each, float* scratch, const Begin& begin,
                    const Measure& measure, const Conclude& conclude, const Finish& finish) {
  const int64_t slabs = images * to.slabs;
  if (to.together) {
    parallel_ranked(slabs, to.threads, [&](int64_t slab, int rank) {
      float* room = scratch + rank * each;
      begin(slab, room);
      for (int64_t piece = 0; piece < to.pieces; ++piece) measure(slab, piece, room);
      conclude(slab, room);
      for (int64_t piece = 0; piece < to.pieces; ++piece) finish(slab, piece, room);
    });
    return;
  }
  const auto of_slab = [&](int64_t task) { return scratch + task / to.pieces * each; };
  for (int64_t slab = 0; slab < slabs; ++slab) begin(slab, scratch + slab * each);
  parallel(slabs * to.pieces, to.threads, [&](int64_t i) { measure(i / to.pieces, i % to.pieces, of_slab(i)); });
  for (int64_t slab = 0; slab < slabs; ++slab) conclude(slab, scratch + slab * each);
  parallel(slabs * to.pieces, to.threads, [&](int64_t i) { finish(i / to.pieces, i % to.pieces, of_slab(i)); });
}

// The slab that the same thread takes next, or this one.
inline int64_t after(const Cut& to, int64_t slab, int64_t images) {
  return to.together && slab + 1 < images * to.slabs ? slab + 1 : slab;
}

inline int64_t rooms(const Cut& to, int64_t images) { return to.together ? to.threads : images * to.slabs; }

// Of an image's slab the channels [first, first + count) and the pixels of a piece.
struct Place {
  int64_t n, first, count, pixel, pixels;
};

inline Place place(const GroupNorm& g, const Cut& to, int64_t slab, int64_t piece) {
  const int64_t first = slab % to.slabs * to.width, left = g.channels - first;
  const int64_t pixel = piece * to.piece, more = g.pixels - pixel;
  return {slab / to.slabs, first, left < to.width ? left : to.width, pixel, more < to.piece ? more : to.piece};
}

// The part of a slab that is in x, or in x2.
struct Part {
  int64_t first, count;  // channels of the whole
  int64_t begin;         // the first one's place in the slab
  int64_t inside;        // and in its tensor
};

// Calls body(part, whether it is in x2) for the parts of a slab.
template <class Body>
inline void parts(const GroupNorm& g, const Place& of, const Body& body) {
  const int64_t left = g.channels_1 - of.first, in_x = left < 0 ? 0 : left < of.count ? left : of.count;
  if (in_x > 0) body(Part{of.first, in_x, 0, of.first}, false);
  if (in_x < of.count) body(Part{of.first + in_x, of.count - in_x, in_x, of.first + in_x - g.channels_1}, true);
}

template <class T>
inline T* at(const Image& image, const Place& of, int64_t channel) {
  return static_cast<T*>(image.data) + of.n * image.image + channel * image.channel + of.pixel * image.pixel;
}

// The parameters of a slab's channels; those that are absent point to what they then amount to.
struct Parameters {
  const float *weight, *bias, *add, *scale, *shift;
};

// Numbers for absent parameters: as many zeros and ones as a slab has channels.
constexpr int64_t kConstants = 2;

inline void fill_constants(float* constants, int64_t width) {
  for (int64_t c = 0; c < width; ++c) constants[c] = 0.0f;
  for (int64_t c = 0; c < width; ++c) constants[width + c] = 1.0f;
}

inline Parameters parameters(const GroupNorm& g, const Cut& to, const Place& of, const float* constants) {
  const float *zeros = constants, *ones = constants + to.width;
  const int64_t both = of.n * g.channels + of.first;
  return {g.weight == nullptr ? ones : g.weight + of.first, g.bias == nullptr ? zeros : g.bias + of.first,
          g.add == nullptr ? zeros : g.add + of.n * g.add_stride + of.first,
          g.scale == nullptr ? zeros : g.scale + both, g.shift == nullptr ? zeros : g.shift + both};
}

// Calls body(first, count, mean, rstd) for stretches of a slab's channels, with their groups' statistics side by side.
template <class Body>
inline void stretches(int64_t channels, int64_t per_group, const double* statistics, const Body& body) {
  constexpr int64_t kStretch = 128;
  double mean[kStretch], rstd[kStretch];
  int64_t left = per_group;
  for (int64_t first = 0; first < channels; first += kStretch) {
    const int64_t count = channels - first < kStretch ? channels - first : kStretch;
    for (int64_t i = 0; i < count; ++i) {
      mean[i] = statistics[0];
      rstd[i] = statistics[1];
      if (--left == 0) {
        statistics += 2;
        left = per_group;
      }
    }
    body(first, count, mean, rstd);
  }
}

// y = (x - centre) gain + offset, of each channel of a slab.
struct Affine {
  float *centre, *gain, *offset;
};

// The groups' statistics and the parameters as one map. It may take the place of what the statistics came from.
inline void affine(int64_t channels, int64_t per_group, const double* statistics, const Parameters& of,
                   const Affine& to) {
  stretches(channels, per_group, statistics, [&](int64_t first, int64_t count, const double* mean, const double* rstd) {
    const float *weight = of.weight + first, *bias = of.bias + first, *add = of.add + first;
    const float *scale = of.scale + first, *shift = of.shift + first;
    float *centre = to.centre + first, *gain = to.gain + first, *offset = to.offset + first;
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) {
      const double factor = 1.0 + double(scale[c]), slope = rstd[c] * double(weight[c]) * factor;
      const double middle = mean[c] - double(add[c]), rounded = double(float(middle));
      const double lost = __builtin_fabs(slope) <= DBL_MAX ? (middle - rounded) * slope : 0.0;
      centre[c] = float(middle);
      gain[c] = float(slope);
      const double scaled = bias[c] == 0.0f ? 0.0 : double(bias[c]) * factor;  // an infinite scale of no bias: no NaN
      offset[c] = float(scaled + double(shift[c]) - lost);
    }
  });
}

// to = from times the factors of dropout, for a slab's piece or some channels of it. `to` may be `from`.
template <class From, class To>
inline void drop(const GroupNorm& g, const Place& of, const From* from, Image from_at, To* to, Image to_at) {
  constexpr int64_t kRoom = 1 << 13;
  float factors[kRoom];
  Counter mine = g.at;
  mine.sample += uint64_t(of.n);
  const int64_t width = of.count < kRoom ? of.count : kRoom, rows = kRoom / width;
  for (int64_t c = 0; c < of.count; c += width) {
    const int64_t channels = of.count - c < width ? of.count - c : width;
    for (int64_t p = 0; p < of.pixels; p += rows) {
      const int64_t in_block = of.pixels - p < rows ? of.pixels - p : rows;
      const auto draw = [&](int64_t pixel, int64_t count, float* out) {
        const int64_t element = (of.pixel + pixel) * g.channels + of.first + c;
        dropout_factors(mine, element, count, g.threshold, g.factor, out);
      };
      if (channels == g.channels) {
        draw(p, in_block * channels, factors);
      } else {
        for (int64_t i = 0; i < in_block; ++i) draw(p + i, channels, factors + i * width);
      }
      const From* source = from + c * from_at.channel + p * from_at.pixel;
      To* target = to + c * to_at.channel + p * to_at.pixel;
      if (g.channels_last) {
        for (int64_t i = 0; i < in_block; ++i) {
          vectors(channels, [&](int64_t k, int, int64_t last) {
            const Floats v = load_some(source + i * from_at.pixel + k, last);
            store_some(target + i * to_at.pixel + k, v * load_some(factors + i * width + k, last), last);
          });
        }
      } else {
        for (int64_t k = 0; k < channels; ++k) {
          vectors(in_block, [&](int64_t i, int, int64_t last) {
            float across[kVec] = {};
            for (int64_t l = 0; l < last; ++l) across[l] = factors[(i + l) * width + k];
            const Floats v = load_some(source + k * from_at.channel + i, last);
            store_some(target + k * to_at.channel + i, v * load(across), last);
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
