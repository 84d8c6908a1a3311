"""Launchers of the kernels in csrc/cuda, a file an op; none is imported before an op first runs."""
