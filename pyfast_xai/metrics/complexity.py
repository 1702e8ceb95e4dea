"""Complexity: how few features an attribution rests on. The model is not run."""

import torch
from torch import Tensor

from pyfast_xai.errors import InputError


def sparseness(attributions: Tensor) -> Tensor:
    """Returns the Gini index of the magnitudes (Chalasani et al., 2020): 0 is even, near 1 a single feature.

    Args:
        attributions: `[R, ...]`, of any sign.

    Returns:
        float32 (float64 for float64) `[R]`; 0 where all are zero.

    Raises:
        InputError: no rows, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.sparseness(torch.tensor([[1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]))
        tensor([0.0000, 0.7500])
    """
    shares = _shares(attributions).sort(1).values
    count = shares.shape[1]
    place = torch.arange(1, count + 1, device=shares.device, dtype=shares.dtype)
    return ((2 * place - count - 1) / count * shares).sum(1).to(_dtype(attributions))


def complexity(attributions: Tensor) -> Tensor:
    """Returns the entropy of the magnitudes as shares of their sum (Bhatt et al., 2020), in nats; low is simple.

    Args:
        attributions: `[R, ...]`, of any sign.

    Returns:
        float32 (float64 for float64) `[R]`, at most the logarithm of the number of features; 0 where all are zero.

    Raises:
        InputError: no rows, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.complexity(torch.tensor([[1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]))
        tensor([1.3863, 0.0000])
    """
    shares = _shares(attributions)
    return torch.special.entr(shares).sum(1).to(_dtype(attributions))


def effective_complexity(attributions: Tensor, *, threshold: float = 1e-5) -> Tensor:
    """Returns the number of features that matter (Nguyen and Martinez, 2020): the fewer the simpler.

    The paper counts the features whose removal the model would feel; Quantus, and this function, count magnitudes above
    a threshold.

    Args:
        attributions: `[R, ...]`, of any sign.
        threshold: a share of the largest magnitude of the row, in [0, 1).

    Returns:
        int64 `[R]`.

    Raises:
        InputError: no rows, NaN, or another threshold.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.effective_complexity(torch.tensor([[1.0, 0.01, -0.5]]), threshold=0.1)
        tensor([2])
    """
    if not 0 <= threshold < 1:
        raise InputError(f"threshold must lie in [0, 1), got {threshold}")
    sizes = _magnitudes(attributions)
    return (sizes > threshold * sizes.amax(1, keepdim=True)).sum(1)


def _dtype(attributions: Tensor) -> torch.dtype:
    return torch.promote_types(attributions.dtype, torch.float32)


def _magnitudes(attributions: Tensor) -> Tensor:
    if not isinstance(attributions, Tensor) or attributions.dim() < 2 or not attributions.numel():
        received = list(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
        raise InputError(f"attributions must have shape [R, ...] and hold at least one number, got {received}")
    flat = attributions.detach().flatten(1).abs()
    if not bool(torch.isfinite(flat).all()):
        raise InputError("attributions must be finite, got NaN or infinity")
    return flat


def _shares(attributions: Tensor) -> Tensor:
    """Returns magnitudes as shares of their sum, float64 `[R, P]`; zeros stay."""
    sizes = _magnitudes(attributions).double()
    total = sizes.sum(1, keepdim=True)
    return sizes / torch.where(total > 0, total, 1)
