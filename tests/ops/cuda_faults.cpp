// Kernels with a fault each, which csrc/cuda/host must notice: `faults NAME` ends with an error, `faults none` does not.
#include <cstdio>
#include <cstring>
#include <memory>

#include "machine.h"

using namespace ddpm::cuda;

namespace {

struct Task {
  const char* fault;
  float* numbers;
};

bool is(const Task& task, const char* fault) { return std::strcmp(task.fault, fault) == 0; }

void expect(bool right, const char* text) {
  if (!right) host::fault(text, block(), thread());
}

DDPM_KERNEL(64, 1) kernel(DDPM_ARGUMENT Task task) {
  auto* const room = reinterpret_cast<float*>(shared());
  copy_16(room + 4 * thread(), task.numbers);
  if (!is(task, "early")) wait_for_copies();
  expect(room[4 * thread()] == 1.0f, "a copy was read before it was there");
  sync();
  room[thread()] = float(thread());
  if (is(task, "left") && thread() == 3) return;
  if (!is(task, "race")) sync();
  expect(room[thread() ^ 1] == float(thread() ^ 1), "a number was read before it was there");
  if (is(task, "bounds")) room[4 * threads()] = 0.0f;
  if (!is(task, "cluster")) cluster_arrive();
  cluster_wait();
  if (is(task, "peer") && block() % 2 == 0) return;
  if (is(task, "arrived")) cluster_arrive();
  if (block() % 2 == 1) expect(*of_peer(room, 0) == 0.0f, "a peer has other numbers");
  expect(shuffle_xor(float(thread()), 5) == float(thread() ^ 5), "a shuffle brings another number");
  if (!is(task, "arrived")) cluster_arrive();
  cluster_wait();
}

}  // namespace

int main(int, char** arguments) {
  alignas(16) float numbers[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int i = 0; i < 2; ++i) {
    const Error error = launch(kernel, Grid{4, 2, 64, 64 * 16}, Task{arguments[1], numbers}, nullptr);
    if (error != Error{}) return 2;
  }
  std::puts("done");
  return 0;
}
