// The gradient of group_norm_silu, from x and the groups' mean and deviation: all else is computed again. A slab is passed
// over twice. First dz, the gradient of the affine map's output, goes to memory in the cache, and into three sums of each
// channel: of dz, of dz (x - mean) and of x - mean. All gradients of parameters are linear in them, and so are the
// coefficients of the second pass, dx = k dz + l (x - mean) + m.
#include "group_norm.h"
#include "kernels.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int kTile = 4;  // vectors side by side: also where their sums leave the registers, as each computation is long

struct Sums {
  float *dz, *product, *x;
};

// Of a slab: what the forward's map was, the coefficients of the second pass (k is the map's gain), what the centre lost
// by its rounding, the groups' 1 / deviation, and the sums of a piece; all of them for the first one, in the end.
struct Slab {
  Affine map;
  float *l, *m, *lost, *rstd;
  Sums sums;
};

constexpr int kRows = 7, kSums = 3;  // numbers of a channel

Slab slab_in(float* room, int64_t width, int64_t piece) {
  const auto row = [=](int64_t i) { return room + i * width; };
  const int64_t sums = kRows + kSums * piece;
  return {{row(0), row(1), row(2)}, row(3), row(4), row(5), row(6), {row(sums), row(sums + 1), row(sums + 2)}};
}

template <Activation A, class T, class From>
void sum_pixels(const T* x, int64_t stride, const From* dy, int64_t dy_stride, Affine of, float* dz, int64_t dz_stride,
                Sums sums, int64_t pixels, int64_t channels) {
  blocks(pixels, [=](int64_t first, int64_t in_block) {
    tiles<kTile>(channels, [=](int64_t c, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats m[V], a[V], b[V], v[V], g[V], of_dz[V] = {}, of_product[V] = {}, of_x[V] = {};
      load_tile(m, of.centre + c, last);
      load_tile(a, of.gain + c, last);
      load_tile(b, of.offset + c, last);
      for (int64_t p = first; p < first + in_block; ++p) {
        load_tile(v, x + p * stride + c, last);
        load_tile(g, dy + p * dy_stride + c, last);
        prefetch<V>(x + (p + kBlock) * stride + c);
        prefetch<V>(dy + (p + kBlock) * dy_stride + c);
        for (int i = 0; i < V; ++i) {
          v[i] -= m[i];
          g[i] = through<A, kPrecision<T>>(g[i], fma(v[i], a[i], b[i]));
        }
        store_tile(dz + p * dz_stride + c, g, last);
        for (int i = 0; i < V; ++i) {
          of_dz[i] += g[i];
          of_product[i] = fma(g[i], v[i], of_product[i]);
          of_x[i] += v[i];
        }
      }
      const auto join = [&](float* all, const Floats (&block)[V]) {
        Floats before[V] = {};
        if (first != 0) load_tile(before, all + c, last);
        for (int i = 0; i < V; ++i) before[i] += block[i];
        store_tile(all + c, before, last);
      };
      join(sums.dz, of_dz);
      join(sums.product, of_product);
      join(sums.x, of_x);
    });
  });
}

template <Activation A, class T, class From>
void sum_rows(const T* x, int64_t stride, const From* dy, int64_t dy_stride, Affine of, float* dz, int64_t dz_stride,
              Sums sums, int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const float m = of.centre[c];
    const Floats a = broadcast(of.gain[c]), b = broadcast(of.offset[c]);
    Floats all[3][4] = {};
    tiles<4>(pixels, [&](int64_t p, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V], g[V];
      load_tile(v, x + c * stride + p, last);
      load_tile(g, dy + c * dy_stride + p, last);
      for (int i = 0; i < V; ++i) {
        v[i] = zeroed(v[i] - m, V == 1 ? last : kVec);
        g[i] = through<A, kPrecision<T>>(g[i], fma(v[i], a, b));
      }
      store_tile(dz + c * dz_stride + p, g, last);
      for (int i = 0; i < V; ++i) {
        all[0][i] += g[i];
        all[1][i] = fma(g[i], v[i], all[1][i]);
        all[2][i] += v[i];
      }
    });
    sums.dz[c] = total(all[0]);
    sums.product[c] = total(all[1]);
    sums.x[c] = total(all[2]);
  }
}

