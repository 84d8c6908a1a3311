// The forward. One pass where a slab of an image fits the shared memory of a cluster: x is read once, y written once. Else
// two: chunks leave their moments, and then each of their blocks merges them and applies the norm.
#include "group_norm.h"

namespace ddpm::cuda {
namespace {

enum Part { kWhole, kMoments, kApply };

constexpr int kSums = 2;  // at once

// From the block's pixels, numbers(p, load(p), v, keep), to room.entry: of each channel a pivot, the mean of the first
// quarter, the mean less the pivot, and the sum of squares around the mean. An offset costs no accuracy.
template <int Ahead, class S, class Load, class Numbers>
DDPM_DEVICE void moments(const Cut& cut, const Place<S>& at, const Room& room, const Load& load,
                         const Numbers& numbers) {
  constexpr int V = S::kCount;
  const int quarter = (at.pixels + 3) / 4;
  float first[1][V] = {}, pivot[V], sums[2][V] = {};
  each<Ahead>(at, quarter, load, [&](int p, const auto& raw) {
    float v[V];
    numbers(p, raw, v, false);
#pragma unroll
    for (int i = 0; i < V; ++i) first[0][i] += v[i];
  });
  add_rows<1>(at, cut, first, room);
  const float share = 1.0f / float(quarter > 0 ? quarter : 1);
  load_numbers(room.total + at.channel, pivot);
#pragma unroll
  for (int i = 0; i < V; ++i) pivot[i] *= share;
  if (at.active && at.row == 0) store_numbers(room.entry + at.channel, pivot);
  each<Ahead>(at, at.pixels, load, [&](int p, const auto& raw) {
    float v[V];
    numbers(p, raw, v, true);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = v[i] - pivot[i];
      sums[0][i] += d;
      sums[1][i] = fused(d, d, sums[1][i]);
    }
  });
  add_rows<2>(at, cut, sums, room);
  const auto count = float(at.pixels > 0 ? at.pixels : 1);
  for (int c = thread(); c < at.width; c += threads()) {
    const float mean = room.total[c] / count, squares = room.total[cut.slab + c] - mean * mean * count;
    room.entry[cut.slab + c] = mean;
    room.entry[2 * cut.slab + c] = squares < 0.0f ? 0.0f : squares;  // NaN stays
  }
}

// The moments of all the blocks of a slab, merged around the first one's pivot (Chan et al. 1979): room.channels.
template <class S, class Entries>
DDPM_DEVICE void merge(const GroupNorm& g, const Place<S>& at, const Room& room, const Entries& entries) {
  constexpr int V = S::kCount;
  const Cut& cut = g.cut;
  float pivot[V] = {}, mean[V], sums[1][V] = {};
  const auto pixels_of = [&](int i) {
    const int left = g.pixels - i * cut.pixels;
    return float(left < 0 ? 0 : left < cut.pixels ? left : cut.pixels);
  };
  // A block's mean, less the pivot.
  const auto load_mean = [&](const float* of, float (&v)[V]) {
    float its[V];
    load_numbers(of, its);
    load_numbers(of + entries.step, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = (its[i] - pivot[i]) + v[i];
  };
  const int first = at.active ? at.row : cut.chunks;
  if (at.active) load_numbers(entries(0) + at.channel, pivot);
#pragma unroll 1
  for (int e = first; e < cut.chunks; e += at.rows) {
    float v[V];
    load_mean(entries(e) + at.channel, v);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0][i] = fused(v[i], pixels_of(e), sums[0][i]);
  }
  add_rows<1>(at, cut, sums, room);
  load_numbers(room.total + at.channel, mean);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    mean[i] /= float(g.pixels);
    sums[0][i] = 0.0f;
  }
  const bool stores = at.active && at.row == 0;
  if (stores) {
    store_numbers(room.channels + at.channel, pivot);
    store_numbers(room.channels + cut.slab + at.channel, mean);
  }
#pragma unroll 1
  for (int e = first; e < cut.chunks; e += at.rows) {
    const float* const of = entries(e) + at.channel;
    float v[V], squares[V];
    load_mean(of, v);
    load_numbers(of + 2 * entries.step, squares);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = v[i] - mean[i];
      sums[0][i] += fused(d * d, pixels_of(e), squares[i]);
    }
  }
  add_rows<1>(at, cut, sums, room);
  if (stores) {
    load_numbers(room.total + at.channel, mean);
    store_numbers(room.channels + 2 * cut.slab + at.channel, mean);
  }
  sync();
}

