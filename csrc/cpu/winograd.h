// Winograd's minimal filtering F(M x M, 3 x 3): y = A' ((G g G') * (B' d B)) A, a tile d of S x S pixels to M x M of the
// result, S = M + 2, with S^2 products instead of 9 M^2. docs/convolution.md derives the matrices and their error. Here are
// those of one dimension; both dimensions take them one after the other. Gradients go through the transposed matrices.
#pragma once

#include "vec.h"

namespace ddpm::cpu {

template <int M>
struct Winograd;

// Points 0, 1, -1, infinity.
template <>
struct Winograd<2> {
  static inline void input(const Floats d[4], Floats v[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static inline void weight(const Floats g[3], Floats u[4]) {
    const Floats even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  static inline void output(const Floats m[4], Floats y[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  static inline void gradient(const Floats y[2], Floats d[4]) {
    d[0] = y[0];
    d[1] = y[0] + y[1];
    d[2] = y[0] - y[1];
    d[3] = -y[1];
  }
  static inline void weight_gradient(const Floats m[4], Floats g[3]) {
    const Floats even = (m[1] + m[2]) * 0.5f;
    g[0] = m[0] + even;
    g[1] = (m[1] - m[2]) * 0.5f;
    g[2] = even + m[3];
  }
};

// Points 0, a, -a, b, -b, infinity, with a = 2/3 and b = 1 / a.
template <>
struct Winograd<4> {
  static constexpr float a = 2.0f / 3.0f, b = 1.5f, aa = 4.0f / 9.0f, bb = 2.25f, s = 97.0f / 36.0f;
  static constexpr float of_a = float(1 / (2 * 4.0 / 9 * (4.0 / 9 - 9.0 / 4)));  // 1 / (2 a^2 (a^2 - b^2))
  static constexpr float of_b = float(1 / (2 * 9.0 / 4 * (9.0 / 4 - 4.0 / 9)));

  static inline void input(const Floats d[6], Floats v[6]) {
    const Floats even_a = fma(broadcast(-bb), d[2], d[4]), odd_a = fma(broadcast(-bb), d[1], d[3]);
    const Floats even_b = fma(broadcast(-aa), d[2], d[4]), odd_b = fma(broadcast(-aa), d[1], d[3]);
    v[0] = fma(broadcast(-s), d[2], d[0] + d[4]);
    v[1] = fma(broadcast(a), odd_a, even_a);
    v[2] = fma(broadcast(-a), odd_a, even_a);
    v[3] = fma(broadcast(b), odd_b, even_b);
    v[4] = fma(broadcast(-b), odd_b, even_b);
    v[5] = fma(broadcast(-s), d[3], d[1] + d[5]);
  }
  static inline void weight(const Floats g[3], Floats u[6]) {
    const Floats even_a = fma(broadcast(aa), g[2], g[0]) * of_a, odd_a = g[1] * (a * of_a);
    const Floats even_b = fma(broadcast(bb), g[2], g[0]) * of_b, odd_b = g[1] * (b * of_b);
    u[0] = g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  static inline void output(const Floats m[6], Floats y[4]) {
    const Floats even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = fma(broadcast(a), odd_a, b * odd_b);
    y[2] = fma(broadcast(aa), even_a, bb * even_b);
    y[3] = fma(broadcast(a * aa), odd_a, fma(broadcast(b * bb), odd_b, m[5]));
  }
  static inline void gradient(const Floats y[4], Floats d[6]) {
    const Floats even_a = fma(broadcast(aa), y[2], y[0]), odd_a = a * fma(broadcast(aa), y[3], y[1]);
    const Floats even_b = fma(broadcast(bb), y[2], y[0]), odd_b = b * fma(broadcast(bb), y[3], y[1]);
    d[0] = y[0];
    d[1] = even_a + odd_a;
    d[2] = even_a - odd_a;
    d[3] = even_b + odd_b;
    d[4] = even_b - odd_b;
    d[5] = y[3];
  }
  static inline void weight_gradient(const Floats m[6], Floats g[3]) {
    const Floats even_a = (m[1] + m[2]) * of_a, odd_a = (m[1] - m[2]) * (a * of_a);
    const Floats even_b = (m[3] + m[4]) * of_b, odd_b = (m[3] - m[4]) * (b * of_b);
    g[0] = m[0] + even_a + even_b;
    g[1] = odd_a + odd_b;
    g[2] = fma(broadcast(aa), even_a, fma(broadcast(bb), even_b, m[5]));
  }
};

}  // namespace ddpm::cpu
