"""Items to network inputs, on threads ahead of the model; an item that cannot be read comes with its error."""

import contextlib
import io
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfast_xai.datasets.reduced_jpeg import reduced
from pyfast_xai.datasets.sources import Item, Labelled
from pyfast_xai.datasets.sources.labels import read_label
from pyfast_xai.images import FORMATS, ImageError, Preprocess, pillow_allows, to_rgb, upright

_scratch = threading.local()
_BLOCKS = 4  # of Pillow's memory for each thread: a picture of 16 million pixels


@dataclass(frozen=True)
class Decoded:
    """An item on its way to the network.

    Attributes:
        item: what was read.
        input: uint8 `[3, H, W]`, the pixels that the network sees, or a floating-point input `[C, H, W]` as the source
            gave it; None where there is an error.
        size: (W, H) of the upright picture, in pixels; None for tensors.
        label: the class that the source names.
        label_error: why there is none although the source names something.
        seconds: that reading and decoding took.
        error: why there is no input.
    """

    item: Item
    input: Tensor | None = None
    size: tuple[int, int] | None = None
    label: int | None = None
    label_error: str | None = None
    seconds: float = 0.0
    error: Exception | None = None


def decode(item: Item, preprocess: Preprocess, max_pixels: int, reduced_jpeg: bool = False) -> Decoded:
    """Reads an item and cuts out what the network sees.

    Args:
        item: of a source.
        preprocess: of the network.
        max_pixels: width times height allowed, checked before anything is decoded.
        reduced_jpeg: see `RunOptions`.

    Returns:
        The pixels, or the error that came instead.
    """
    start = time.perf_counter()
    decoded = Decoded(item, label_error=item.label_error)
    label = item.label
    try:
        picture = item.read()
        if isinstance(picture, Labelled):
            picture, label = picture.picture, picture.label
        decoded = _input(decoded, picture, preprocess, max_pixels, reduced_jpeg)
    except Exception as error:  # sources and decoders may raise anything on broken data
        # Its frames hold the picture.
        error = error.with_traceback(None)
        error.__context__ = error.__cause__ = None
        decoded = replace(decoded, error=error)
    if decoded.label_error is None:
        index, reason = read_label(label)
        decoded = replace(decoded, label=index, label_error=reason)
    return replace(decoded, seconds=time.perf_counter() - start)


def _input(decoded: Decoded, picture: Any, preprocess: Preprocess, max_pixels: int, reduced_jpeg: bool) -> Decoded:
    name = decoded.item.id
    if isinstance(picture, Tensor) and picture.is_floating_point():
        if picture.dim() != 3 or picture.numel() == 0:
            raise ImageError(f"image {name!r} must have shape [C, H, W], got {list(picture.shape)}")
        return replace(decoded, input=picture.detach().cpu())
    pixels, size = input_pixels(picture, name, preprocess, max_pixels, reduced_jpeg)
    return replace(decoded, input=pixels, size=size)


def input_pixels(
    picture: Any, name: str, preprocess: Preprocess, max_pixels: int, reduced_jpeg: bool
) -> tuple[Tensor, tuple[int, int]]:
    """Returns what the network sees of a picture, uint8 `[3, H, W]`, and (W, H) of the whole upright picture.

    Args:
        picture: bytes, a PIL image, or a uint8 tensor `[3, H, W]`.
        name: of the picture, for messages.
        preprocess: of the network.
        max_pixels: width times height allowed.
        reduced_jpeg: see `RunOptions`.

    Raises:
        ImageError: no picture, broken, or too large.
    """
    if reduced_jpeg and isinstance(picture, (bytes, bytearray, memoryview)):
        reduction = reduced(bytes(picture), max_pixels, lambda size, factor: _suffices(size, factor, preprocess))
        if reduction is not None:
            return visible_pixels(preprocess, *reduction), reduction[1]
    image = rgb_of(picture, name, max_pixels)
    return visible_pixels(preprocess, image), image.size


def _suffices(size: tuple[int, int], factor: int, preprocess: Preprocess) -> bool:
    """Returns whether a picture that is reduced by a factor has twice the pixels a side that the network sees."""
    # Where the factor does not divide a side, the last pixel lies partly beyond the picture.
    sides = zip(size, preprocess.scaled(size), strict=True)
    return all(whole % factor == 0 and whole >= 2 * factor * visible for whole, visible in sides)


