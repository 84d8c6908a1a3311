// Images that are normalised and activated before tiles are cut from them: of a rectangle of tiles at a time, in a strip of
// memory, so that hardly a pixel is activated twice, and of a few channels.
#pragma once

#include "convolution.h"
#include "tiles.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

template <class T, int M, int N>
class Strips {
 public:
  Strips(const Conv3x3& of, const Tiles<T, M, N>& tiles) : of_(of), tiles_(tiles) {}

  bool wanted() const { return of_.scale != nullptr; }

  // Pixels of so many tiles with those around them: as many rows of tiles as are complete.
  int64_t size(int64_t tiles) const {
    if (!wanted()) return 0;
    const int64_t wide = least(tiles, tiles_.across()), high = tiles / wide;
    return whole_pages(up((high * M + 2) * (wide * N + 2) * kDepth, kStep<T>));
  }

  // Tiles to rows of v; `strip` is room for so many.
  void transform(int64_t tile, int64_t count, const Matrices<T, M, N>& as, int64_t row, T* v, T* strip) const {
    switch (of_.activation) {
      case Activation::none: return transform<Activation::none>(tile, count, as, row, v, strip);
      case Activation::silu: return transform<Activation::silu>(tile, count, as, row, v, strip);
      case Activation::relu: return transform<Activation::relu>(tile, count, as, row, v, strip);
      case Activation::mish: return transform<Activation::mish>(tile, count, as, row, v, strip);
    }
  }

 private:
  template <Activation A>
  void transform(int64_t tile, int64_t count, const Matrices<T, M, N>& as, int64_t row, T* v, T* strip) const {
    const int64_t across = tiles_.across(), of_an_image = tiles_.of_an_image();
    while (count > 0) {
      const auto at = tiles_.place(tile);
      const int64_t column = tile % across, whole = least(count, of_an_image - tile % of_an_image) / across;
      const int64_t high = column == 0 && whole > 0 ? whole : 1;
      const int64_t wide = high == 1 ? least(count, across - column) : across;
      rectangle<A>(of_.x, at, high, wide, 0, of_.channels_1, as, row, v, strip);
      if (of_.channels_1 < of_.channels) {
        rectangle<A>(of_.x2, at, high, wide, of_.channels_1, of_.channels, as, row, v, strip);
      }
      tile += high * wide;
      row += high * wide;
      count -= high * wide;
    }
  }

  // high x wide tiles of the channels [first, end), which are those of this image.
  template <Activation A>
  void rectangle(const Image& image, typename Tiles<T, M, N>::Place at, int64_t high, int64_t wide, int64_t first,
                 int64_t end, const Matrices<T, M, N>& as, int64_t row, T* v, T* strip) const {
    constexpr int S = M + 2, R = N + 2;
    const int64_t rows = high * M + 2, columns = wide * N + 2;
    const T* const from = static_cast<const T*>(image.data) + at.image * image.image;
    for (int64_t c = first; c < end; c += kDepth) {
      const int64_t channels = least(end - c, kDepth);
      const float *scale = of_.scale + at.image * of_.channels + c, *shift = of_.shift + at.image * of_.channels + c;
      tiles<4>(channels, [&](int64_t lane, auto tile, int64_t last) DDPM_INLINED {
        constexpr int V = decltype(tile)::value;
        Floats x[V], a[V], b[V];
        load_tile(a, scale + lane, last);
        load_tile(b, shift + lane, last);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t y = at.y + i - 1;
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t place = at.x + j - 1;
            const bool inside = y >= 0 && y < of_.height && place >= 0 && place < of_.width;
            if (inside) {
              load_tile(x, from + (y * of_.width + place) * image.pixel + c - first + lane, last);
              for (int k = 0; k < V; ++k) x[k] = activate<A, kPrecision<T>>(fma(x[k], a[k], b[k]));
            } else {
              for (int k = 0; k < V; ++k) x[k] = Floats{};
            }
            store_tile(strip + (i * columns + j) * kDepth + lane, x, last);
          }
        }
      });
      for (int64_t tile = 0; tile < high * wide; ++tile) {
        const T* pixel[S][R];
        for (int i = 0; i < S; ++i) {
          for (int j = 0; j < R; ++j) {
            pixel[i][j] = strip + ((tile / wide * M + i) * columns + tile % wide * N + j) * kDepth;
          }
        }
        tiles_.template spread<OfX>(pixel, c, c + channels, as, row + tile, v);
      }
    }
  }

  const Conv3x3& of_;
  const Tiles<T, M, N>& tiles_;
};

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
