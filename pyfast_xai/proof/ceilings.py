"""The rates that no kernel exceeds: copying memory, and multiplying matrices."""

import functools

import torch

from pyfast_xai.proof.clock import Clock, Time


def ceilings(clock: Clock, device: torch.device, small: bool = False) -> dict[str, tuple[float, Time]]:
    """Returns bytes per second of a copy, reads plus writes, and operations per second of a product, by dtype.

    Args:
        clock: the clock of the device.
        device: the device to measure.
        small: small enough for a CPU.
    """
    size = 2**20 if small else 2**30
    source = torch.randint(-99, 99, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    time = clock.median(lambda: target.copy_(source), rounds=30)
    rates = {"copy": (2 * size / time.median, time)}
    # On random numbers: zeros switch fewer transistors and run faster.
    size_of_matrix = 64 if small else 8192
    torch.set_float32_matmul_precision("highest")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size_of_matrix, size_of_matrix, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        time = clock.median(functools.partial(torch.mm, a, b, out=out), rounds=15)
        rates[str(dtype).removeprefix("torch.")] = (2 * size_of_matrix**3 / time.median, time)
    return rates
