"""Pictures into tensors, maps onto pictures; arrays in and out, as OpenCV would do it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError

JET = 2  # cv2.COLORMAP_JET


def preprocess_image(
    img: np.ndarray, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """A picture as a normalised batch of one.

    Args:
        img: `[H, W, C]`; uint8 is brought to [0, 1], floats are taken as they are.
        mean: of each channel.
        std: of each channel.

    Returns:
        `[1, C, H, W]`.
    """
    picture = torch.from_numpy(np.array(img)).movedim(-1, 0).contiguous()
    if picture.dtype == torch.uint8:
        picture = picture.float() / 255
    middle, spread = (picture.new_tensor(own)[:, None, None] for own in (mean, std))
    return ((picture - middle) / spread)[None]


def deprocess_image(img: np.ndarray) -> np.ndarray:
    """Any array as a picture: grey for the mean, a tenth of the range for the standard deviation, uint8."""
    scaled = (img - np.mean(img)) / (np.std(img) + 1e-5) * 0.1 + 0.5
    return np.uint8(np.clip(scaled, 0, 1) * 255)


def scaled(maps: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Maps from 0 to just below 1, each by itself, and at another size.

    Args:
        maps: `[N, ...]` with two or three dimensions of space.
        size: of the space; None for as it is.

    Returns:
        `[N, *size]`, float32.
    """
    space = tuple(range(1, maps.dim()))
    maps = maps - maps.amin(space, keepdim=True)
    maps = maps / (1e-7 + maps.amax(space, keepdim=True))
    if size is None:
        return maps.float()
    if len(space) == 2:
        return functional.interpolate(maps[:, None].float(), size=tuple(size), mode="bilinear")[:, 0]
    factors = [new / old for new, old in zip(size, maps.shape[1:], strict=True)]
    return torch.stack([torch.from_numpy(ndimage.zoom(own, factors)) for own in maps.float().cpu().numpy()]).to(
        maps.device
    )


def scale_cam_image(cam: np.ndarray, target_size: Sequence[int] | None = None) -> np.ndarray:
    """Maps from 0 to just below 1, each by itself.

    Args:
        cam: `[N, H, W]` or `[N, D, H, W]`.
        target_size: the size in OpenCV's order, `(W, H)` or `(W, H, D)`.

    Returns:
        Float32 `[N, ...]`.
    """
    size = None if target_size is None else tuple(target_size)[::-1]
    return scaled(torch.from_numpy(np.array(cam)), size).cpu().numpy()


def show_cam_on_image(
    img: np.ndarray, mask: np.ndarray, use_rgb: bool = False, colormap: int = JET, image_weight: float = 0.5
) -> np.ndarray:
    """A map in colours over a picture.

    Args:
        img: `[H, W, 3]` float in [0, 1].
        mask: `[H, W]` in [0, 1].
        use_rgb: the picture is RGB; otherwise BGR, as OpenCV reads it.
        colormap: a colour map of OpenCV; any other than jet needs `cv2`.
        image_weight: share of the picture.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        InputError: a picture or a share out of range.
    """
    if np.max(img) > 1:
        raise InputError(f"img must be float in [0, 1], got a largest value of {np.max(img)}")
    if not 0 <= image_weight <= 1:
        raise InputError(f"image_weight must lie in [0, 1], got {image_weight}")
    heat = _table(colormap)[np.uint8(255 * np.asarray(mask))]
    heat = np.float32(heat if use_rgb else heat[..., ::-1]) / 255
    mixed = (1 - image_weight) * heat + image_weight * img
    return np.uint8(255 * (mixed / np.max(mixed)))


def _table(colormap: int) -> np.ndarray:
    """256 RGB colours."""
    if colormap == JET:
        at = np.arange(256)[:, None]
        # Each colour rises by 4 from a level at a place, and falls likewise.
        rising = np.array([2, 0, 128]) + 4 * (at - np.array([96, 32, 0]))
        falling = np.array([252, 252, 254]) - 4 * (at - np.array([224, 160, 96]))
        table = np.uint8(np.clip(np.minimum(rising, falling), 0, 255))
        table[159, 2] = 1  # 2 by the rule; OpenCV's table is rounded otherwise here
        return table
    cv2: Any = __import__("cv2")
    return cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], colormap)[:, 0, ::-1]
