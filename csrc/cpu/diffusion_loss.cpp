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

// to = f(d), for whole vectors.
template <class Function>
void map(const Piece& p, const float* d, float* to, const Function& f) {
  for (int64_t i = 0; i < p.count; i += kVec) store(to + i, f(load(d + i)));
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
    switch (of.loss) {
      case Loss::l1: map(p, d, d, [](Floats v) { return larger(-v, v); }); break;
      case Loss::l2: map(p, d, d, [](Floats v) { return v * v; }); break;
      case Loss::huber:
        map(p, d, d, [](Floats v) {
          const Floats size = larger(-v, v);
          return size < 1.0f ? 0.5f * v * v : size - 0.5f;
        });
    }
    sums[number] = sum(d, p.count);
  });
}

void diffusion_loss_backward(const DiffusionLoss& of, const float* grad, int64_t step, double count, const Array& out,
                             int threads) {
  each_piece(of.batch, threads, [&](const Piece& p, int64_t) {
    Buffer d, of_out;
    differences(of, p, d);
    const auto factor = float(double(grad[p.sample * step]) / count);
    const Floats one = broadcast(1.0f), up = broadcast(factor), down = -up, twice = broadcast(2.0f * factor), zero = {};
    float* const to = to_write(out, p, of_out);
    switch (of.loss) {
      case Loss::l1: map(p, d, to, [&](Floats v) { return v > zero ? up : v < zero ? down : zero; }); break;
      case Loss::l2: map(p, d, to, [&](Floats v) { return v * twice; }); break;
      case Loss::huber: map(p, d, to, [&](Floats v) { return larger(-one, smaller(one, v)) * up; });
    }
    written(out, p, to, of_out);
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
