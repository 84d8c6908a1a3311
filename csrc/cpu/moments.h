// Moments of what a convolution writes: mean, and sum of squares around it, of each image and channel. What a block of tiles
// has of an image, a segment, is summed up less a pivot, the mean of its first tile; segments are merged by Chan et al. 1979.
#pragma once

#include "conv3x3.h"
#include "tiles.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

struct Segment {
  int64_t block, image;
  bool begins;  // with this tile
};

// As it is in memory.
template <class T>
inline Floats stored(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  T rounded[kVec];
  store(rounded, x);
  return load(rounded);
}

template <class T, int M, int N>
class Moments {
 public:
  Moments(const Conv3x3& of, const Tiles<T, M, N>& tiles)
      : of_(of), tiles_(tiles), channels_(wanted() ? up(of.out_channels, kVec) * kVec : 0) {}

  bool wanted() const { return of_.mean != nullptr; }

  // Room for blocks of so many tiles; then where it is.
  int64_t size(int64_t rows) {
    rows_ = rows;
    return whole_pages((up(tiles_.count, rows) + of_.images) * kNumbers * channels_);
  }
  void lie_in(float* room) { segments_ = room; }

  // A tile's pixels, of a vector of channels.
  void add(int64_t channel, Segment to, const Floats (&pixels)[M][N], int64_t high, int64_t wide) const {
    const auto each = [&](const auto& body) DDPM_INLINED {
      for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) body(pixels[i][j]);
      }
    };
    float *const pivots = at(to.block, to.image) + channel, *const sums = pivots + channels_;
    float* const squares = sums + channels_;
    Floats pivot{}, sum{}, square{};
    if (to.begins) {
      each([&](Floats x) { pivot += x; });
      pivot *= 1.0f / float(high * wide);
      store(pivots, pivot);
    } else {
      pivot = load(pivots);
    }
    each([&](Floats x) {
      const Floats d = x - pivot;
      sum += d;
      square = fma(d, d, square);
    });
    store(sums, to.begins ? sum : load(sums) + sum);
    store(squares, to.begins ? square : load(squares) + square);
  }

  // Those of images.
  void conclude(int threads) const {
    if (!wanted()) return;
    const int64_t each = tiles_.of_an_image();
    parallel(of_.images, worth(threads, of_.images * of_.out_channels, 1 << 10), [&](int64_t image) {
      float *mean = of_.mean + image * of_.out_channels, *squares = of_.squares + image * of_.out_channels;
      double pixels = 0;
      for (int64_t tile = image * each; tile < (image + 1) * each;) {
        const int64_t block = tile / rows_, end = least((block + 1) * rows_, (image + 1) * each);
        double more = 0;
        for (; tile < end; ++tile) more += double(tiles_.high(tiles_.place(tile)) * tiles_.wide(tiles_.place(tile)));
        const float *pivot = at(block, image), *sum = pivot + channels_, *around = sum + channels_;
        const double share = more / (pixels + more);
        for (int64_t c = 0; c < of_.out_channels; ++c) {
          const double part = double(sum[c]) / more, before = pixels == 0 ? 0.0 : double(mean[c]);
          const double own = double(around[c]) - double(sum[c]) * part, apart = double(pivot[c]) + part - before;
          const double rest = (own < 0 ? 0.0 : own) + apart * apart * share * pixels;
          mean[c] = float(before + apart * share);
          squares[c] = float(pixels == 0 ? rest : double(squares[c]) + rest);
        }
        pixels += more;
      }
    });
  }

 private:
  static constexpr int64_t kNumbers = 3;  // of a channel

  // Blocks and images go up together, so each pair has a place of its own.
  float* at(int64_t block, int64_t image) const { return segments_ + (block + image) * kNumbers * channels_; }

  const Conv3x3& of_;
  const Tiles<T, M, N>& tiles_;
  const int64_t channels_;
  int64_t rows_ = 0;
  float* segments_ = nullptr;
};

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
