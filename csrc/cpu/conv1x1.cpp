// 1x1 convolutions: products of pixels and weights. The channels of a block of pixels are laid as products read them, and
// stay in the second cache while all weights go by.
#include "kernels.h"
#include "moments.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kPixels = 64;  // of a block

template <class T>
class ByPixels {
 public:
  explicit ByPixels(const Convolution& of)
      : of_(of),
        each_(of.height * of.width),
        count_(of.images * each_),
        panels_(up(of.out_channels, kPanel)),
        panel_(up(of.channels, kStep<T>) * kStep<T> * kPanel),
        moments_(of, each_) {}

  void run(int threads) {
    // Of few pixels each thread takes some of the output channels, and so reads a part of the weights only.
    const bool few = count_ < 2 * kRows * threads && panels_ >= threads;
    const int64_t shares = few ? threads : 1;
    rows_ = up(count_, few ? up(count_, kPixels) : up(up(count_, kPixels), threads) * threads);
    const int64_t blocks = up(count_, rows_), pixels = whole_pages(up(up(of_.channels, kDepth) * block(), kStep<T>));
    const int64_t own = pixels + whole_pages(rows_ * kPanel), moments = moments_.size(rows_);
    float* const room = kept(moments + threads * own);
    moments_.lie_in(room);
    parallel_ranked(shares * blocks, threads, [&](int64_t task, int rank) {
      float* const v = room + moments + rank * own;
      const int64_t share = task / blocks, number = task % blocks;
      multiply(number, panels_ * share / shares, panels_ * (share + 1) / shares, reinterpret_cast<T*>(v), v + pixels);
    });
    moments_.conclude(threads, [](int64_t first, int64_t end) { return end - first; });
  }

 private:
  // Pixels of a block that are one image's.
  struct Part {
    int64_t image, pixel, row, count;
  };

  template <class Body>
  void each_part(int64_t number, const Body& body) const {
    for (int64_t at = number * rows_, end = least(at + rows_, count_), row = 0; at < end;) {
      const Part part{at / each_, at % each_, row, least(each_ - at % each_, end - at)};
      body(part);
      at += part.count;
      row += part.count;
    }
  }

  static T* pixel(const Image& image, const Part& at) {
    return static_cast<T*>(image.data) + at.image * image.image + at.pixel * image.pixel;
  }

  int64_t block() const { return rows_ * kDepth; }

  // The channels [first, end), which are those of this image, to v, [channels / kDepth][rows][kDepth].
  void lay_out(const Image& image, const Part& part, int64_t first, int64_t end, T* v) const {
    const T* from = pixel(image, part);
    for (int64_t row = part.row; row < part.row + part.count; ++row, from += image.pixel) {
      for (int64_t c = first, count; c < end; c += count) {
        count = least(end - c, kDepth - c % kDepth);
        std::memcpy(v + c / kDepth * block() + row * kDepth + c % kDepth, from + c - first, size_t(count) * sizeof(T));
      }
      if (end == of_.channels && end % kStep<T> != 0) v[end / kDepth * block() + row * kDepth + end % kDepth] = T{};
    }
  }

  // A block with the panels [from, to).
  void multiply(int64_t number, int64_t from, int64_t to, T* v, float* sums) const {
    each_part(number, [&](const Part& part) {
      lay_out(of_.x, part, 0, of_.channels_1, v);
      if (of_.channels_1 < of_.channels) lay_out(of_.x2, part, of_.channels_1, of_.channels, v);
    });
    const int64_t rows = least(rows_, count_ - number * rows_);
    const T* u = static_cast<const T*>(of_.weights) + from * panel_;
    for (int64_t panel = from; panel < to; ++panel, u += panel_) {
      products<false>(rows, Rows<T>{v, block()}, u, of_.channels, {sums, kPanel, kVec}, u + panel_);
      for (int64_t lane = 0; lane < kPanel && panel * kPanel + lane < of_.out_channels; lane += kVec) {
        const int64_t channel = panel * kPanel + lane;
        each_part(number, [&](const Part& part) {
          moments_.wanted() ? write<true>(number, part, channel, sums + lane) : write<false>(number, part, channel, sums + lane);
        });
      }
    }
  }

  // Sums of a vector of output channels to the result, with all that is added there; and to the moments.
  template <bool Counted>
  void write(int64_t number, const Part& part, int64_t channel, const float* sums) const {
    const int64_t count = least(of_.out_channels - channel, kVec);
    const Floats bias = of_.bias != nullptr ? load_some(of_.bias + channel, count) : Floats{};
    T* y = pixel(of_.y, part) + channel;
    const T* residual = of_.residual.data != nullptr ? pixel(of_.residual, part) + channel : nullptr;
    Spread spread{};
    for (int64_t row = 0; row < part.count; ++row, y += of_.y.pixel) {
      Floats sum = load(sums + (part.row + row) * kPanel) + bias;
      if (residual != nullptr) sum += load_some(residual + row * of_.residual.pixel, count);
      if (Counted) {
        const Floats x = stored<T>(sum);
        if (row == 0) spread.pivot = x;
        spread.add(x);
      }
      count == kVec ? store(y, sum) : store_part(y, sum, count);
    }
    if (Counted) moments_.set(channel, number, part.image, spread);
  }

  const Convolution& of_;
  const int64_t each_, count_;    // pixels of an image, and in all
  const int64_t panels_, panel_;  // and numbers of a panel's weights
  int64_t rows_ = 0;              // of a block
  Moments moments_;
};

}  // namespace

void conv1x1(const Convolution& of, int threads) { of.half ? ByPixels<bf16>(of).run(threads) : ByPixels<float>(of).run(threads); }

}  // namespace ddpm::cpu::DDPM_ISA
