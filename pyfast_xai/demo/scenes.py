"""Cluttered scenes with one handwritten digit each, painted from scikit-learn's digits.

Every scene is a function of one row of uniform draws, so scene ``i`` of a seed is the same whatever the count,
and painting is a handful of batched tensor operations. Decoys (brush strokes, blobs, scrambled pieces of other
digits) share the digit's palette and line width: neither colour nor thickness tells where the digit is.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast_xai.errors import InputError

SIZE = 96
"""Side of a scene, in pixels."""

_TILE = 8
_TILE_SIDE = (24.0, 48.0)
_TEST_STRIDE = 5
_CHUNK = 64

_BLOBS, _BLOB_DRAWS = 5, 7
_STROKES, _STROKE_DRAWS = 4, 8
_FRAGMENTS, _FRAGMENT_DRAWS = 6, 14
_NOISE_SIDE = 6
_BACKGROUND_DRAWS = 6 + _NOISE_SIDE**2
_DIGIT_DRAWS = 10
_DRAWS = (
    1,
    _DIGIT_DRAWS,
    _BACKGROUND_DRAWS,
    _BLOBS * _BLOB_DRAWS,
    _STROKES * _STROKE_DRAWS,
    _FRAGMENTS * _FRAGMENT_DRAWS,
)

# Three soft background colours, then five inks that stand out against all three.
_PALETTES = (
    "fdf0d5 f7dcb4 fbe6d0 003049 c1121f 3a6ea5 780000 1f7a6f",
    "e8f6ef cbe8da dff0d0 1b4965 d1495b 5f0f40 0b6e4f d9570d",
    "ece4f7 d5c9f0 f4d9e6 3c096c 0077b6 b5179e 264653 c9184a",
    "e3f2fd bcdff5 d9e4ff 023e8a d62828 e0601a 2d6a4f 5a189a",
    "ffe5ec ffc8dd fde2d0 6a040f 22577a 7209b7 386641 d9480f",
    "f1e6da dfc4a3 ead3bd 3d2b1f 1d3557 9b2226 31572c 5f0f40",
    "14213d 1f3a63 2b2d5b ffd166 ef6f8f 06d6a0 f1faee 8ecae6",
    "12292b 1f4a46 17363d f4d35e ee964b ff7f5c d8f3dc 90e0ef",
    "2d1e3e 4d2c57 3a2160 ffc6ff ffadad fdffb6 9bf6ff caffbf",
    "2b3a42 35525a 4a6a68 e3ead9 ffb703 ff9f8a f2e9e4 a8dadc",
)


class Scenes(NamedTuple):
    """A batch of scenes.

    Attributes:
        images: ``[N, 3, 96, 96]`` float32, RGB in 0..1.
        labels: ``[N]`` int64, the digit 0..9.
        boxes: ``[N, 4]`` int64, ``x1, y1, x2, y2`` in pixels, both ends inclusive: the tight box of the digit.

    Example:
        >>> from pyfast_xai.demo import make_scenes
        >>> scenes = make_scenes(2, seed=0)
        >>> scenes.images.shape, scenes.labels.shape, scenes.boxes.shape
        (torch.Size([2, 3, 96, 96]), torch.Size([2]), torch.Size([2, 4]))
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


def make_scenes(count: int, seed: int, split: str = "test") -> Scenes:
    """Paints ``count`` scenes, the same ones for the same seed and split.

    Args:
        count: how many scenes, at least 1.
        seed: a non-negative integer; scene ``i`` depends on the seed and on ``i``, not on ``count``.
        split: ``"train"`` or ``"test"``: which digits (whole and in pieces) may appear. No digit is in both.

    Returns:
        The scenes, on the CPU.

    Raises:
        InputError: an argument is out of range, or scikit-learn, which holds the digits, is not installed.

    Example:
        >>> from pyfast_xai import demo
        >>> scenes = demo.make_scenes(8, seed=0)
        >>> accuracy = (demo.load()(scenes.images).argmax(1) == scenes.labels).float().mean()
        >>> bool(accuracy > 0.7)
        True
    """
    # Whatever default device the caller has set: a seed means the same scenes on the CPU only.
    with torch.device("cpu"):
        return _paint(_draw(count, seed), split)


