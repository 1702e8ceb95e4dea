"""The two rates that nothing on this machine exceeds: of copying memory and of multiplying and adding."""

import time
from collections.abc import Callable
from typing import Any

import torch

COPIED = 2**28  # bytes, more than caches hold
SIDE = 3072  # of the matrices
MAPS = 8, 256, 28, 28
ROUNDS = 15


def rates() -> dict[str, float]:
    """On the threads that PyTorch has now.

    Returns:
        "copy", bytes a second of a copy, read and written; "float32", multiplications and additions a second of a
        product of matrices or of a convolution: they come from two libraries, of which one may be the slower by half
        on a processor that it was not made for.
    """
    source = torch.randn(COPIED // 4)
    there = torch.empty_like(source)
    a, b = torch.randn(2, SIDE, SIDE)
    product = torch.empty_like(a)
    maps = torch.randn(MAPS).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(MAPS[1], MAPS[1], 3, 3)
    multiplied = 2 * SIDE**3 / _seconds(lambda: torch.mm(a, b, out=product))
    operations = 2 * weight[0].numel() * torch.conv2d(maps, weight).numel()
    convolved = operations / _seconds(lambda: torch.conv2d(maps, weight))
    return {
        "copy": 2 * COPIED / _seconds(lambda: there.copy_(source)),
        "float32": max(multiplied, convolved),
    }


def _seconds(call: Callable[[], Any]) -> float:
    call()
    used = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        used.append(time.perf_counter() - start)
    return min(used)  # a ceiling: what disturbs the machine only lowers the rate


if __name__ == "__main__":
    found = rates()
    print(
        f"{torch.get_num_threads()} threads: copy {found['copy'] / 1e9:.1f} GB/s, "
        f"float32 product or convolution {found['float32'] / 1e9:.0f} Gop/s"
    )
