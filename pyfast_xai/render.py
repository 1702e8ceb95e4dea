"""Colours, overlays and contact sheets; everything is `[N, 3, H, W]` float in 0..1 until it becomes a picture."""

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError

Color = Sequence[float]  # red, green, blue in 0..1

WHITE, YELLOW, GREEN = (1.0, 1.0, 1.0), (1.0, 0.85, 0.1), (0.2, 0.9, 0.4)
SHADOW = (20, 20, 20)

# Anchor colours, evenly spaced; between them the scale is linear. Turbo is Google's (A. Mikhailov, 2019, Apache-2.0),
# viridis, plasma, inferno and magma are by S. van der Walt and N. Smith (CC0), cividis by J. Nunez, C. Anderton and
# R. Renslow (CC0), coolwarm by K. Moreland (2009): within 3 % of the originals. Jet is MATLAB's, exactly.
_ANCHORS = {
    "plasma": "0d0887 330597 5002a2 6a00a8 8405a7 9c179e b12a90 c33d80 "
    "d35171 e16462 ed7953 f68f44 fca636 fec029 f9dc24 f0f921",
    "turbo": "30123b 4143a7 4771e9 3e9bfe 22c5e2 1ae4b6 46f884 88ff4e "
    "b9f635 e1dd37 faba39 fd8d27 f05b12 d63506 af1801 7a0403",
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
    "viridis": "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e "
    "1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725",
    "inferno": "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c "
    "c73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4",
    "magma": "000004 0b0924 20114b 3b0f70 57157e 721f81 8c2981 a8327d "
    "c43c75 de4968 f1605d fa7f5e fe9f6d febf84 fddea0 fcfdbf",
    "cividis": "00224e 002a5f 003070 143670 263d6e 33446d 3e4b6c 48526c 51586d 5a5f6e "
    "636670 6c6d72 747475 7d7c78 858279 8f8a78 989277 a29975 aca172 b6a96f "
    "c0b16a cbb965 d5c25e e0cb56 ead34c f6dd3f fee838",
    "coolwarm": "3b4cc0 465ecf 536edd 5e7de7 6b8df0 799cf8 86a9fc 94b6ff a1c0ff aec9fc "
    "bbd1f8 c7d7f0 d3dbe7 dddcdc e6d7cf eed0c0 f3c7b1 f7bca1 f7af91 f6a283 "
    "f29274 ec8165 e46e56 da5a49 d0473d c32e31 b40426",
    "gray": "000000 ffffff",
}
COLORMAPS = tuple(_ANCHORS)
# Perceptually uniform, and vivid over photographs; for signed maps one with a neutral middle.
DEFAULT_COLORMAP, SIGNED_COLORMAP = "plasma", "coolwarm"
CLIPPED = 0.02  # share of a map that is shown as its hottest
_KNEE = 0.25  # heat from which a place has the full opacity


@functools.cache
def _table(colormap: str) -> Tensor:
    """Returns 256 colours `[256, 3]`."""
    if colormap not in _ANCHORS:
        raise InputError(f"colormap must be one of {', '.join(map(repr, COLORMAPS))}, got {colormap!r}")
    anchors = torch.tensor([list(bytes.fromhex(code)) for code in _ANCHORS[colormap].split()]) / 255
    return functional.interpolate(anchors.T[None], size=256, mode="linear", align_corners=True)[0].T.contiguous()