def _paint(draws: Tensor, split: str) -> Scenes:
    tiles, classes = _digits(split)
    images, labels, boxes = [], [], []
    for rows in draws.split(_CHUNK):
        which, mask, ink = _digit(rows, tiles)
        images.append(_over(_backdrop(rows, tiles), mask, ink))
        labels.append(classes[which])
        boxes.append(_tight_boxes(mask))
    return Scenes(torch.cat(images), torch.cat(labels), torch.cat(boxes))


def split_indices(total: int, split: str) -> Tensor:
    """Returns the indices of the digits that belong to a split: every fifth is kept for testing.

    Args:
        total: number of digits.
        split: ``"train"`` or ``"test"``.

    Returns:
        ``[K]`` int64, ascending.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', got {split!r}")
    index = torch.arange(total)
    held_out = index % _TEST_STRIDE == _TEST_STRIDE - 1
    return index[held_out if split == "test" else ~held_out]


@lru_cache(maxsize=2)
def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Returns the tiles ``[K, 8, 8]`` float32 in 0..1 (ink is 1) and classes ``[K]`` int64 of a split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the demo scenes need scikit-learn, which holds the digits: pip install scikit-learn"
        ) from error
    data = load_digits()
    index = split_indices(len(data.target), split)
    tiles = torch.from_numpy(data.images).float()[index] / 16
    return tiles, torch.from_numpy(data.target).long()[index]


def _draw(count: int, seed: int) -> Tensor:
    """Returns one row of uniform draws a scene, ``[N, sum(_DRAWS)]`` float32 in 0..1."""
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    return torch.rand(count, sum(_DRAWS), generator=torch.Generator().manual_seed(seed))


def _span(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


def _pick(draw: Tensor, choices: int) -> Tensor:
    return (draw * choices).long().clamp_(max=choices - 1)


@lru_cache(maxsize=1)
def _palettes() -> Tensor:
    """Returns ``[P, 8, 3]`` float32 RGB in 0..1."""
    return torch.tensor([[list(bytes.fromhex(c)) for c in row.split()] for row in _PALETTES]) / 255


def _colours(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the background colours ``[n, 3, 3]`` and inks ``[n, 5, 3]`` of each scene's palette."""
    palette = _palettes()[_pick(rows[:, 0], len(_PALETTES))]
    return palette[:, :3], palette[:, 3:]


@lru_cache(maxsize=1)
def _grid() -> tuple[Tensor, Tensor]:
    """Returns coordinates ``x`` ``[1, 1, 96]`` and ``y`` ``[1, 96, 1]``, in pixels from the top left pixel's centre."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    return axis.view(1, 1, SIZE), axis.view(1, SIZE, 1)


def _local(cx: Tensor, cy: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Returns pixels in frames centred at ``cx, cy`` (pixels), turned by ``angle`` (radians), two ``[n, 96, 96]``."""
    x, y = _grid()
    dx, dy = x - cx.view(-1, 1, 1), y - cy.view(-1, 1, 1)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return dx * cos + dy * sin, dy * cos - dx * sin


