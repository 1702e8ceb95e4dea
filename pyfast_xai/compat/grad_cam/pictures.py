"""Pictures into tensors, maps onto pictures; arrays in and out, as OpenCV would do it."""

from collections.abc import Mapping, Sequence
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
    """Returns a picture as a normalised batch of one.

    Args:
        img: `[H, W, C]`; uint8 is brought to [0, 1], floats are taken as they are.
        mean: mean of each channel.
        std: standard deviation of each channel.

    Returns:
        `[1, C, H, W]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import preprocess_image
        >>> preprocess_image(np.zeros((32, 48, 3), np.float32)).shape
        torch.Size([1, 3, 32, 48])
    """
    picture = torch.from_numpy(np.array(img)).movedim(-1, 0).contiguous()
    if picture.dtype == torch.uint8:
        picture = picture.float() / 255
    middle, spread = (picture.new_tensor(values)[:, None, None] for values in (mean, std))
    return ((picture - middle) / spread)[None]


def deprocess_image(img: np.ndarray) -> np.ndarray:
    """Returns any array as a picture: grey for the mean, a tenth of the range for the standard deviation, uint8.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import deprocess_image
        >>> deprocess_image(np.random.default_rng(0).normal(size=(4, 4, 3))).dtype
        dtype('uint8')
    """
    scaled = (img - np.mean(img)) / (np.std(img) + 1e-5) * 0.1 + 0.5
    return np.uint8(np.clip(scaled, 0, 1) * 255)


