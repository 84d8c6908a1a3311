// Group normalisation with what stands around it: x is read once from memory for the statistics, and once from the cache
// to be normalised. Sums and squares are taken of x less a pivot, the mean of a piece's first quarter: so far from the mean
// of the piece that the squares lose digits (by more than a factor of 4) no pivot can be. Pieces are merged by Chan et al.
// 1979. An offset costs no accuracy.
#include "group_norm.h"
#include "kernels.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int kTile = kVec >= 16 ? 8 : 4;  // vectors of sums in registers
constexpr int kRows = 3;                   // numbers of a channel in the moments of a piece

// Of each channel: a pivot, the mean less the pivot, and the sum of squares around the mean.
struct Moments {
  float *pivot, *mean, *squares;
};

template <class T>
void pixel_moments(const T* x, int64_t stride, int64_t pixels, int64_t channels, Moments out) {
  const float each = 1.0f / float(pixels);
  blocks(pixels, [=](int64_t first, int64_t in_block) {
    tiles<kTile>(channels, [=](int64_t c, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      const T* block = x + first * stride + c;
      Floats v[V], pivot[V] = {}, sum[V] = {}, squares[V] = {};
      if (first == 0) {
        for (int64_t p = 0; p < in_block; ++p) {
          load_tile(v, block + p * stride, last);
          for (int i = 0; i < V; ++i) pivot[i] += v[i];
        }
        for (int i = 0; i < V; ++i) pivot[i] *= 1.0f / float(in_block);
        store_tile(out.pivot + c, pivot, last);
      } else {
        load_tile(pivot, out.pivot + c, last);
        load_tile(sum, out.mean + c, last);
        load_tile(squares, out.squares + c, last);
      }
      for (int64_t p = 0; p < in_block; ++p) {
        load_tile(v, block + p * stride, last);
        for (int i = 0; i < V; ++i) {
          const Floats d = v[i] - pivot[i];
          sum[i] += d;
          squares[i] = fma(d, d, squares[i]);
        }
      }
      if (first + in_block == pixels) {
        for (int i = 0; i < V; ++i) {
          const Floats mean = sum[i] * each;
          squares[i] = larger(Floats{}, fma(-sum[i], mean, squares[i]));  // NaN stays
          sum[i] = mean;
        }
      }
      store_tile(out.mean + c, sum, last);
      store_tile(out.squares + c, squares, last);
    });
  });
}

template <class T>
void row_moments(const T* x, int64_t stride, int64_t pixels, int64_t channels, Moments out) {
  constexpr int64_t kRow = 64 * kVec;  // pixels of a piece
  for (int64_t c = 0; c < channels; ++c, x += stride) {
    double mean = 0, squares = 0;
    for (int64_t first = 0; first < pixels; first += kRow) {
      const int64_t count = pixels - first < kRow ? pixels - first : kRow, some = count < kRow / 4 ? count : kRow / 4;
      const T* row = x + first;
      const auto sums_of = [=](int64_t count, float pivot, float& sum, float& squares) {
        Floats s[4] = {}, q[4] = {};
        tiles<4>(count, [&](int64_t p, auto tile, int64_t last) DDPM_INLINED {
          constexpr int V = decltype(tile)::value;
          Floats v[V];
          load_tile(v, row + p, last);
          for (int i = 0; i < V; ++i) {
            const Floats d = V == 1 ? zeroed(v[i] - pivot, last) : v[i] - pivot;
            s[i] += d;
            q[i] = fma(d, d, q[i]);
          }
        });
        sum = total(s);
        squares = total(q);
      };
      float sum, around_pivot;
      sums_of(some, 0.0f, sum, around_pivot);
      const float pivot = sum / float(some);
      sums_of(count, pivot, sum, around_pivot);
      const double part = double(sum) / double(count), share = double(count) / double(first + count);
      const double d = double(pivot) + part - mean;
      const double around_mean = double(around_pivot) - double(sum) * part;
      mean += d * share;
      squares += (around_mean < 0 ? 0 : around_mean) + d * d * share * double(first);
    }
    out.pivot[c] = float(mean);
    out.mean[c] = float(mean - double(out.pivot[c]));
    out.squares[c] = float(squares);
  }
}

