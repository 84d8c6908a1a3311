// Digests of tensors' memory, by pieces that threads share.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

namespace ddpm::cpu {

// A number for each tensor of a list; None for one whose memory isn't all its own.
inline py::list digests_of(const py::list& tensors, const Kernels& kernels, int threads) {
  constexpr int64_t kPiece = 1 << 16;  // bytes
  std::vector<Bytes> pieces;
  std::vector<int64_t> ends;  // of each tensor's pieces; -1 for None
  for (const py::handle object : tensors) {
    const Tensor tensor(object);
    const bool fit = tensor.plain() && tensor.dtype != Dtype::other && tensor.dense();
    const int64_t bytes = fit ? tensor.elements() * tensor.element_bytes() : 0;
    for (int64_t at = 0; at < bytes; at += kPiece) {
      pieces.push_back({static_cast<const char*>(tensor.data) + at, std::min(kPiece, bytes - at)});
    }
    ends.push_back(fit ? int64_t(pieces.size()) : -1);
  }
  std::vector<uint64_t> each(pieces.size());
  {
    py::gil_scoped_release unlocked;
    kernels.digests(pieces.data(), int64_t(pieces.size()), each.data(), threads);
  }
  py::list answer;
  size_t piece = 0;
  for (const int64_t end : ends) {
    uint64_t digest = 0;
    for (; int64_t(piece) < end; ++piece) digest = digest * 0x9E3779B97F4A7C15u + each[piece];
    answer.append(end < 0 ? py::object(py::none()) : py::int_(digest));
  }
  return answer;
}

}  // namespace ddpm::cpu