def _over(canvas: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Lays ``colour`` ``[n, 3]`` over ``canvas`` ``[n, 3, 96, 96]`` where ``mask`` ``[n, 96, 96]`` says how much."""
    return torch.lerp(canvas, colour[:, :, None, None], mask[:, None])


def _stamp(tile: Tensor, u: Tensor, v: Tensor, cell: Tensor) -> Tensor:
    """Returns the coverage of a tile of ink enlarged smoothly about its centre.

    Args:
        tile: ``[n, k, k]`` ink in 0..1.
        u: ``[n, 96, 96]`` pixel offsets from the tile's centre, along its rows.
        v: ``[n, 96, 96]`` pixel offsets from the tile's centre, along its columns.
        cell: ``[n]`` pixels a tile cell spans.

    Returns:
        ``[n, 96, 96]`` coverage in 0..1, exactly 0 off the ink.
    """
    # An empty ring lets strokes that touch the tile's edge end in a round, not in a cut.
    ringed = F.pad(tile[:, None], (1, 1, 1, 1))
    # At 8x8 the loops of a 6 or 9 are only paler ink: raise local contrast, or enlarging closes them.
    ringed = ringed + 0.7 * (ringed - F.avg_pool2d(ringed, 3, 1, 1, count_include_pad=True))
    side = ringed.shape[-1]
    fine = F.interpolate(ringed, scale_factor=6, mode="bicubic", align_corners=False)
    half = (cell * (side / 2)).view(-1, 1, 1)
    ink = F.grid_sample(fine, torch.stack((u / half, v / half), -1), padding_mode="zeros", align_corners=False)[:, 0]
    # The ramp is about a pixel wide at every scale, so enlarging keeps the edge crisp.
    coverage = ((ink - 0.5) * cell.view(-1, 1, 1) * 0.9 + 0.5).clamp(0, 1)
    return torch.where(coverage < 0.08, 0.0, coverage)


def _placement(rows: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws the digit: index in ``tiles``, pixels a cell, turn (radians), slant, each ``[n]``; centre ``[n, 2]``."""
    draw = rows.split(_DRAWS, 1)[1]
    which = _pick(draw[:, 0], len(tiles))
    cell = _span(draw[:, 1], *_TILE_SIDE) / _TILE
    angle = _span(draw[:, 2], -0.15, 0.15)
    slant = _span(draw[:, 3], -0.12, 0.12)
    low, high = _reach(tiles[which], cell, angle, slant)
    centre = -low + draw[:, 4:6] * (SIZE - 1 - (high - low))
    return which, cell, angle, slant, centre


def _digit(rows: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the whole digit: index in ``tiles`` ``[n]``, coverage ``[n, 96, 96]`` and colour ``[n, 3]``."""
    which, cell, angle, slant, centre = _placement(rows, tiles)
    u, v = _local(centre[:, 0], centre[:, 1], angle)
    mask = _stamp(tiles[which], u + slant.view(-1, 1, 1) * v, v, cell)
    draw = rows.split(_DRAWS, 1)[1]
    ink = _ink(rows, draw[:, 6], draw[:, 7:10])
    return which, mask, ink


def _reach(tile: Tensor, cell: Tensor, angle: Tensor, slant: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the reach of the ink of a turned, slanted tile from its centre, in pixels: two ``[n, 2]`` (x, y)."""
    axis = (torch.arange(_TILE) - (_TILE - 1) / 2) * cell.view(-1, 1)
    v = axis[:, :, None]
    u = axis[:, None, :] - slant.view(-1, 1, 1) * v
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    coordinates = torch.stack((u * cos - v * sin, u * sin + v * cos), 1).flatten(2)
    blank = (tile < 0.2).flatten(1)[:, None]
    # Smoothing spreads a cell's ink less than one cell past its centre.
    margin = cell.view(-1, 1)
    low = coordinates.masked_fill(blank, math.inf).amin(2) - margin
    high = coordinates.masked_fill(blank, -math.inf).amax(2) + margin
    return low, high


def _ink(rows: Tensor, choice: Tensor, jitter: Tensor) -> Tensor:
    _, inks = _colours(rows)
    colour = inks[torch.arange(len(rows)), _pick(choice, inks.shape[1])]
    return (colour + _span(jitter, -0.06, 0.06)).clamp(0, 1)


def _backdrop(rows: Tensor, tiles: Tensor) -> Tensor:
    """Returns the everything but the digit: ``[n, 3, 96, 96]`` float32 in 0..1."""
    _, _, background, blobs, strokes, fragments = rows.split(_DRAWS, 1)
    canvas = _paper(rows, background)
    for draw in blobs.split(_BLOB_DRAWS, 1):
        canvas = _over(canvas, *_blob(rows, draw))
    for draw in strokes.split(_STROKE_DRAWS, 1):
        canvas = _over(canvas, *_stroke(rows, draw))
    _, cell, _, _, centre = _placement(rows, tiles)
    for draw in fragments.split(_FRAGMENT_DRAWS, 1):
        # A piece that would touch the digit could turn it into another one: it moves half a scene away.
        position = draw[:, 6:8] * SIZE
        near = (position - centre).norm(dim=1, keepdim=True) < cell[:, None] * (_TILE / 2) + 8
        position = torch.where(near, (position + SIZE / 2) % SIZE, position)
        canvas = _over(canvas, *_fragment(rows, draw, tiles, position))
    return canvas


def _paper(rows: Tensor, draw: Tensor) -> Tensor:
    """Returns a gradient of two colours, drifts of a third, and a faint weave."""
    colours, _ = _colours(rows)
    centre = torch.full_like(draw[:, 0], SIZE / 2)
    u, _ = _local(centre, centre, draw[:, 0] * (2 * math.pi))
    blend = (u / SIZE + 0.5).clamp(0, 1)
    canvas = _over(colours[:, 0, :, None, None].expand(-1, -1, SIZE, SIZE), blend, colours[:, 1])
    noise = draw[:, 6:].view(-1, 1, _NOISE_SIDE, _NOISE_SIDE)
    drift = F.interpolate(noise, size=(SIZE, SIZE), mode="bicubic", align_corners=True)[:, 0]
    canvas = _over(canvas, ((drift - 0.35) * 1.6).clamp(0, 1), colours[:, 2])
    s, t = _local(centre, centre, draw[:, 1] * math.pi)
    pitch = (2 * math.pi / _span(draw[:, 2], 5, 11)).view(-1, 1, 1)
    stripes, dots = (s * pitch).sin(), (s * pitch).sin() * (t * pitch).sin()
    weave = torch.where(draw[:, 3].view(-1, 1, 1) < 0.5, stripes, dots)
    shade = weave * _span(draw[:, 4], 0.0, 0.025).view(-1, 1, 1) + _span(draw[:, 5], -0.03, 0.03).view(-1, 1, 1)
    return (canvas + shade[:, None]).clamp(0, 1)


def _blob(rows: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a translucent ellipse; one in three is hollow."""
    u, v = _local(draw[:, 0] * SIZE, draw[:, 1] * SIZE, draw[:, 2] * math.pi)
    radius = _span(draw[:, 3], 3, 13).view(-1, 1, 1)
    distance = (u.square() + (v * 1.25).square()).sqrt() - radius
    hollow = (draw[:, 4] < 1 / 3).view(-1, 1, 1)
    mask = torch.where(hollow, 2.0 - distance.abs(), 0.5 - distance).clamp(0, 1)
    opacity = _span(draw[:, 5], 0.12, 0.5).view(-1, 1, 1)
    return mask * opacity, _ink(rows, draw[:, 6], draw.new_full((len(draw), 3), 0.5))


def _stroke(rows: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a tapered brush stroke along a parabola."""
    u, v = _local(draw[:, 0] * SIZE, draw[:, 1] * SIZE, draw[:, 2] * (2 * math.pi))
    half = _span(draw[:, 3], 7, 24).view(-1, 1, 1)
    bend = _span(draw[:, 4], -0.7, 0.7).view(-1, 1, 1) * half
    position = u / half
    slope = 2 * bend * position / half
    distance = (v - bend * (1 - position.square())).abs() / (1 + slope.square()).sqrt()
    width = _span(draw[:, 5], 0.8, 2.6).view(-1, 1, 1) * (1 - position.square().square())
    opacity = _span(draw[:, 6], 0.45, 0.95).view(-1, 1, 1)
    mask = (width - distance + 0.3).clamp(0, 1) * (position.abs() < 1)
    return mask * opacity, _ink(rows, draw[:, 7], draw.new_full((len(draw), 3), 0.5))


def _fragment(rows: Tensor, draw: Tensor, tiles: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a patch of 4x4 cells, halves of two digits, rotated at random, centred at `position` `[n, 2]` (pixels)."""
    windows = tiles.unfold(1, 4, 1).unfold(2, 2, 1)
    halves = [windows[tuple(_pick(draw[:, k + axis], windows.shape[axis]) for axis in range(3))] for k in (0, 3)]
    patch = torch.cat(halves, -1)
    u, v = _local(position[:, 0], position[:, 1], draw[:, 8] * (2 * math.pi))
    cell = _span(draw[:, 9], *_TILE_SIDE) / _TILE * 0.9
    return _stamp(patch, u, v, cell), _ink(rows, draw[:, 10], draw[:, 11:14])


def _tight_boxes(mask: Tensor) -> Tensor:
    """Returns the inclusive bounds ``x1, y1, x2, y2`` of the covered pixels, ``[n, 4]`` int64."""
    inked = mask > 0
    bounds = []
    for dim in (1, 2):
        line = inked.any(dim).to(torch.uint8)
        first = line.argmax(1)
        last = line.shape[1] - 1 - line.flip(1).argmax(1)
        bounds.append((first, last))
    (x1, x2), (y1, y2) = bounds
    return torch.stack((x1, y1, x2, y2), 1)
