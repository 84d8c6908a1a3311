"""Benchmarks of ddpm_fast against the strongest settings of its peers, and the original formulation they start from."""
