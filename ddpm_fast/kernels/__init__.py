"""Triton kernels, one file per op, loaded by `ops` alone when a GPU runs them. There are none yet."""
