// Threads: the OpenMP that torch has loaded.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ddpm::cpu {

// How many threads are worth their start, with at least `grain` units of work each.
static inline int worth(int threads, int64_t work, int64_t grain) {
  const int64_t most = work / grain;
  return most < threads ? (most < 1 ? 1 : int(most)) : threads;
}

// Calls body(task, rank) for every task in [0, tasks); each thread, of that rank, gets a contiguous range of them.
template <class Body>
static inline void parallel_ranked(int64_t tasks, [[maybe_unused]] int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t members = omp_get_num_threads(), rank = omp_get_thread_num();
      const int64_t share = tasks / members, more = tasks % members;
      const int64_t first = rank * share + (rank < more ? rank : more), last = first + share + (rank < more);
      for (int64_t task = first; task < last; ++task) body(task, int(rank));
    }
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

template <class Body>
static inline void parallel(int64_t tasks, int threads, const Body& body) {
  parallel_ranked(tasks, threads, [&](int64_t task, int) { body(task); });
}

}  // namespace ddpm::cpu