// From the channels' pivots, means and squares, in `channels`, to the pivots, gains and offsets of
// y = (x - pivot) gain + offset, in their place; on the way, the groups' statistics.
template <class S>
DDPM_DEVICE void affine(const GroupNorm& g, const Place<S>& at, const Room& room, float* channels) {
  const int slab = g.cut.slab, per_group = g.channels / g.groups;
  float *const origins = room.total, *const means = origins + slab, *const rstds = means + slab;
  const float *const pivot = channels, *const mean = channels + slab, *const squares = channels + 2 * slab;
  const auto from_origin = [&](int c, float origin) {
    return (pivot[c] - origin) + value(g.add, at.n, at.slab + c, 0.0f) + mean[c];
  };
  for (int group = thread() / kWarp; group * per_group < at.width; group += threads() / kWarp) {
    const int first = group * per_group, last = first + per_group, lane = thread() % kWarp;
    const float origin = pivot[first];
    float sum = 0.0f, around = 0.0f;
    for (int c = first + lane; c < last; c += kWarp) sum += from_origin(c, origin);
    const float middle = over_warp(sum) / float(per_group);
    for (int c = first + lane; c < last; c += kWarp) {
      const float d = from_origin(c, origin) - middle;
      around += fused(d * d, float(g.pixels), squares[c]);
    }
    const float variance = over_warp(around) / (float(g.pixels) * float(per_group));
    if (lane == 0) {
      const float rstd = 1.0f / Scalar::root(variance + g.eps);
      origins[group] = origin;
      means[group] = middle;
      rstds[group] = rstd;
      if (at.chunk == 0) {
        double* const to = g.statistics + 2 * (at.n * g.groups + at.slab / per_group + group);
        to[0] = double(origin) + double(middle);
        to[1] = double(rstd);
      }
    }
  }
  sync();
  for (int c = thread(); c < at.width; c += threads()) {
    const int group = c / per_group, channel = at.slab + c;
    const float factor = 1.0f + value(g.scale, at.n, channel, 0.0f);
    const float gain = rstds[group] * value(g.weight, 0, channel, 1.0f) * factor;
    const float from_mean = (pivot[c] - origins[group]) + value(g.add, at.n, channel, 0.0f) - means[group];
    const float base = fused(value(g.bias, 0, channel, 0.0f), factor, value(g.shift, at.n, channel, 0.0f));
    channels[slab + c] = gain;
    channels[2 * slab + c] = fused(from_mean, gain, base);
  }
  sync();
}

// What is normalised, of a thread's channels: x, or its sum with the residual, as that is stored; or x2.
template <class S>
struct Source {
  static constexpr int V = S::kCount;
  using E = typename S::Element;
  using Raw = typename S::Raw;
  struct Pair {
    Raw x, residual;
  };

  DDPM_DEVICE Source(const Forward& f, const Place<S>& at)
      : x(lane<const E>(f.x, f.x2, f.channels_1, at.n, at.c())),
        residual(lane<const E>(f.residual, {}, f.channels_1, at.n, at.c())),
        h(lane<E>(f.h, {}, f.channels_1, at.n, at.c())),
        pixel(at.pixel),
        summed(h.first != nullptr) {}

  DDPM_DEVICE Pair load_pair(int p) const {
    Pair pair{load<S>(x(pixel + p)), {}};
    if (summed) pair.residual = load_residual(p);
    return pair;
  }
  DDPM_DEVICE Raw load_residual(int p) const { return load<S>(residual(pixel + p)); }

  DDPM_DEVICE void numbers(int p, const Pair& pair, float (&v)[V], bool keep) const {
    S::unpack(pair.x, v);
    if (!summed) return;
    float r[V];
    S::unpack(pair.residual, r);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += r[i];
    const Raw raw = S::pack(v);
    S::unpack(raw, v);
    if (keep) store<S>(h(pixel + p), raw);
  }

  // Of the sum, or of x, once the sum is stored.
  DDPM_DEVICE Lane<const E> stored() const { return summed ? Lane<const E>{h.first, h.step} : x; }

  Lane<const E> x, residual;
  Lane<E> h;
  int pixel;
  bool summed;
};