// dx = k dz + l (x - centre) + m [+ dh]; `Past` the caches, if dx's rows are whole vectors.
template <bool Past, class T>
void combine_pixels(const T* x, int64_t stride, const float* dz, int64_t dz_stride, const T* dh, int64_t dh_stride,
                    const Slab& of, int64_t begin, T* dx, int64_t dx_stride, int64_t pixels, int64_t channels) {
  const float *centre = of.map.centre + begin, *k = of.map.gain + begin, *l = of.l + begin, *m = of.m + begin;
  blocks(pixels, [=](int64_t first, int64_t in_block) {
    tiles<kTile>(channels, [=](int64_t c, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V], g[V], h[V] = {}, middle[V], of_g[V], of_v[V], rest[V];
      load_tile(middle, centre + c, last);
      load_tile(of_g, k + c, last);
      load_tile(of_v, l + c, last);
      load_tile(rest, m + c, last);
      for (int64_t p = first; p < first + in_block; ++p) {
        load_tile(v, x + p * stride + c, last);
        load_tile(g, dz + p * dz_stride + c, last);
        if (dh != nullptr) load_tile(h, dh + p * dh_stride + c, last);
        if constexpr (!Past) prefetch_to_write<V>(dx + (p + kAhead) * dx_stride + c);
        for (int i = 0; i < V; ++i) v[i] = fma(of_g[i], g[i], fma(of_v[i], v[i] - middle[i], rest[i])) + h[i];
        if constexpr (Past && sizeof(T) == sizeof(float)) {
          if (last == kVec) {
            for (int i = 0; i < V; ++i) stream(dx + p * dx_stride + c + i * kVec, v[i]);
            continue;
          }
        }
        store_tile(dx + p * dx_stride + c, v, last);
      }
    });
  });
}

template <class T>
void combine_rows(const T* x, int64_t stride, const float* dz, int64_t dz_stride, const T* dh, int64_t dh_stride,
                  const Slab& of, int64_t begin, T* dx, int64_t dx_stride, int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const Floats centre = broadcast(of.map.centre[begin + c]), k = broadcast(of.map.gain[begin + c]);
    const Floats l = broadcast(of.l[begin + c]), m = broadcast(of.m[begin + c]);
    tiles<4>(pixels, [=](int64_t p, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V], g[V], h[V] = {};
      load_tile(v, x + c * stride + p, last);
      load_tile(g, dz + c * dz_stride + p, last);
      if (dh != nullptr) load_tile(h, dh + c * dh_stride + p, last);
      for (int i = 0; i < V; ++i) v[i] = fma(k, g[i], fma(l, v[i] - centre, m)) + h[i];
      store_tile(dx + c * dx_stride + p, v, last);
    });
  }
}

// Gradients of the parameters, image by image, null where not wanted; those that all images share are added up in the end.
struct Rows {
  float *dweight, *dbias, *dadd, *dscale, *dshift;  // [N, C]

  Rows operator+(int64_t offset) const {
    const auto at = [=](float* row) { return row == nullptr ? nullptr : row + offset; };
    return {at(dweight), at(dbias), at(dadd), at(dscale), at(dshift)};
  }
};

// From a slab's sums those of dz (x - mean), with the mean as it is and not as float32 has it, and the coefficients.
void coefficients(int64_t channels, int64_t per_group, double pixels, const double* statistics, const float* add,
                  const Slab& of) {
  stretches(channels, per_group, statistics, [&](int64_t first, int64_t count, const double* mean, const double* rstd) {
    const float *centre = of.map.centre + first, *dz = of.sums.dz + first, *added = add + first;
    float *product = of.sums.product + first, *lost = of.lost + first, *of_rstd = of.rstd + first;
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) {
      lost[c] = float(mean[c] - double(added[c]) - double(centre[c]));
      product[c] = float(double(product[c]) - double(lost[c]) * double(dz[c]));
      of_rstd[c] = float(rstd[c]);
    }
  });
  const double count = double(per_group) * pixels;
  for (int64_t begin = 0; begin < channels; begin += per_group, statistics += 2) {
    double sum = 0, sum_of_products = 0;
    for (int64_t c = begin; c < begin + per_group; ++c) {
      sum += double(of.map.gain[c]) * double(of.sums.dz[c]);
      sum_of_products += double(of.map.gain[c]) * double(of.sums.product[c]);
    }
    const float l = float(-statistics[1] * statistics[1] * sum_of_products / count), m = float(-sum / count);
    for (int64_t c = begin; c < begin + per_group; ++c) {
      of.l[c] = l;
      of.m[c] = m - l * of.lost[c];
    }
  }
  if (count == 1) {  // such an element is its mean: all of x's gradient, and the products, are exactly 0, or no number
    for (int64_t c = 0; c < channels; ++c) {
      of.map.gain[c] *= 0.0f;
      of.sums.product[c] *= 0.0f;
      of.l[c] = of.m[c] = 0.0f * of.rstd[c];
    }
  }
}

