// Moments of what a convolution writes: mean, and sum of squares around it, of each image and channel. What a block of tiles,
// or pixels, has of an image, a segment, is summed up less a pivot, the mean of its first tile; segments are merged by Chan
// et al. 1979.
#pragma once

#include "convolution.h"
#include "group_norm.h"
#include "products.h"

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

// The sums of a segment and a vector of channels.
struct Spread {
  Floats pivot, sum{}, square{};

  void add(Floats x) {
    const Floats d = x - pivot;
    sum += d;
    square = fma(d, d, square);
  }
};

// Of images that consist of so many tiles, or pixels, each, and blocks of so many of them.
class Moments {
 public:
  Moments(const Convolution& of, int64_t each)
      : of_(of), each_(each), channels_(wanted() ? up(of.out_channels, kVec) * kVec : 0) {}

  bool wanted() const { return of_.mean != nullptr; }

  // Room for blocks of so many tiles; then where it is.
  int64_t size(int64_t rows) {
    rows_ = rows;
    return whole_pages((up(of_.images * each_, rows) + of_.images) * kNumbers * channels_);
  }
  void lie_in(float* room) { segments_ = room; }

  void set(int64_t channel, int64_t block, int64_t image, const Spread& to) const {
    float* const numbers = at(block, image) + channel;
    store(numbers, to.pivot);
    store(numbers + channels_, to.sum);
    store(numbers + 2 * channels_, to.square);
  }

  // A tile's pixels, of a vector of channels.
  template <int M, int N>
  void add(int64_t channel, Segment to, const Floats (&pixels)[M][N], int64_t high, int64_t wide) const {
    const auto each = [&](const auto& body) DDPM_INLINED {
      for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) body(pixels[i][j]);
      }
    };
    Spread now{};
    const float* const before = at(to.block, to.image) + channel;
    if (to.begins) {
      each([&](Floats x) { now.pivot += x; });
      now.pivot *= 1.0f / float(high * wide);
    } else {
      now.pivot = load(before);
    }
    each([&](Floats x) { now.add(x); });
    if (!to.begins) {  // a tile's sums are added up, as one chain of all pixels would round more
      now.sum += load(before + channels_);
      now.square += load(before + 2 * channels_);
    }
    set(channel, to.block, to.image, now);
  }

  // Those of images; pixels(first, end) tells how many pixels tiles have.
  template <class Pixels>
  void conclude(int threads, const Pixels& pixels) const {
    if (!wanted()) return;
    parallel(of_.images, worth(threads, of_.images * of_.out_channels, 1 << 10), [&](int64_t image) {
      float *mean = of_.mean + image * of_.out_channels, *squares = of_.squares + image * of_.out_channels;
      double before = 0;
      for (int64_t tile = image * each_; tile < (image + 1) * each_;) {
        const int64_t block = tile / rows_, end = least((block + 1) * rows_, (image + 1) * each_);
        const double more = double(pixels(tile, end));
        const float *pivot = at(block, image), *sum = pivot + channels_, *around = sum + channels_;
        const double share = more / (before + more);
        for (int64_t c = 0; c < of_.out_channels; ++c) {
          const double part = double(sum[c]) / more, last = before == 0 ? 0.0 : double(mean[c]);
          const double own = double(around[c]) - double(sum[c]) * part, apart = double(pivot[c]) + part - last;
          const double rest = (own < 0 ? 0.0 : own) + apart * apart * share * before;
          mean[c] = float(last + apart * share);
          squares[c] = float(before == 0 ? rest : double(squares[c]) + rest);
        }
        before += more;
        tile = end;
      }
    });
  }

 private:
  static constexpr int64_t kNumbers = 3;  // of a channel

  // Blocks and images go up together, so each pair has a place of its own.
  float* at(int64_t block, int64_t image) const { return segments_ + (block + image) * kNumbers * channels_; }

  const Convolution& of_;
  const int64_t each_, channels_;
  int64_t rows_ = 0;
  float* segments_ = nullptr;
};

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
