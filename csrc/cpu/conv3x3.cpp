// 3x3 convolutions by Winograd's minimal filtering: a block of tiles is transformed, multiplied with the weights, position
// by position of a tile, for a few output channels at a time, and transformed back while it is in the second cache. Weights
// that were transformed beforehand go by once a block. Others are transformed here, piece by piece, and forgotten.
#include "kernels.h"
#include "moments.h"
#include "strips.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kGroup = kVec >= 16 ? 2 : 4;  // panels of transformed weights that are used at once
constexpr int64_t kAtOnce = 256;                // input channels whose weights are transformed at once in the kernel
constexpr int64_t kTiles = 32;                  // of a block; twice as many where weights are transformed for each

// Channels as weights have them.
template <class T>
constexpr int64_t whole_steps(int64_t channels) {
  return up(channels, kStep<T>) * kStep<T>;
}

// Nine vectors of weights, load(tap), to those of each position.
template <int M, int N, class Load, class Store>
DDPM_INLINED inline void transform_weight(const Load& load, const Store& store) {
  constexpr int S = M + 2, R = N + 2;
  Floats half[S][3];
  for (int j = 0; j < 3; ++j) {
    const Floats g[3] = {load(j), load(3 + j), load(6 + j)};
    Floats column[S];
    Winograd<M>::weight(g, column);
    for (int i = 0; i < S; ++i) half[i][j] = column[i];
  }
  for (int i = 0; i < S; ++i) {
    Floats u[R];
    Winograd<N>::weight(half[i], u);
    for (int j = 0; j < R; ++j) store(i * R + j, u[j]);
  }
}

// Of one panel, [channels][9][kPanel] to [positions][channels][kPanel], positions `step` apart.
template <int M, int N, class T>
void transform_weights(const T* w, int64_t channels, T* u, int64_t step) {
  for (int64_t c = 0; c < channels; c += kStep<T>, w += kTaps * kPanel * kStep<T>, u += kPanel * kStep<T>) {
    for (int64_t lane = 0; lane < kPanel * kStep<T>; lane += kVec * kStep<T>) {
      const auto at = [=](int tap) { return w + tap * kPanel * kStep<T> + lane; };
      if constexpr (kStep<T> == 1) {
        transform_weight<M, N>([=](int tap) { return load(at(tap)); },
                            [=](int p, Floats x) { store(u + p * step + lane, x); });
      } else {
        Floats low[(M + 2) * (N + 2)];
        transform_weight<M, N>([=](int tap) { return low_halves(read_as<Words32>(at(tap))); },
                            [&](int p, Floats x) { low[p] = x; });
        transform_weight<M, N>([=](int tap) { return high_halves(read_as<Words32>(at(tap))); },
                            [&](int p, Floats x) {
                              const Words32 both = paired(low[p], x);
                              std::memcpy(u + p * step + lane, &both, sizeof both);
                            });
      }
    }
  }
}

template <class T, int M, int N>
class InTiles {
 public:
  explicit InTiles(const Conv3x3& of)
      : of_(of),
        tiles_(of.images, of.height, of.width),
        v_{of.channels, 0},
        panels_(up(of.out_channels, kPanel)),
        group_(of.transformed ? kGroup : 1),
        piece_(of.transformed ? of.channels : least(kAtOnce, of.channels)),
        strips_(of, tiles_),
        moments_(of, tiles_.of_an_image()) {}

