// The backward. It computes the forward's map again from the groups' statistics. One pass where x and dy of a slab fit the
// shared memory of a cluster: each is read once, dx written once. Else two: chunks leave their sums, and then each of their
// blocks adds them up and writes its part of dx.
#include "group_norm.h"

namespace ddpm::cuda {
namespace {

enum Part { kWhole, kSum, kApply };

constexpr int kSums = 3;  // at once

// The forward's map, z = (x - centre) gain + offset: room.channels [3, slab], and what the centre loses by rounding.
template <class S>
DDPM_DEVICE void affine(const Backward& b, const Place<S>& at, const Room& room) {
  const int slab = b.cut.slab, per_group = b.channels / b.groups;
  for (int c = thread(); c < at.width; c += threads()) {
    const int channel = at.slab + c;
    const double* const of = b.statistics + 2 * (at.n * b.groups + channel / per_group);
    const double exact = of[0] - double(value(b.add, at.n, channel, 0.0f));
    const auto centre = float(exact);
    const auto lost = float(exact - double(centre));
    const float slope = 1.0f + value(b.scale, at.n, channel, 0.0f);
    const float gain = float(of[1]) * value(b.weight, 0, channel, 1.0f) * slope;
    const float base = fused(value(b.bias, 0, channel, 0.0f), slope, value(b.shift, at.n, channel, 0.0f));
    room.channels[c] = centre;
    room.channels[slab + c] = gain;
    room.channels[2 * slab + c] = fused(-lost, gain, base);
    room.more[c] = lost;
  }
  sync();
}

// 0 where an element is its own mean: x's gradient and the products are then exactly 0, or no number.
DDPM_DEVICE float exactly(const Backward& b) { return b.pixels == 1 && b.channels == b.groups ? 0.0f : 1.0f; }

// From the slab's sums of g, g d and d, in room.total, the groups' part of dx = g gain + d k + m: k and m in
// room.more [3, slab], behind what the centre lost. The first chunk stores the image's rows.
template <class S>
DDPM_DEVICE void conclude(const Backward& b, const Place<S>& at, const Room& room) {
  const int slab = b.cut.slab, per_group = b.channels / b.groups;
  const float *const of_g = room.total, *const of_product = of_g + slab, *const of_d = of_product + slab;
  const float *const gain = room.channels + slab, *const lost = room.more;
  const float count = float(b.pixels) * float(per_group);
  const float exact = exactly(b);
  for (int group = thread() / kWarp; group * per_group < at.width; group += threads() / kWarp) {
    const int first = group * per_group, last = first + per_group, lane = thread() % kWarp;
    const auto rstd = float(b.statistics[2 * (at.n * b.groups + at.slab / per_group + group) + 1]) * exact;
    const auto product = [&](int c) { return fused(-lost[c], of_g[c], of_product[c]) * exact; };
    float products = 0.0f, plain = 0.0f;
    for (int c = first + lane; c < last; c += kWarp) {
      products = fused(gain[c] * exact, product(c), products);
      plain = fused(gain[c] * exact, of_g[c], plain);
    }
    const float k = -rstd * rstd * over_warp(products) / count, mean = -over_warp(plain) / count;
    for (int c = first + lane; c < last; c += kWarp) {
      const float m = fused(-k, lost[c], mean);
      room.more[slab + c] = k;
      room.more[2 * slab + c] = m;
      if (at.chunk != 0) continue;
      const int channel = at.slab + c;
      const float slope = 1.0f + value(b.scale, at.n, channel, 0.0f), scaled = rstd * product(c);
      const int64_t step = b.images * b.channels;
      float* const row = b.rows + at.n * b.channels + channel;
      row[0] = slope * scaled;
      row[step] = slope * of_g[c];
      row[2 * step] = gain[c] * exact * of_g[c] + k * of_d[c] + float(b.pixels) * m;
      row[3 * step] = value(b.weight, 0, channel, 1.0f) * scaled + value(b.bias, 0, channel, 0.0f) * of_g[c];
      row[4 * step] = of_g[c];
    }
  }
  sync();
}

template <class S>
struct Pair {
  typename S::Raw x, dy;
};

// The forward's map, of a thread's channels.
template <class S>
struct Map {
  static constexpr int V = S::kCount;

  DDPM_DEVICE Map(const Place<S>& at, const Room& room, int slab) {
    load_numbers(room.channels + at.channel, centre);
    load_numbers(room.channels + slab + at.channel, gain);
    load_numbers(room.channels + 2 * slab + at.channel, offset);
  }

  // x less its centre, and dy taken back to the norm.
  DDPM_DEVICE void numbers(const Backward& b, const Place<S>& at, int p, const Pair<S>& pair, float (&d)[V],
                           float (&g)[V]) const {
    float z[V];
    S::unpack(pair.x, d);
    S::unpack(pair.dy, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      d[i] -= centre[i];
      z[i] = fused(d[i], gain[i], offset[i]);
    }
    drop(b, at.n, uint32_t((at.pixel + p) * b.channels + at.c()), g);
    through(b.activation, z, g);
  }