// The gradients of a slab's parameters.
void gradients(int64_t channels, double pixels, const Parameters& of_channels, const Slab& of, const Rows& to) {
  const float *dz = of.sums.dz, *product = of.sums.product, *rstd = of.rstd, *scale = of_channels.scale;
  if (float* out = to.dweight) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) out[c] = (1.0f + scale[c]) * (rstd[c] * product[c]);
  }
  if (float* out = to.dbias) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) out[c] = (1.0f + scale[c]) * dz[c];
  }
  if (float* out = to.dadd) {  // the sum of dx
    const float *k = of.map.gain, *l = of.l, *m = of.m, *x = of.sums.x;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = float(double(k[c]) * double(dz[c]) + double(l[c]) * double(x[c]) + pixels * double(m[c]));
    }
  }
  if (float* out = to.dscale) {
    const float *weight = of_channels.weight, *bias = of_channels.bias;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) out[c] = weight[c] * (rstd[c] * product[c]) + bias[c] * dz[c];
  }
  if (float* out = to.dshift) std::memcpy(out, dz, size_t(channels) * sizeof(float));
}

// Where a part's dz is, in a slab's room: a piece after the other.
Image room_of(const GroupNorm& g, const Place& of, const Part& part, float* room) {
  float* first = room + of.pixel * of.count + part.begin * of.pixels;
  return g.channels_last ? Image{first, 0, 1, part.count} : Image{first, 0, of.pixels, 1};
}

// dz and its sums.
template <Activation A, class T>
void measure(const GroupNorm& g, const GroupNormBackward& b, const Place& of, const Slab& slab, float* room) {
  parts(g, of, [&](const Part& part, bool second) {
    const Image &image = second ? g.x2 : g.x, dz = room_of(g, of, part, room);
    const T *x = at<T>(image, of, part.inside), *dy = at<T>(b.dy, of, part.first);
    float* to = static_cast<float*>(dz.data);
    const Affine map = {slab.map.centre + part.begin, slab.map.gain + part.begin, slab.map.offset + part.begin};
    const Sums sums = {slab.sums.dz + part.begin, slab.sums.product + part.begin, slab.sums.x + part.begin};
    const auto sum = [&](const auto* from, const Image& from_at) {
      if (g.channels_last) {
        sum_pixels<A>(x, image.pixel, from, from_at.pixel, map, to, dz.pixel, sums, of.pixels, part.count);
      } else {
        sum_rows<A>(x, image.channel, from, from_at.channel, map, to, dz.channel, sums, of.pixels, part.count);
      }
    };
    if (g.threshold != 0) {
      drop(g, {of.n, part.first, part.count, of.pixel, of.pixels}, dy, b.dy, to, dz);
      sum(to, dz);
    } else {
      sum(dy, b.dy);
    }
  });
}

// dx. Where all is more than the caches hold, dx leaves them out: else its memory would be read before it is written.
template <class T>
void finish(const GroupNorm& g, const GroupNormBackward& b, const Place& of, const Slab& slab, float* room) {
  const bool past = in_memory(3 * g.images * g.channels * g.pixels * int64_t{sizeof(T)});
  parts(g, of, [&](const Part& part, bool second) {
    const Image &image = second ? g.x2 : g.x, &target = second ? b.dx2 : b.dx;
    const Image dz = room_of(g, of, part, room);
    const float* from = static_cast<const float*>(dz.data);
    const T* x = at<T>(image, of, part.inside);
    const T* dh = second || b.dh.data == nullptr ? nullptr : at<T>(b.dh, of, part.inside);
    T* dx = at<T>(target, of, part.inside);
    // bf16 is bound by arithmetic.
    const bool whole = reinterpret_cast<uintptr_t>(dx) % kVecBytes == 0 && target.pixel % kVec == 0;
    if (g.channels_last && sizeof(T) == sizeof(float) && whole && past) {
      combine_pixels<true>(x, image.pixel, from, dz.pixel, dh, b.dh.pixel, slab, part.begin, dx, target.pixel,
                           of.pixels, part.count);
      streamed();
    } else if (g.channels_last) {
      combine_pixels<false>(x, image.pixel, from, dz.pixel, dh, b.dh.pixel, slab, part.begin, dx, target.pixel,
                            of.pixels, part.count);
    } else {
      combine_rows(x, image.channel, from, dz.channel, dh, b.dh.channel, slab, part.begin, dx, target.channel,
                   of.pixels, part.count);
    }
  });
}

