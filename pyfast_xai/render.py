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

WHITE, YELLOW, GREEN = (1.0, 1.0, 1.0), (1.0, 0.85, 0.1), (0.2, 0.9, 0.4)
SHADOW = (20, 20, 20)

# Anchor colours, evenly spaced; between them the scale is linear. Turbo is Google's (A. Mikhailov, 2019, Apache-2.0),
# viridis and inferno are by S. van der Walt and N. Smith (CC0): within 3 % of the originals. Jet is MATLAB's, exactly.
_ANCHORS = {
    "turbo": "30123b 4143a7 4771e9 3e9bfe 22c5e2 1ae4b6 46f884 88ff4e "
    "b9f635 e1dd37 faba39 fd8d27 f05b12 d63506 af1801 7a0403",
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
    "viridis": "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e "
    "1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725",
    "inferno": "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c "
    "c73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4",
    "gray": "000000 ffffff",
}
COLORMAPS = tuple(_ANCHORS)


@functools.cache
def _table(colormap: str) -> Tensor:
    """256 colours `[256, 3]`."""
    if colormap not in _ANCHORS:
        raise InputError(f"colormap must be one of {', '.join(map(repr, COLORMAPS))}, got {colormap!r}")
    anchors = torch.tensor([list(bytes.fromhex(code)) for code in _ANCHORS[colormap].split()]) / 255
    return functional.interpolate(anchors.T[None], size=256, mode="linear", align_corners=True)[0].T.contiguous()


