"""Items to network inputs, on threads ahead of the model: what cannot be read is told, never raised."""

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfast_xai.datasets.sources import Item, Labelled
from pyfast_xai.images import FORMATS, ImageError, Preprocess, pillow_allows, to_rgb, upright


@dataclass(frozen=True)
class Decoded:
    """An item on its way through.

    Attributes:
        item: what was read.
        input: uint8 `[3, H, W]`, the pixels that the network sees, or a floating-point input `[C, H, W]` as the source
            gave it; None where there is an error.
        size: (W, H) of the upright picture, in pixels; None for tensors.
        label: the class that the source says it has.
        seconds: that reading and decoding took.
        error: why there is no input.
    """

    item: Item
    input: Tensor | None = None
    size: tuple[int, int] | None = None
    label: int | None = None
    seconds: float = 0.0
    error: Exception | None = None


def decode(item: Item, preprocess: Preprocess, max_pixels: int) -> Decoded:
    """Read an item and cut out what the network sees.

    Args:
        item: of a source.
        preprocess: of the network.
        max_pixels: width times height allowed, checked before anything is decoded.

    Returns:
        The pixels, or the error that came instead.
    """
    began = time.perf_counter()
    label = item.label
    try:
        found = item.read()
        if isinstance(found, Labelled):
            found, label = found.picture, found.label
        if isinstance(found, Tensor) and found.is_floating_point():
            if found.dim() != 3 or found.numel() == 0:
                raise ImageError(f"image {item.id!r} must have shape [C, H, W], got {list(found.shape)}")
            return Decoded(item, found.detach().cpu(), None, label, time.perf_counter() - began)
        image = rgb_of(found, item.id, max_pixels)
        return Decoded(item, pixels_seen(preprocess, image), image.size, label, time.perf_counter() - began)
    except Exception as error:  # sources and decoders raise whatever they come across in broken data
        # Its frames hold the picture.
        plain = error.with_traceback(None)
        plain.__context__ = plain.__cause__ = None
        return Decoded(item, label=label, seconds=time.perf_counter() - began, error=plain)


def rgb_of(found: Any, name: str, max_pixels: int) -> Any:
    from PIL import Image

    if isinstance(found, (bytes, bytearray, memoryview)):
        return decode_bytes(bytes(found), name, max_pixels)
    if isinstance(found, Tensor):
        if found.dtype != torch.uint8 or found.dim() != 3 or found.shape[0] != 3:
            raise ImageError(f"image {name!r} must be uint8 [3, H, W] or float, got {found.dtype} {list(found.shape)}")
        return Image.fromarray(found.permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(found, Image.Image):
        if found.width * found.height > max_pixels:
            raise ImageError(
                f"image {name!r} must have at most {max_pixels:,} pixels, got {found.width} x {found.height}"
            )
        found.load()
        return upright(to_rgb(found), found)
    raise ImageError(f"image {name!r} must be bytes, a PIL image or a tensor, got {type(found).__name__}")


def decode_bytes(data: bytes, name: str, max_pixels: int) -> Any:
    """A picture file in memory as a viewer shows it; see `images.load_image`, whose rules these are.

    Args:
        data: of the file.
        name: of the picture, for messages.
        max_pixels: width times height allowed, checked before anything is decoded.

    Returns:
        A PIL image of mode "RGB". JPEG comes from simplejpeg where that is installed and content, within one grey
        level of Pillow; what it refuses, Pillow decides.

    Raises:
        ImageError: no picture, broken, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    shown = repr(name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"image {shown} must have at most {max_pixels:,} pixels, got {image.width} x {image.height}"
                )
            fast = _fast(data, image)
            if fast is None:
                image.load()
                fast = to_rgb(image)
            return upright(fast, image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ImageError(f"image {shown} must be a {kinds} file, got something else") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image {shown} must have at most {max_pixels:,} pixels, got far more") from None
    except Exception as error:  # decoders raise whatever they come across in broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {shown} must be a whole picture, got broken data ({reason})") from error


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decoder() -> str:
    """What decodes here, with its version: a run that goes on elsewhere compares it."""
    import PIL

    fast = _simplejpeg()
    return f"pillow {PIL.__version__}" + ("" if fast is None else f", simplejpeg {fast.__version__}")


def _fast(data: bytes, image: Any) -> Any:
    from PIL import Image

    fast = _simplejpeg()
    if fast is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        return Image.fromarray(fast.decode_jpeg(data, "RGB", strict=True))
    except (ValueError, MemoryError):
        return None


@contextlib.contextmanager
def pillow_for_threads(max_pixels: int) -> Iterator[None]:
    """Pillow as the threads of a run need it: its limit and its warnings belong to the process, so both are set once.

    What is odd about somebody's metadata is of no interest here, and sizes are checked by `decode_bytes`.
    """
    from PIL import Image

    with warnings.catch_warnings(), pillow_allows(max_pixels):
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def pixels_seen(preprocess: Preprocess, image: Any) -> Tensor:
    """What the network sees of an RGB image, uint8 `[3, H, W]`: `Preprocess` before its numbers are scaled.

    Bytes wait for their turn in a quarter of the memory, and no thread of PyTorch is needed to make them.
    """
    from PIL import Image

    image = preprocess.without_far_ends(image)
    height, width = preprocess.shape
    left, top = preprocess.corner(image.size)
    image = image.resize(preprocess.scaled(image.size), Image.Resampling[preprocess.interpolation.upper()])
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Inputs of the network, bit for bit those of `Preprocess`.

    Args:
        pixels: uint8 `[N, 3, H, W]`.
        preprocess: of the network.

    Returns:
        float32 `[N, C, H, W]`, on the device of the pixels.
    """
    shown = pixels.float().div_(255)  # in place: fresh memory costs as much as the arithmetic
    if len(preprocess.mean) == 1:
        grey = shown.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        shown = (shown * grey).sum(1, keepdim=True)
    mean, std = (shown.new_tensor(list(v)).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return shown.sub_(mean).div_(std)