// h = x + residual
template <class T>
void sum_pixels(const T* x, int64_t stride, const T* residual, int64_t residual_stride, T* h, int64_t h_stride,
                int64_t pixels, int64_t channels) {
  blocks(pixels, [=](int64_t first, int64_t in_block) {
    tiles<4>(channels, [=](int64_t c, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V], r[V];
      for (int64_t p = first; p < first + in_block; ++p) {
        load_tile(v, x + p * stride + c, last);
        load_tile(r, residual + p * residual_stride + c, last);
        for (int i = 0; i < V; ++i) v[i] += r[i];
        store_tile(h + p * h_stride + c, v, last);
      }
    });
  });
}

template <class T>
void sum_rows(const T* x, int64_t stride, const T* residual, int64_t residual_stride, T* h, int64_t h_stride,
              int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const T *from = x + c * stride, *more = residual + c * residual_stride;
    T* to = h + c * h_stride;
    vectors(pixels, [=](int64_t p, int, int64_t last) {
      store_some(to + p, load_some(from + p, last) + load_some(more + p, last), last);
    });
  }
}

// All vectors of a tile are loaded before any is stored: so their long computations go on side by side. Meanwhile memory is
// idle: it brings y's lines, and of `next`, what will be x then, those in the same place.
template <Activation A, class T>
void normalise_pixels(const T* x, int64_t stride, Affine to, T* y, int64_t y_stride, int64_t pixels, int64_t channels,
                      const T* next) {
  blocks(pixels, [=](int64_t first, int64_t in_block) {
    tiles<kTile>(channels, [=](int64_t c, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V], m[V], a[V], b[V];
      load_tile(m, to.centre + c, last);
      load_tile(a, to.gain + c, last);
      load_tile(b, to.offset + c, last);
      for (int64_t p = first; p < first + in_block; ++p) {
        load_tile(v, x + p * stride + c, last);
        prefetch<V>(next + p * stride + c);
        prefetch_to_write<V>(y + (p + kAhead) * y_stride + c);
        for (int i = 0; i < V; ++i) v[i] = activate<A, kPrecision<T>>(fma(v[i] - m[i], a[i], b[i]));
        store_tile(y + p * y_stride + c, v, last);
      }
    });
  });
}

template <Activation A, class T>
void normalise_rows(const T* x, int64_t stride, Affine to, T* y, int64_t y_stride, int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const Floats m = broadcast(to.centre[c]);
    const Floats a = broadcast(to.gain[c]), b = broadcast(to.offset[c]);
    tiles<4>(pixels, [=](int64_t p, auto tile, int64_t last) DDPM_INLINED {
      constexpr int V = decltype(tile)::value;
      Floats v[V];
      load_tile(v, x + c * stride + p, last);
      for (int i = 0; i < V; ++i) v[i] = activate<A, kPrecision<T>>(fma(v[i] - m, a, b));
      store_tile(y + c * y_stride + p, v, last);
    });
  }
}

// Adds the moments of `more` pixels to those of `pixels` pixels.
void merge(const Moments& into, int64_t pixels, const Moments& from, int64_t more, int64_t channels) {
  const float share = float(more) / float(pixels + more), weight = share * float(pixels);
  vectors(channels, [=](int64_t c, int, int64_t last) {
    const Floats mean = load_some(into.mean + c, last);
    const Floats apart = load_some(from.pivot + c, last) - load_some(into.pivot + c, last);
    const Floats d = apart + (load_some(from.mean + c, last) - mean);
    const Floats squares = load_some(into.squares + c, last) + load_some(from.squares + c, last);
    store_some(into.mean + c, fma(d, broadcast(share), mean), last);
    store_some(into.squares + c, fma(d * d, broadcast(weight), squares), last);
  });
}

