"""Reference of `point_density`: counts, then a Gaussian along each axis written as a matrix."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


def _gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    position = torch.arange(size, dtype=torch.float64, device=device)
    return torch.exp(-(((position[:, None] - position[None, :]) / sigma) ** 2) / 2)  # [size, size]


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    """Returns the sum of unit-height Gaussians at `points` [P], flat indices into [images, height, width]."""
    checks.point_density(points, images, height, width, sigma)
    counts = torch.bincount(points, minlength=images * height * width).double().view(images, height, width)
    vertical = _gaussian(height, sigma, points.device)
    horizontal = _gaussian(width, sigma, points.device)
    return (vertical @ counts @ horizontal).float()
