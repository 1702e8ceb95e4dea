"""Kernels written in Python: `reference` is the specification, `numba` and `triton` are fast twins."""
