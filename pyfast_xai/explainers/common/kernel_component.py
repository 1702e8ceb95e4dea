"""Kernel principal components of activations, with the kernels and the sign of scikit-learn."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kernel = Literal["sigmoid", "rbf", "poly", "cosine", "linear"]

KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda rows, gamma: (gamma * rows @ rows.mT + 1).tanh(),
    "rbf": lambda rows, gamma: (-gamma * torch.cdist(rows, rows).square()).exp(),
    "poly": lambda rows, gamma: (gamma * rows @ rows.mT + 1) ** 3,
    "cosine": lambda rows, gamma: functional.normalize(rows, dim=2) @ functional.normalize(rows, dim=2).mT,
    "linear": lambda rows, gamma: rows @ rows.mT,
}


def first_kernel_component(rows: Tensor, kernel: Kernel, gamma: float | None = None) -> Tensor:
    """Returns the projections on the first kernel principal component.

    Args:
        rows: `[R, positions, C]`, at least float32; they are centred over positions first.
        kernel: a name of `KERNELS`.
        gamma: gamma of the kernel; None for one divided by C.

    Returns:
        `[R, positions]`, of which the entry of the largest magnitude is positive.
    """
    rows = (rows - rows.mean(1, keepdim=True)).double()
    similar = KERNELS[kernel](rows, 1 / rows.shape[2] if gamma is None else gamma)
    means = similar.mean(1, keepdim=True)
    centred = similar - means - means.mT + means.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    maps = vectors[..., -1] * values[..., -1:].clamp_min(0).sqrt()
    peak = maps.gather(1, maps.abs().argmax(1, keepdim=True))
    return torch.where(peak < 0, -maps, maps)
