"""Colours, overlays and contact sheets; everything is `[N, 3, H, W]` float in 0..1 until it becomes a picture."""

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError

COLORMAPS = ("turbo", "jet", "viridis", "inferno", "gray")
WHITE, YELLOW, RED = (1.0, 1.0, 1.0), (1.0, 0.85, 0.1), (1.0, 0.15, 0.2)

# Anchor colours, hexadecimal, evenly spaced; between them the scale is linear. Turbo is Google's (A. Mikhailov, 2019),
# viridis and inferno are by S. van der Walt and N. Smith.
_ANCHORS = {
    "turbo": "30123b 4145ab 4675ed 39a2fc 1bcfd4 24eca6 61fc6c a4fc3b d1e834 f3c63a fe9b2d f36315 d93806 b11901 7a0402",
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
    "viridis": "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725",
    "inferno": "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4",
    "gray": "000000 ffffff",
}


@functools.cache
def _table(colormap: str) -> Tensor:
    """256 colours `[256, 3]`."""
    if colormap not in _ANCHORS:
        raise InputError(f"colormap must be one of {', '.join(map(repr, COLORMAPS))}, got {colormap!r}")
    anchors = [[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in _ANCHORS[colormap].split()]
    return functional.interpolate(
        torch.tensor(anchors).T[None], size=256, mode="linear", align_corners=True
    )[0].T.contiguous()


def for_display(images: Tensor) -> Tensor:
    """Any images `[N, C, H, W]` as `[N, 3, H, W]` in 0..1.

    Images already within 0..1 are kept; others are stretched from their own least to their own largest value.
    """
    shown = images.detach().float()
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    outside = (low < 0) | (high > 1)
    stretched = (shown - low) / (high - low).clamp_min(1e-12)
    shown = torch.where(outside, stretched, shown)
    return shown if shown.shape[1] == 3 else shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def normalize(heatmap: Tensor) -> Tensor:
    """Each map `[N, H, W]` stretched to 0..1; a constant map becomes zero."""
    low, high = heatmap.amin((1, 2), keepdim=True), heatmap.amax((1, 2), keepdim=True)
    return (heatmap - low) / torch.where(high > low, high - low, torch.ones_like(high))


def colorize(heatmap: Tensor, colormap: str = "turbo") -> Tensor:
    """Colours `[N, 3, H, W]` of maps `[N, H, W]` in 0..1."""
    table = _table(colormap).to(heatmap.device)
    return table[(heatmap * 255).round().long().clamp(0, 255)].permute(0, 3, 1, 2)


def overlay(images: Tensor, heatmap: Tensor, alpha: float = 0.5, colormap: str = "turbo") -> Tensor:
    """Heat maps over images; the photograph shows through where the map is cold.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        heatmap: `[N, h, w]`, any scale; resized to the images.
        alpha: opacity at the hottest place, 0 to 1.
        colormap: one of `COLORMAPS`.

    Returns:
        `[N, 3, H, W]` in 0..1, on the CPU.
    """
    images, heatmap = images.detach().float().cpu(), heatmap.detach().float().cpu()
    if heatmap.shape[1:] != images.shape[2:]:
        heatmap = functional.interpolate(heatmap[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    heat = normalize(heatmap)
    # Half the opacity everywhere keeps the colours of the map readable, the other half follows the heat.
    opacity = (alpha * (0.4 + 0.6 * heat.clamp(0, 1)))[:, None]
    return images * (1 - opacity) + colorize(heat, colormap) * opacity


def _drawn(images: Tensor, draw: Any) -> Tensor:
    """`images` after `draw(n, canvas, scale)` has drawn on each at four times its size, for smooth edges."""
    from PIL import Image, ImageDraw

    scale = 4
    results = []
    for n, image in enumerate(images.detach().float().cpu()):
        layer = Image.new("RGBA", (image.shape[2] * scale, image.shape[1] * scale))
        draw(n, ImageDraw.Draw(layer), scale)
        small = layer.resize((image.shape[2], image.shape[1]), Image.Resampling.BOX)
        mark = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(*image.shape[1:], 4) / 255
        mark = mark.permute(2, 0, 1)
        results.append(image * (1 - mark[3:]) + mark[:3] * mark[3:])
    return torch.stack(results) if results else images


def _ink(color: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in color)


def draw_points(
    images: Tensor, points: Sequence[Tensor], color: Sequence[float] = RED, radius: float | None = None
) -> Tensor:
    """Dots with a thin dark rim.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        points: of each image, `[P, 2]` as (y, x) pixels.
        color: red, green, blue in 0..1.
        radius: in pixels; None takes 1 % of the shorter side.
    """
    size = max(1.0, 0.01 * min(images.shape[2:])) if radius is None else radius
    rim = max(0.35, size / 3)

    def draw(n: int, canvas: Any, scale: int) -> None:
        for reach, ink in ((size + rim, (20, 20, 20, 255)), (size, (*_ink(color), 255))):
            for y, x in points[n].tolist():
                left, top = (x + 0.5 - reach) * scale, (y + 0.5 - reach) * scale
                canvas.ellipse([left, top, left + 2 * reach * scale, top + 2 * reach * scale], fill=ink)

    return _drawn(images, draw)


def draw_boxes(
    images: Tensor, boxes: Tensor, color: Sequence[float] = YELLOW, width: float | None = None
) -> Tensor:
    """Outlines of boxes `[N, 4]` (x1, y1, x2, y2), one an image; a row of NaN draws nothing."""
    line = max(1.0, 0.008 * min(images.shape[2:])) if width is None else width

    def draw(n: int, canvas: Any, scale: int) -> None:
        box = boxes[n].tolist()
        if any(map(math.isnan, box)):
            return
        corners = [box[0] * scale, box[1] * scale, (box[2] + 1) * scale - 1, (box[3] + 1) * scale - 1]
        grown = [corners[0] - 2, corners[1] - 2, corners[2] + 2, corners[3] + 2]
        canvas.rectangle(grown, outline=(20, 20, 20, 160), width=round(line * scale) + 4)
        canvas.rectangle(corners, outline=(*_ink(color), 255), width=round(line * scale))

    return _drawn(images, draw)


def to_pil(image: Tensor) -> Any:
    """One image `[3, H, W]` in 0..1 as a PIL image."""
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def png_bytes(picture: Any) -> bytes:
    """A PIL image as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def montage(
    rows: Sequence[Sequence[Tensor]],
    labels: Sequence[str] | None = None,
    titles: Sequence[Sequence[str]] | None = None,
    side: int = 192,
) -> Any:
    """A contact sheet.

    Args:
        rows: images `[3, H, W]` in 0..1, row by row; each is fitted into a square cell.
        labels: of the rows, written to their left.
        titles: of the images, written above them, row by row.
        side: of a cell, in pixels.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    gap, head = 8, 22 if titles else 0
    margin = max((font.getlength(label) for label in labels), default=0) + 2 * gap if labels else gap
    columns = max((len(row) for row in rows), default=0)
    width, height = int(margin + columns * (side + gap)), gap + len(rows) * (side + head + gap)
    sheet = Image.new("RGB", (max(width, 1), max(height, 1)), "white")
    canvas = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * (side + head + gap)
        if labels:
            canvas.text((gap, top + head + side // 2 - 8), labels[r], fill="black", font=font)
        for c, image in enumerate(row):
            left = int(margin + c * (side + gap))
            if titles and c < len(titles[r]):
                title = titles[r][c]
                while title and font.getlength(title) > side:
                    title = title[:-2].rstrip("…") + "…" if len(title) > 2 else ""
                canvas.text((left, top + 2), title, fill="black", font=font)
            picture = to_pil(image)
            ratio = side / max(picture.size)
            # Small pictures keep their pixels, large ones are averaged down.
            picture = picture.resize(
                (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))),
                Image.Resampling.LANCZOS if ratio < 1 else Image.Resampling.BICUBIC,
            )
            sheet.paste(picture, (left + (side - picture.width) // 2, top + head + (side - picture.height) // 2))
    return sheet
