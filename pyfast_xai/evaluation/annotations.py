"""Annotations of pictures (class, boxes and masks), read from the formats that data sets come in."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

Label = int | str
Shape = Path | list[float] | dict[str, Any]
"""An outline of an object: a mask file, a polygon (x, y, x, y, ...) or COCO's run lengths."""


@dataclass(frozen=True, eq=False)
class Annotation:
    """The annotation of one picture.

    Attributes:
        path: path of the picture.
        label: its class: an index, or a name; None where it has none or several.
        boxes: boxes of its objects, float32 `[B, 4]` as (x1, y1, x2, y2), inclusive pixels of the file.
        kinds: class of each object.
        shapes: outlines of its objects; empty where there are none.
        shape_kinds: class of each outline; empty where it is not known.
    """

    path: Path
    label: Label | None = None
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    kinds: Sequence[Label] = ()
    shapes: Sequence[Shape] = ()
    shape_kinds: Sequence[Label] = ()

    def of_class(self, kind: Label) -> "Annotation":
        """Returns the annotation of the objects of one class.

        Args:
            kind: the class.
        """
        boxes = self.boxes[torch.tensor([known == kind for known in self.kinds], dtype=torch.bool)]
        # The outlines of an object may be several.
        shapes = [shape for shape, known in zip(self.shapes, self.shape_kinds, strict=True) if known == kind]
        return Annotation(self.path, kind, boxes, [kind] * len(boxes), shapes, [kind] * len(shapes))

    def mask(self, size: tuple[int, int]) -> Any:
        """Returns all objects together, a PIL image of mode "L": 255 on an object, 0 elsewhere.

        Args:
            size: (W, H) of the picture.
        """
        from PIL import Image, ImageChops

        whole = Image.new("L", size)
        for shape in self.shapes:
            whole = ImageChops.lighter(whole, _drawn(shape, size))
        return whole


def _drawn(shape: Shape, size: tuple[int, int]) -> Any:
    from PIL import Image, ImageDraw

    if isinstance(shape, Path):
        with Image.open(shape) as mask:
            # In indexed masks 255 marks borders that belong to nothing (PASCAL VOC).
            background = 255 if mask.mode == "P" else 0
            grey = mask if mask.mode in ("L", "P") else mask.convert("L")
            pixels = Image.eval(_plain(grey), lambda value: 0 if value in (0, background) else 255)
        if pixels.size != size:
            raise InputError(f"annotations must have masks of the size of the picture, {size}, got {pixels.size}")
        return pixels
    canvas = Image.new("L", size)
    if isinstance(shape, list):
        ImageDraw.Draw(canvas).polygon(shape, fill=255)
        return canvas
    return _run_lengths(shape, size)


def _plain(mask: Any) -> Any:
    """Returns the indices instead of colours."""
    from PIL import Image

    return Image.frombytes("L", mask.size, mask.tobytes()) if mask.mode == "P" else mask


def _run_lengths(shape: Mapping[str, Any], size: tuple[int, int]) -> Any:
    """Returns COCO's uncompressed run lengths: background and object in turn, column by column."""
    import numpy as np
    from PIL import Image

    counts = shape.get("counts")
    if not isinstance(counts, list) or sum(counts) != size[0] * size[1]:
        received = f"{sum(counts)} pixels" if isinstance(counts, list) else "compressed ones"
        raise InputError(
            f"annotations must have run lengths of {size[0] * size[1]} pixels in plain numbers, got {received}"
        )
    values = np.repeat(np.arange(len(counts)) % 2 * 255, counts).astype(np.uint8)
    return Image.fromarray(values.reshape(size[::-1], order="F"))


@dataclass
class _Entry:
    """An annotation whose picture has not been found yet."""

    name: str
    label: Label | None = None
    boxes: Any = ()
    kinds: Sequence[Label] = ()
    shapes: Sequence[Shape] = ()
    shape_kinds: Sequence[Label] = ()


def read_annotations(source: str | Path, images: Iterable[str | Path]) -> tuple[list[Annotation], list[Path]]:
    """Returns the annotations of some pictures.

    Understood are COCO's JSON; a JSON list of `{"file", "label", "boxes"}`; PASCAL VOC's XML, one file or a folder
    (ILSVRC's, too); `LOC_val_solution.csv` of ILSVRC; a folder with `class_labels.txt` and `localization.txt`
    (Choe et al., 2020); and a folder of mask PNGs called like the pictures, where 0 is background.

    Args:
        source: a file or folder.
        images: the pictures; they are matched by their path, as far as the annotation tells it, with or without suffix.

    Returns:
        An annotation for each picture that has one, in order of the pictures, and the pictures without.

    Raises:
        InputError: a format that is not known, or an annotation that cannot be read.
    """
    source, pictures = Path(source), [Path(image) for image in images]
    reader = _reader_of(source)
    try:
        entries = list(reader(source))
    except (KeyError, TypeError, ValueError, IndexError, ElementTree.ParseError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"annotations must be readable, got {str(source)!r} ({reason})") from None
    if not entries:
        raise InputError(f"annotations must hold at least one picture, got {str(source)!r} with none")
    matched = _matched(entries, pictures)
    return [matched[path] for path in pictures if path in matched], [path for path in pictures if path not in matched]


def _reader_of(source: Path) -> Callable[[Path], Iterator[_Entry]]:
    if source.is_dir():
        if (source / "localization.txt").is_file():
            return _choe
        for pattern, reader in (("*.xml", _voc), ("*.png", _masks)):
            if next(source.rglob(pattern), None) is not None:
                return reader
        raise InputError(f"annotations must be a folder with XML, PNG or localization.txt, got {str(source)!r}")
    known = {".json": _json, ".xml": _voc, ".csv": _ilsvrc}
    if not source.is_file() or source.suffix.lower() not in known:
        raise InputError(f"annotations must be a folder or a file of {', '.join(known)}, got {str(source)!r}")
    return known[source.suffix.lower()]


