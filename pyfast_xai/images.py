"""Picture files to network inputs, and pixels of the input back to pixels of the file."""

import contextlib
import glob
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

# A decoder that is never asked for cannot be attacked.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000

_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageError(InputError):
    """A file that cannot be shown to a network; the message names it."""


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Any:
    """One picture as a viewer shows it.

    The orientation its camera noted is applied, transparency lies on white, 16-bit grey is scaled to 8 bits, other
    grey without a known range is stretched from its least to its largest value. Of an animation the first frame is
    taken.

    Args:
        path: a PNG, JPEG, WEBP, BMP, GIF or TIFF file; its content decides, not its name.
        max_pixels: width times height allowed, checked before anything is decoded.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        ImageError: the file is missing, no picture, broken, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    # The quoted form shows odd characters and line breaks, and keeps the message on one line.
    name = repr(str(path))
    _check_file(path, name)
    with warnings.catch_warnings():
        # What is odd about somebody's metadata is of no interest here, and the size is checked below.
        warnings.simplefilter("ignore")
        try:
            with pillow_allows(max_pixels), Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(
                        f"image {name} must have at most {max_pixels:,} pixels, got {image.width} x {image.height}"
                    )
                image.load()
                return upright(to_rgb(image), image)
        except ImageError:
            raise
        except UnidentifiedImageError:
            kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise ImageError(f"image {name} must be a {kinds} file, got something else") from None
        except PermissionError as error:
            raise ImageError(f"image {name} must be readable, got {error.strerror}") from None
        except Image.DecompressionBombError:
            raise ImageError(f"image {name} must have at most {max_pixels:,} pixels, got far more") from None
        except Exception as error:  # decoders raise whatever they come across in broken data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"image {name} must be a whole picture, got broken data ({reason})") from error


@contextlib.contextmanager
def pillow_allows(pixels: int) -> Iterator[None]:
    """Lift Pillow's own limit, one for the whole process, where the caller asks for more."""
    from PIL import Image

    own = Image.MAX_IMAGE_PIXELS
    if own is None or own >= pixels:
        yield
        return
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = own


def _check_file(path: str | Path, name: str) -> None:
    try:
        mode = "a folder" if os.path.isdir(path) else None if os.path.isfile(path) else "no such file"
        if mode is None and os.path.getsize(path) == 0:
            mode = "an empty one"
    except (OSError, ValueError):
        mode = "no such file"
    if mode is not None:
        raise ImageError(f"image {name} must be a file, got {mode}")


