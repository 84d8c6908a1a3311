#include "pieces.h"

namespace ddpm::cpu::DDPM_ISA {

void q_sample(const QSample& of, int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t) {
    Buffer of_x_start, of_noise, of_out;
    const int64_t t = of.t[p.sample];
    const Floats signal = broadcast(of.signal[t]), sigma = broadcast(of.sigma[t]);
    const float* const z = read(of.noise, p, of_noise, of.x_start, of.out);
    const float* const x_start = read(of.x_start, p, of_x_start);
    float* const out = to_write(of.out, p, of_out);
    for (int64_t i = 0; i < p.count; i += kVec) store(out + i, signal * load(x_start + i) + sigma * load(z + i));
    written(of.out, p, out, of_out);
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
