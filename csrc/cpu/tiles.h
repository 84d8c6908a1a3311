// Tiles of images, and what Winograd's filtering makes of them: for each position of a transformed tile a matrix of tiles
// and channels.
#pragma once

#include "group_norm.h"
#include "products.h"
#include "winograd.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kTaps = 9;

// What is transformed: x, in tiles that overlap, or the gradient of the result, in tiles that don't.
struct OfX {
  static constexpr int kBefore = 1;  // pixels before the tile of the result
  template <int M>
  static constexpr int kSide = M + 2;
  template <int M>
  static inline void one(const Floats* d, Floats* v) {
    Winograd<M>::input(d, v);
  }
};

struct OfGradient {
  static constexpr int kBefore = 0;
  template <int M>
  static constexpr int kSide = M;
  template <int M>
  static inline void one(const Floats* d, Floats* v) {
    Winograd<M>::gradient(d, v);
  }
};

// Where transformed tiles lie: [positions][channels / kDepth][rows][kDepth], a row a tile. The line between positions keeps
// their equal places from falling together in a cache.
template <class T, int M, int N>
struct Matrices {
  static constexpr int kPositions = (M + 2) * (N + 2);
  int64_t channels, rows;

  int64_t block() const { return rows * kDepth; }
  int64_t position() const { return up(channels, kDepth) * block() + 64 / int64_t(sizeof(T)); }
  int64_t floats() const { return whole_pages(up(kPositions * position(), kStep<T>)); }
};

// The images' tiles of M x N pixels of the result.
template <class T, int M, int N>
class Tiles {
 public:
  static constexpr int S = M + 2, R = N + 2;  // rows and columns of a transformed tile

  Tiles(int64_t images, int64_t height, int64_t width)
      : height_(height), width_(width), down_(up(height, M)), across_(up(width, N)), count(images * down_ * across_) {}

  struct Place {
    int64_t image, y, x;
  };
  Place place(int64_t tile) const { return {tile / (down_ * across_), tile / across_ % down_ * M, tile % across_ * N}; }

  // The channels [first, end), which are those of this image, to a row. Pixels outside are read from `zeros`.
  template <class Of>
  void transform(const Image& image, Place at, const T* zeros, int64_t first, int64_t end, Matrices<T, M, N> as, int64_t row,
                 T* to) const {
    constexpr int P = Of::template kSide<M>, Q = Of::template kSide<N>;
    const T* pixel[P][Q];
    for (int i = 0; i < P; ++i) {
      for (int j = 0; j < Q; ++j) {
        const int64_t y = at.y + i - Of::kBefore, x = at.x + j - Of::kBefore;
        const bool inside = y >= 0 && y < height_ && x >= 0 && x < width_;
        pixel[i][j] =
            inside ? static_cast<const T*>(image.data) + at.image * image.image + (y * width_ + x) * image.pixel : zeros;
      }
    }
    spread<Of>(pixel, first, end, as, row, to);
  }

  // The same of pixels that lie anywhere, at their first channel.
  template <class Of, int P, int Q>
  static void spread(const T* const (&pixel)[P][Q], int64_t first, int64_t end, Matrices<T, M, N> as, int64_t row, T* to) {
    const int64_t step = as.position();
    for (int64_t c = first, room; c < end; c += room) {
      T* const there = to + c / kDepth * as.block() + row * kDepth + c % kDepth;
      room = least(kDepth - c % kDepth, kVec);
      const int64_t count = least(end - c, room);
      if (count == kVec) {
        both<Of>(pixel, c - first, [](const T* p) { return load(p); },
                 [=](int p, Floats x) { store(there + p * step, x); });
      } else {
        both<Of>(pixel, c - first, [=](const T* p) { return load_part(p, count); },
                 [=](int p, Floats x) { store_part(there + p * step, x, room); });
      }
    }
    if (end == as.channels && end % kStep<T> != 0) {  // what the last channel's pair lacks
      T* const there = to + end / kDepth * as.block() + row * kDepth + end % kDepth;
      for (int p = 0; p < S * R; ++p) there[p * step] = T{};
    }
  }

 private:
  // Columns, then rows.
  template <class Of, int P, int Q, class Load, class Store>
  DDPM_INLINED static inline void both(const T* const (&pixel)[P][Q], int64_t c, const Load& load, const Store& store) {
    Floats half[S][Q];
    for (int j = 0; j < Q; ++j) {
      Floats d[P], column[S];
      for (int i = 0; i < P; ++i) d[i] = load(pixel[i][j] + c);
      Of::template one<M>(d, column);
      for (int i = 0; i < S; ++i) half[i][j] = column[i];
    }
    for (int i = 0; i < S; ++i) {
      Floats v[R];
      Of::template one<N>(half[i], v);
      for (int j = 0; j < R; ++j) store(i * R + j, v[j]);
    }
  }

  int64_t height_, width_, down_, across_;

 public:
  int64_t count;

  int64_t across() const { return across_; }
  int64_t of_an_image() const { return down_ * across_; }
  // Of a tile's pixels those that are the image's.
  int64_t high(Place at) const { return least(height_ - at.y, M); }
  int64_t wide(Place at) const { return least(width_ - at.x, N); }
};

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