  void run(int threads) {
    const int64_t most = of_.transformed ? kTiles : 2 * kTiles, groups = up(panels_, group_);
    if (tiles_.count < kTiles * threads && groups >= threads) {
      // Few tiles: each thread takes some of the output channels, and so reads a part of the weights only.
      v_.rows = least(tiles_.count, most);
      const int64_t each = own_size();
      float* const room = room_of(v_.floats() + threads * each);
      T* const v = reinterpret_cast<T*>(room);
      for (int64_t first = 0; first < tiles_.count; first += v_.rows) {
        const int64_t count = least(tiles_.count - first, v_.rows), together = strips_.wanted() ? up(count, threads) : 1;
        parallel_ranked(up(count, together), threads, [&](int64_t part, int rank) {
          const int64_t row = part * together;
          transform(first + row, least(count - row, together), row, v, room + v_.floats() + rank * each);
        });
        parallel_ranked(groups, threads, [&](int64_t group, int rank) {
          multiply(group, first, count, v, room + v_.floats() + rank * each);
        });
      }
      return conclude(threads);
    }
    const int64_t share = up(up(tiles_.count, most), threads) * threads;  // blocks, as many for each thread
    v_.rows = up(tiles_.count, share);
    const int64_t each = v_.floats() + own_size();
    float* const room = room_of(threads * each);
    parallel_ranked(up(tiles_.count, v_.rows), threads, [&](int64_t block, int rank) {
      float* const own = room + rank * each;
      T* const v = reinterpret_cast<T*>(own);
      const int64_t first = block * v_.rows, count = least(tiles_.count - first, v_.rows);
      transform(first, count, 0, v, own + v_.floats());
      for (int64_t group = 0; group < groups; ++group) multiply(group, first, count, v, own + v_.floats());
    });
    conclude(threads);
  }

 private:
  static constexpr int S = M + 2, R = N + 2, kPositions = S * R;

  // Room for the call, after zeros for the pixels outside of an image, and the moments.
  float* room_of(int64_t count) {
    const int64_t outside = whole_pages(of_.channels + kVec);
    const int64_t moments = moments_.size(v_.rows);
    float* const room = kept(outside + moments + count);
    std::memset(room, 0, size_t(outside) * sizeof(float));
    zeros_ = reinterpret_cast<const T*>(room);
    moments_.lie_in(room + outside);
    return room + outside + moments;
  }

  // What a thread needs beside transformed tiles: a strip, and when that is done weights and sums.
  int64_t own_size() const {
    const int64_t strip = strips_.size(v_.rows), rest = u_size() + m_size();
    return strip > rest ? strip : rest;
  }
  // Sums are [rows][panels of a group, in halves][positions].
  Sums sums_at(float* first) const { return {first, group_ * kPanel * kPositions, kPositions * kVec}; }
  int64_t m_size() const { return whole_pages(v_.rows * group_ * kPanel * kPositions); }
  // Of weights that are transformed here.
  int64_t u_step() const { return whole_steps<T>(piece_) * kPanel + 64 / int64_t(sizeof(T)); }
  int64_t u_size() const { return of_.transformed ? 0 : whole_pages(up(kPositions * u_step(), kStep<T>)); }

  // Tiles to rows of v.
  void transform(int64_t tile, int64_t count, int64_t row, T* v, float* room) const {
    if (strips_.wanted()) return strips_.transform(tile, count, v_, row, v, reinterpret_cast<T*>(room));
    for (const int64_t end = tile + count; tile < end; ++tile, ++row) {
      const auto at = tiles_.place(tile);
      tiles_.template transform<OfX>(of_.x, at, zeros_, 0, of_.channels_1, v_, row, v);
      if (of_.channels_1 < of_.channels) {
        tiles_.template transform<OfX>(of_.x2, at, zeros_, of_.channels_1, of_.channels, v_, row, v);
      }
    }
  }

