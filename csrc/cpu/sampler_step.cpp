#include "pieces.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

// One piece, in whole vectors. A vector is read before it is written: the results may lie where x and hist do.
void step(const SamplerStep& of, int64_t count, const float* x, const float* model_out, const float* hist,
          const float* z, float* x0_out, float* out) {
  const Floats p_x = broadcast(of.p_x), p_m = broadcast(of.p_m), c_x = broadcast(of.c_x), c_0 = broadcast(of.c_0);
  const Floats c_h = broadcast(of.c_h), c_z = broadcast(of.c_z), low = broadcast(-of.clip), high = broadcast(of.clip);
  for (int64_t i = 0; i < count; i += kVec) {
    const Floats x_i = load(x + i);
    Floats x0 = p_x * x_i + p_m * load(model_out + i);
    x0 = larger(low, smaller(high, x0));  // NaN stays
    Floats next = c_x * x_i + c_0 * x0;
    if (hist) next = next + c_h * load(hist + i);
    if (z) next = next + c_z * load(z + i);
    if (x0_out) store(x0_out + i, x0);
    store(out + i, next);
  }
}

// e^x to 1 ulp, with the same bits on every instruction set, which `power` has not: 2^n e^r, n the integer next to
// x / log 2, and on [-log 2 / 2, log 2 / 2] the polynomial of least relative error.
Floats exponential(Floats x) {
  const Floats held = larger(broadcast(-104.0f), smaller(broadcast(89.0f), x));  // 0 and inf at the ends; NaN stays
  const Floats magic = broadcast(0x1.8p23f), shifted = held * kLog2E + magic, n = shifted - magic;
  const Floats r = (held - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // log 2 in two parts: the first product is exact
  Floats q = r * 0x1.6a23cep-10f + 0x1.123a20p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Ints power = (Ints)shifted - (Ints)magic, half = power >> 1;  // in two halves: 2^128 and 2^-150 are no floats
  return (1.0f + (r + r * r * q)) * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
}

// exp(c_v v) z, which may go where z lies.
const float* scaled(const float* z, const float* v, float c_v, int64_t count, float* out) {
  const Floats factor = broadcast(c_v);
  for (int64_t i = 0; i < count; i += kVec) store(out + i, exponential(factor * load(v + i)) * load(z + i));
  return out;
}

}  // namespace

void sampler_step(const SamplerStep& of, int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t) {
    Buffer of_x, of_model_out, of_hist, of_noise, of_variance, of_x0, of_out;
    const float* z = read(of.noise, p, of_noise, of.variance, of.x, of.model_out, of.hist, of.x0_out, of.out);
    if (const float* v = read(of.variance, p, of_variance)) z = scaled(z, v, of.c_v, p.count, of_noise);
    const float* const x = read(of.x, p, of_x);
    const float* const model_out = read(of.model_out, p, of_model_out);
    const float* const hist = read(of.hist, p, of_hist);
    float* const x0_out = to_write(of.x0_out, p, of_x0);
    float* const out = to_write(of.out, p, of_out);
    step(of, p.count, x, model_out, hist, z, x0_out, out);
    if (x0_out) written(of.x0_out, p, x0_out, of_x0);
    written(of.out, p, out, of_out);
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
