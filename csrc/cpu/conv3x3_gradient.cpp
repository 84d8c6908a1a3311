// The gradient of a 3x3 convolution's weight by Winograd's filtering: what is made of a weight g, (G g G'), meets for each
// position the matrix of transformed tiles v, [tiles][C]; the result's gradient, through A, meets it from the other side,
// [tiles][K]. So the gradient of g is G' (v' d) G, with a quarter of the direct method's products.
#include "kernels.h"
#include "tiles.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kAtOnce = 256;  // tiles that are transformed at once
constexpr int64_t kChain = 32;    // and that are summed one after the other: more would round more

template <int M>
class WeightGradient {
 public:
  explicit WeightGradient(const Conv3x3Gradient& of)
      : of_(of),
        tiles_(of.images, of.height, of.width),
        v_{of.channels, least(tiles_.count, kAtOnce)},
        d_{of.out_channels, v_.rows},
        row_(up(of.out_channels, kDepth) * kDepth) {}

  void run(int threads) const {
    const int64_t outside = whole_pages((of_.channels > of_.out_channels ? of_.channels : of_.out_channels) + kVec);
    float* const zeros = kept(outside + v_.floats() + d_.floats() + kPositions * position());
    float *const v = zeros + outside, *const d = v + v_.floats(), *const sums = d + d_.floats();
    std::memset(zeros, 0, size_t(outside) * sizeof(float));
    const int64_t blocks = up(of_.channels, kDepth);
    for (int64_t first = 0; first < tiles_.count; first += v_.rows) {
      const int64_t rows = least(tiles_.count - first, v_.rows);
      parallel(rows, threads, [&](int64_t row) {
        const auto at = tiles_.place(first + row);
        tiles_.template transform<OfX>(of_.x, at, zeros, 0, of_.channels, v_, row, v);
        tiles_.template transform<OfGradient>(of_.dy, at, zeros, 0, of_.out_channels, d_, row, d);
      });
      parallel(kPositions * blocks, threads, [&](int64_t task) {
        const int64_t p = task / blocks, block = task % blocks;
        const float* const a = v + p * v_.position() + block * v_.block();
        const float* const b = d + p * d_.position();
        float* const to = sums + p * position() + block * kDepth * row_;
        multiply(a, b, block, rows, to, first == 0);
      });
    }
    parallel(up(of_.out_channels, kVec), threads, [&](int64_t k) { write(sums, k * kVec); });
  }

 private:
  static constexpr int S = M + 2, kPositions = S * S;

  // Sums are [positions][C][row].
  int64_t position() const { return whole_pages(of_.channels * row_) + 16; }

  // kDepth channels of v with all output channels; the first sums are set.
  void multiply(const float* v, const float* d, int64_t block, int64_t rows, float* to, bool first) const {
    const int64_t channels = least(of_.channels - block * kDepth, kDepth);
    for (int64_t k = 0; k < of_.out_channels; k += kPanel) {
      const float* const panel = d + k / kDepth * d_.block() + k % kDepth;
      in_parts(channels, [&](int64_t c, int64_t columns) {
        const Sums sums{to + c * row_ + k, row_, kVec};
        for (int64_t row = 0; row < rows; row += kChain) {
          const int64_t count = least(rows - row, kChain);
          const float *const a = v + c + row * kDepth, *const b = panel + row * kDepth;
          first && row == 0 ? outer_product_of<false>(columns, a, b, count, sums)
                            : outer_product_of<true>(columns, a, b, count, sums);
        }
      });
    }
  }

  // The gradients of a vector of output channels from k on.
  void write(const float* sums, int64_t k) const {
    const int64_t lanes = least(of_.out_channels - k, kVec);
    for (int64_t c = 0; c < of_.channels; ++c) {
      Floats half[3][S], g[3][3];
      for (int j = 0; j < S; ++j) {
        Floats m[S], column[3];
        for (int i = 0; i < S; ++i) m[i] = load(sums + (i * S + j) * position() + c * row_ + k);
        Winograd<M>::weight_gradient(m, column);
        for (int i = 0; i < 3; ++i) half[i][j] = column[i];
      }
      for (int i = 0; i < 3; ++i) Winograd<M>::weight_gradient(half[i], g[i]);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* const to = of_.to + ((k + lane) * of_.channels + c) * kTaps;
        for (int tap = 0; tap < kTaps; ++tap) to[tap] = g[tap / 3][tap % 3][lane];
      }
    }
  }

  const Conv3x3Gradient& of_;
  const Tiles<float, M, M> tiles_;
  const Matrices<float, M, M> v_, d_;
  const int64_t row_;
};

}  // namespace

void conv3x3_gradient(const Conv3x3Gradient& of, int threads) {
  of.tile == 2 ? WeightGradient<2>(of).run(threads) : WeightGradient<4>(of).run(threads);
}

}  // namespace ddpm::cpu::DDPM_ISA