def for_display(images: Tensor) -> Tensor:
    """Converts images `[N, C, H, W]` of any number of channels to `[N, 3, H, W]` in 0..1.

    Images already within 0..1 are kept, others are stretched from their own least to their own largest value. One
    channel becomes grey; of any other number of channels the mean is shown. What is not finite counts as 0.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.for_display(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.dim() != 4:
        raise InputError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
    shown = images.detach().float().nan_to_num(0, 0, 0)
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    # A range too small for its own reciprocal is constant.
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    shown = torch.where((low < 0) | (high > 1), (shown - low) / span, shown)
    return shown if shown.shape[1] == 3 else shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def stretch(images: Tensor, saturated: float = 0.0) -> Tensor:
    """Stretches each image `[N, C, H, W]` over 0..1; a constant one becomes mid grey.

    Args:
        images: floating-point, any range.
        saturated: share of the numbers that become 0 or 1, half at each end; 0 keeps every difference.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.stretch(torch.tensor([[[[2.0, 4.0]]]]))
        tensor([[[[0., 1.]]]])
    """
    low, high = _quantile(images, saturated / 2), _quantile(images, 1 - saturated / 2)
    least, largest = _quantile(images, 0.0), _quantile(images, 1.0)
    # If fewer numbers than that differ at all, the whole range is used.
    low, high = torch.where(high > low, low, least), torch.where(high > low, high, largest)
    span = (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    return torch.where(high > low, ((images - low) / span).clamp(0, 1), 0.5)


def stretch_signed(values: Tensor, saturated: float = CLIPPED) -> Tensor:
    """Stretches each row of signed numbers `[N, ...]` over -1..1, both signs by one factor, so that zero stays zero.

    Args:
        values: floating-point, any range; non-finite ones count as 0.
        saturated: share of the numbers that become -1 or 1; with 0 a single outlier leaves the rest near zero.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.stretch_signed(torch.tensor([[-1.0, 0.0, 4.0]]))
        tensor([[-0.2500,  0.0000,  1.0000]])
    """
    values = values.detach().float().nan_to_num(0, 0, 0)
    size = values.abs()
    largest = _quantile(size, 1 - saturated)
    # If less than that share is not zero at all, the largest is used.
    largest = torch.where(largest > 0, largest, _quantile(size, 1.0))
    return (values / largest.clamp_min(torch.finfo(torch.float32).tiny)).clamp(-1, 1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Returns a quantile of each row's numbers, of the shape `[N, 1, ...]`."""
    flat = values.flatten(1)
    rank = min(max(1, round(share * flat.shape[1])), flat.shape[1])
    return flat.kthvalue(rank, 1).values.view(-1, *[1] * (values.dim() - 1))


