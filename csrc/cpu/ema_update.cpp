#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

// From the nearer end, as torch's lerp: a weight of 0 or 1 gives that end.
Floats mixed(Floats average, Floats value, float weight) {
  const Floats apart = value - average;
  return weight < 0.5f ? fma(broadcast(weight), apart, average) : fma(broadcast(weight - 1.0f), apart, value);
}

void update(const Stretch& s, float weight) {
  int64_t i = 0;
  for (; i + kVec <= s.count; i += kVec) {
    store(s.average + i, mixed(load(s.average + i), load(s.value + i), weight));
  }
  if (const int64_t rest = s.count - i; rest > 0) {
    store_part(s.average + i, mixed(load_part(s.average + i, rest), load_part(s.value + i, rest), weight), rest);
  }
}

}  // namespace

void ema_update(const Stretch* stretches, int64_t count, float weight, int threads) {
  parallel(count, worth(threads, count, 1), [=](int64_t task) { update(stretches[task], weight); });
}

}  // namespace ddpm::cpu::DDPM_ISA
