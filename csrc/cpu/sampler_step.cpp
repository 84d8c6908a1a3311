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

}  // namespace

void sampler_step(const SamplerStep& of, int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t) {
    Buffer of_x, of_model_out, of_hist, of_noise, of_x0, of_out;
    const float* const z = read(of.noise, p, of_noise, of.x, of.model_out, of.hist, of.x0_out, of.out);
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
