"""The instruction set that the compiled kernels use on this machine."""

import platform

import torch

from pyfast_xai.ops.registry import BINARIES

# By the bytes of a vector register.
_NAMES = {64: "AVX-512", 32: "AVX2", 16: "NEON" if platform.machine() in ("aarch64", "arm64") else "SSE2"}


def instruction_set() -> str | None:
    """Returns the instruction set of the compiled kernels: "AVX-512", "AVX2", "NEON" or "SSE2".

    Each kernel is compiled for several, and the loader of the library picks one by what the processor has. None where
    this installation has no compiled library.

    Example:
        >>> from pyfast_xai import ops
        >>> ops.instruction_set()  # doctest: +SKIP
    """
    return _NAMES[torch.ops.pyfast_xai.vector_bytes()] if BINARIES["cpp"] else None
