"""The two rates that nothing on this machine exceeds: of copying memory and of multiplying and adding."""

import time
from collections.abc import Callable
from typing import Any

import torch

COPIED = 2**28  # bytes, more than caches hold
SIDE = 3072  # of the matrices
ROUNDS = 15


def rates() -> dict[str, float]:
    """On the threads that PyTorch has now.

    Returns:
        "copy", bytes a second of a copy, read and written; "float32", multiplications and additions a second of a
        product of matrices.
    """
    source = torch.randn(COPIED // 4)
    there = torch.empty_like(source)
    a, b = torch.randn(2, SIDE, SIDE)
    product = torch.empty_like(a)
    return {
        "copy": 2 * COPIED / _seconds(lambda: there.copy_(source)),
        "float32": 2 * SIDE**3 / _seconds(lambda: torch.mm(a, b, out=product)),
    }


def _seconds(call: Callable[[], Any]) -> float:
    call()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)  # a ceiling: what disturbs the machine only lowers the rate


if __name__ == "__main__":
    found = rates()
    print(
        f"{torch.get_num_threads()} threads: copy {found['copy'] / 1e9:.1f} GB/s, "
        f"float32 product {found['float32'] / 1e9:.0f} Gop/s"
    )