// to[c] = the sum over the images, in their order.
void add_up(const float* rows, int64_t images, int64_t channels, float* to) {
  constexpr int64_t kSums = 64;
  for (int64_t first = 0; first < channels; first += kSums) {
    const int64_t count = channels - first < kSums ? channels - first : kSums;
    double sums[kSums] = {};
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t c = 0; c < count; ++c) sums[c] += double(rows[n * channels + first + c]);
    }
    for (int64_t c = 0; c < count; ++c) to[first + c] = float(sums[c]);
  }
}

// to += more
void add(float* to, const float* more, int64_t count) {
#pragma GCC ivdep
  for (int64_t c = 0; c < count; ++c) to[c] += more[c];
}

template <Activation A, class T>
void backward(const GroupNorm& g, const GroupNormBackward& b, int threads) {
  const Cut to = cut(g, 2 * sizeof(T) + sizeof(float), threads);
  const int64_t rows_of_slab = ((kRows + kSums * to.pieces) * to.width + kVec - 1) / kVec * kVec;
  const int64_t each = whole_pages(rows_of_slab + g.pixels * to.width);
  const int64_t all = g.images * g.channels, in_rooms = rooms(to, g.images) * each;
  const bool shared_add = b.dadd != nullptr && g.add_stride == 0;
  const Scratch scratch(in_rooms + 3 * all + kConstants * to.width);
  float *shared = scratch.get() + in_rooms, *constants = shared + 3 * all;
  fill_constants(constants, to.width);
  const int64_t per_group = g.channels / g.groups;
  const auto statistics_of = [&](const Place& of) {
    return g.statistics + 2 * (of.n * g.groups + of.first / per_group);
  };
  const Rows rows = {b.dweight == nullptr ? nullptr : shared, b.dbias == nullptr ? nullptr : shared + all,
                     shared_add ? shared + 2 * all : b.dadd, b.dscale, b.dshift};
  run_cut(
      to, g.images, each, scratch.get(),
      [&](int64_t task, float* room) {
        const Place of = place(g, to, task, 0);
        const Parameters with = parameters(g, to, of, constants);
        affine(of.count, per_group, statistics_of(of), with, slab_in(room, to.width, 0).map);
      },
      [&](int64_t task, int64_t piece, float* room) {
        measure<A, T>(g, b, place(g, to, task, piece), slab_in(room, to.width, piece), room + rows_of_slab);
      },
      [&](int64_t task, float* room) {
        const Place of = place(g, to, task, 0);
        const Slab slab = slab_in(room, to.width, 0);
        for (int64_t piece = 1; piece < to.pieces; ++piece) {
          const Sums more = slab_in(room, to.width, piece).sums;
          add(slab.sums.dz, more.dz, of.count);
          add(slab.sums.product, more.product, of.count);
          add(slab.sums.x, more.x, of.count);
        }
        const Parameters with = parameters(g, to, of, constants);
        coefficients(of.count, per_group, double(g.pixels), statistics_of(of), with.add, slab);
        gradients(of.count, double(g.pixels), with, slab, rows + (of.n * g.channels + of.first));
      },
      [&](int64_t task, int64_t piece, float* room) {
        finish<T>(g, b, place(g, to, task, piece), slab_in(room, to.width, 0), room + rows_of_slab);
      });
  if (b.dweight != nullptr) add_up(rows.dweight, g.images, g.channels, b.dweight);
  if (b.dbias != nullptr) add_up(rows.dbias, g.images, g.channels, b.dbias);
  if (shared_add) add_up(rows.dadd, g.images, g.channels, b.dadd);
}

template <class T>
void backward(const GroupNorm& g, const GroupNormBackward& b, int threads) {
  switch (g.activation) {
    case Activation::none: return backward<Activation::none, T>(g, b, threads);
    case Activation::silu: return backward<Activation::silu, T>(g, b, threads);
    case Activation::relu: return backward<Activation::relu, T>(g, b, threads);
    case Activation::mish: return backward<Activation::mish, T>(g, b, threads);
  }
}

}  // namespace

void group_norm_silu_backward(const GroupNorm& g, const GroupNormBackward& b, int threads) {
  g.half ? backward<bf16>(g, b, threads) : backward<float>(g, b, threads);
}

}  // namespace ddpm::cpu::DDPM_ISA