def for_display(images: Tensor) -> Tensor:
    """Any images `[N, C, H, W]` as `[N, 3, H, W]` in 0..1.

    Images already within 0..1 are kept, others are stretched from their own least to their own largest value. One
    channel becomes grey; of any other number of channels the mean is shown. What is not finite counts as 0.
    """
    if images.dim() != 4:
        raise InputError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
    shown = images.detach().float().nan_to_num(0, 0, 0)
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    # A range too small for its own reciprocal is constant.
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    shown = torch.where((low < 0) | (high > 1), (shown - low) / span, shown)
    return shown if shown.shape[1] == 3 else shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def stretch(images: Tensor) -> Tensor:
    """Each image `[N, C, H, W]` from its least to its largest value over 0..1; a constant one becomes mid grey."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    return torch.where(high > low, (images - low) / span, 0.5)


def normalize(heatmap: Tensor) -> Tensor:
    """Each map `[N, H, W]` stretched to 0..1; a constant map becomes zero. What is not finite counts as 0."""
    heatmap = heatmap.detach().float().nan_to_num(0, 0, 0)
    low, high = heatmap.amin((1, 2), keepdim=True), heatmap.amax((1, 2), keepdim=True)
    return (heatmap - low) / torch.where(high > low, high - low, 1)


def colorize(heatmap: Tensor, colormap: str = "turbo") -> Tensor:
    """Colours `[N, 3, H, W]` of maps `[N, H, W]` in 0..1."""
    table = _table(colormap).to(heatmap.device)
    steps = (heatmap.detach().float().nan_to_num(0) * 255).round().clamp(0, 255)
    return table[steps.long()].permute(0, 3, 1, 2)


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
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0 to 1, got {alpha}")
    images, heatmap = images.detach().float().cpu(), heatmap.detach().float().cpu()
    if len(images) != len(heatmap):
        raise InputError(f"heatmap must be one for each of {len(images)} images, got {len(heatmap)}")
    if heatmap.shape[1:] != images.shape[2:]:
        heatmap = functional.interpolate(heatmap[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    heat = normalize(heatmap)
    # Full opacity from half the heat on, and a soft step below: cold places keep the colours of the photograph.
    rise = (2 * heat).clamp(max=1)
    opacity = (alpha * rise * rise * (3 - 2 * rise))[:, None]
    return images * (1 - opacity) + colorize(heat, colormap) * opacity


# Hues of the classes that dominate, in turns of the colour circle: neighbours in the list lie far apart.
HUES = tuple(degrees / 360 for degrees in (0, 130, 225, 52, 295, 185, 28, 262, 90, 330))


def class_hues(winner: Tensor, best: Tensor) -> list[dict[int, float]]:
    """A dictionary of hues for each image: F of CLEAR's Eq. 6 (Kumar, Wong and Taylor, 2017).

    The classes with the largest dominant response in all get the hues of `HUES` in turn; more classes than hues share
    them. All images have the same dictionary where the batch as a whole has no more classes than there are hues.

    Args:
        winner: dominant class, int64 `[N, H, W]`; negative where there is none.
        best: its response `[N, H, W]`; only where it is positive a class is seen.
    """
    ranks = [_ranked(w, b) for w, b in zip(winner, best, strict=True)]
    together = _ranked(winner, best)
    if len(together) <= len(HUES):
        ranks = [together] * len(ranks)
    return [{c: HUES[i % len(HUES)] for i, c in enumerate(ranked)} for ranked in ranks]


def _ranked(winner: Tensor, best: Tensor) -> list[int]:
    """The classes that are seen, those with the largest response in all first."""
    seen = (best > 0) & (winner >= 0)
    classes, at = winner[seen].unique(return_inverse=True)
    weight = torch.zeros(len(classes), dtype=torch.float64, device=best.device)
    weight.index_add_(0, at, best[seen].double())
    return classes[weight.argsort(descending=True, stable=True)].tolist()


def _hsv(hue: Tensor, value: Tensor) -> Tensor:
    """Full saturation: hues and values `[N, H, W]` as `[N, 3, H, W]`."""
    sector = torch.stack([(6 * hue + start) % 6 for start in (5, 3, 1)], 1)
    value = value[:, None]
    return value - value * torch.minimum(sector, 4 - sector).clamp(0, 1)


def _hue_and_value(
    winner: Tensor, best: Tensor, hues: Sequence[dict[int, float]] | None, saturated: float
) -> tuple[Tensor, Tensor]:
    if winner.shape != best.shape or winner.dim() != 3:
        raise InputError(
            f"winner and best must have the same shape [N, H, W], got {list(winner.shape)} and {list(best.shape)}"
        )
    winner, best = winner.cpu(), best.detach().float().cpu()
    hues = class_hues(winner, best) if hues is None else hues
    if len(hues) != len(winner):
        raise InputError(f"hues must be one dictionary for each of {len(winner)} images, got {len(hues)}")
    hue = torch.zeros_like(best)
    for own, classes, dictionary in zip(hue, winner, hues, strict=True):
        for index, turn in dictionary.items():
            own[classes == index] = turn
    return hue, brightness(best.masked_fill(winner < 0, 0), saturated)


def brightness(best: Tensor, saturated: float = 0.005) -> Tensor:
    """Responses `[N, H, W]` as brightness in 0..1: negative ones are dark, the largest of an image are full.

    Args:
        best: responses, of whatever class: they are compared as they are.
        saturated: share of the pixels that are fully bright; with none but the largest, one outlier darkens the rest.
    """
    if not 0 <= saturated < 1:
        raise InputError(f"saturated must lie in 0 to 1, got {saturated}")
    positive = best.detach().float().nan_to_num(0, 0, 0).clamp_min(0)
    flat = positive.flatten(1)
    top = flat.kthvalue(max(1, round((1 - saturated) * flat.shape[1])), 1).values
    # Where less than that share responds at all, the largest.
    top = torch.where(top > 0, top, flat.amax(1))
    return (positive / top.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]).clamp_max(1)


def dominance(
    winner: Tensor, best: Tensor, hues: Sequence[dict[int, float]] | None = None, saturated: float = 0.005
) -> Tensor:
    """CLEAR's composite (Eq. 6): the hue says which class dominates a pixel, the brightness how strongly.

    Args:
        winner: dominant class, int64 `[N, H, W]`.
        best: dominant response `[N, H, W]`, at one scale for all classes; negative is black.
        hues: by class, in turns of the colour circle, a dictionary for each image; None takes `class_hues`.
        saturated: see `brightness`.

    Returns:
        `[N, 3, H, W]` in 0..1, on the CPU.
    """
    return _hsv(*_hue_and_value(winner, best, hues, saturated))


def overlay_dominance(
    images: Tensor,
    winner: Tensor,
    best: Tensor,
    hues: Sequence[dict[int, float]] | None = None,
    alpha: float = 0.5,
    saturated: float = 0.005,
) -> Tensor:
    """The composite over grey images, which show through where no class responds.

    Args:
        images: `[N, 3, H', W']` in 0..1.
        winner: dominant class, int64 `[N, H, W]`.
        best: dominant response `[N, H, W]`.
        hues: see `dominance`.
        alpha: how far the images are darkened for the colours to stand out, 0 to 1.
        saturated: see `brightness`.

    Returns:
        `[N, 3, H', W']` in 0..1, on the CPU.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0 to 1, got {alpha}")
    images = images.detach().float().cpu()
    if len(images) != len(winner):
        raise InputError(f"winner must be one for each of {len(images)} images, got {len(winner)}")
    hue, value = _hue_and_value(winner, best, hues, saturated)
    colors, value = _hsv(hue, value), value[:, None]
    if value.shape[2:] != images.shape[2:]:
        colors, value = (
            functional.interpolate(part, images.shape[2:], mode="bilinear", align_corners=False)
            for part in (colors, value)
        )
    return images.mean(1, keepdim=True) * (1 - alpha) * (1 - value) + colors