// From the moments of a slab's channels the statistics of its groups, with `add`.
void merge_groups(int64_t channels, int64_t per_group, const Moments& of, const float* add, double pixels, double eps,
                  double* statistics) {
  const double share = 1.0 / (double(per_group) * pixels);
  const int64_t groups = channels / per_group;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * per_group, end = begin + per_group;
    const auto mean = [&](int64_t c) { return double(of.pivot[c]) + double(of.mean[c]) + double(add[c]); };
    double group_mean = 0, squares = 0;
    for (int64_t c = begin; c < end; ++c) group_mean += mean(c);
    group_mean /= double(per_group);  // exact where all are equal
    for (int64_t c = begin; c < end; ++c) {
      const double d = mean(c) - group_mean;
      squares += double(of.squares[c]) + pixels * d * d;
    }
    statistics[2 * group] = group_mean;
    statistics[2 * group + 1] = squares;
  }
  for (int64_t group = 0; group < groups; ++group) {
    statistics[2 * group + 1] = 1.0 / __builtin_sqrt(statistics[2 * group + 1] * share + eps);
  }
}

// x's sum with the residual, where there is one, and the moments of a piece.
template <class T>
void measure(const GroupNorm& g, const GroupNormForward& f, const Place& of, const Moments& moments) {
  parts(g, of, [&](const Part& part, bool second) {
    Image image = second ? g.x2 : g.x;
    const T* x = at<T>(image, of, part.inside);
    if (f.h.data != nullptr && !second) {
      const T* residual = at<T>(f.residual, of, part.inside);
      T* h = at<T>(f.h, of, part.inside);
      if (g.channels_last) {
        sum_pixels(x, image.pixel, residual, f.residual.pixel, h, f.h.pixel, of.pixels, part.count);
      } else {
        sum_rows(x, image.channel, residual, f.residual.channel, h, f.h.channel, of.pixels, part.count);
      }
      x = h;
      image = f.h;
    }
    const Moments to = {moments.pivot + part.begin, moments.mean + part.begin, moments.squares + part.begin};
    if (g.channels_last) {
      pixel_moments(x, image.pixel, of.pixels, part.count, to);
    } else {
      row_moments(x, image.channel, of.pixels, part.count, to);
    }
  });
}

template <Activation A, class T>
void finish(const GroupNorm& g, const GroupNormForward& f, const Place& of, const Place& next, const Affine& map) {
  parts(g, of, [&](const Part& part, bool second) {
    const bool summed = f.h.data != nullptr && !second;
    const Image& image = summed ? f.h : second ? g.x2 : g.x;
    const T* x = at<T>(image, of, part.inside);
    const Affine to = {map.centre + part.begin, map.gain + part.begin, map.offset + part.begin};
    T* y = at<T>(f.y, of, part.first);
    if (g.channels_last) {
      const T* then = summed ? x : at<T>(image, next, next.first + part.inside - of.first);
      normalise_pixels<A>(x, image.pixel, to, y, f.y.pixel, of.pixels, part.count, then);
    } else {
      normalise_rows<A>(x, image.channel, to, y, f.y.channel, of.pixels, part.count);
    }
  });
  if (g.threshold != 0) {
    T* y = at<T>(f.y, of, of.first);
    drop(g, of, y, f.y, y, f.y);
  }
}