def scaled(maps: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Returns the maps from 0 to just below 1, each by itself, and at another size.

    Args:
        maps: `[N, ...]` with two or three dimensions of space.
        size: size of the space; None for as it is.

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
    return torch.stack([torch.from_numpy(ndimage.zoom(heatmap, factors)) for heatmap in maps.float().cpu().numpy()]).to(
        maps.device
    )


def scale_cam_image(cam: np.ndarray, target_size: Sequence[int] | None = None) -> np.ndarray:
    """Returns the maps from 0 to just below 1, each by itself.

    Args:
        cam: `[N, H, W]` or `[N, D, H, W]`.
        target_size: the size in OpenCV's order, `(W, H)` or `(W, H, D)`.

    Returns:
        Float32 `[N, ...]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import scale_cam_image
        >>> scale_cam_image(np.ones((2, 4, 4), np.float32), target_size=(8, 6)).shape
        (2, 6, 8)
    """
    size = None if target_size is None else tuple(target_size)[::-1]
    return scaled(torch.from_numpy(np.array(cam)), size).cpu().numpy()


def show_cam_on_image(
    img: np.ndarray, mask: np.ndarray, use_rgb: bool = False, colormap: int = JET, image_weight: float = 0.5
) -> np.ndarray:
    """Returns a map in colours over a picture.

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

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import show_cam_on_image
        >>> picture = show_cam_on_image(np.zeros((8, 8, 3), np.float32), np.ones((8, 8), np.float32), use_rgb=True)
        >>> picture.shape, picture.dtype
        ((8, 8, 3), dtype('uint8'))
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
    """Returns 256 RGB colours."""
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


def scale_accross_batch_and_channels(tensor: np.ndarray, target_size: Sequence[int]) -> np.ndarray:
    """Returns every channel of every image from 0 to just below 1, at another size; the name is as it is there.

    Args:
        tensor: `[N, C, h, w]`.
        target_size: in OpenCV's order, `(W, H)`.

    Returns:
        Float32 `[N, C, H, W]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import scale_accross_batch_and_channels
        >>> scale_accross_batch_and_channels(np.random.default_rng(0).random((2, 3, 4, 4)), (8, 6)).shape
        (2, 3, 6, 8)
    """
    result = scale_cam_image(tensor.reshape(-1, *tensor.shape[2:]), target_size)
    return result.reshape(*tensor.shape[:2], *result.shape[1:])


def create_labels_legend(concept_scores: np.ndarray, labels: Mapping[int, str], top_k: int = 2) -> list[str]:
    """Returns the classes with the highest scores of each concept, one a line.

    Args:
        concept_scores: `[K, classes]`.
        labels: names of the classes; of a name with commas the first three parts are shown.
        top_k: how many classes.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import create_labels_legend
        >>> create_labels_legend(np.array([[0.25, 0.75]]), {0: "cat", 1: "dog"}, top_k=1)
        ['dog:0.75']
    """
    best = np.argsort(concept_scores, axis=1)[:, ::-1][:, :top_k]
    return [
        "\n".join(f"{','.join(labels[c].split(',')[:3])}:{scores[c]:.2f}" for c in chosen)
        for scores, chosen in zip(concept_scores, best, strict=True)
    ]


def show_factorization_on_image(
    img: np.ndarray,
    explanations: np.ndarray,
    colors: Sequence[np.ndarray] | None = None,
    image_weight: float = 0.5,
    concept_labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Returns the maps of some factors in colours over a picture; each pixel has the colour of the strongest.

    Args:
        img: `[H, W, 3]` float in [0, 1], RGB.
        explanations: `[K, H, W]` from 0 to 1, which are not written to.
        colors: color of each, RGB or RGBA in [0, 1]; None for the rainbow of matplotlib, "gist_rainbow".
        image_weight: share of the picture.
        concept_labels: label of each, for a legend at the right.

    Returns:
        uint8 `[H, W, 3]`, or `[H, 2 W, 3]` with a legend, which is drawn by this library.

    Raises:
        InputError: colours or labels that are not one for each map.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import show_factorization_on_image
        >>> maps = np.random.default_rng(0).random((3, 8, 8))
        >>> show_factorization_on_image(np.zeros((8, 8, 3)), maps, concept_labels=["a", "b", "c"]).shape
        (8, 16, 3)
    """
    count = len(explanations)
    chosen = _rainbow(count) if colors is None else np.stack([np.asarray(color)[:3] for color in colors])
    for name, values in (("colors", chosen), ("concept_labels", concept_labels)):
        if values is not None and len(values) != count:
            raise InputError(f"{name} must be one for each of {count} maps, got {len(values)}")
    # With the value of a colour in place of its brightness, as in HSV of eight bits.
    full = np.floor(chosen * 255) / np.maximum(np.floor(chosen * 255).max(1, keepdims=True), 1)
    strongest = explanations.argmax(0)
    value = np.floor(255 * np.take_along_axis(explanations, strongest[None], 0)[0]) / 255
    shown = full[strongest] * value[..., None]
    mixed = np.uint8((img * image_weight + shown * (1 - image_weight)) * 255)
    if concept_labels is None:
        return mixed
    return np.hstack((mixed, _legend(concept_labels, full, mixed.shape[:2])))


def _rainbow(count: int) -> np.ndarray:
    """Returns so many colours of matplotlib's "gist_rainbow", RGB `[K, 3]`."""
    from matplotlib import colormaps

    table = colormaps["gist_rainbow"](np.arange(0, 1, 1.0 / count)[:count])
    return np.asarray(table)[:, :3]


def _legend(labels: Sequence[str], colors: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Returns labels of several lines beside their colours on white, uint8 `[H, W, 3]`."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = size
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    lines = [label.split("\n") for label in labels]
    line = height / max(1, sum(map(len, lines)) + 0.5 * len(lines))
    font = ImageFont.load_default(size=max(1.0, min(0.8 * line, height / 14)))
    top = 0.25 * line
    for texts, color in zip(lines, colors, strict=True):
        patch = [0.02 * width, top, 0.1 * width, top + len(texts) * line]
        canvas.rectangle(patch, fill=tuple(round(255 * part) for part in color))
        for text in texts:
            canvas.text((0.14 * width, top + line / 2), text, fill="black", font=font, anchor="lm")
            top += line
        top += 0.5 * line
    return np.asarray(sheet)
