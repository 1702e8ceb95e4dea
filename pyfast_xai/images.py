"""Picture files to network inputs, and pixels of the input back to pixels of the file."""

import contextlib
import glob
import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

# A decoder that is not loaded cannot be attacked.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000

ORIENTATION = 0x0112  # tag of Exif
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


def load_image(image: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """Loads one picture, as a viewer shows it, from a file or from what holds its pixels.

    The orientation its camera noted is applied, transparency lies on white, 16-bit grey is scaled to 8 bits, other
    grey without a known range is stretched from its least to its largest value. Of an animation the first frame is
    taken.

    Args:
        image: the path of a PNG, JPEG, WEBP, BMP, GIF or TIFF file, whose content decides, not its name; a Pillow
            image; or pixels, as a NumPy array, a tensor or nested lists: `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1, 3
            or 4 channels, integers in 0..255, or real numbers in 0..1.
        max_pixels: width times height allowed, checked before anything is decoded.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        ImageError: the file is missing, no picture, broken, or too large, or the pixels are none.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import load_image
        >>> Image.new("L", (40, 30)).save("grey.png")
        >>> picture = load_image("grey.png")
        >>> picture.mode, picture.size
        ('RGB', (40, 30))
    """
    from PIL import Image

    if isinstance(image, (str, Path)):
        return _from_file(image, max_pixels)
    if not isinstance(image, Image.Image):
        return _from_pixels(image)
    if image.width * image.height > max_pixels:
        raise ImageError(f"image must have at most {max_pixels:,} pixels, got {image.width} x {image.height}")
    picture = upright(to_rgb(image), image)
    picture.info = {}  # the orientation has been applied
    return picture


def _from_pixels(pixels: Any) -> Any:
    """Returns a PIL image of pixels that an array, a tensor or nested lists hold."""
    import numpy as np
    from PIL import Image

    expected = "a path, a Pillow image or pixels [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels"
    try:
        values = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    except (TypeError, ValueError) as error:
        raise ImageError(f"image must be {expected}, got {type(pixels).__name__}") from error
    shape = list(values.shape)
    if values.dtype.kind not in "buif" or not values.size:
        raise ImageError(f"image must be {expected}, got {type(pixels).__name__} {shape} of {values.dtype}")
    channels = (1, 3, 4)
    if values.ndim == 4 and (shape[1] in channels or shape[3] in channels):
        raise ImageError(f"image must be {expected}, got a batch {shape}: give one after another, or a list of them")
    if values.ndim == 3 and shape[2] not in channels and shape[0] in channels:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in channels):
        raise ImageError(f"image must be {expected}, got {shape}")
    low, high = float(values.min()), float(values.max())
    largest = 1 if values.dtype.kind in "bf" else 255
    if not (low >= 0 and high <= largest):
        hint = ""
        if largest == 1 and 0 <= low <= high <= 255:
            hint = ": divide by 255"
        elif largest == 1:
            hint = ": undo the normalisation, which Preprocess does by itself"
        raise ImageError(f"image of {values.dtype} must hold numbers in 0..{largest}, got {low:g} to {high:g}{hint}")
    bytes_ = (values * (255 // largest) + (0.5 if values.dtype.kind == "f" else 0)).astype(np.uint8)
    return to_rgb(Image.fromarray(bytes_[..., 0] if bytes_.ndim == 3 and bytes_.shape[2] == 1 else bytes_))


def _from_file(path: str | Path, max_pixels: int) -> Any:
    """Returns a PIL image of a file."""
    from PIL import Image, UnidentifiedImageError

    # The quoted form shows odd characters and line breaks, and keeps the message on one line.
    name = repr(str(path))
    _check_file(path, name)
    with warnings.catch_warnings():
        # Odd metadata does not matter here, and the size is checked below.
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
        except Exception as error:  # decoders may raise anything on broken data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"image {name} must be a whole picture, got broken data ({reason})") from error


@contextlib.contextmanager
def pillow_allows(pixels: int) -> Iterator[None]:
    """Raises Pillow's process-wide limit of pixels if the caller allows more."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or limit >= pixels:
        yield
        return
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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
    """Returns the grey values of 16 or 32 bits as 8 bits."""
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
    """Turns `picture` upright as `source`, the opened file, says; a TIFF was turned while it was decoded."""
    from PIL import Image

    try:
        orientation = source.getexif().get(ORIENTATION)
    except Exception:  # broken metadata is no reason to refuse a picture
        return picture
    transpose = _TRANSPOSES.get(orientation)
    return picture if transpose is None else picture.transpose(Image.Transpose[transpose])


def find_images(paths: Iterable[str | Path], without: str | Path | None = None) -> list[Path]:
    """Returns the picture files of paths, folders and patterns, each once.

    Args:
        paths: a file is taken as it is; of a folder all pictures in it and below, see `PictureFolders`; a pattern such
            as `photos/**/*.jpg` is expanded, sorted.
        without: a folder that is passed over where it lies below one of `paths`.

    Raises:
        ImageError: a folder or a pattern without any picture.
    """
    files: dict[Path, None] = {}
    names = list(map(Path, paths))
    folders = PictureFolders([name for name in names if name.is_dir()], without)
    for name in names:
        # A file may have brackets in its name.
        if name.is_dir():
            matches = [name / path for path, _ in folders.walk(name)]
        elif glob.has_magic(str(name)) and not os.path.lexists(name):
            matches = matching_files(str(name))
        else:
            matches = [name]
        if not matches:
            raise no_pictures(name)
        files.update(dict.fromkeys(matches))
    return list(files)


def matching_files(pattern: str, folder: str = "") -> list[Path]:
    """Returns the files that match a pattern, sorted.

    Args:
        pattern: absolute, or relative to a folder.
        folder: where it begins; no part of the pattern. Empty for the working folder.
    """
    matches = glob.glob(pattern, root_dir=folder or None, recursive=True)
    return sorted(Path(path) for path in matches if os.path.isfile(os.path.join(folder, path)))


def no_pictures(name: str | Path) -> ImageError:
    """Returns the error of a folder or a pattern without any picture."""
    return ImageError(f"images must name at least one picture, got none for {str(name)!r}")


@dataclass(frozen=True)
class FolderState:
    """Facts that tell whether a folder still has the same pictures and subfolders.

    Attributes:
        path: below the root, "" for the root.
        changed: time of its last change in nanoseconds; 0 where it is so recent that another change could share it.
        names: digest of the names in it.
    """

    path: str
    changed: int
    names: bytes


class PictureFolders:
    """Walks folders for pictures, hidden ones left out, in the order of sorted paths.

    A link to a folder is followed, but every real folder is walked once: under its real name where that lies below one
    of the roots, else under the first link that leads to it.

    Args:
        roots: the folders that are walked.
        without: a folder that is passed over where it lies below a root.
    """

    def __init__(self, roots: Iterable[str | Path], without: str | Path | None = None) -> None:
        self._roots = [os.path.realpath(root) for root in roots]
        self._skipped = without
        self._without = None if without is None else os.path.realpath(without)
        self._walked: set[tuple[int, int]] = set()

    def walk(
        self, root: str | Path, on_folder: Callable[[FolderState], None] | None = None
    ) -> Iterator[tuple[str, str | None]]:
        """Yields the path of each picture below a root, and None.

        A folder that cannot be read comes as its path with a slash, and the reason.

        Args:
            root: one of the roots.
            on_folder: called with each folder that is walked.
        """
        root = os.fspath(root)
        stack = [("", iter([("", True)]), False)]
        while stack:
            prefix, names, linked = stack[-1]
            for name, is_folder in names:
                path = prefix + name
                if not is_folder:
                    yield path, None
                    continue
                full = os.path.join(root, path)
                is_linked = linked or os.path.islink(full)
                if path and not self._enters(full, is_linked):
                    continue
                try:
                    status = os.stat(full)
                    state, children = _scanned(full, path, status, self._skipped)
                except OSError as error:
                    if not path:
                        raise
                    yield f"{path}/", f"folder must be readable, got {error.strerror}"
                    continue
                self._walked.add((status.st_dev, status.st_ino))
                if on_folder is not None:
                    on_folder(state)
                stack.append((f"{path}/" if path else "", iter(children), is_linked and bool(path)))
                break
            else:
                stack.pop()

    def _enters(self, full: str, linked: bool) -> bool:
        """Returns whether a folder is walked here."""
        if not linked and self._without is None:
            return True
        real_path = os.path.realpath(full)
        if real_path == self._without:
            return False
        if not linked:
            return True
        if os.path.islink(full) and any(self._reaches(top, real_path) for top in self._roots):
            return False
        status = os.stat(real_path)
        return (status.st_dev, status.st_ino) not in self._walked

    def _reaches(self, top: str, real_path: str) -> bool:
        """Returns whether a walk from a root reaches a real folder without a link."""
        if real_path == top:
            return True
        relative = real_path.removeprefix(top.rstrip(os.sep) + os.sep)
        return relative != real_path and not any(part.startswith(".") for part in relative.split(os.sep))


def folder_state(root: str | Path, path: str, without: str | Path | None = None) -> FolderState:
    """Returns the state of a folder as it is now.

    Args:
        root: that was walked.
        path: of the folder, below the root.
        without: a folder that is passed over.

    Raises:
        OSError: the folder cannot be read.
    """
    full = os.path.join(root, path)
    return _scanned(full, path, os.stat(full), without)[0]


def _scanned(
    full: str, path: str, status: os.stat_result, without: str | Path | None
) -> tuple[FolderState, list[tuple[str, bool]]]:
    """Returns the state of a folder, and the names in it with whether each is a folder, sorted."""
    skipped = ""
    if without is not None and os.path.dirname(os.path.abspath(without)) == os.path.abspath(full):
        skipped = os.path.basename(os.path.abspath(without))
    # Clocks of file systems stand still for some milliseconds; network disks add theirs.
    is_settled = time.time_ns() - status.st_mtime_ns > 1_000_000_000
    names = []
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or name == skipped:
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself
                is_folder = False
            if is_folder or is_picture(name):
                names.append((name, is_folder))
    names.sort()
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(names), 4096):
        lines = "".join(f"{name}{'/' if is_subfolder else ''}\0" for name, is_subfolder in names[start : start + 4096])
        digest.update(os.fsencode(lines))
    return FolderState(path, status.st_mtime_ns if is_settled else 0, digest.digest()), names


def is_picture(name: str) -> bool:
    """Returns whether a file is a picture by its name."""
    return name[max(name.rfind("."), 0) :].lower() in SUFFIXES


def _are_several(images: Any) -> bool:
    """Returns whether something is a list of pictures, or an array of them, and not the pixels of one."""
    if isinstance(images, (list, tuple)):
        # Nested lists of numbers are pixels.
        first = images[0] if images else None
        return not (isinstance(first, (list, tuple)) and bool(first) and not isinstance(first[0], (str, Path)))
    return getattr(images, "ndim", 0) == 4


@dataclass(frozen=True)
class Preprocess:
    """A picture as a network wants it.

    Attributes:
        size: (H, W) of the network's input, in pixels; an int for a square.
        resize: length of the shorter side before the crop, in pixels; None takes the smallest that covers `size`.
        mean: of each channel in 0..1, subtracted; one value stands for a network that takes grey pictures.
        std: of each channel, divided by.
        interpolation: "nearest", "bilinear", "bicubic", "lanczos" or "box".
        crop: "center" cuts the middle out of the resized picture; "squash" shows the whole, its sides scaled apart.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess
        >>> preprocess = Preprocess(224, resize=256)
        >>> inputs, shown = preprocess(Image.new("RGB", (640, 480)))
        >>> inputs.shape, shown.shape
        (torch.Size([3, 224, 224]), torch.Size([3, 224, 224]))
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
        """Returns the size (H, W) of the input."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def batch(self, images: Any) -> tuple[Tensor, Tensor]:
        """Returns pictures as a batch that the network takes, and the same crops for display.

        Args:
            images: one picture or a list of them, each whatever `load_image` takes: a path, a Pillow image, or pixels.

        Returns:
            The input `[N, C, H, W]`, float32, normalised, and the displayable crops `[N, 3, H, W]`, float32 in 0..1.

        Raises:
            ImageError: something that is no picture.

        Example:
            >>> import numpy as np
            >>> from PIL import Image
            >>> from pyfast_xai import Preprocess
            >>> Image.new("RGB", (640, 480)).save("cat.jpg")
            >>> pictures = ["cat.jpg", Image.new("L", (300, 400)), np.zeros((200, 200, 3), np.uint8)]
            >>> inputs, shown = Preprocess(224).batch(pictures)
            >>> inputs.shape
            torch.Size([3, 3, 224, 224])
        """
        pictures = list(images) if _are_several(images) else [images]
        if not pictures:
            raise ImageError("images must hold at least one picture, got none")
        inputs, shown = zip(*(self(load_image(image)) for image in pictures), strict=True)
        return torch.stack(inputs), torch.stack(shown)

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        """Returns the network's input and the same crop for display.

        Args:
            image: a PIL image of mode "RGB" as it is, or whatever else `load_image` takes.

        Returns:
            The input `[C, H, W]`, float32, normalised, and the displayable crop `[3, H, W]`, float32 in 0..1.
        """
        shown = self.shown(image)
        # Luma as Pillow defines it for mode "L".
        grey = shown.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        channels = shown if len(self.mean) == 3 else (shown * grey).sum(0, keepdim=True)
        mean, std = (torch.tensor(list(v), dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return (channels - mean) / std, shown

    def shown(self, image: Any, zoom: int = 1) -> Tensor:
        """Returns the part of a PIL image that the network sees, `[3, zoom H, zoom W]` in 0..1.

        Args:
            image: see `__call__`.
            zoom: how many pixels a side are shown for each of the input; drawn from the pixels of the image.
        """
        import numpy as np
        from PIL import Image

        if not isinstance(image, Image.Image) or image.mode != "RGB":
            image = load_image(image)
        image = self.without_unused_rows(image)
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
        """Returns the part of a picture that the network sees: left, top, right and bottom edge, in its pixels.

        Args:
            size: (W, H) of the picture, as PIL has it.
        """
        (left, top), (height, width) = self.corner(size), self.shape
        x_scale, y_scale = (original / scaled for original, scaled in zip(size, self.scaled(size), strict=True))
        return left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale

    def points_in(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Converts pixels of the input to pixels of the picture it was made from.

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
        """Converts boxes on the input to boxes on the picture it was made from.

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
        limits = torch.tensor([size[0] - 1, size[1] - 1], dtype=torch.float64).repeat(2)
        return torch.cat([first, last], 1).clamp(min=0).minimum(limits).float()

    def visible_boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Converts boxes on a picture to boxes on the input, as far as they are visible: the inverse of `boxes_in`.

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
        visible = (edges[:, 2:] > edges[:, :2]).all(1)
        return (edges[visible] - torch.tensor([0, 0, 1, 1])).float()

    def without_unused_rows(self, image: Any) -> Any:
        """Cuts a picture of a few pixels by thousands down to what the crop can see: scaled, the whole may not fit."""
        if math.prod(self.scaled(image.size)) <= MAX_PIXELS:
            return image
        left, top, right, _ = self.window(image.size)
        # The widest filter looks three pixels beyond the window, of the picture or of the input, whichever are larger.
        reach = 3 * max(1.0, (right - left) / self.shape[1])
        # The same length is cut from both ends, so that the middle stays the middle.
        x, y = max(0, math.floor(left - reach)), max(0, math.floor(top - reach))
        return image.crop((x, y, image.width - x, image.height - y))

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size (W, H) of the whole picture at the scale of the input."""
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
        """Returns the left and top of the crop in the scaled picture."""
        height, width = self.shape
        scaled_width, scaled_height = self.scaled(size)
        return round((scaled_width - width) / 2), round((scaled_height - height) / 2)
