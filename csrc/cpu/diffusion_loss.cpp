#include "pieces.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

// model_out - target of a piece, in whole vectors.
void differences(const DiffusionLoss& of, const Piece& p, float* d) {
  Buffer of_model_out, of_noise, of_x_start;
  const float* const z = read(of.noise, p, of_noise, of.model_out, of.x_start);
  const float* const model_out = read(of.model_out, p, of_model_out);
  const float* const x_start = read(of.x_start, p, of_x_start);
  const Floats noise_coef = broadcast(of.noise_coef ? of.noise_coef[p.sample] : 1.0f);
  const Floats x_coef = broadcast(x_start ? of.x_coef[p.sample] : 0.0f);
  for (int64_t i = 0; i < p.count; i += kVec) {
    Floats target = load(z + i) * noise_coef;
    if (x_start) target = target + load(x_start + i) * x_coef;
    store(d + i, load(model_out + i) - target);
  }
}

// In sixteen sums side by side, which are added in order: the same bits whatever the vectors.
double sum(const float* v, int64_t count) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int l = 0; l < kSums; ++l) sums[l] += double(v[i + l]);
  }
  for (int l = 0; i + l < count; ++l) sums[l] += double(v[i + l]);
  double total = 0.0;
  for (int l = 0; l < kSums; ++l) total += sums[l];
  return total;
}

}  // namespace

void diffusion_loss(const DiffusionLoss& of, double* sums, int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t number) {
    Buffer d;
    differences(of, p, d);
    for (int64_t i = 0; i < p.count; i += kVec) {
      const Floats v = load(d + i);
      store(d + i, of.l1 ? larger(-v, v) : v * v);
    }
    sums[number] = sum(d, p.count);
  });
}

void diffusion_loss_backward(const DiffusionLoss& of, float factor, const Array& out, int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t) {
    Buffer d, of_out;
    differences(of, p, d);
    const Floats up = broadcast(factor), down = broadcast(-factor), twice = broadcast(2.0f * factor), zero = {};
    float* const to = to_write(out, p, of_out);
    for (int64_t i = 0; i < p.count; i += kVec) {
      const Floats v = load(d + i);
      store(to + i, of.l1 ? (v > zero ? up : v < zero ? down : zero) : v * twice);
    }
    written(out, p, to, of_out);
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