// Brings it to shared memory, where a thread reads again only what it has brought itself.
template <class S>
DDPM_DEVICE void hold(const Place<S>& at, const Source<S>& source, typename S::Element* held, int slab) {
  using E = typename S::Element;
  each<1>(at, at.pixels, [&](int p) { return source.x(at.pixel + p); },
          [&](int p, const E* from) { copy_16(held + p * slab, from); });
  wait_for_copies();
  if (!source.summed) return;
  each<2>(at, at.pixels, [&](int p) { return source.load_residual(p); }, [&](int p, const typename S::Raw& raw) {
    float v[S::kCount];
    source.numbers(p, {load<S>(held + p * slab), raw}, v, true);
    store<S>(held + p * slab, S::pack(v));
  });
}

template <class S, Part P>
DDPM_KERNEL(kThreads, P == kWhole ? 3 : 2) group_norm_silu_fwd_kernel(DDPM_ARGUMENT Forward f) {
  constexpr int V = S::kCount, kAhead = P == kWhole ? 1 : 4;
  using E = typename S::Element;
  using Raw = typename S::Raw;
  const Cut& cut = f.cut;
  const Place<S> at(f);
  const Room room = cuda::room<S>(cut, sizeof(E), kSums);
  const Source<S> source(f, at);
  E* const held = reinterpret_cast<E*>(room.images) + at.channel;
  const auto load_held = [&](int p) { return load<S>(held + p * cut.slab); };

  float* channels = room.channels;
  if constexpr (P == kWhole) {
    hold(at, source, held, cut.slab);
    moments<kAhead>(cut, at, room, load_held, [](int, const Raw& raw, float (&v)[V], bool) { S::unpack(raw, v); });
    if (cut.chunks == 1) {
      channels = room.entry;
      sync();
    } else {
      cluster_arrive();
      cluster_wait();
    }
  } else if constexpr (P == kMoments) {
    using Pair = typename Source<S>::Pair;
    const auto numbers = [&](int p, const Pair& pair, float (&v)[V], bool keep) { source.numbers(p, pair, v, keep); };
    moments<kAhead>(cut, at, room, [&](int p) { return source.load_pair(p); }, numbers);
    leave(f, at, room.entry);  // a thread leaves what it has written itself, or what a barrier has let it see
    return;
  }
  if (channels != room.entry) merge(f, at, room, Entries<P == kWhole>(f, at, room));
  if (P == kWhole && cut.chunks > 1) cluster_arrive();  // the peers' memory is read

  affine(f, at, room, channels);
  float pivot[V], gain[V], offset[V];
  load_numbers(channels + at.channel, pivot);
  load_numbers(channels + cut.slab + at.channel, gain);
  load_numbers(channels + 2 * cut.slab + at.channel, offset);
  const auto y = lane<E>(f.y, at.n, at.c());
  const auto kept = source.stored();
  const auto again = [&](int p) {
    if constexpr (P == kWhole) return load_held(p);
    return load<S>(kept(at.pixel + p));
  };
  each<kAhead>(at, at.pixels, again, [&](int p, const Raw& raw) {
    const int pixel = at.pixel + p;
    float v[V];
    S::unpack(raw, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = fused(v[i] - pivot[i], gain[i], offset[i]);
    activate(f.activation, v);
    drop(f, at.n, uint32_t(pixel * f.channels + at.c()), v);
    store<S>(y(pixel), S::pack(v));
  });
  // A block's shared memory stays until its peers have read it.
  if (P == kWhole && cut.chunks > 1) cluster_wait();
}

}  // namespace

Error group_norm_silu(const Forward& f, Stream stream) {
  return with_storage(f, [&](auto storage) {
    using S = decltype(storage);
    Grid grid{blocks(f), 1, f.cut.threads, room_bytes(f.cut, S::kCount, sizeof(typename S::Element), kSums)};
    if constexpr (S::kCount > 1) {
      if (f.cut.one_pass) {
        grid.cluster = f.cut.chunks;
        return launch(group_norm_silu_fwd_kernel<S, kWhole>, grid, f, stream);
      }
    }
    const Error error = launch(group_norm_silu_fwd_kernel<S, kMoments>, grid, f, stream);
    return error != Error{} ? error : launch(group_norm_silu_fwd_kernel<S, kApply>, grid, f, stream);
  });
}

}  // namespace ddpm::cuda