template <Activation A, class T>
void forward(const GroupNorm& g, const GroupNormForward& f, int threads) {
  const Cut to = cut(g, 2 * sizeof(T), threads);
  // A slab's room: statistics of its groups (at most as many as channels), and the moments of its pieces.
  const int64_t in_doubles = int64_t{2 * sizeof(double) / sizeof(float)} * to.width;
  const int64_t each = whole_pages(in_doubles + to.pieces * kRows * to.width);
  const int64_t in_rooms = rooms(to, g.images) * each;
  const Scratch scratch(in_rooms + kConstants * to.width);
  float* constants = scratch.get() + in_rooms;
  fill_constants(constants, to.width);
  const auto moments_of = [&](int64_t piece, float* room) {
    const auto row = [=](int i) { return room + in_doubles + (piece * kRows + i) * to.width; };
    return Moments{row(0), row(1), row(2)};
  };
  run_cut(
      to, g.images, each, scratch.get(), [](int64_t, float*) {},
      [&](int64_t slab, int64_t piece, float* room) {
        measure<T>(g, f, place(g, to, slab, piece), moments_of(piece, room));
      },
      [&](int64_t slab, float* room) {
        const Moments all = moments_of(0, room);
        const Place of = place(g, to, slab, 0);
        for (int64_t piece = 1; piece < to.pieces; ++piece) {
          merge(all, piece * to.piece, moments_of(piece, room), place(g, to, slab, piece).pixels, of.count);
        }
        const int64_t per_group = g.channels / g.groups, first_group = of.n * g.groups + of.first / per_group;
        double* statistics = g.statistics ? g.statistics + 2 * first_group : reinterpret_cast<double*>(room);
        const Parameters with = parameters(g, to, of, constants);
        merge_groups(of.count, per_group, all, with.add, double(g.pixels), g.eps, statistics);
        affine(of.count, per_group, statistics, with, {all.pivot, all.mean, all.squares});
      },
      [&](int64_t slab, int64_t piece, float* room) {
        const Moments all = moments_of(0, room);  // now the affine maps
        const Place next = place(g, to, after(to, slab, g.images), piece);
        finish<A, T>(g, f, place(g, to, slab, piece), next, {all.pivot, all.mean, all.squares});
      });
}

template <class T>
void forward(const GroupNorm& g, const GroupNormForward& f, int threads) {
  switch (g.activation) {
    case Activation::none: return forward<Activation::none, T>(g, f, threads);
    case Activation::silu: return forward<Activation::silu, T>(g, f, threads);
    case Activation::relu: return forward<Activation::relu, T>(g, f, threads);
    case Activation::mish: return forward<Activation::mish, T>(g, f, threads);
  }
}

}  // namespace

void group_norm_silu(const GroupNorm& g, const GroupNormForward& f, int threads) {
  g.half ? forward<bf16>(g, f, threads) : forward<float>(g, f, threads);
}

void norm_of_moments(const NormOfMoments& of, int threads) {
  const int64_t each = of.channels / of.groups;
  parallel(of.images * of.groups, worth(threads, of.images * of.channels, 1 << 11), [&](int64_t task) {
    const int64_t image = task / of.groups, first = task % of.groups * each, place = image * of.channels + first;
    const float *mean = of.mean + place, *squares = of.squares + place;
    const float* add = of.add == nullptr ? nullptr : of.add + image * of.add_stride + first;
    const auto middle = [=](int64_t c) { return double(mean[c]) + (add == nullptr ? 0.0 : double(add[c])); };
    double whole = 0, around = 0;
    for (int64_t c = 0; c < each; ++c) whole += middle(c);
    whole /= double(each);
    for (int64_t c = 0; c < each; ++c) {
      const double d = middle(c) - whole;
      around += double(squares[c]) + of.pixels * d * d;
    }
    const double rstd = 1.0 / __builtin_sqrt(around / (double(each) * of.pixels) + of.eps);
    for (int64_t c = 0; c < each; ++c) {
      const double slope = of.weight == nullptr ? rstd : rstd * double(of.weight[first + c]);
      const double offset = of.bias == nullptr ? 0.0 : double(of.bias[first + c]);
      of.scale[place + c] = float(slope);
      of.shift[place + c] = float(((add == nullptr ? 0.0 : double(add[c])) - whole) * slope + offset);
    }
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
