// What forward and backward of group_norm_silu share on a GPU. A block has an image's slab of channels, whole groups, and a
// chunk of its pixels. A thread has the same channels, one vector, of every `rows`-th pixel. Sums are taken in a fixed order
// and nothing is added atomically: the same bits in every run.
#pragma once

#include "group_norm_silu.h"
#include "vectors.h"

namespace ddpm::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, at most

// Whether the rows of pixels that a warp has are added by shuffles first.
DDPM_BOTH bool folds(int vectors) { return vectors < kWarp && (vectors & (vectors - 1)) == 0; }

// Rows of sums that a block's threads then leave in shared memory.
DDPM_BOTH int partial_rows(int vectors, int threads) { return threads / (folds(vectors) ? kWarp : vectors); }

// Where a block and a thread stand.
template <class S>
struct Place {
  int64_t n;
  int chunk, slab, width;     // the slab's first channel, and its channels, in the last slab maybe fewer
  int pixel, pixels;          // the block's first one, and how many it has: none, maybe
  int channel, row, rows, vectors;  // of the slab the thread's first channel, its first pixel and the step from there
  bool active;

  DDPM_DEVICE explicit Place(const GroupNorm& g) {
    const Cut& cut = g.cut;
    const int slabs = (g.channels + cut.slab - 1) / cut.slab, task = block() / cut.chunks;
    chunk = block() % cut.chunks;
    slab = task % slabs * cut.slab;
    n = task / slabs;
    width = lesser(cut.slab, g.channels - slab);
    pixel = chunk * cut.pixels;
    pixels = pixel < g.pixels ? lesser(cut.pixels, g.pixels - pixel) : 0;
    vectors = cut.slab / S::kCount;
    rows = threads() / vectors;
    row = thread() / vectors;
    channel = thread() % vectors * S::kCount;
    active = row < rows && channel < width;
  }

  // The thread's first channel in its image; one that exists, if it has none.
  DDPM_DEVICE int c() const { return active ? slab + channel : slab; }

 private:
  static DDPM_DEVICE int lesser(int a, int b) { return a < b ? a : b; }
};

// Shared memory: what of the images is held, sums of rows of threads, and three numbers a channel for each use.
struct Room {
  unsigned char* images;
  float *partial, *total, *channels, *entry, *more;
};

constexpr int kArrays = 4;  // total, channels, entry, more

inline size_t room_bytes(const Cut& cut, int vector, size_t held, int sums) {
  const int floats = cut.slab * (sums * partial_rows(cut.slab / vector, cut.threads) + 3 * kArrays);
  return (cut.one_pass ? size_t(cut.pixels) * size_t(cut.slab) * held : 0) + size_t(floats) * sizeof(float);
}

// `held`: bytes of a pixel's channel.
template <class S>
DDPM_DEVICE Room room(const Cut& cut, int held, int sums) {
  unsigned char* const first = shared();
  const int step = 3 * cut.slab;
  auto* const floats = reinterpret_cast<float*>(first + (cut.one_pass ? cut.pixels * cut.slab * held : 0));
  float* const rest = floats + sums * partial_rows(cut.slab / S::kCount, threads()) * cut.slab;
  return {first, floats, rest, rest + step, rest + 2 * step, rest + 3 * step};
}

// A thread's channels of an image, pixel by pixel.
template <class E>
struct Lane {
  E* first;
  int step;
  DDPM_DEVICE E* operator()(int pixel) const { return global(first + pixel * step); }
};

template <class E>
DDPM_DEVICE Lane<E> lane(const Image& image, int64_t n, int c) {
  if (image.data == nullptr) return {nullptr, 0};
  return {static_cast<E*>(image.data) + n * image.image + c, image.pixel};
}

// Of two images that stand for their concatenation; the second may be none.
template <class E>
DDPM_DEVICE Lane<E> lane(const Image& first, const Image& second, int channels_1, int64_t n, int c) {
  return c < channels_1 ? lane<E>(first, n, c) : lane<E>(second, n, c - channels_1);
}

DDPM_DEVICE float value(const Row& row, int64_t n, int c, float absent) {
  if (row.data == nullptr) return absent;
  return element(row.data, row.type, n * row.image + c);
}

// Calls use(p, load(p)) for the thread's pixels of `count`; `Ahead` loads are under way at once.
template <int Ahead, class S, class Load, class Use>
DDPM_DEVICE void each(const Place<S>& at, int count, const Load& load, const Use& use) {
  if (!at.active) return;
  for (int p = at.row; p < count; p += Ahead * at.rows) {
    decltype(load(p)) raw[Ahead];
#pragma unroll
    for (int j = 0; j < Ahead; ++j) {
      if (p + j * at.rows < count) raw[j] = load(p + j * at.rows);
    }
#pragma unroll
    for (int j = 0; j < Ahead; ++j) {
      if (p + j * at.rows < count) use(p + j * at.rows, raw[j]);
    }
  }
}

