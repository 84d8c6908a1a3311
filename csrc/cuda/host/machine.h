// A GPU as a C++ program, for tests: kernels run on the CPU as they are. Each thread of a block is a fiber that runs until a
// barrier or a shuffle; a fault in how threads meet ends the process. In some launches the last thread runs first: a missing
// barrier shows in one of the two orders.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define DDPM_DEVICE inline
#define DDPM_BOTH inline
#define DDPM_KERNEL(threads, blocks) void
#define DDPM_ARGUMENT const

namespace ddpm::cuda {

using Stream = void*;
enum Error : int { kNone, kTooMuchShared, kBadGrid };
constexpr const char* kDeviceType = "cpu";

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr int kShared = 227 << 10;  // of a block on sm_90

[[noreturn]] inline void fault(const char* text, int block, int thread) {
  std::fprintf(stderr, "kernel fault: %s (block %d, thread %d)\n", text, block, thread);
  std::fflush(stderr);
  std::abort();
}

enum class Waits { no, block, warp, cluster, turn, done };  // turn: until the other blocks have run

struct Block;

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake = nullptr;  // AddressSanitizer's second stack
  Block* block = nullptr;
  int thread = 0;
  Waits waits = Waits::no;
  int arrived = 0, passed = 0;  // at the cluster's barrier, how often
  float given = 0, got = 0;  // in a shuffle
  int lanes = 0;
  std::vector<std::pair<void*, const void*>> copies;  // under way
};

struct Block {
  int index = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  std::vector<Block*>* cluster = nullptr;
};

// The one that runs, and where its threads go back to.
struct Machine {
  Fiber* now = nullptr;
  ucontext_t home;
  void* home_fake = nullptr;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  int threads = 0;
  unsigned launches = 0;
  std::vector<std::unique_ptr<char[]>> stacks;  // of all threads that there have been at once
  std::function<void()> kernel;
};

inline Machine& machine() {
  static Machine the;
  return the;
}

inline void switch_to(Fiber& fiber) {
  auto& m = machine();
  m.now = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.home_fake, fiber.stack, kStack);
#endif
  swapcontext(&m.home, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.home_fake, nullptr, nullptr);
#endif
}

inline void switch_home(Fiber& fiber) {
  auto& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.waits == Waits::done ? nullptr : &fiber.fake, m.home_stack, m.home_size);
#endif
  swapcontext(&fiber.context, &m.home);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake, &m.home_stack, &m.home_size);
#endif
}

inline void entry() {
  auto& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.home_stack, &m.home_size);
#endif
  m.kernel();
  Fiber& fiber = *m.now;
  if (fiber.arrived != fiber.passed) fault("left between a cluster's arrive and wait", fiber.block->index, fiber.thread);
  fiber.waits = Waits::done;
  switch_home(fiber);
}

inline void wait(Waits what) {
  Fiber& fiber = *machine().now;
  fiber.waits = what;
  switch_home(fiber);
}

inline bool all(const Block& block, Waits what, int first, int count) {
  for (int i = first; i < first + count; ++i) {
    if (block.fibers[size_t(i)]->waits != what) return false;
  }
  return true;
}

inline void release(Block& block, int first, int count) {
  for (int i = first; i < first + count; ++i) block.fibers[size_t(i)]->waits = Waits::no;
}

// Lets a warp run as far as it comes without the others; whether one of its threads ran.
inline bool run_warp(Block& block, int first, int order) {
  bool ran = false;
  for (;;) {
    for (int i = 0; i < kWarp; ++i) {
      Fiber& fiber = *block.fibers[size_t(first + (order < 0 ? kWarp - 1 - i : i))];
      if (fiber.waits != Waits::no) continue;
      switch_to(fiber);
      ran = true;
    }
    if (!all(block, Waits::warp, first, kWarp)) return ran;
    for (int i = 0; i < kWarp; ++i) {
      Fiber& fiber = *block.fibers[size_t(first + i)];
      fiber.got = block.fibers[size_t(first + (i ^ fiber.lanes))]->given;
    }
    release(block, first, kWarp);
  }
}

// Lets a block run as far as it comes without the others, its warps one after the other; whether a thread ran.
inline bool run_alone(Block& block, int order) {
  const int count = int(block.fibers.size());
  bool ran = false, again = true;
  while (again) {
    for (int i = 0; i < count; i += kWarp) ran |= run_warp(block, order < 0 ? count - kWarp - i : i, order);
    again = all(block, Waits::block, 0, count);
    if (again) release(block, 0, count);
  }
  // What has ended is gone: a peer that still reads it would read another block's.
  if (all(block, Waits::done, 0, count)) ASAN_POISON_MEMORY_REGION(block.shared.get(), block.shared_bytes);
  return ran;
}

// Lets those go on that wait for a cluster whose threads have all arrived, though not all wait.
inline void release_cluster(std::vector<Block*>& cluster) {
  int least = cluster[0]->fibers[0]->arrived;
  for (const Block* block : cluster) {
    for (const auto& fiber : block->fibers) least = fiber->arrived < least ? fiber->arrived : least;
  }
  for (const Block* block : cluster) {
    for (const auto& fiber : block->fibers) {
      if (fiber->waits == Waits::cluster && fiber->arrived <= least) fiber->waits = Waits::no;
    }
  }
}

inline void run_cluster(std::vector<Block*>& cluster, int order) {
  for (bool done = false; !done;) {
    bool ran = false;
    for (size_t i = 0; i < cluster.size(); ++i) {
      for (bool again = true; again; ran |= again) {
        release_cluster(cluster);
        again = run_alone(*cluster[order < 0 ? cluster.size() - 1 - i : i], order);
      }
    }
    done = true;
    for (Block* block : cluster) {
      for (const auto& fiber : block->fibers) {
        if (fiber->waits == Waits::done) continue;
        done = false;
        if (fiber->waits == Waits::turn) fiber->waits = Waits::no;
        if (!ran) fault("waits for threads that don't come", block->index, fiber->thread);
      }
    }
  }
}