def normalize(heatmap: Tensor) -> Tensor:
    """Stretches each map `[N, H, W]` to 0..1; a constant map becomes zero, and non-finite values count as 0.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.normalize(torch.tensor([[[2.0, 3.0, 4.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    heatmap = heatmap.detach().float().nan_to_num(0, 0, 0)
    low, high = heatmap.amin((1, 2), keepdim=True), heatmap.amax((1, 2), keepdim=True)
    return (heatmap - low) / torch.where(high > low, high - low, 1)


def colorize(heatmap: Tensor, colormap: str = DEFAULT_COLORMAP) -> Tensor:
    """Colours maps `[N, H, W]` in 0..1 as `[N, 3, H, W]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.colorize(torch.rand(2, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    table = _table(colormap).to(heatmap.device)
    steps = (heatmap.detach().float().nan_to_num(0) * 255).round().clamp(0, 255)
    return table[steps.long()].permute(0, 3, 1, 2)


def overlay(
    images: Tensor,
    heatmap: Tensor,
    alpha: float = 0.5,
    colormap: str | None = None,
    saturated: float = CLIPPED,
    signed: bool = False,
) -> Tensor:
    """Draws heat maps over images; the photograph shows through where the map is cold.

    Opacity rises with the heat and is full from a quarter of it on, so that weak evidence is seen as well.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        heatmap: `[N, h, w]`, any scale; resized to the images.
        alpha: opacity of what is hot, 0 to 1.
        colormap: one of `COLORMAPS`; None takes "plasma", or "coolwarm" for signed maps.
        saturated: share of the pixels that are fully hot; with 0 a single outlier, as gradients have, would leave the
            bare photograph.
        signed: False stretches each map from its least to its largest value; True keeps zero where it is, in the middle
            of the colour map and transparent.

    Returns:
        `[N, 3, H, W]` in 0..1, on the CPU.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.overlay(torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4)).shape
        torch.Size([2, 3, 32, 32])
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0 to 1, got {alpha}")
    if not 0 <= saturated < 1:
        raise InputError(f"saturated must lie in [0, 1), got {saturated}")
    images, heatmap = images.detach().float().cpu(), heatmap.detach().float().cpu()
    if len(images) != len(heatmap):
        raise InputError(f"heatmap must be one for each of {len(images)} images, got {len(heatmap)}")
    if heatmap.shape[1:] != images.shape[2:]:
        heatmap = functional.interpolate(heatmap[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    heat = stretch_signed(heatmap if signed else normalize(heatmap), saturated)
    rise = (heat.abs() / _KNEE).clamp(max=1)
    # A soft step: cold places keep the colours of the photograph.
    opacity = (alpha * rise * rise * (3 - 2 * rise))[:, None]
    shades = colorize((heat + 1) / 2 if signed else heat, colormap or default_colormap(signed))
    return images * (1 - opacity) + shades * opacity


def default_colormap(signed: bool) -> str:
    """Returns the colour map of maps that are signed or not.

    Example:
        >>> from pyfast_xai import render
        >>> render.default_colormap(signed=False), render.default_colormap(signed=True)
        ('plasma', 'coolwarm')
    """
    return SIGNED_COLORMAP if signed else DEFAULT_COLORMAP


# Colours of the classes that dominate, the most frequent first, each with one channel full. Any two of them differ by
# 26 in CIELAB (CIE76) or more, also as people see them who lack one kind of cone (as in Machado et al., 2009).
CLASS_COLORS: tuple[Color, ...] = tuple(
    tuple(part / 255 for part in bytes.fromhex(code))
    for code in (
        *("ffff00", "ff0044", "4dffff", "7700ff", "ffad99"),
        *("99adff", "ff00aa", "b2ff80", "ff851a", "b259ff"),
    )
)


def class_colors(winner: Tensor, best: Tensor) -> list[dict[int, Color]]:
    """Returns a dictionary of colours for each image: F of CLEAR's Eq. 6 (Kumar, Wong and Taylor, 2017).

    The classes with the largest dominant response in all get the colours of `CLASS_COLORS` in turn; more classes than
    colours share them. All images have the same dictionary where the batch as a whole has no more classes than there
    are colours.

    Args:
        winner: dominant class, int64 `[N, H, W]`; negative where there is none.
        best: its response `[N, H, W]`; only where it is positive a class is seen.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> winner = torch.tensor([[[7, 7, 2]]])
        >>> [list(colors) for colors in render.class_colors(winner, torch.tensor([[[1.0, 2.0, 0.5]]]))]
        [[7, 2]]
    """
    ranks = [_ranked(w, b) for w, b in zip(winner, best, strict=True)]
    together = _ranked(winner, best)
    if len(together) <= len(CLASS_COLORS):
        ranks = [together] * len(ranks)
    return [{c: CLASS_COLORS[i % len(CLASS_COLORS)] for i, c in enumerate(ranked)} for ranked in ranks]


def _ranked(winner: Tensor, best: Tensor) -> list[int]:
    """Returns the classes that are seen, those with the largest response in all first."""
    active = (best > 0) & (winner >= 0)
    classes, at = winner[active].unique(return_inverse=True)
    weight = torch.zeros(len(classes), dtype=torch.float64, device=best.device)
    weight.index_add_(0, at, best[active].double())
    return classes[weight.argsort(descending=True, stable=True)].tolist()


def _color_and_value(
    winner: Tensor, best: Tensor, colors: Sequence[dict[int, Color]] | None, saturated: float
) -> tuple[Tensor, Tensor]:
    """Returns the colour of the class of each pixel `[N, 3, H, W]`, and its brightness `[N, 1, H, W]`."""
    if winner.shape != best.shape or winner.dim() != 3:
        raise InputError(
            f"winner and best must have the same shape [N, H, W], got {list(winner.shape)} and {list(best.shape)}"
        )
    winner, best = winner.cpu(), best.detach().float().cpu()
    colors = class_colors(winner, best) if colors is None else colors
    if len(colors) != len(winner):
        raise InputError(f"colors must be one dictionary for each of {len(winner)} images, got {len(colors)}")
    painted = torch.zeros(*best.shape, 3)
    for picture, classes, dictionary in zip(painted, winner, colors, strict=True):
        for index, color in dictionary.items():
            picture[classes == index] = torch.tensor(color)
    return painted.permute(0, 3, 1, 2), brightness(best.masked_fill(winner < 0, 0), saturated)[:, None]


def brightness(best: Tensor, saturated: float = 0.005) -> Tensor:
    """Returns responses `[N, H, W]` as brightness in 0..1: negative ones are dark, the largest of an image are full.

    Args:
        best: responses of any class, which are compared directly.
        saturated: share of the pixels that are fully bright; with none but the largest, one outlier darkens the rest.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.brightness(torch.tensor([[[-1.0, 1.0, 2.0]]]), saturated=0.0)
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    if not 0 <= saturated < 1:
        raise InputError(f"saturated must lie in 0 to 1, got {saturated}")
    positive = best.detach().float().nan_to_num(0, 0, 0).clamp_min(0)
    top = _quantile(positive, 1 - saturated)
    # If less than that share responds at all, the largest response is used.
    top = torch.where(top > 0, top, positive.amax((1, 2), keepdim=True))
    return (positive / top.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)


def dominance(
    winner: Tensor, best: Tensor, colors: Sequence[dict[int, Color]] | None = None, saturated: float = 0.005
) -> Tensor:
    """Draws CLEAR's composite (Eq. 6): the colour is the dominant class of a pixel, the brightness its strength.

    Args:
        winner: dominant class, int64 `[N, H, W]`.
        best: dominant response `[N, H, W]`, at one scale for all classes; negative is black.
        colors: by class, a dictionary for each image; None takes `class_colors`.
        saturated: see `brightness`.

    Returns:
        `[N, 3, H, W]` in 0..1, on the CPU.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.dominance(torch.randint(3, (2, 8, 8)), torch.rand(2, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    painted, value = _color_and_value(winner, best, colors, saturated)
    return painted * value


def overlay_dominance(
    images: Tensor,
    winner: Tensor,
    best: Tensor,
    colors: Sequence[dict[int, Color]] | None = None,
    alpha: float = 0.5,
    saturated: float = 0.005,
) -> Tensor:
    """Draws the composite over grey images, which show through where no class responds.

    Args:
        images: `[N, 3, H', W']` in 0..1.
        winner: dominant class, int64 `[N, H, W]`.
        best: dominant response `[N, H, W]`.
        colors: see `dominance`.
        alpha: how far the images are darkened for the colours to stand out, 0 to 1.
        saturated: see `brightness`.

    Returns:
        `[N, 3, H', W']` in 0..1, on the CPU.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> winner, best = torch.randint(3, (2, 8, 8)), torch.rand(2, 8, 8)
        >>> render.overlay_dominance(torch.rand(2, 3, 8, 8), winner, best).shape
        torch.Size([2, 3, 8, 8])
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0 to 1, got {alpha}")
    images = images.detach().float().cpu()
    if len(images) != len(winner):
        raise InputError(f"winner must be one for each of {len(images)} images, got {len(winner)}")
    painted, value = _color_and_value(winner, best, colors, saturated)
    painted = painted * value
    if value.shape[2:] != images.shape[2:]:
        painted, value = (
            functional.interpolate(part, images.shape[2:], mode="bilinear", align_corners=False)
            for part in (painted, value)
        )
    return images.mean(1, keepdim=True) * (1 - alpha) * (1 - value) + painted


def binary(target: Tensor, others: Tensor, constant: bool = False, saturated: float = 0.005) -> Tensor:
    """Draws the evidence for a class and against it (Kumar, Wong and Taylor, 2017, section 4.2).

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

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.binary(torch.rand(2, 8, 8), torch.rand(2, 8, 8), constant=True).shape
        torch.Size([2, 3, 8, 8])
    """
    target, others = target.detach().float().cpu(), others.detach().float().cpu()
    if target.shape != others.shape or target.dim() != 3:
        raise InputError(
            f"target and others must have the same shape [N, H, W], got {list(target.shape)} and {list(others.shape)}"
        )
    is_target = target >= others
    value = brightness(torch.maximum(target, others), saturated)
    if constant:
        shown = value >= 0.1
        return torch.stack([shown & is_target, torch.zeros_like(is_target), shown & ~is_target], 1).float()
    hot = torch.stack([3 * value, 3 * value - 1, 3 * value - 2], 1).clamp(0, 1)
    green = torch.stack([torch.zeros_like(value), value, torch.zeros_like(value)], 1)
    return torch.where(is_target[:, None], hot, green)


def legend(names: Sequence[str], colors: Sequence[Color], side: int = 192) -> Any:
    """Draws names beside patches of their colours, one below the other, as a PIL image `side` pixels wide.

    Args:
        names: names of the classes.
        colors: color of each.
        side: width in pixels; names are cut to it.

    Example:
        >>> from pyfast_xai import render
        >>> render.legend(["tabby", "tiger cat"], [render.YELLOW, render.GREEN], side=120).width
        120
    """
    from PIL import Image, ImageDraw

    font = _font(side)
    line = math.ceil(font.size * 1.5)
    patch = math.ceil(font.size)
    sheet = Image.new("RGB", (side, max(1, line * len(names))), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        top = i * line + (line - patch) // 2
        canvas.rectangle([0, top, patch - 1, top + patch - 1], fill=_ink(color))
        text = _fitted(name, font, side - 1.5 * patch)
        canvas.text((1.5 * patch, i * line + line / 2), text, fill="black", font=font, anchor="lm")
    return sheet


def _font(side: int) -> Any:
    """Returns the font for cells of some side, which grows slowly: a sheet of large pictures may be scaled down."""
    from PIL import ImageFont

    return ImageFont.load_default(size=round(11 + side / 64))


@dataclass(frozen=True)
class Key:
    """A line of the legend of a sheet: a mark, and its meaning.

    Attributes:
        text: the meaning of the mark, or of the highest end of a colour map.
        color: color of a mark.
        mark: "box", "dot", or "none" for the text alone.
        colormap: one of `COLORMAPS` in place of a colour.
        low: the meaning of the lowest end of the colour map.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> keys = [render.Key("more", colormap="plasma", low="less"), render.Key("box", color=render.YELLOW)]
        >>> render.montage([[torch.rand(3, 8, 8)]], keys=keys).mode
        'RGB'
    """

    text: str
    color: Color = YELLOW
    mark: str = "box"
    colormap: str | None = None
    low: str = ""

    def width(self, font: Any) -> float:
        """Returns the pixels that the key takes in a line."""
        line = math.ceil(font.size * 1.5)
        if self.mark == "none":
            return font.getlength(self.text)
        if self.colormap is None:
            return 1.2 * line + font.getlength(self.text)
        return 5.8 * line + font.getlength(self.low) + font.getlength(self.text)

    def draw(self, canvas: Any, font: Any, left: float, middle: float) -> None:
        """Draws the key from some pixel on, on a line with some middle."""
        line = math.ceil(font.size * 1.5)
        half = font.size // 2
        if self.colormap is not None:
            canvas.text((left, middle), self.low, fill="black", font=font, anchor="lm")
            left += font.getlength(self.low) + 0.4 * line
            shades = _table(self.colormap).tolist()
            length = 5 * line
            for step in range(length):
                color = shades[step * 255 // (length - 1)]
                canvas.line([left + step, middle - half, left + step, middle + half - 1], fill=_ink(color))
            left += length + 0.4 * line
        elif self.mark != "none":
            outline = [left, middle - half, left + 2 * half, middle + half]
            if self.mark == "dot":
                canvas.ellipse(outline, fill=_ink(self.color), outline=SHADOW, width=max(1, half // 3))
            else:
                canvas.rectangle(outline, outline=SHADOW, width=4)
                inner = [outline[0] + 1, outline[1] + 1, outline[2] - 1, outline[3] - 1]
                canvas.rectangle(inner, outline=_ink(self.color), width=2)
            left += 1.2 * line
        canvas.text((left, middle), self.text, fill="black", font=font, anchor="lm")


def _drawn(images: Tensor, draw: Any) -> Tensor:
    """Returns `images` after `draw(n, canvas, scale)` has drawn on each, enlarged for smooth edges."""
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


def _ink(color: Color) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in color)


def draw_points(images: Tensor, points: Sequence[Tensor], color: Color = WHITE, radius: float | None = None) -> Tensor:
    """Draws points as dots with a thin dark rim.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        points: points of each image, `[P, 2]` as (y, x) pixels.
        color: red, green, blue in 0..1.
        radius: in pixels; None takes 1 % of the shorter side, less where there are more than 200 points.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.draw_points(torch.zeros(1, 3, 32, 32), [torch.tensor([[16, 8]])]).shape
        torch.Size([1, 3, 32, 32])
    """
    if len(points) != len(images):
        raise InputError(f"points must be one tensor for each of {len(images)} images, got {len(points)}")

    def draw(n: int, canvas: Any, scale: int) -> None:
        coordinates = points[n].tolist()
        crowd = min(1.0, max(0.4, math.sqrt(200 / max(1, len(coordinates)))))
        size = max(0.6, 0.01 * min(images.shape[2:]) * crowd) if radius is None else radius
        # All rims first: where dots overlap they join.
        for reach, ink in ((size + max(0.35, size / 4), SHADOW), (size, _ink(color))):
            for y, x in coordinates:
                left, top = (x + 0.5 - reach) * scale, (y + 0.5 - reach) * scale
                right, bottom = left + 2 * reach * scale - 1, top + 2 * reach * scale - 1
                canvas.ellipse([left, top, max(left, right), max(top, bottom)], fill=(*ink, 255))

    return _drawn(images, draw)


def draw_boxes(images: Tensor, boxes: Tensor, color: Color = YELLOW, width: float | None = None) -> Tensor:
    """Draws outlines of boxes with a thin dark rim.

    Args:
        images: `[N, 3, H, W]` in 0..1.
        boxes: `[N, 4]` as (x1, y1, x2, y2), one an image; a row of NaN draws nothing.
        color: red, green, blue in 0..1.
        width: width of the line, in pixels; None takes 0.8 % of the shorter side.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.draw_boxes(torch.zeros(1, 3, 32, 32), torch.tensor([[4.0, 4, 20, 28]])).shape
        torch.Size([1, 3, 32, 32])
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
    """Converts one image `[3, H, W]` in 0..1 to a PIL image.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> render.to_pil(torch.rand(3, 20, 30)).size
        (30, 20)
    """
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def from_pil(picture: Any) -> Tensor:
    """Converts a PIL image to `[3, H, W]` in 0..1.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import render
        >>> render.from_pil(Image.new("RGB", (30, 20))).shape
        torch.Size([3, 20, 30])
    """
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def png_bytes(picture: Any) -> bytes:
    """Encodes a PIL image as PNG.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import render
        >>> render.png_bytes(Image.new("RGB", (30, 20)))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    # Three times as fast as the default, for a twentieth more bytes.
    picture.save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def montage(
    rows: Sequence[Sequence[Tensor]],
    labels: Sequence[str] | None = None,
    titles: Sequence[Sequence[str]] | None = None,
    side: int = 192,
    heading: str = "",
    legends: Sequence[Sequence[Any]] | None = None,
    keys: Sequence[Key] = (),
) -> Any:
    """Draws a contact sheet.

    Args:
        rows: images `[3, H, W]` in 0..1, row by row; each is fitted into a square cell.
        labels: labels of the rows, written to their left.
        titles: titles of the images, written above them, row by row; the last rows may have none.
        side: side of a cell, in pixels.
        heading: heading of the sheet, in a line of its own.
        legends: legends of the images, PIL images put below them as they are, row by row; the last rows may have none.
        keys: the meaning of marks and colours, in the last lines.

    Returns:
        A PIL image.

    Example:
        >>> import torch
        >>> from pyfast_xai import render
        >>> sheet = render.montage([[torch.rand(3, 32, 32), torch.rand(3, 32, 32)]], labels=["first row"], side=64)
        >>> sheet.mode
        'RGB'
    """
    from PIL import Image, ImageDraw

    font = _font(side)
    line = math.ceil(font.size * 1.5)
    gap = max(6, side // 24)
    named = [_fitted(label, font, 2 * side) for label in labels or []]
    margin = math.ceil(max((font.getlength(label) for label in named), default=0)) + (2 * gap if named else gap)
    heads = [line if titles and r < len(titles) and any(titles[r]) else 0 for r in range(len(rows))]
    feet = [
        max((legend.height for legend in legends[r]), default=0) if legends and r < len(legends) else 0
        for r in range(len(rows))
    ]
    columns = max((len(row) for row in rows), default=0)
    width = margin + columns * (side + gap)
    placed, lines = _placed(keys, font, width - 2 * gap, 2 * gap)
    above = line + gap // 2 if heading else 0
    height = gap + above + sum(heads) + sum(feet) + len(rows) * (side + gap)
    sheet = Image.new("RGB", (width, height + (lines * line + gap // 2 if keys else 0)), "white")
    canvas = ImageDraw.Draw(sheet)
    if heading:
        large = font.font_variant(size=font.size + 3)
        text = _fitted(heading, large, width - 2 * gap)
        canvas.text((gap, gap + line / 2), text, fill="black", font=large, anchor="lm")
    top = gap + above
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
            if legends and feet[r] and c < len(legends[r]):
                sheet.paste(legends[r][c], (left, top + heads[r] + side + gap // 2))
        top += heads[r] + side + feet[r] + gap
    for key, across, down in placed:
        key.draw(canvas, font, gap + across, top + (down + 0.5) * line)
    return sheet


def _placed(keys: Sequence[Key], font: Any, room: float, gap: float) -> tuple[list[tuple[Key, float, int]], int]:
    """Returns keys with where they begin in a line, in pixels, and in which line, and how many lines there are."""
    placed: list[tuple[Key, float, int]] = []
    across, down = 0.0, 0
    for key in keys:
        if across and across + key.width(font) > room:
            across, down = 0.0, down + 1
        placed.append((key, across, down))
        across += key.width(font) + gap
    return placed, down + 1


def _fitted(text: str, font: Any, room: float) -> str:
    """Returns `text` on one line, cut with an ellipsis where it is wider than `room` pixels."""
    # File names may hold line breaks and bytes that are no text.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
