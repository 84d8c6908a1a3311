// softmax(q k' scale) v of one head. Keys are transposed and values laid out in panels once an image; then blocks of
// queries meet all of them: scores, their exponentials and the sums of values stay in the second cache.
#include <cfloat>

#include "group_norm.h"
#include "kernels.h"
#include "products.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kQueries = 2 * kRows;      // of a block
constexpr int64_t kMost = int64_t{1} << 24;  // numbers in the room of all threads together, where each has an image

class Heads {
 public:
  explicit Heads(const Attention& of)
      : of_(of),
        key_panels_(up(of.tokens, kPanel)),
        value_panels_(up(of.channels, kPanel)),
        keys_(whole_pages(key_panels_ * kPanel * of.channels)),
        values_(whole_pages(value_panels_ * kPanel * of.tokens)),
        // Queries and scores are [numbers / kDepth][kQueries][kDepth], sums [kQueries][channels].
        queries_(whole_pages(kQueries * up(of.channels, kDepth) * kDepth)),
        scores_(whole_pages(kQueries * up(of.tokens, kDepth) * kDepth)),
        sums_(whole_pages(kQueries * value_panels_ * kPanel)) {}

  void run(int threads) const {
    const int64_t blocks = up(of_.tokens, kQueries), packed = keys_ + values_, own = queries_ + scores_ + sums_;
    const bool alike = of_.images % threads == 0 || of_.images > 4 * threads;
    if (alike && threads * (packed + own) <= kMost) {  // an image a thread
      float* const room = kept(threads * (packed + own));
      parallel_ranked(of_.images, threads, [&](int64_t image, int rank) {
        float* const keys = room + rank * (packed + own);
        for (int64_t p = 0; p < key_panels_; ++p) lay_out_keys(image, p, keys);
        for (int64_t p = 0; p < value_panels_; ++p) lay_out_values(image, p, keys + keys_);
        for (int64_t block = 0; block < blocks; ++block) attend(image, block * kQueries, keys, keys + packed);
      });
      return;
    }
    float* const room = kept(packed + threads * own);
    for (int64_t image = 0; image < of_.images; ++image) {
      parallel(key_panels_ + value_panels_, threads, [&](int64_t p) {
        p < key_panels_ ? lay_out_keys(image, p, room) : lay_out_values(image, p - key_panels_, room + keys_);
      });
      parallel_ranked(blocks, threads, [&](int64_t block, int rank) {
        attend(image, block * kQueries, room, room + packed + rank * own);
      });
    }
  }

 private:
  static const float* row(const Rows3& of, int64_t image, int64_t token) {
    return of.data + image * of.image + token * of.token;
  }

  // [panels of keys][channels][kPanel]; 0 beyond the last key.
  void lay_out_keys(int64_t image, int64_t panel, float* keys) const {
    const int64_t first = panel * kPanel, count = least(of_.tokens - first, kPanel);
    float* const to = keys + first * of_.channels;
    for (int64_t c = 0; c < of_.channels; c += kVec) {  // by vectors of each key, into the first cache
      const int64_t last = least(of_.channels - c, kVec);
      float some[kPanel][kVec] = {};
      for (int64_t i = 0; i < count; ++i) store(some[i], load_some(row(of_.k, image, first + i) + c, last) * of_.scale);
      for (int64_t j = 0; j < last; ++j) {
        for (int64_t i = 0; i < kPanel; ++i) to[(c + j) * kPanel + i] = some[i][j];
      }
    }
  }

  // [panels of channels][tokens][kPanel]; 0 beyond the last channel.
  void lay_out_values(int64_t image, int64_t panel, float* values) const {
    float* to = values + panel * kPanel * of_.tokens;
    for (int64_t token = 0; token < of_.tokens; ++token) {
      for (int64_t c = panel * kPanel; c < (panel + 1) * kPanel; c += kVec, to += kVec) {
        const int64_t last = of_.channels - c;
        store(to, last <= 0 ? Floats{} : load_some(row(of_.v, image, token) + c, last));
      }
    }
  }

  // A block of queries from `first` on; what it needs is at `room`.
  void attend(int64_t image, int64_t first, const float* keys, float* room) const {
    const int64_t rows = least(of_.tokens - first, kQueries), block = kQueries * kDepth;
    float *const queries = room, *const scores = queries + queries_, *const sums = scores + scores_;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < of_.channels; c += kVec) {
        const Floats q = load_some(row(of_.q, image, first + r) + c, of_.channels - c);
        store(queries + c / kDepth * block + r * kDepth + c % kDepth, q);
      }
    }
    for (int64_t p = 0; p < key_panels_; ++p) {
      const int64_t at = p * kPanel;
      products<false>(rows, Rows<float>{queries, block}, keys + at * of_.channels, of_.channels,
                      {scores + at / kDepth * block + at % kDepth, kDepth, kVec});
    }
    float share[kQueries];
    for (int64_t r = 0; r < rows; ++r) share[r] = 1.0f / exponentials(scores + r * kDepth, block);
    const int64_t width = value_panels_ * kPanel;
    for (int64_t p = 0; p < value_panels_; ++p) {
      products<false>(rows, Rows<float>{scores, block}, keys + keys_ + p * kPanel * of_.tokens, of_.tokens,
                      {sums + p * kPanel, width, kVec});
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* const out = of_.out + image * of_.out_image + (first + r) * of_.out_token;
      for (int64_t c = 0; c < of_.channels; c += kVec) {
        const Floats y = load(sums + r * width + c) * share[r];
        const int64_t last = of_.channels - c;
        last < kVec ? store_part(out + c, y, last) : store(out + c, y);
      }
    }
  }

  // A row of scores to e^(score - the largest), whose sum it returns.
  float exponentials(float* scores, int64_t block) const {
    Floats most = broadcast(-FLT_MAX);
    const auto each = [&](const auto& body) {
      for (int64_t t = 0; t < of_.tokens; t += kVec) body(scores + t / kDepth * block + t % kDepth, of_.tokens - t);
    };
    each([&](float* s, int64_t last) {
      const Floats x = load(s);
      most = larger(most, last < kVec ? chosen(x, broadcast(-FLT_MAX), last) : x);
    });
    float top = most[0];
    for (int i = 1; i < kVec; ++i) top = most[i] > top ? most[i] : top;
    Floats total = {};
    each([&](float* s, int64_t last) {
      const Power e = power<Precision::fine>((load(s) - broadcast(top)) * broadcast(kLog2E));
      const Floats x = e.scale * e.part;
      const Floats kept = last < kVec ? chosen(x, Floats{}, last) : x;
      store(s, kept);
      total += kept;
    });
    return sum(total);
  }

  // The first `count` of a, the rest of b.
  static Floats chosen(Floats a, Floats b, int64_t count) {
    for (int64_t i = count; i < kVec; ++i) a[i] = b[i];
    return a;
  }

  const Attention& of_;
  const int64_t key_panels_, value_panels_, keys_, values_, queries_, scores_, sums_;
};

}  // namespace

void attention(const Attention& of, int threads) { Heads(of).run(threads); }

}  // namespace ddpm::cpu::DDPM_ISA