  float centre[V], gain[V], offset[V];
};

// Adds up what the blocks of a slab left: room.total.
template <class S, class Entries>
DDPM_DEVICE void add_up(const Cut& cut, const Place<S>& at, const Room& room, const Entries& entries) {
  float sums[3][S::kCount] = {};
#pragma unroll 1
  for (int e = at.active ? at.row : cut.chunks; e < cut.chunks; e += at.rows) {
    const float* const of = entries(e) + at.channel;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      float v[S::kCount];
      load_numbers(of + k * entries.step, v);
#pragma unroll
      for (int i = 0; i < S::kCount; ++i) sums[k][i] += v[i];
    }
  }
  add_rows<3>(at, cut, sums, room);
}

template <class S, Part P>
DDPM_KERNEL(kThreads, 2) group_norm_silu_bwd_kernel(DDPM_ARGUMENT Backward b) {
  constexpr int V = S::kCount, kAhead = P == kWhole ? 1 : 2;
  using E = typename S::Element;
  const Cut& cut = b.cut;
  const Place<S> at(b);
  const Room room = cuda::room<S>(cut, 2 * sizeof(E), kSums);
  const auto x = lane<const E>(b.x, b.x2, b.channels_1, at.n, at.c()), dy = lane<const E>(b.dy, at.n, at.c());
  E *const held_x = reinterpret_cast<E*>(room.images) + at.channel, *const held_dy = held_x + cut.pixels * cut.slab;
  const auto load_pair = [&](int p) -> Pair<S> {
    if constexpr (P == kWhole) return {load<S>(held_x + p * cut.slab), load<S>(held_dy + p * cut.slab)};
    return {load<S>(x(at.pixel + p)), load<S>(dy(at.pixel + p))};
  };

  if constexpr (P == kWhole) {
    // A thread reads again only what it has copied itself.
    each<1>(at, at.pixels, [](int p) { return p; }, [&](int p, int) {
      copy_16(held_x + p * cut.slab, x(at.pixel + p));
      copy_16(held_dy + p * cut.slab, dy(at.pixel + p));
    });
  }
  affine(b, at, room);
  const Map<S> map(at, room, cut.slab);
  if constexpr (P != kApply) {
    float sums[3][V] = {};
    if (P == kWhole) wait_for_copies();
    each<kAhead>(at, at.pixels, load_pair, [&](int p, const Pair<S>& pair) {
      float d[V], g[V];
      map.numbers(b, at, p, pair, d, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[0][i] += g[i];
        sums[1][i] = fused(g[i], d[i], sums[1][i]);
        sums[2][i] += d[i];
      }
    });
    add_rows<3>(at, cut, sums, room);
    if constexpr (P == kSum) {
      leave(b, at, room.total);
      return;
    }
  }
  const bool clustered = P == kWhole && cut.chunks > 1;
  if (clustered) {
    for (int j = thread(); j < 3 * cut.slab; j += threads()) room.entry[j] = room.total[j];
    cluster_arrive();
    cluster_wait();
  }
  if (P == kApply || clustered) add_up(cut, at, room, Entries<P == kWhole>(b, at, room));
  if (clustered) cluster_arrive();  // the peers' memory is read
  conclude(b, at, room);

  const auto dh = lane<const E>(b.dh, {}, b.channels_1, at.n, at.c());
  const auto dx = lane<E>(b.dx, b.dx2, b.channels_1, at.n, at.c());
  float k[V], m[V];
  load_numbers(room.more + cut.slab + at.channel, k);
  load_numbers(room.more + 2 * cut.slab + at.channel, m);
  const float exact = exactly(b);
  each<kAhead>(at, at.pixels, load_pair, [&](int p, const Pair<S>& pair) {
    float d[V], g[V];
    map.numbers(b, at, p, pair, d, g);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = fused(g[i], map.gain[i] * exact, fused(d[i], k[i], m[i]));
    if (dh.first != nullptr) {
      float more[V];
      S::unpack(load<S>(dh(at.pixel + p)), more);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] += more[i];
    }
    store<S>(dx(at.pixel + p), S::pack(g));
  });
  if (clustered) cluster_wait();  // a block's shared memory stays until its peers have read it
}

}  // namespace

Error group_norm_silu_backward(const Backward& b, Stream stream) {
  return with_storage(b, [&](auto storage) {
    using S = decltype(storage);
    Grid grid{blocks(b), 1, b.cut.threads, room_bytes(b.cut, S::kCount, 2 * sizeof(typename S::Element), kSums)};
    if constexpr (S::kCount > 1) {
      if (b.cut.one_pass) {
        grid.cluster = b.cut.chunks;
        return launch(group_norm_silu_bwd_kernel<S, kWhole>, grid, b, stream);
      }
    }
    const Error error = launch(group_norm_silu_bwd_kernel<S, kSum>, grid, b, stream);
    return error != Error{} ? error : launch(group_norm_silu_bwd_kernel<S, kApply>, grid, b, stream);
  });
}

}  // namespace ddpm::cuda