def to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        # RGBa, premultiplied, converts to RGBA alone; for the rest this is where palettes are looked up.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(image: Any) -> Any:
    """Grey values of 16 or 32 bits as 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode.startswith("I;16") or image.format == "PNG":  # some releases of Pillow call 16 bits "I"
        low, high = 0.0, 65535.0
    scaled = (values - low) / (high - low if high > low else 1.0)
    return Image.fromarray((scaled * 255).round().astype(np.uint8))


def upright(picture: Any, source: Any) -> Any:
    """`picture` turned as `source`, the opened file, says; a TIFF was turned while it was decoded."""
    from PIL import Image

    try:
        orientation = source.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata is no reason to refuse a picture
        return picture
    turn = _TRANSPOSES.get(orientation)
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def find_images(paths: Iterable[str | Path], without: str | Path | None = None) -> list[Path]:
    """The files that paths, folders and patterns stand for, each once.

    Args:
        paths: a file is taken as it is; of a folder all pictures in it and below, sorted, hidden ones left out; a
            pattern such as `photos/**/*.jpg` is expanded, sorted.
        without: a folder that is passed over where it lies below one of `paths`.

    Raises:
        ImageError: a folder or a pattern without any picture.
    """
    found: dict[Path, None] = {}
    for given in map(Path, paths):
        # A file may have brackets in its name.
        if given.is_dir():
            own = sorted(_pictures_in(given, without))
        elif glob.has_magic(str(given)) and not os.path.lexists(given):
            own = sorted(Path(p) for p in glob.glob(str(given), recursive=True) if os.path.isfile(p))
        else:
            own = [given]
        if not own:
            raise ImageError(f"images must name at least one picture, got none for {str(given)!r}")
        found.update(dict.fromkeys(own))
    return list(found)


def _pictures_in(folder: Path, without: str | Path | None) -> Iterator[Path]:
    passed_over = None if without is None else os.path.realpath(without)
    for here, below, files in os.walk(folder):
        below[:] = [
            name for name in below if name[0] != "." and os.path.realpath(os.path.join(here, name)) != passed_over
        ]
        for path in (Path(here, file) for file in files if file[0] != "."):
            if path.suffix.lower() in SUFFIXES:
                yield path


@dataclass(frozen=True)
class Preprocess:
    """A PIL image as a network wants it.

    Attributes:
        size: (H, W) of the network's input, in pixels; an int for a square.
        resize: length of the shorter side before the crop, in pixels; None takes the smallest that covers `size`.
        mean: of each channel in 0..1, subtracted; one value stands for a network that takes grey pictures.
        std: of each channel, divided by.
        interpolation: "nearest", "bilinear", "bicubic", "lanczos" or "box".
        crop: "center" cuts the middle out of the resized picture; "squash" shows the whole, its sides scaled apart.
    """

    size: int | tuple[int, int] = 224
    resize: int | None = None
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop: Literal["center", "squash"] = "center"

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or (self.resize is not None and self.resize < 1):
            raise InputError(f"size must be at least 1 pixel, got size {self.size} and resize {self.resize}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(f"mean and std must have 3 values each, or 1, got {len(self.mean)} and {len(self.std)}")
        if not all(value > 0 for value in self.std):
            raise InputError(f"std must be positive, got {tuple(self.std)}")
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "lanczos", "box"):
            raise InputError(f"interpolation must be a filter such as 'bilinear', got {self.interpolation!r}")
        if self.crop not in ("center", "squash"):
            raise InputError(f"crop must be 'center' or 'squash', got {self.crop!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the input."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        """What the network sees, and the same to look at.

        Args:
            image: a PIL image of mode "RGB".

        Returns:
            The input `[C, H, W]`, float32, normalised, and the displayable crop `[3, H, W]`, float32 in 0..1.
        """
        shown = self.shown(image)
        # Luma as Pillow defines it for mode "L".
        grey = shown.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        seen = shown if len(self.mean) == 3 else (shown * grey).sum(0, keepdim=True)
        mean, std = (torch.tensor(list(v), dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return (seen - mean) / std, shown

    def shown(self, image: Any, zoom: int = 1) -> Tensor:
        """The part of a PIL image that the network sees, `[3, zoom H, zoom W]` in 0..1.

        Args:
            image: of mode "RGB".
            zoom: how many pixels a side are shown for each of the input; drawn from the pixels of the image.
        """
        import numpy as np
        from PIL import Image

        image = self.without_far_ends(image)
        height, width = self.shape
        scaled_width, scaled_height = self.scaled(image.size)
        left, top = self.corner(image.size)
        filter_ = Image.Resampling[self.interpolation.upper()]
        if zoom == 1 or left < 0 or top < 0:
            # The network's own pixels, to the last bit; a crop beyond the picture is black there.
            image = image.resize((scaled_width, scaled_height), filter_)
            image = image.crop((left, top, left + width, top + height))
            if zoom > 1:
                image = image.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width * zoom, height * zoom), Image.Resampling.LANCZOS, box=self.window(image.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture that the network sees: left, top, right and bottom edge, in its pixels.

        Args:
            size: (W, H) of the picture, as PIL has it.
        """
        (left, top), (height, width) = self.corner(size), self.shape
        across, down = (whole / scaled for whole, scaled in zip(size, self.scaled(size), strict=True))
        return left * across, top * down, (left + width) * across, (top + height) * down

    def points_in(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels of the input as pixels of the picture they were made from.

        Args:
            points: int64 `[P, 2]` as (y, x) pixels of the input; each stands for its middle.
            size: (W, H) of the picture.

        Returns:
            int64 `[P, 2]` as (y, x), within the picture.
        """
        left, top, right, bottom = self.window(size)
        height, width = self.shape
        pixel = torch.tensor([(bottom - top) / height, (right - left) / width], dtype=torch.float64)
        placed = (points.cpu().double() + 0.5) * pixel + torch.tensor([top, left], dtype=torch.float64)
        return placed.floor().long().clamp(min=0).minimum(torch.tensor([size[1] - 1, size[0] - 1]))

    def boxes_in(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes on the input as boxes on the picture it was made from.

        Args:
            boxes: `[N, 4]` as (x1, y1, x2, y2), inclusive pixels of the input.
            size: (W, H) of the picture.

        Returns:
            float32 `[N, 4]`, inclusive whole pixels that the box touches, within the picture; NaN stays NaN.
        """
        left, top, right, bottom = self.window(size)
        height, width = self.shape
        pixel = torch.tensor([(right - left) / width, (bottom - top) / height] * 2, dtype=torch.float64)
        edges = boxes.cpu().double() + torch.tensor([0, 0, 1, 1])
        edges = edges * pixel + torch.tensor([left, top] * 2, dtype=torch.float64)
        # An edge within rounding of a pixel's border lies on it.
        first, last = (edges[:, :2] + 1e-6).floor(), (edges[:, 2:] - 1e-6).ceil() - 1
        most = torch.tensor([size[0] - 1, size[1] - 1], dtype=torch.float64).repeat(2)
        return torch.cat([first, last], 1).clamp(min=0).minimum(most).float()

    def boxes_seen(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes on a picture as boxes on the input, where they are seen at all: the inverse of `boxes_in`.

        Args:
            boxes: `[N, 4]` as (x1, y1, x2, y2), inclusive pixels of the picture.
            size: (W, H) of the picture.

        Returns:
            float32 `[M, 4]`, inclusive pixels of the input, not rounded, cut at its border; M <= N.
        """
        left, top, right, bottom = self.window(size)
        height, width = self.shape
        pixel = torch.tensor([width / (right - left), height / (bottom - top)] * 2, dtype=torch.float64)
        edges = boxes.cpu().double() + torch.tensor([0, 0, 1, 1])
        edges = (edges - torch.tensor([left, top] * 2, dtype=torch.float64)) * pixel
        edges = edges.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float64))
        seen = (edges[:, 2:] > edges[:, :2]).all(1)
        return (edges[seen] - torch.tensor([0, 0, 1, 1])).float()

    def without_far_ends(self, image: Any) -> Any:
        """A picture of a few pixels by thousands, cut down to what the crop can see: scaled, the whole may not fit."""
        if math.prod(self.scaled(image.size)) <= MAX_PIXELS:
            return image
        left, top, right, _ = self.window(image.size)
        # The widest filter looks three pixels beyond the window, of the picture or of the input, whichever are larger.
        reach = 3 * max(1.0, (right - left) / self.shape[1])
        # As much from either end, so that the middle stays the middle.
        x, y = max(0, math.floor(left - reach)), max(0, math.floor(top - reach))
        return image.crop((x, y, image.width - x, image.height - y))

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """(W, H) of the whole picture at the scale of the input."""
        height, width = self.shape
        if self.crop == "squash":
            return width, height
        shorter = min(size)
        if self.resize is None:
            ratio = max(width / size[0], height / size[1])
            return max(width, math.floor(size[0] * ratio)), max(height, math.floor(size[1] * ratio))
        # The longer side is rounded down, as torchvision does.
        return max(1, self.resize * size[0] // shorter), max(1, self.resize * size[1] // shorter)

    def corner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Left and top of the crop in the scaled picture."""
        height, width = self.shape
        scaled_width, scaled_height = self.scaled(size)
        return round((scaled_width - width) / 2), round((scaled_height - height) / 2)
