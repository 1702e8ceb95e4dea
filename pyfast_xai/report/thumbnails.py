"""Small pictures of what a network saw."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.datasets import reduced_jpeg
from pyfast_xai.datasets.decode import rgb_of, visible_pixels
from pyfast_xai.datasets.sources import Item, Labelled
from pyfast_xai.images import Preprocess


def thumbnail(item: Item, preprocess: Preprocess, side: int, max_pixels: int) -> Any:
    """Returns the part of a picture that the network sees, as a PIL image.

    The pixels are those of the network, made smaller. A JPEG that is far larger is not decoded in full: its crop is
    then within a pixel of the network's.

    Args:
        item: of a source.
        preprocess: of the network.
        side: longer side, in pixels; at most that of the network's input.
        max_pixels: width times height of the picture that is allowed.

    Raises:
        Exception: whatever reading and decoding of broken data raise.
    """
    from PIL import Image

    data = item.read()
    data = data.picture if isinstance(data, Labelled) else data
    if isinstance(data, Tensor) and data.is_floating_point():
        return as_image(small(render.for_display(data[None]), side))
    height, width = reduced(*preprocess.shape, side)
    if isinstance(data, bytes):
        early = _decoded_small(data, preprocess, (width, height), max_pixels)
        if early is not None:
            return early
    pixels = visible_pixels(preprocess, rgb_of(data, item.id, max_pixels)).permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def _decoded_small(data: bytes, preprocess: Preprocess, size: tuple[int, int], max_pixels: int) -> Any:
    """Returns the crop of a JPEG that a half, a quarter or an eighth of the pixels a side suffice for, or None."""
    from PIL import Image

    def suffices(full_size: tuple[int, int], factor: int) -> bool:
        left, top, right, bottom = preprocess.window(full_size)
        if left < 0 or top < 0:  # black beyond the picture
            return False
        # Half more than are shown: else pixels would be mixtures of their neighbours.
        return 1.5 * factor <= min((right - left) / size[0], (bottom - top) / size[1])

    reduction = reduced_jpeg.reduced(data, max_pixels, suffices)
    if reduction is None:
        return None
    picture = reduction[0]
    left, top, right, bottom = preprocess.window(picture.size)
    box = (left, top, min(right, picture.width), min(bottom, picture.height))
    return picture.resize(size, Image.Resampling.BILINEAR, box=box)


def reduced(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns height and width with the longer one at most `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def small(image: Tensor, side: int) -> Tensor:
    """Returns an image `[1, C, H, W]`, its longer side at most `side`."""
    size = reduced(image.shape[2], image.shape[3], side)
    if size == tuple(image.shape[2:]):
        return image
    return functional.interpolate(image, size, mode="bilinear", antialias=True)


def as_image(image: Tensor) -> Any:
    """Returns an image `[1, 1 or 3, H, W]` in 0..1 as PIL has it."""
    from PIL import Image

    pixels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
