"""Triton kernels, one file per op, loaded by `ops` alone when a GPU (or Triton's interpreter) runs them."""
