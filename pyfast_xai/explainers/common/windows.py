"""Windows of an image at several scales, and their maps put back where they were taken (Tursun et al., 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.tensors import at_least_float32

# Of a window on the scaled image: (x, y, width of the image, height of the image).
Place = tuple[int, int, int, int]


def window_scales(window: int, count: int, growth: float) -> list[int]:
    """Returns lengths of the shorter side of the image: that of the window, and more in steps of a share of it."""
    step = round(window * growth)
    return [window + step * i for i in range(count)]


def patches_of(image: Tensor, scales: Sequence[int], window: int, step: int) -> tuple[Tensor, list[Place]]:
    """Returns the windows of an image at several scales.

    Args:
        image: `[1, C, H, W]`.
        scales: lengths of its shorter side.
        window: length of the side of a window.
        step: between windows; those that would leave the image are moved back into it.

    Returns:
        `[P, C, window, window]`, and where each was taken.

    Raises:
        InputError: a scale smaller than the window.
    """
    height, width = image.shape[2:]
    wide = at_least_float32(image)  # there is no such resize in half precision on a CPU
    patches, places = [], []
    for scale in scales:
        if scale < window:
            raise InputError(f"scales must be at least the window, {window}, got {scale}")
        size = [int(scale * height / width), scale] if width <= height else [scale, int(scale * width / height)]
        scaled = functional.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True)
        for y in _starts(size[0], step, window):
            for x in _starts(size[1], step, window):
                patches.append(scaled[:, :, y : y + window, x : x + window])
                places.append((x, y, size[1], size[0]))
    return torch.cat(patches).to(image.dtype), places


def _starts(length: int, step: int, window: int) -> list[int]:
    starts: list[int] = []
    for start in range(0, length, step):
        if start + window >= length:
            return [*starts, max(length - window, 0)]
        starts.append(start)
    return starts


def top_windows(scores: Tensor, drop_share: float) -> tuple[Tensor, Tensor]:
    """Returns the windows that count, those of the lowest score first, and the weight of each window.

    Args:
        scores: `[P]`, not negative.
        drop_share: share of the windows, those of the lowest scores, that is left out.

    Returns:
        Places int64, and scores as shares of the largest `[P]`, or ones where none is positive.
    """
    order = scores.argsort(dim=0, stable=True)[int(len(scores) * drop_share) :]
    best = scores[order[-1]]
    return order, torch.where(best > 0, scores / best, torch.ones_like(scores))


class PatchFusion:
    """The maps of windows put back where they were taken, one after the other.

    Args:
        size: (H, W) of the image.
        pool: "mean" over the windows that say more than `theta` at a place, or "max".
        theta: see `pool`.
    """

    def __init__(self, size: Sequence[int], pool: str, theta: float) -> None:
        self._size, self._pool, self._theta = tuple(size), pool, theta
        self._total: Tensor | None = None
        self._count: Tensor | None = None

    def add(self, patch: Tensor, place: Place) -> None:
        """Puts the map `[h, w]` of a window in its place."""
        x, y, width, height = place
        whole = patch.new_zeros(height, width)
        whole[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
        mask = functional.interpolate(whole[None, None], size=self._size, mode="bilinear", align_corners=False)[0, 0]
        if self._total is None or self._count is None:
            self._total, self._count = torch.zeros_like(mask), torch.zeros_like(mask)
        if self._pool == "max":
            self._total = torch.maximum(self._total, mask)
            return
        above = mask > self._theta
        self._total += torch.where(above, mask, 0)
        self._count += above

    def result(self) -> Tensor:
        """Returns the map, `[H, W]`."""
        assert self._total is not None
        assert self._count is not None
        return self._total if self._pool == "max" else self._total / self._count.clamp_min(1)


def blurred(heatmap: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Returns a map `[H, W]` under a Gaussian, mirrored at its edges."""
    at = torch.arange(size, dtype=heatmap.dtype, device=heatmap.device) - (size - 1) / 2
    weights = (-(at**2) / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    margin = size // 2
    if min(heatmap.shape) <= margin:
        return heatmap
    padded = functional.pad(heatmap[None, None], [margin] * 4, mode="reflect")
    padded = functional.conv2d(padded, weights.view(1, 1, -1, 1))
    return functional.conv2d(padded, weights.view(1, 1, 1, -1))[0, 0]
