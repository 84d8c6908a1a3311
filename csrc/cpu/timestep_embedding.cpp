#include "kernels.h"
#include "parallel.h"

#include <cstring>

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kBlock = 64;  // frequencies worked on together, in memory that is known to be apart
constexpr double kSmall = 0x1p20;

uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

double signed_by(double x, uint64_t sign) {
  const uint64_t bits = bits_of(x) ^ sign;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// Sine and cosine of |x| < 2^20: the nearest quarter turn, and polynomials for the rest, within 1e-10.
void sin_cos(double x, float* sin, float* cos) {
  const double magic = 0x1.8p52;
  const double shifted = x * 0x1.45f306dc9c883p-1 + magic;  // the quarter turns are in the low bits
  const double turns = shifted - magic;
  const double r = (x - turns * 0x1.921fb544p0) - turns * 0x1.0b4611a626331p-34, y = r * r;
  double s = -1.0 / 39916800;
  s = s * y + 1.0 / 362880;
  s = s * y - 1.0 / 5040;
  s = s * y + 1.0 / 120;
  s = s * y - 1.0 / 6;
  s = r + r * y * s;
  double c = -1.0 / 3628800;
  c = c * y + 1.0 / 40320;
  c = c * y - 1.0 / 720;
  c = c * y + 1.0 / 24;
  c = c * y - 0.5;
  c = 1.0 + y * c;
  const uint64_t quarter = bits_of(shifted);
  const bool odd = quarter & 1;
  *sin = float(signed_by(odd ? c : s, (quarter & 2) << 62));
  *cos = float(signed_by(odd ? s : c, ((quarter + 1) & 2) << 62));
}

}  // namespace

void timestep_embedding(float* out, const double* t, int64_t num_samples, const double* frequencies, int64_t half,
                        int threads) {
  const int64_t blocks = (half + kBlock - 1) / kBlock;
  parallel(num_samples * blocks, worth(threads, num_samples * half, 1 << 13), [=](int64_t task) {
    const int64_t n = task / blocks, first = task % blocks * kBlock, rest = half - first;
    const int64_t count = rest < kBlock ? rest : kBlock;
    const double time = t[n], *const frequency = frequencies + first;
    float* const sin = out + n * 2 * half + first;
    float* const cos = sin + half;
    if (__builtin_fabs(time) < kSmall) {
      float s[kBlock], c[kBlock];
      for (int64_t i = 0; i < count; ++i) sin_cos(time * frequency[i], s + i, c + i);
      std::memcpy(sin, s, size_t(count) * sizeof(float));
      std::memcpy(cos, c, size_t(count) * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        sin[i] = float(__builtin_sin(time * frequency[i]));
        cos[i] = float(__builtin_cos(time * frequency[i]));
      }
    }
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
