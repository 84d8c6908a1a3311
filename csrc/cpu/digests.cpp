#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int kStates = 8;  // as many as hide how long a product takes
constexpr int64_t kBlock = kStates * kVecBytes;

// A step that can be undone for any given word, so that a single word that changes always shows; turned, as else the
// highest bits of several would cancel each other out, and with them the signs of numbers.
Words32 stirred(Words32 state, Words32 word) { return (((state << 13) | (state >> 19)) ^ word) * 0x9E3779B1u; }

void stir(Words32* states, const char* block) {
  for (int i = 0; i < kStates; ++i) {
    Words32 word;
    std::memcpy(&word, block + i * kVecBytes, sizeof word);
    states[i] = stirred(states[i], word);
  }
}

uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
  return x ^ (x >> 32);
}

uint64_t digest(const Bytes& of) {
  Words32 states[kStates] = {};
  int64_t at = 0;
  for (; at + kBlock <= of.count; at += kBlock) stir(states, of.data + at);
  if (at < of.count) {
    char rest[kBlock] = {};
    std::memcpy(rest, of.data + at, size_t(of.count - at));
    stir(states, rest);
  }
  uint64_t all = uint64_t(of.count);
  for (const Words32& state : states) {
    for (int i = 0; i < kVec; ++i) all = mixed(all + 0x9E3779B97F4A7C15u + state[i]);
  }
  return all;
}

}  // namespace

void digests(const Bytes* pieces, int64_t count, uint64_t* digests, int threads) {
  parallel(count, worth(threads, count, 2), [=](int64_t task) { digests[task] = digest(pieces[task]); });
}

}  // namespace ddpm::cpu::DDPM_ISA