// Adds K sums of each channel over the block's rows of threads: room.total [K, slab].
template <int K, class S>
DDPM_DEVICE void add_rows(const Place<S>& at, const Cut& cut, float (&sums)[K][S::kCount], const Room& room) {
  int row = at.row;
  bool writes = at.row < at.rows;
  if (folds(at.vectors)) {
    for (int lanes = at.vectors; lanes < kWarp; lanes *= 2) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) sums[k][i] += shuffle_xor(sums[k][i], lanes);
      }
    }
    row = thread() / kWarp;
    writes = thread() % kWarp < at.vectors;
  }
  const int rows = partial_rows(at.vectors, threads());
  if (writes) {
#pragma unroll
    for (int k = 0; k < K; ++k) store_numbers(room.partial + (k * rows + row) * cut.slab + at.channel, sums[k]);
  }
  sync();
  for (int j = thread(); j < K * cut.slab; j += threads()) {
    const float* from = room.partial + j / cut.slab * rows * cut.slab + j % cut.slab;
    float sum = 0.0f;
    for (int r = 0; r < rows; ++r) sum += from[r * cut.slab];
    room.total[j] = sum;
  }
  sync();
}

DDPM_DEVICE float over_warp(float v) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}

// What the blocks of a slab left, one after the other: in their shared memory (`Peers`), or in the table.
template <bool Peers>
struct Entries {
  const float* first;
  int64_t block;  // from one to the next in the table
  int step;       // from one of its three arrays to the next

  template <class S>
  DDPM_DEVICE Entries(const GroupNorm& g, const Place<S>& at, const Room& room)
      : first(Peers ? room.entry : g.table + at.n * g.cut.chunks * 3 * g.channels + at.slab),
        block(int64_t{3} * g.channels),
        step(Peers ? g.cut.slab : g.channels) {}

  DDPM_DEVICE const float* operator()(int i) const {
    if constexpr (Peers) return of_peer(first, i);
    return global(first + i * block);
  }
};

// Leaves a block's three arrays in the table.
template <class S>
DDPM_DEVICE void leave(const GroupNorm& g, const Place<S>& at, const float* arrays) {
  float* const to = g.table + (at.n * g.cut.chunks + at.chunk) * 3 * g.channels + at.slab;
  for (int c = thread(); c < at.width; c += threads()) {
    for (int k = 0; k < 3; ++k) to[k * g.channels + c] = arrays[k * g.cut.slab + c];
  }
}

template <int V>
DDPM_DEVICE void activate(Activation activation, float (&z)[V]) {
  if (activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = quotient(z[i], 1.0f + power_of_2(z[i] * -kLog2E));
  } else if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = z[i] <= 0.0f ? 0.0f : z[i];  // NaN stays
  } else if (activation == Activation::mish) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float e = power_of_2((z[i] > 30.0f ? 30.0f : z[i]) * kLog2E), u = e * (e + 2.0f);
      z[i] = z[i] * quotient(u, u + 2.0f);
    }
  }
}

// Takes the gradients dy through the activation at z.
template <int V>
DDPM_DEVICE void through(Activation activation, const float (&z)[V], float (&dy)[V]) {
  if (activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = quotient(1.0f, 1.0f + power_of_2(z[i] * -kLog2E));
      dy[i] = dy[i] * s * fused(z[i], 1.0f - s, 1.0f);
    }
  } else if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < V; ++i) dy[i] = z[i] <= 0.0f ? 0.0f : dy[i];
  } else if (activation == Activation::mish) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float e = power_of_2((z[i] > 30.0f ? 30.0f : z[i]) * kLog2E), u = e * (e + 2.0f), v = u + 2.0f;
      const float held = z[i] > 21.0f ? 21.0f + (z[i] - z[i]) : z[i];  // from there on the rest is 0; inf becomes NaN
      dy[i] = dy[i] * quotient(u + held * quotient(4.0f * e * (e + 1.0f), v), v);
    }
  }
}

// Applies dropout to numbers from `element` of image n on, in H, W, C order: eight of these share a counter, and a vector lies
// within one. Seed and draw are read again for each: kept in registers, they would take what others need.
template <int V>
DDPM_DEVICE void drop(const GroupNorm& g, int64_t n, uint32_t element, float (&v)[V]) {
  if (g.threshold == 0) return;
  const Words of = words(counter(g.draws, n), element / 8);
#pragma unroll
  for (uint32_t i = 0; i < V; ++i) {
    const uint32_t half = (element & (8 - V)) + i;
    const uint32_t word = half & 4 ? (half & 2 ? of.w[3] : of.w[2]) : (half & 2 ? of.w[1] : of.w[0]);
    v[i] *= (half & 1 ? word >> 16 : word & 0xFFFF) >= g.threshold ? g.factor : 0.0f;
  }
}

// Of a launch.
inline int64_t blocks(const GroupNorm& g) {
  return g.images * ((g.channels + g.cut.slab - 1) / g.cut.slab) * g.cut.chunks;
}

// Calls run(storage) with elements or vectors of the image's dtype.
template <class Run>
Error with_storage(const GroupNorm& g, const Run& run) {
  const bool vectors = g.cut.vectors;
  switch (g.type) {
    case Type::bf16: return vectors ? run(Vector<Bf16>{}) : run(Single<Bf16>{});
    case Type::float16: return vectors ? run(Vector<Float16>{}) : run(Single<Float16>{});
    default: return vectors ? run(Vector<float>{}) : run(Single<float>{});
  }
}

}  // namespace ddpm::cuda