def binary(target: Tensor, others: Tensor, constant: bool = False, saturated: float = 0.005) -> Tensor:
    """What speaks for a class and what against it (Kumar, Wong and Taylor, 2017, section 4.2).

    The paper does not say what is shown where both respond; here it is the stronger one, and the class itself where
    they are equal: the picture then agrees with the dominant class. Neither shows where it is not positive.

    Args:
        target: response of the class `[N, H, W]`.
        others: largest response of all others `[N, H, W]`.
        constant: False is the heat map, black-red-yellow-white for the class and green for the others, as bright as
            they respond; True the binary map, red and blue wherever the brightness is a tenth at least.
        saturated: see `brightness`; both are brought to one scale.

    Returns:
        `[N, 3, H, W]` in 0..1, on the CPU.
    """
    target, others = target.detach().float().cpu(), others.detach().float().cpu()
    if target.shape != others.shape or target.dim() != 3:
        raise InputError(
            f"target and others must have the same shape [N, H, W], got {list(target.shape)} and {list(others.shape)}"
        )
    own = target >= others
    value = brightness(torch.maximum(target, others), saturated)
    if constant:
        shown = value >= 0.1
        return torch.stack([shown & own, torch.zeros_like(own), shown & ~own], 1).float()
    hot = torch.stack([3 * value, 3 * value - 1, 3 * value - 2], 1).clamp(0, 1)
    green = torch.stack([torch.zeros_like(value), value, torch.zeros_like(value)], 1)
    return torch.where(own[:, None], hot, green)