  // Multiplies a block's rows with a group of panels, and writes what is made of them.
  void multiply(int64_t group, int64_t first, int64_t rows, const T* v, float* room) const {
    const int64_t from = group * group_, panels = least(panels_ - from, group_);
    float* const m = room + u_size();
    if (of_.transformed) {
      const int64_t size = whole_steps<T>(of_.channels) * kPanel;
      const T* u = static_cast<const T*>(of_.weights) + from * kPositions * size;
      for (int p = 0; p < kPositions; ++p) {
        for (int64_t panel = 0; panel < panels; ++panel, u += size) {
          products<false>(rows, Rows<T>{v + p * v_.position(), v_.block()}, u, of_.channels,
                          sums_at(m + (panel * 2 * kPositions + p) * kVec), u + size);
        }
      }
    } else {
      T* const u = reinterpret_cast<T*>(room);
      const T* w = static_cast<const T*>(of_.weights) + from * whole_steps<T>(of_.channels) * kTaps * kPanel;
      for (int64_t c = 0; c < of_.channels; c += piece_, w += piece_ * kTaps * kPanel) {
        const int64_t channels = least(of_.channels - c, piece_);
        transform_weights<M, N>(w, channels, u, u_step());
        const T* next = w + channels * kTaps * kPanel;
        for (int p = 0; p < kPositions; ++p, next += channels * kPanel) {
          const Rows<T> tiles{v + p * v_.position() + c * v_.rows, v_.block()};
          const Sums to = sums_at(m + p * kVec);
          const T* const ahead = p < kTaps ? next : nullptr;  // a tap's weights at a position
          c == 0 ? products<false>(rows, tiles, u + p * u_step(), channels, to, ahead)
                 : products<true>(rows, tiles, u + p * u_step(), channels, to, ahead);
        }
      }
    }
    const int64_t end = least(of_.out_channels, (from + panels) * kPanel);
    int64_t image = -1;  // of the row before
    for (int64_t row = 0; row < rows; ++row) {
      const auto at = tiles_.place(first + row);
      const float* sums = m + row * group_ * 2 * kPositions * kVec;
      for (int64_t c = from * kPanel; c < end; c += kVec, sums += kPositions * kVec) {
        moments_.wanted() ? write<true>(at, c, sums, {first / v_.rows, at.image, at.image != image})
                          : write<false>(at, c, sums, {});
      }
      image = at.image;
    }
  }

  void conclude(int threads) const {
    moments_.conclude(threads, [&](int64_t first, int64_t end) {
      int64_t pixels = 0;
      for (int64_t tile = first; tile < end; ++tile) pixels += tiles_.high(tiles_.place(tile)) * tiles_.wide(tiles_.place(tile));
      return pixels;
    });
  }

  // A tile's sums of the output channels from c on to the result, with all that is added there; and to the moments.
  template <bool Counted>
  void write(typename Tiles<T, M, N>::Place at, int64_t c, const float* m, Segment of) const {
    const int64_t count = least(of_.out_channels - c, kVec), high = tiles_.high(at), wide = tiles_.wide(at);
    const auto pixel = [&](const Image& image) {
      return static_cast<T*>(image.data) + at.image * image.image + (at.y * of_.width + at.x) * image.pixel + c;
    };
    T* const y = pixel(of_.y);
    const T* const residual = of_.residual.data != nullptr ? pixel(of_.residual) : nullptr;
    const Floats bias = of_.bias != nullptr ? load_some(of_.bias + c, count) : Floats{};
    Floats half[M][R];
    for (int j = 0; j < R; ++j) {
      Floats d[S], column[M];
      for (int i = 0; i < S; ++i) d[i] = load(m + (i * R + j) * kVec);
      Winograd<M>::output(d, column);
      for (int i = 0; i < M; ++i) half[i][j] = column[i];
    }
    Floats all[M][N];
    for (int64_t i = 0; i < high; ++i) {
      Floats out[N];
      Winograd<N>::output(half[i], out);
      for (int64_t j = 0; j < wide; ++j) {
        const int64_t p = i * of_.width + j;
        Floats sum = out[j] + bias;
        if (residual != nullptr) sum += load_some(residual + p * of_.residual.pixel, count);
        if (Counted) all[i][j] = stored<T>(sum);
        if (count == kVec) {
          store(y + p * of_.y.pixel, sum);
        } else {
          store_part(y + p * of_.y.pixel, sum, count);
        }
      }
    }
    if constexpr (Counted) moments_.add(c, of, all, high, wide);
  }

  const Conv3x3& of_;
  const Tiles<T, M, N> tiles_;
  Matrices<T, M, N> v_;  // of a block
  const int64_t panels_, group_, piece_;
  const Strips<T, M, N> strips_;
  Moments moments_;
  const T* zeros_ = nullptr;
};

