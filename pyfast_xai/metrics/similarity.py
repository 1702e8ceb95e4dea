"""Similarities of two batches of maps, one number an image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.errors import InputError

Similarity = Callable[[Tensor, Tensor], Tensor]


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of the angle between maps of two batches `[N, ...]`, `[N]`; 0 where one is zero.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.cosine_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.])
    """
    a, b = flat(a, b)
    return (unit(a) * unit(b)).sum(1)


def unit(values: Tensor) -> Tensor:
    """Returns the rows of `[N, P]` at length 1; one that is zero stays so."""
    # Scaled first: squares of small gradients would vanish.
    largest = values.abs().amax(1, keepdim=True)
    return functional.normalize(values / torch.where(largest > 0, largest, 1), dim=1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Spearman's correlation of the ranks of two batches of maps `[N, ...]`, `[N]`; 0 where one is constant.

    Equal values share the mean of their ranks.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]])).round()
        tensor([1.])
    """
    a, b = flat(a, b)
    return (unit(ranks(a)) * unit(ranks(b))).sum(1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Pearson's correlation of two batches `[N, ...]`, `[N]`; 0 where one is constant.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 3.0, 1.0]])).round()
        tensor([-1.])
    """
    a, b = (_centered(values) for values in flat(a, b))
    return (unit(a) * unit(b)).sum(1)


def _centered(values: Tensor) -> Tensor:
    """Returns rows `[N, P]` less their means; constant ones are exactly zero."""
    low, high = values.aminmax(dim=1, keepdim=True)
    return torch.where(low == high, 0, values - values.mean(1, keepdim=True))


def ranks(values: Tensor) -> Tensor:
    """Ranks in each row of `[N, P]`, around 0 and within -1..1."""
    ordered, order = values.sort(1)
    count = values.shape[1]
    place = torch.arange(count, device=values.device).expand_as(order)
    new = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 1), value=True)
    first = torch.where(new[:, :-1], place, 0).cummax(1).values
    last = torch.where(new[:, 1:], place, count).flip(1).cummin(1).values.flip(1)
    middle = (first + last - (count - 1)).to(values.dtype) / count
    return torch.zeros_like(values).scatter_(1, order, middle)


def ssim(a: Tensor, b: Tensor, *, data_range: float = 1.0, sigma: float = 1.5) -> Tensor:
    """Returns the structural similarity of two batches of maps `[N, H, W]`, `[N]` (Wang et al., 2004, Eq. 13).

    Means and variances are those of a Gaussian window of 11 pixels for `sigma` 1.5, taken where it lies within the map.

    Args:
        a: maps.
        b: maps to compare with them.
        data_range: between the least and the largest possible value.
        sigma: sigma of the window, in pixels.

    Raises:
        InputError: other shapes, NaN, or maps smaller than the window.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> maps = torch.rand(2, 32, 32)
        >>> metrics.ssim(maps, maps)
        tensor([1., 1.])
    """
    reach = int(3.5 * sigma + 0.5)
    if a.shape != b.shape or a.dim() != 3:
        raise InputError(f"a and b must both have shape [N, H, W], got {list(a.shape)} and {list(b.shape)}")
    if min(a.shape[1:]) < 2 * reach + 1:
        least = 2 * reach + 1
        raise InputError(f"a and b must be at least {least} x {least} for sigma {sigma}, got {list(a.shape[1:])}")
    x, y = (flat.view(a.shape) for flat in flat(a, b))
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (taps / sigma) ** 2)
    window = window / window.sum()
    # Variances are differences of squares: around zero they lose the fewest digits.
    center = (x + y).mean((1, 2), keepdim=True) / 2
    x, y = x - center, y - center
    stack = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    stack = functional.conv2d(functional.conv2d(stack, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = stack.view(5, len(a), *stack.shape[2:]).unbind(0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = (2 * (xy - mx * my) + c2) / ((xx - mx * mx) + (yy - my * my) + c2)
    mx, my = mx + center, my + center
    return ((2 * mx * my + c1) / (mx * mx + my * my + c1) * structure).mean((1, 2))


def _stretched_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Returns the SSIM of maps stretched to 0..1, as Adebayo et al. compare maps, whose scale says nothing."""
    return ssim(render.normalize(a), render.normalize(b))


SIMILARITIES: dict[str, Similarity] = {
    "cosine": cosine_similarity,
    "rank": rank_correlation,
    "ssim": _stretched_ssim,
}


def flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() < 2:
        raise InputError(f"a and b must have the same shape [N, ...], got {list(a.shape)} and {list(b.shape)}")
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise InputError("a and b must be finite, got NaN or infinity")
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    return (a, b) if a.dtype == torch.float64 else (a.float(), b.float())


def compared(a: Tensor, b: Tensor, similarities: Sequence[str]) -> dict[str, Tensor]:
    return {name: SIMILARITIES[name](a, b) for name in similarities}


def check_similarities(similarities: Sequence[str]) -> None:
    if isinstance(similarities, str):
        raise InputError(f"similarities must be a list of names, got the string {similarities!r}")
    for name in similarities:
        if name not in SIMILARITIES:
            raise InputError(f"similarities must be among {', '.join(map(repr, SIMILARITIES))}, got {name!r}")