def _matched(entries: Sequence[_Entry], pictures: Sequence[Path]) -> dict[Path, Annotation]:
    """Returns the pictures whose path ends as an entry says; of entries that fit equally well none is taken."""
    ends: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in pictures:
        whole = path.resolve()
        for parts in (whole.parts, whole.with_suffix("").parts):
            for length in range(1, min(4, len(parts)) + 1):
                ends[parts[-length:]].append(path)
    annotations = {}
    for entry in entries:
        parts = PurePath(entry.name).parts[-4:]
        # A picture may lie in another folder than when it was annotated.
        for length in range(len(parts), 0, -1):
            paths = ends.get(parts[-length:], [])
            if len(paths) == 1:
                fields = (entry.kinds, entry.shapes, entry.shape_kinds)
                annotations[paths[0]] = Annotation(paths[0], entry.label, _boxes(entry), *fields)
            if paths:
                break
    return annotations


def _boxes(entry: _Entry) -> Tensor:
    for box in entry.boxes:
        if len(box) != 4 or not all(isinstance(end, (int, float)) for end in box):
            raise InputError(f"annotations must have boxes of four numbers, got {box!r} for {entry.name!r}")
    return torch.tensor(list(map(list, entry.boxes)), dtype=torch.float32).reshape(-1, 4)


def _json(source: Path) -> Iterator[_Entry]:
    table = json.loads(source.read_text())
    if isinstance(table, dict) and "images" in table:
        yield from _coco(table)
    elif isinstance(table, list):
        for row in table:
            boxes = row.get("boxes", [])
            yield _Entry(row["file"], row.get("label"), boxes, row.get("kinds", [row.get("label")] * len(boxes)))
    else:
        raise InputError(f"annotations must be COCO's or a list, got {str(source)!r}")


def _coco(table: Mapping[str, Any]) -> Iterator[_Entry]:
    names = {category["id"]: category["name"] for category in table.get("categories", [])}
    objects = defaultdict(list)
    for row in table.get("annotations", []):
        if not row.get("iscrowd"):
            objects[row["image_id"]].append(row)
    for image in table["images"]:
        rows = objects[image["id"]]
        kinds = [names.get(row["category_id"], row["category_id"]) for row in rows]
        shapes: list[Shape] = []
        shape_kinds: list[Label] = []
        for row, kind in zip(rows, kinds, strict=True):
            shape = row.get("segmentation") or []
            outlines = [shape] if isinstance(shape, dict) else shape
            shapes += outlines
            shape_kinds += [kind] * len(outlines)
        boxes = [(x, y, x + w - 1, y + h - 1) for x, y, w, h in (row["bbox"] for row in rows)]
        yield _Entry(image["file_name"], kinds[0] if len(set(kinds)) == 1 else None, boxes, kinds, shapes, shape_kinds)


def _voc(source: Path) -> Iterator[_Entry]:
    files = sorted(source.rglob("*.xml")) if source.is_dir() else [source]
    synsets = _synsets(source)
    for file in files:
        root = ElementTree.parse(file).getroot()
        boxes, kinds = [], []
        for element in root.iter("object"):
            if element.findtext("difficult", "0").strip() == "1":
                continue
            name = element.findtext("name", "")
            corners = [float(element.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax")]
            # PASCAL VOC counts pixels from one, ILSVRC from zero; both include the last.
            first = 0 if name in synsets or name[1:].isdecimal() else 1
            boxes.append([corner - first for corner in corners])
            kinds.append(synsets.get(name, name))
        # Names in the file are those of its making; that of the file is the picture's.
        yield _Entry(file.stem, kinds[0] if len(set(kinds)) == 1 else None, boxes, kinds)


def _ilsvrc(source: Path) -> Iterator[_Entry]:
    synsets = _synsets(source)
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            words = row["PredictionString"].split()
            objects = [words[i : i + 5] for i in range(0, len(words), 5)]
            kinds = [synsets.get(entry[0], entry[0]) for entry in objects]
            boxes = [[float(end) for end in entry[1:]] for entry in objects]
            yield _Entry(row["ImageId"], kinds[0] if len(set(kinds)) == 1 else None, boxes, kinds)


def _synsets(source: Path) -> dict[str, int]:
    """Reads the output of each synset from a list beside the annotations; networks have them in this order."""
    beside = source if source.is_dir() else source.parent
    for folder in (beside, beside.parent):
        for name in ("LOC_synset_mapping.txt", "synset_words.txt"):
            if (folder / name).is_file():
                lines = (folder / name).read_text().splitlines()
                return {line.split()[0]: index for index, line in enumerate(sorted(filter(None, lines)))}
    return {}


def _choe(source: Path) -> Iterator[_Entry]:
    labels = dict(_pairs(source / "class_labels.txt")) if (source / "class_labels.txt").is_file() else {}
    boxes = defaultdict(list)
    for name, rest in _pairs(source / "localization.txt"):
        boxes[name].append([float(end) for end in rest.split(",")])
    for name, ends in boxes.items():
        label = int(labels[name]) if name in labels else None
        yield _Entry(name, label, ends, [] if label is None else [label] * len(ends))


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        if line.strip():
            name, _, rest = line.partition(",")
            yield name, rest


def _masks(source: Path) -> Iterator[_Entry]:
    for file in sorted(source.rglob("*.png")):
        yield _Entry(str(file.relative_to(source).with_suffix("")), shapes=[file])