def rgb_of(picture: Any, name: str, max_pixels: int) -> Any:
    """Returns a PIL image of mode "RGB" of bytes, a PIL image, or a uint8 tensor `[3, H, W]`.

    Args:
        picture: what an item was read as.
        name: of the picture, for messages.
        max_pixels: width times height allowed.

    Raises:
        ImageError: no picture, broken, or too large.
    """
    from PIL import Image

    if isinstance(picture, (bytes, bytearray, memoryview)):
        return decode_bytes(bytes(picture), name, max_pixels)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
            raise ImageError(
                f"image {name!r} must be uint8 [3, H, W] or float, got {picture.dtype} {list(picture.shape)}"
            )
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(picture, Image.Image):
        if picture.width * picture.height > max_pixels:
            raise ImageError(
                f"image {name!r} must have at most {max_pixels:,} pixels, got {picture.width} x {picture.height}"
            )
        picture.load()
        return upright(to_rgb(picture), picture)
    raise ImageError(f"image {name!r} must be bytes, a PIL image or a tensor, got {type(picture).__name__}")


def decode_bytes(data: bytes, name: str, max_pixels: int) -> Any:
    """Decodes a picture file in memory as a viewer shows it; see `images.load_image`, whose rules these are.

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

    quoted = repr(name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"image {quoted} must have at most {max_pixels:,} pixels, got {image.width} x {image.height}"
                )
            fast = _fast(data, image)
            if fast is None:
                image.load()
                fast = to_rgb(image)
            return upright(fast, image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ImageError(f"image {quoted} must be a {kinds} file, got something else") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image {quoted} must have at most {max_pixels:,} pixels, got far more") from None
    except Exception as error:  # decoders may raise anything on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {quoted} must be a whole picture, got broken data ({reason})") from error


def recycle_pixels() -> None:
    """Has this thread decode every JPEG into the same memory, for as long as it lives."""
    _scratch.pixels = np.empty(0, np.uint8)


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decoder() -> str:
    """Returns which decoders are installed, with versions: a run that goes on elsewhere compares them."""
    import PIL

    fast = _simplejpeg()
    return f"pillow {PIL.__version__}" + ("" if fast is None else f", simplejpeg {fast.__version__}")


def _fast(data: bytes, image: Any) -> Any:
    from PIL import Image

    fast = _simplejpeg()
    if fast is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    size = image.width * image.height * 3
    try:
        buffer = getattr(_scratch, "pixels", None)
        if buffer is not None and len(buffer) < size:
            buffer = _scratch.pixels = np.empty(size, np.uint8)
        return Image.fromarray(fast.decode_jpeg(data, "RGB", strict=True, buffer=buffer))  # a copy
    except (ValueError, MemoryError):
        return None


@contextlib.contextmanager
def _recycled_blocks(count: int) -> Iterator[None]:
    """Has Pillow keep so many blocks of freed pictures, of 16 MiB each, and give them back at the end."""
    from PIL import Image

    core: Any = Image.core
    previous = core.get_blocks_max()
    core.set_blocks_max(max(previous, count))
    try:
        yield
    finally:
        core.set_blocks_max(previous)


@contextlib.contextmanager
def pillow_for_threads(max_pixels: int, threads: int = 1) -> Iterator[None]:
    """Sets limit, warnings and memory of Pillow, which belong to the process, for all threads of a run.

    Odd metadata warrants no warning here, and `decode_bytes` checks sizes. The memory of a picture serves the next one:
    fresh memory, filled with zeros by the system, takes a quarter of the time of a picture of a camera.

    Args:
        max_pixels: width times height allowed.
        threads: that decode.
    """
    from PIL import Image

    with warnings.catch_warnings(), pillow_allows(max_pixels), _recycled_blocks(threads * _BLOCKS):
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def visible_pixels(preprocess: Preprocess, image: Any, size: tuple[int, int] | None = None) -> Tensor:
    """Returns what the network sees of an RGB image, uint8 `[3, H, W]`: `Preprocess` before its numbers are scaled.

    Bytes wait for their turn in a quarter of the memory, and no thread of PyTorch is needed to make them.

    Args:
        preprocess: of the network.
        image: a PIL image of mode "RGB".
        size: (W, H) of the picture that it is a reduced copy of; None for the whole picture.
    """
    from PIL import Image

    image = preprocess.without_unused_rows(image)
    size = image.size if size is None else size
    height, width = preprocess.shape
    left, top = preprocess.corner(size)
    image = image.resize(preprocess.scaled(size), Image.Resampling[preprocess.interpolation.upper()])
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Returns inputs of the network, bit for bit those of `Preprocess`.

    Args:
        pixels: uint8 `[N, 3, H, W]`.
        preprocess: of the network.

    Returns:
        float32 `[N, C, H, W]`, on the device of the pixels.
    """
    grey_image = pixels.float().div_(255)  # in place: fresh memory costs as much as the arithmetic
    if len(preprocess.mean) == 1:
        grey = grey_image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        grey_image = (grey_image * grey).sum(1, keepdim=True)
    mean, std = (grey_image.new_tensor(list(v)).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return grey_image.sub_(mean).div_(std)