float number(const ConvolutionWeights& w, int64_t at) {
  return w.from_half ? as<float>(uint32_t{static_cast<const uint16_t*>(w.data)[at]} << 16) : static_cast<const float*>(w.data)[at];
}

// The taps of a panel, [taps][kPanel], of the channels of one step.
template <class T>
void gather(const ConvolutionWeights& w, int64_t panel, int64_t channel, T* to) {
  const int64_t first = panel * kPanel, lanes = least(w.out_channels - first, kPanel);
  for (int64_t tap = 0; tap < w.taps; ++tap, to += kPanel * kStep<T>) {
    float row[kStep<T>][kPanel] = {};
    for (int64_t i = 0; i < least(kStep<T>, w.channels - channel); ++i) {
      const int64_t at = (channel + i) * w.in_stride + tap / 3 * w.row_stride + tap % 3 * w.column_stride;
      for (int64_t lane = 0; lane < lanes; ++lane) row[i][lane] = number(w, at + (first + lane) * w.out_stride);
    }
    for (int64_t lane = 0; lane < kPanel; lane += kVec) {
      if constexpr (kStep<T> == 1) {
        store(to + lane, load(row[0] + lane));
      } else {
        const Words32 both = paired(load(row[0] + lane), load(row[1] + lane));
        std::memcpy(to + lane * kStep<T>, &both, sizeof both);
      }
    }
  }
}

template <class T, int M, int N>
void lay_out(const ConvolutionWeights& w, int threads) {
  const int64_t channels = whole_steps<T>(w.channels), panels = up(w.out_channels, kPanel);
  parallel(panels * (channels / kStep<T>), threads, [&](int64_t task) {
    const int64_t panel = task / (channels / kStep<T>), channel = task % (channels / kStep<T>) * kStep<T>;
    T* const to = static_cast<T*>(w.to);
    if constexpr (M == 0) {
      gather(w, panel, channel, to + (panel * channels + channel) * w.taps * kPanel);
    } else {
      constexpr int64_t kPositions = (M + 2) * (N + 2);
      const int64_t first = panel / kGroup * kGroup, in_group = least(panels - first, kGroup);
      T nine[kTaps * kPanel * kStep<T>];
      gather(w, panel, channel, nine);
      T* const u = to + (first * kPositions + (panel - first)) * channels * kPanel + channel * kPanel;
      transform_weights<M, N>(nine, kStep<T>, u, in_group * channels * kPanel);
    }
  });
}

// Calls body(number of the dtype, Count<rows>, Count<columns>) for tiles of a precision.
template <class Body>
void with_tiles(bool half, int tile, const Body& body) {
  if (half) {
    tile == 2 ? body(bf16{}, Count<2>{}, Count<2>{}) : body(bf16{}, Count<2>{}, Count<4>{});
  } else {
    tile == 2 ? body(float{}, Count<2>{}, Count<2>{}) : body(float{}, Count<4>{}, Count<4>{});
  }
}

}  // namespace

void conv3x3(const Conv3x3& of, int threads) {
  with_tiles(of.half, of.tile, [&](auto kind, auto rows, auto columns) {
    InTiles<decltype(kind), rows.value, columns.value>(of).run(threads);
  });
}

void convolution_room(const ConvolutionWeights& of, int64_t* numbers) {
  const int64_t channels = of.half ? whole_steps<bf16>(of.channels) : of.channels;
  int64_t numbers_of_taps = of.taps;
  if (of.tile != 0) {
    with_tiles(of.half, of.tile, [&](auto, auto rows, auto columns) {
      numbers_of_taps = (rows.value + 2) * (columns.value + 2);
    });
  }
  *numbers = channels * up(of.out_channels, kPanel) * kPanel * numbers_of_taps;
}

void convolution_weights(const ConvolutionWeights& of, int threads) {
  if (of.tile == 0) return of.half ? lay_out<bf16, 0, 0>(of, threads) : lay_out<float, 0, 0>(of, threads);
  with_tiles(of.half, of.tile, [&](auto kind, auto rows, auto columns) {
    lay_out<decltype(kind), rows.value, columns.value>(of, threads);
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