inline void start(Block& block, int index) {
  block.index = index;
  block.shared.reset(new unsigned char[block.shared_bytes]);
  std::memset(block.shared.get(), 0xFF, block.shared_bytes);  // no numbers
  for (const auto& fiber : block.fibers) {
    fiber->waits = Waits::no;
    fiber->arrived = fiber->passed = 0;
    getcontext(&fiber->context);
    ASAN_UNPOISON_MEMORY_REGION(fiber->stack, kStack);  // what its last thread left there
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
  }
}

}  // namespace host

inline int thread() { return host::machine().now->thread; }
inline int threads() { return host::machine().threads; }
inline int block() { return host::machine().now->block->index; }
inline unsigned char* shared() { return host::machine().now->block->shared.get(); }
template <class T>
T* global(T* at) {
  return at;
}

inline void sync() { host::wait(host::Waits::block); }

inline float shuffle_xor(float v, int lanes) {
  host::Fiber& fiber = *host::machine().now;
  fiber.given = v;
  fiber.lanes = lanes;
  host::wait(host::Waits::warp);
  return fiber.got;
}

inline void cluster_arrive() {
  host::Fiber& fiber = *host::machine().now;
  if (fiber.arrived != fiber.passed) host::fault("arrives twice", fiber.block->index, fiber.thread);
  ++fiber.arrived;
  host::wait(host::Waits::turn);
}

inline void cluster_wait() {
  host::Fiber& fiber = *host::machine().now;
  if (fiber.arrived == fiber.passed) host::fault("waits without having arrived", fiber.block->index, fiber.thread);
  host::wait(host::Waits::cluster);
  ++fiber.passed;
}

inline const float* of_peer(const float* mine, int rank) {
  host::Block& block = *host::machine().now->block;
  if (rank < 0 || size_t(rank) >= block.cluster->size()) host::fault("no such peer", block.index, rank);
  const auto offset = reinterpret_cast<const unsigned char*>(mine) - block.shared.get();
  return reinterpret_cast<const float*>((*block.cluster)[size_t(rank)]->shared.get() + offset);
}

// Until it is waited for, what a copy brings is no number.
inline void copy_16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    host::fault("copies what is not aligned", block(), thread());
  }
  std::memset(to, 0xFF, 16);
  host::machine().now->copies.emplace_back(to, from);
}

inline void wait_for_copies() {
  auto& copies = host::machine().now->copies;
  for (const auto& [to, from] : copies) std::memcpy(to, from, 16);
  copies.clear();
}

inline float power_of_2(float x) { return exp2f(x); }
inline float quotient(float a, float b) { return a / b; }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

inline uint32_t to_bf16(float low, float high) {
  const auto one = [](float v) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return v == v ? (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16 : 0x7FFF;
  };
  return one(low) | one(high) << 16;
}

inline uint32_t to_float16(float low, float high) {
  const _Float16 both[2] = {_Float16(low), _Float16(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}

inline float from_float16(uint16_t bits) {
  _Float16 v;
  std::memcpy(&v, &bits, sizeof v);
  return float(v);
}

template <class Arguments>
Error launch(void (*kernel)(Arguments), const Grid& grid, const Arguments& arguments, Stream) {
  if (grid.shared > size_t{host::kShared}) return kTooMuchShared;
  if (grid.blocks < 1 || grid.blocks > 0x7FFFFFFF || grid.cluster < 1 || grid.cluster > 8 ||
      grid.blocks % grid.cluster != 0 || grid.threads < 1 || grid.threads > 1024 || grid.threads % host::kWarp != 0) {
    return kBadGrid;
  }
  auto& m = host::machine();
  // Of two equal sequences of launches, each has another order the second time (Thue and Morse).
  const int order = __builtin_parity(m.launches++) != 0 ? -1 : 1;
  m.threads = grid.threads;
  m.kernel = [&] { kernel(arguments); };
  std::vector<host::Block> all(static_cast<size_t>(grid.cluster));
  std::vector<host::Block*> cluster;
  size_t used = 0;
  for (auto& block : all) {
    block.fibers.resize(size_t(grid.threads));
    for (int i = 0; i < grid.threads; ++i) {
      block.fibers[size_t(i)] = std::make_unique<host::Fiber>();
      block.fibers[size_t(i)]->block = &block;
      block.fibers[size_t(i)]->thread = i;
      if (used == m.stacks.size()) m.stacks.emplace_back(new char[host::kStack]);
      block.fibers[size_t(i)]->stack = m.stacks[used++].get();
    }
    block.shared_bytes = grid.shared;
    block.cluster = &cluster;
    cluster.push_back(&block);
  }
  for (int64_t first = 0; first < grid.blocks; first += grid.cluster) {
    for (size_t i = 0; i < all.size(); ++i) host::start(all[i], int(first) + int(i));
    host::run_cluster(cluster, order);
    for (auto& block : all) ASAN_UNPOISON_MEMORY_REGION(block.shared.get(), grid.shared);
  }
  return kNone;
}

inline Error limits(int, Limits& to) {
  to = {9, 132, host::kShared};
  return kNone;
}

inline Error use(int) { return kNone; }
inline const char* text(Error error) {
  return error == kTooMuchShared ? "more shared memory than a block may have" : error == kBadGrid ? "a bad grid" : "none";
}

}  // namespace ddpm::cuda