def legend(names: Sequence[str], hues: Sequence[float], side: int = 192) -> Any:
    """Names with patches of their colours, one below the other, as a PIL image `side` pixels wide.

    Args:
        names: of the classes.
        hues: of each, in turns of the colour circle.
        side: width in pixels; names are cut to it.
    """
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(size=round(11 + side / 64))
    line = math.ceil(font.size * 1.5)
    patch = math.ceil(font.size)
    sheet = Image.new("RGB", (side, max(1, line * len(names))), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (name, turn) in enumerate(zip(names, hues, strict=True)):
        color = _hsv(torch.full((1, 1, 1), turn), torch.ones(1, 1, 1)).flatten().tolist()
        top = i * line + (line - patch) // 2
        canvas.rectangle([0, top, patch - 1, top + patch - 1], fill=_ink(color))
        text = _fitted(name, font, side - 1.5 * patch)
        canvas.text((1.5 * patch, i * line + line / 2), text, fill="black", font=font, anchor="lm")
    return sheet


def _drawn(images: Tensor, draw: Any) -> Tensor:
    """`images` after `draw(n, canvas, scale)` has drawn on each, enlarged for smooth edges."""
    from PIL import Image, ImageDraw

    # Large pictures need no enlarging, and their enlargement would not fit.
    scale = min(4, max(1, 1200 // max(images.shape[2:])))
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
    images: Tensor, points: Sequence[Tensor], color: Sequence[float] = WHITE, radius: float | None = None
) -> Tensor:
    """Dots with a thin dark rim.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        points: of each image, `[P, 2]` as (y, x) pixels.
        color: red, green, blue in 0..1.
        radius: in pixels; None takes 1 % of the shorter side, less where there are more than 200 points.
    """
    if len(points) != len(images):
        raise InputError(f"points must be one tensor for each of {len(images)} images, got {len(points)}")

    def draw(n: int, canvas: Any, scale: int) -> None:
        own = points[n].tolist()
        crowd = min(1.0, max(0.4, math.sqrt(200 / max(1, len(own)))))
        size = max(0.6, 0.01 * min(images.shape[2:]) * crowd) if radius is None else radius
        # All rims first: where dots overlap they join.
        for reach, ink in ((size + max(0.35, size / 4), SHADOW), (size, _ink(color))):
            for y, x in own:
                left, top = (x + 0.5 - reach) * scale, (y + 0.5 - reach) * scale
                right, bottom = left + 2 * reach * scale - 1, top + 2 * reach * scale - 1
                canvas.ellipse([left, top, max(left, right), max(top, bottom)], fill=(*ink, 255))

    return _drawn(images, draw)


def draw_boxes(images: Tensor, boxes: Tensor, color: Sequence[float] = YELLOW, width: float | None = None) -> Tensor:
    """Outlines of boxes with a thin dark rim.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        boxes: `[N, 4]` as (x1, y1, x2, y2), one an image; a row of NaN draws nothing.
        color: red, green, blue in 0..1.
        width: of the line, in pixels; None takes 0.8 % of the shorter side.
    """
    if boxes.shape != (len(images), 4):
        raise InputError(f"boxes must have shape [{len(images)}, 4], got {list(boxes.shape)}")
    line = max(1.0, 0.008 * min(images.shape[2:])) if width is None else width

    def draw(n: int, canvas: Any, scale: int) -> None:
        box = boxes[n].tolist()
        if any(map(math.isnan, box)):
            return
        # The line lies around the pixels of the box, with a rim on both sides, as far as the picture goes.
        stroke, rim = max(1, round(line * scale)), max(1, round(line * scale / 4))
        least, most = rim, [side * scale - 1 - rim for side in (images.shape[3], images.shape[2])]
        outer = [max(least, box[0] * scale - stroke), max(least, box[1] * scale - stroke)]
        outer += [min(most[0], (box[2] + 1) * scale - 1 + stroke), min(most[1], (box[3] + 1) * scale - 1 + stroke)]
        grown = [outer[0] - rim, outer[1] - rim, outer[2] + rim, outer[3] + rim]
        if grown[2] > grown[0] and grown[3] > grown[1]:
            canvas.rectangle(grown, outline=(*SHADOW, 255), width=stroke + 2 * rim)
        if outer[2] > outer[0] and outer[3] > outer[1]:
            canvas.rectangle(outer, outline=(*_ink(color), 255), width=stroke)

    return _drawn(images, draw)


def to_pil(image: Tensor) -> Any:
    """One image `[3, H, W]` in 0..1 as a PIL image."""
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def from_pil(picture: Any) -> Tensor:
    """A PIL image as `[3, H, W]` in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def png_bytes(picture: Any) -> bytes:
    """A PIL image as PNG."""
    buffer = io.BytesIO()
    # Three times as fast as the default, for a twentieth more bytes.
    picture.save(buffer, "PNG", compress_level=2)
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
        titles: of the images, written above them, row by row; the last rows may have none.
        side: of a cell, in pixels.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    # The size grows slowly with the cells, so that a sheet of large pictures can be read when it is scaled down.
    font: Any = ImageFont.load_default(size=round(11 + side / 64))
    line = math.ceil(font.size * 1.5)
    gap = max(6, side // 24)
    named = [_fitted(label, font, 2 * side) for label in labels or []]
    margin = math.ceil(max((font.getlength(label) for label in named), default=0)) + (2 * gap if named else gap)
    heads = [line if titles and r < len(titles) and any(titles[r]) else 0 for r in range(len(rows))]
    columns = max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (margin + columns * (side + gap), gap + sum(heads) + len(rows) * (side + gap)), "white")
    canvas = ImageDraw.Draw(sheet)
    top = gap
    for r, row in enumerate(rows):
        if r < len(named):
            canvas.text((gap, top + heads[r] + side / 2), named[r], fill="black", font=font, anchor="lm")
        for c, image in enumerate(row):
            left = margin + c * (side + gap)
            if titles and heads[r] and c < len(titles[r]):
                title = _fitted(titles[r][c], font, side)
                canvas.text((left, top + heads[r] / 2 - 1), title, fill="black", font=font, anchor="lm")
            picture = to_pil(image)
            ratio = side / max(picture.size)
            picture = picture.resize(
                (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))),
                Image.Resampling.LANCZOS if ratio < 1 else Image.Resampling.BICUBIC,
            )
            place = (left + (side - picture.width) // 2, top + heads[r] + (side - picture.height) // 2)
            sheet.paste(picture, place)
        top += heads[r] + side + gap
    return sheet


def _fitted(text: str, font: Any, room: float) -> str:
    """`text` on one line, cut with an ellipsis where it is wider than `room` pixels."""
    # File names may hold line breaks and bytes that are no text.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
