"""JPEG files decoded at a fraction of their size, without the rest of them."""

import io
from collections.abc import Callable
from typing import Any

from pyfast_xai.images import ORIENTATION, to_rgb, upright

Size = tuple[int, int]


def reduced(data: bytes, max_pixels: int, suffices: Callable[[Size, int], bool]) -> tuple[Any, Size] | None:
    """Returns a JPEG file at a half, a quarter or an eighth of its size.

    Args:
        data: of the file.
        max_pixels: width times height allowed of the whole picture.
        suffices: returns whether a picture (W, H) may be reduced by a factor.

    Returns:
        A PIL image of mode "RGB", and (W, H) of the whole upright picture; None for a file that must be decoded whole,
        another format and broken data among them.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.width * image.height > max_pixels:
                return None
            is_on_its_side = image.getexif().get(ORIENTATION, 1) >= 5
            size = image.size[::-1] if is_on_its_side else image.size
            factor = next((factor for factor in (8, 4, 2) if suffices(size, factor)), None)
            if factor is None:
                return None
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            image.load()
            return upright(to_rgb(image), image), size
    except Exception:  # decoding the whole file reports the error
        return None
