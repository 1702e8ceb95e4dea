"""CPU kernels compiled by Numba on their first call, for installations without the compiled library."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_running = threading.Lock()


def _free() -> None:
    global _running
    _running = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free)  # no thread of the parent that held it lives in the child


def one_thread(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let one Python thread at a time into parallel kernels: Numba's workqueue layer aborts the process otherwise."""

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        with _running:
            return kernel(*args)

    return guarded


def array(tensor: Tensor) -> np.ndarray:
    """Returns the memory of a CPU tensor as an array; a half-precision tensor is copied to float32, as NumPy needs."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.numpy(force=True)
