"""Random numbers that are a function of a seed and their place, and so part of a CUDA graph, unlike a generator's."""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def normals(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Returns normally distributed numbers, float64 `[rows, columns]`, the same on every device up to rounding.

    From the hash of SplitMix64 (Steele, Lea and Flood, 2014) by the transform of Box and Muller.
    """
    counter = torch.arange(2 * rows * columns, device=device) + 1
    bits = _mixed(counter * _signed(_GOLDEN) + _signed(_scrambled(seed)))
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    radius, angle = uniform.view(2, rows, columns)
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)


def _mixed(bits: Tensor) -> Tensor:
    for shift, factor in _MIXING:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Returns the bits shifted to the right, with zeros from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _scrambled(seed: int) -> int:
    """Returns a scrambled seed, so that neighbouring seeds do not give the same numbers, moved by one."""
    bits = seed % 2**64
    for shift, factor in _MIXING:
        bits = (bits ^ (bits >> shift)) * factor % 2**64
    return bits


def _signed(number: int) -> int:
    """Returns the same 64 bits as an int64."""
    return number - 2**64 if number >= 2**63 else number
