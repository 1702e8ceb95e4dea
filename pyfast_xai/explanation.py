"""The explanation that every explainer returns."""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import localize, render
from pyfast_xai.errors import InputError
from pyfast_xai.nifti import write_nifti


@dataclass(eq=False, repr=False)
class Explanation:
    """An explanation of a model's outputs for a batch of images.

    Tensors stay on the device of the input until someone asks for something else.

    Several targets or components of an image are rows of their own, image by image.

    Attributes:
        method: the explainer that made it.
        heatmap: float32 `[N, H, W]` at the resolution of the input, >= 0, larger is more important; `[N, D, H, W]` of
            volumes and clips, `[N, L]` of signals.
        target: the class (or neuron) explained, int64 `[N]`; None where the method needs none.
        score: the model's probability for the target (its output, where that is no probability; the activation, for a
            neuron), float32 `[N]`.
        kind: what the target is, a "class" of the model or a "neuron".
        outputs: the kind of the model's outputs by which the score was made, one of "logits", "independent logits",
            "probabilities" and "values" for each row, see `Explainer`; None for a neuron and without a target.
        logits: the outputs of the model for the images, `[N, classes]` or of another shape; None where the method
            stops below the outputs.
        points: fixations of each row, int64 `[P, 2]` as (y, x) pixels of the input; None for other methods.
        attribution: signed, one number for each number of the image, `[N, C, H, W]`; None for methods without.
        signed_map: what the method computed, signed, at the resolution of its layer `[N, h, w]` or of the images; None
            where there is none. `heatmap` is made from its positive part.
        images: what was explained, `[N, C, H, W]`, as the model took it; the ground of pictures.
        box_rule: how `boxes` makes boxes by default; a rule of `localize`.
        labels: names of the classes, used in pictures and files.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo
        >>> explanation = GradCAM(demo.load())(torch.rand(2, 3, 96, 96), target=[3, 7])
        >>> explanation.target
        tensor([3, 7])
        >>> explanation.boxes().shape, explanation.overlay().shape
        (torch.Size([2, 4]), torch.Size([2, 3, 96, 96]))
        >>> explanation.plot().size
        (746, 466)
    """

    method: str
    heatmap: Tensor
    target: Tensor | None = None
    score: Tensor | None = None
    points: list[Tensor] | None = None
    attribution: Tensor | None = None
    signed_map: Tensor | None = None
    images: Tensor | None = None
    box_rule: localize.BoxRule = localize.SEGMENT
    kind: Literal["class", "neuron"] = "class"
    outputs: list[str] | None = None
    logits: Tensor | None = None
    labels: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.images is not None:
            self.images = self.images.detach()

    @staticmethod
    def concatenate(parts: "Sequence[Explanation]") -> "Explanation":
        """Returns one explanation with the rows of several by the same explainer.

        Args:
            parts: at least one. A field that not all of them have, or whose rows differ in shape, is None.

        Example:
            >>> parts = [Explanation("mine", torch.rand(2, 4, 4)), Explanation("mine", torch.rand(1, 4, 4))]
            >>> Explanation.concatenate(parts)
            Explanation(mine, 3 images 4x4)

        Raises:
            InputError: heat maps of different sizes.
        """
        sizes = {part.heatmap.shape[1:] for part in parts}
        if len(sizes) != 1:
            raise InputError(f"parts must have heat maps of one size, got {[list(size) for size in sizes]}")
        rows = [part.by_row() for part in parts]
        return replace(parts[0], **{name: _joined([row.get(name) for row in rows]) for name in rows[0]})

    def __len__(self) -> int:
        return len(self.heatmap)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.heatmap.shape[1:]))
        parts = [self.method, f"{len(self)} image{'' if len(self) == 1 else 's'} {size}"]
        if self.target is not None:
            parts.append(f"{'target' if self.kind == 'class' else 'neuron'} {_short(self.target.tolist())}")
        if self.heatmap.device.type != "cpu":
            parts.append(str(self.heatmap.device))
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getitem__(self, rows: int | slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor) -> "Explanation":
        """Returns some of the rows.

        Args:
            rows: an integer, of Python, NumPy or PyTorch, for an explanation of one row; a slice; integers; or a mask,
                bool `[N]`.

        Raises:
            IndexError: a row that does not exist.
            InputError: no integers, or a mask of another length.
        """
        chosen = _row_numbers(rows, len(self))
        parts: dict[str, Any] = {
            name: value[torch.tensor(chosen, dtype=torch.int64, device=value.device)]
            if isinstance(value, Tensor) and not isinstance(chosen, slice)
            else value[chosen]
            if isinstance(chosen, slice)
            else [value[row] for row in chosen]
            for name, value in self.by_row().items()
        }
        return replace(self, **parts)

    def __iter__(self) -> Iterator["Explanation"]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str) -> "Explanation":
        """Returns the explanation on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
            for name, value in self.by_row().items()
            if name != "outputs"
        }
        return replace(self, **moved)

    def by_row(self) -> dict[str, Any]:
        """Returns the fields that have one entry a row."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) or (name in ("points", "outputs") and value)
        }

    # Other libraries

    def numpy(self) -> np.ndarray:
        """Returns the heat map as a NumPy array `[N, H, W]`."""
        return self.heatmap.detach().cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array, shared = self.numpy(), self.heatmap.device.type == "cpu"
        if dtype is not None and array.dtype != dtype:
            array, shared = array.astype(dtype), False
        if copy is False and not shared:
            raise ValueError(f"copy must be allowed for {self.heatmap.dtype} on {self.heatmap.device}, got copy=False")
        return array.copy() if copy and shared else array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.heatmap.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.heatmap.__dlpack_device__()

    # Volumes and clips

    def slice(self, axis: Literal["z", "y", "x"] = "z", index: int | None = None) -> "Explanation":
        """Returns the explanation of one slice of each volume or clip, which can be drawn as that of an image.

        Args:
            axis: across which to cut: "z" for the first of `[D, H, W]` (depth, or the frames of a clip), "y" or "x".
            index: index of the slice; None for the slice of each row that holds most of the heat map.

        Returns:
            An explanation with heat maps `[N, H, W]`; it has a signed map where that has the resolution of the volumes.

        Raises:
            InputError: no volumes, or an axis or a slice that does not exist.

        Example:
            >>> import torch
            >>> from pyfast_xai import Explanation
            >>> Explanation("saliency", torch.rand(2, 16, 24, 32)).slice("z", 3)
            Explanation(saliency, 2 images 24x32)
        """
        dim = self._axis(axis)
        if index is None:
            others = [other for other in (1, 2, 3) if other != dim]
            chosen = self.heatmap.sum(others).argmax(1)
        elif -self.heatmap.shape[dim] <= index < self.heatmap.shape[dim]:
            chosen = torch.full((len(self),), index % self.heatmap.shape[dim], device=self.heatmap.device)
        else:
            raise InputError(f"index must be one of {self.heatmap.shape[dim]} slices across {axis!r}, got {index}")
        numbers = chosen.tolist()

        cut: dict[str, Any] = {}
        if self.points is not None:
            others = [other for other in range(3) if other != dim - 1]
            cut["points"] = [p[p[:, dim - 1] == n][:, others] for p, n in zip(self.points, numbers, strict=True)]
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor) and tensor.dim() > 3 and tensor.shape[-3:] == self.heatmap.shape[1:]:
                at = tensor.dim() - 4 + dim - 1
                cut[name] = torch.stack([row.select(at, number) for row, number in zip(tensor, numbers, strict=True)])
        return replace(self, **{"signed_map": None, **cut})

    def projection(self, axis: Literal["z", "y", "x"] = "z") -> "Explanation":
        """Returns the largest heat along one axis of volumes or clips, over the mean of the images along it.

        Args:
            axis: along which to look: "z" for the first of `[D, H, W]`, "y" or "x".

        Returns:
            An explanation with heat maps `[N, H, W]`, without attribution and signed map.

        Raises:
            InputError: no volumes, or an axis that does not exist.

        Example:
            >>> import torch
            >>> from pyfast_xai import Explanation
            >>> Explanation("saliency", torch.rand(2, 16, 24, 32)).projection("x")
            Explanation(saliency, 2 images 16x24)
        """
        dim = self._axis(axis)
        images = None if self.images is None else self.images.mean(dim + 1)
        others = [other for other in range(3) if other != dim - 1]
        points = None if self.points is None else [p[:, others] for p in self.points]
        heatmap = self.heatmap.amax(dim)
        return replace(self, heatmap=heatmap, images=images, points=points, attribution=None, signed_map=None)

    def to_nifti(self, path: str | Path, row: int = 0, *, affine: Any = None, reverse: bool = False) -> None:
        """Writes the heat map of a volume as a NIfTI-1 file, which viewers of medical images lay over the scan.

        Args:
            path: ends in ".nii", or ".nii.gz" for a compressed file.
            row: which heat map.
            affine: `[4, 4]`, from indices of voxels to millimetres, that of the scan; None for the identity.
            reverse: the axes of the volume are `[z, y, x]`, as SimpleITK reads scans; otherwise those of the file, as
                nibabel and MONAI read them.

        Raises:
            InputError: no volumes, another ending, or a matrix of another shape.
            IndexError: a row that does not exist.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from pyfast_xai import Explanation
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Explanation("saliency", torch.rand(1, 16, 24, 32)).to_nifti(f"{folder}/heat.nii.gz")
        """
        self._axis("z")
        volume = self.numpy()[row]
        write_nifti(path, volume.transpose() if reverse else volume, affine)

    def _axis(self, axis: str) -> int:
        """Returns which dimension of the heat map an axis is."""
        if self.heatmap.dim() != 4:
            raise InputError(f"heatmap must be that of volumes, [N, D, H, W], got {list(self.heatmap.shape)}")
        if axis not in ("z", "y", "x"):
            raise InputError(f"axis must be 'z', 'y' or 'x', got {axis!r}")
        return 1 + "zyx".index(axis)

    def _check_flat(self) -> None:
        """Refuses what only images have."""
        if self.heatmap.dim() != 3:
            way = ": take a slice() or a projection()" if self.heatmap.dim() == 4 else ""
            raise InputError(f"heatmap must be that of images, [N, H, W], got {list(self.heatmap.shape)}{way}")

    # Places

    def boxes(self, rule: localize.BoxRule | str | None = None) -> Tensor:
        """Returns one box an image around the evidence.

        Args:
            rule: how: `localize.Segment`, `Mass` or `Hull`, or the text of one, as "segment:0.4", "mass:0.05" or
                "hull"; None for `box_rule`, the explainer's.

        Returns:
            Boxes `[N, 4]`, float32, as (x1, y1, x2, y2) in inclusive pixels of the input; a row of NaN where there is
            no evidence.

        Raises:
            InputError: a rule that does not exist, or a hull of a method without points.

        Example:
            >>> import torch
            >>> from pyfast_xai import Explanation
            >>> heatmap = torch.zeros(1, 8, 8)
            >>> heatmap[0, 2:5, 3:7] = 1
            >>> Explanation("saliency", heatmap).boxes("mass:0.05").tolist()
            [[3.0, 2.0, 6.0, 4.0]]
        """
        self._check_flat()
        return (self.box_rule if rule is None else localize.box_rule(rule))(self.heatmap, self.points)

    def peak(self) -> Tensor:
        """Returns the largest pixel of each heat map, int64 `[N, 2]` as (y, x) pixels of the input."""
        self._check_flat()
        return localize.peak(self.heatmap)

    # Pictures

    def overlay(
        self, images: Tensor | None = None, alpha: float = 0.5, colormap: str | None = None, signed: bool = False
    ) -> Tensor:
        """Draws the heat map over the images, float32 `[N, 3, H, W]` in 0..1, with fixations if there are any.

        The hottest 2 % of a map have the end of the colour scale in common, since few pixels hold most of a gradient.

        Args:
            images: `[N, C, H', W']` to draw on; None for those that were explained.
            alpha: opacity where the map is hot.
            colormap: one of `render.COLORMAPS`; None takes "plasma", or "coolwarm" for what is signed.
            signed: draw `signed_map`, or else the sum of `attribution` over the channels: what speaks for the target in
                one colour and what speaks against it in another.

        Raises:
            InputError: no images, or nothing signed to draw.
        """
        shown = render.overlay(
            self._ground(images), self._signed() if signed else self.heatmap, alpha, colormap, signed=signed
        )
        if self.points is None:
            return shown
        scale = torch.tensor([shown.shape[-2] / self.heatmap.shape[-2], shown.shape[-1] / self.heatmap.shape[-1]])
        return render.draw_points(shown, [((p.cpu() + 0.5) * scale).long() for p in self.points])

    def _signed(self) -> Tensor:
        """Returns the signed map of each row, `[N, h, w]`."""
        if self.signed_map is not None:
            return self.signed_map
        if self.attribution is None:
            raise InputError(f"signed must be False for {self.method}, whose maps have no sign, got True")
        return self.attribution.float().sum(1)

    def _ground(self, images: Tensor | None) -> Tensor:
        """Returns the images that pictures are drawn on, as they are shown."""
        self._check_flat()
        ground = self.images if images is None else images
        if ground is None:
            raise InputError("images must be given to an explanation that does not hold its own, got None")
        if not isinstance(ground, Tensor):
            raise InputError(
                f"images must be a tensor [N, C, H, W] to draw on, got {type(ground).__name__}: "
                "make one with Preprocess(...).batch(images)"
            )
        if ground.dim() == 4 and len(ground) != len(self):
            raise InputError(f"images must be one for each of {len(self)} rows, got {len(ground)}")
        return render.for_display(ground)

    def rgb(self) -> Tensor:
        """Returns the attribution as pictures `[N, 3, H, W]` in 0..1: what has no influence is a mid grey.

        Signed, as in Nie et al., 2018. Of any other number of channels than three the mean is shown. The fiftieth of
        the numbers that is farthest from zero is clipped, since few pixels hold most of a gradient.

        Raises:
            InputError: the method has no attribution.
        """
        if self.attribution is None:
            raise InputError(f"{self.method} gives no attribution that could be shown: use overlay()")
        self._check_flat()
        shown = self.attribution.float()
        if shown.shape[1] != 3:
            shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return (render.stretch_signed(shown) + 1) / 2

    def legends(self, side: int = 192) -> list[Any]:
        """Returns legends of the colours of `overlay`, one PIL image for each row; none for most methods.

        Args:
            side: width in pixels.
        """
        return []

    def keys(self, colormap: str | None = None, signed: bool = False) -> list[render.Key]:
        """Returns the keys of the colours and marks of `overlay`, as `render.montage` draws them.

        Args:
            colormap: colormap of the overlay.
            signed: whether the overlay is signed.
        """
        low, high = ("speaks against", "speaks for the target") if signed else ("cold", "hot: matters most")
        keys = [render.Key(high, colormap=colormap or render.default_colormap(signed), low=low)]
        return keys if self.points is None else [*keys, render.Key("fixation", color=render.WHITE, mark="dot")]

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"

    def captions(self) -> list[str]:
        """Returns a line for each image: class and probability, class and value, or neuron and activation."""
        if self.target is None:
            return [self.method] * len(self)
        lines = []
        for i, target in enumerate(self.target.tolist()):
            name = self._name(target) if self.kind == "class" else f"neuron {target}"
            is_value = self.kind == "neuron" or (self.outputs is not None and self.outputs[i] == "values")
            score = "" if self.score is None else f" {float(self.score[i]):{'.3g' if is_value else '.0%'}}"
            lines.append(name + score)
        return lines

    def plot(
        self,
        images: Tensor | None = None,
        columns: int = 4,
        *,
        title: str | None = None,
        labels: Sequence[str] | None = None,
        colormap: str | None = None,
        alpha: float = 0.5,
        signed: bool = False,
        boxes: bool | localize.BoxRule | str | Tensor = False,
        ax: Any = None,
    ) -> Any:
        """Draws a contact sheet of overlays with their classes, and below it what colours and marks stand for.

        Args:
            images: `[N, C, H', W']` to draw on; None for those that were explained.
            columns: pictures side by side.
            title: title of the sheet; None for the name of the method.
            labels: names of the classes; None for those of the explanation.
            colormap: see `overlay`.
            alpha: see `overlay`.
            signed: see `overlay`.
            boxes: True draws those of `boxes()`; a rule makes others, see `boxes`; a tensor `[N, 4]` is drawn as it is,
                (x1, y1, x2, y2) in inclusive pixels of the input.
            ax: axes of matplotlib to draw on: one, which gets the sheet, or N of them, which get a picture each; None
                for no matplotlib.

        Returns:
            A PIL image, or `ax` where it was given.

        Raises:
            InputError: no images, boxes of another shape, or another number of axes.

        Example:
            >>> import torch
            >>> from pyfast_xai import GradCAM, demo
            >>> explanation = GradCAM(demo.load())(torch.rand(1, 3, 96, 96))
            >>> sheet = explanation.plot(title="digits", labels=list("0123456789"), boxes=True)
            >>> sheet.save("digits.png")
        """
        named = self if labels is None else replace(self, labels=list(labels))
        side = _SIDES.get(len(self), _SIDE)
        ground = named._ground(images)
        # Lines and dots are drawn at the size at which they are seen.
        zoom = side / max(ground.shape[2:])
        if zoom > 1:
            size = [max(1, round(edge * zoom)) for edge in ground.shape[2:]]
            ground = functional.interpolate(ground.cpu(), size, mode="bicubic", align_corners=False).clamp(0, 1)
        shown, keys = named.overlay(ground, alpha, colormap, signed), named.keys(colormap, signed)
        if boxes is not False:
            drawn = named._drawn_boxes(boxes)
            scale = shown.new_tensor([*shown.shape[:1:-1]]) / shown.new_tensor([*self.heatmap.shape[:0:-1]])
            edges = (drawn + drawn.new_tensor([0, 0, 1, 1])) * scale.repeat(2)
            shown = render.draw_boxes(shown, edges - edges.new_tensor([0, 0, 1, 1]))
            keys.append(render.Key("box"))
        captions = [""] * len(named) if named.target is None else named.captions()
        heading = self.method if title is None else title
        if isinstance(ax, (Sequence, np.ndarray)):
            axes = np.asarray(ax, dtype=object).ravel()
            if len(axes) != len(self):
                raise InputError(f"ax must be one for all or one for each of {len(self)} images, got {len(axes)}")
            for one, picture, caption in zip(axes, shown, captions, strict=True):
                _on_axes(one, render.to_pil(picture), ": ".join(filter(None, (heading, caption))))
            return ax
        legends = named.legends(side)
        sheet = render.montage(
            [list(shown[i : i + columns]) for i in range(0, len(shown), columns)],
            titles=[captions[i : i + columns] for i in range(0, len(shown), columns)],
            side=side,
            heading=heading,
            legends=[legends[i : i + columns] for i in range(0, len(legends), columns)],
            keys=keys,
        )
        return sheet if ax is None else _on_axes(ax, sheet, "")

    def _drawn_boxes(self, boxes: Any) -> Tensor:
        """Returns the boxes that `plot` draws, `[N, 4]` on the CPU."""
        if not isinstance(boxes, Tensor):
            return self.boxes(None if boxes is True else boxes).cpu()
        if boxes.shape != (len(self), 4):
            raise InputError(f"boxes must have shape [{len(self)}, 4], got {list(boxes.shape)}")
        return boxes.detach().float().cpu()

    def save(self, folder: str | Path, names: list[str] | None = None) -> list[Path]:
        """Writes one overlay PNG an image and `<method>.json` with targets, scores, boxes and points.

        Args:
            folder: made if it is not there.
            names: stems of the files; None numbers them.

        Returns:
            The paths written, the JSON last.

        Raises:
            InputError: a folder that is called as a picture, or another number of names.
        """
        folder = Path(folder)
        if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not folder.is_dir():
            raise InputError(
                f"folder must be a folder for a picture of each image, got {str(folder)!r}: "
                f"give plot().save({str(folder)!r}) for one picture"
            )
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{i:04d}" for i in range(len(self))] if names is None else names
        if len(names) != len(self):
            raise InputError(f"names must be one for each of {len(self)} images, got {len(names)}")
        paths = []
        boxes = self.boxes()
        for name, picture, box in zip(names, self.overlay(), boxes, strict=True):
            path = folder / f"{name}.{self.method}.png"
            path.write_bytes(render.png_bytes(render.to_pil(render.draw_boxes(picture[None], box[None].cpu())[0])))
            paths.append(path)
        table = folder / f"{self.method}.json"
        table.write_text(json.dumps([{"name": n, **row} for n, row in zip(names, self.rows(), strict=True)], indent=1))
        return [*paths, table]

    def rows(self) -> list[dict[str, Any]]:
        """Returns one JSON-ready record an image: method, size, target, score, box and points."""
        boxes = self.boxes().cpu()
        records = []
        for i in range(len(self)):
            record: dict[str, Any] = {"method": self.method, "size": list(self.heatmap.shape[-2:])}
            if self.target is not None:
                record["target"] = self.target[i].tolist()
            if self.score is not None:
                record["score"] = self.score[i].tolist()
            record["box"] = None if bool(boxes[i].isnan().any()) else boxes[i].tolist()
            if self.points is not None:
                record["points"] = self.points[i].tolist()
            records.append(record)
        return records

    # Notebooks

    def _repr_png_(self) -> bytes | None:
        if self.images is None or self.heatmap.dim() not in (3, 4):
            return None
        shown = self[:_SHOWN]
        return render.png_bytes((shown if shown.heatmap.dim() == 3 else shown.slice()).plot())

    def _repr_html_(self) -> str | None:
        picture = self._repr_png_()
        if picture is None:
            return None
        shown = self[:_SHOWN]
        text = f"Heat maps of {self.method}"
        if shown.target is not None:
            text += f" for {', '.join(shown.captions())}"
        note = f"<p>{_SHOWN} of {len(self)} images: plot() draws all of them.</p>" if len(self) > _SHOWN else ""
        source = base64.b64encode(picture).decode()
        return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{source}">{note}'


_SHOWN = 16  # images in a notebook
_SIDE = 256  # of a picture on a sheet, in pixels
_SIDES = {1: 448, 2: 352}  # where there are few


def _on_axes(ax: Any, picture: Any, title: str) -> Any:
    """Draws a PIL image on axes of matplotlib, and returns them."""
    ax.imshow(np.asarray(picture))
    ax.set_title(title)
    ax.set_axis_off()
    return ax


def _row_numbers(rows: Any, count: int) -> slice | list[int]:
    """Returns which of `count` rows an index means: a slice with a positive step, or numbers from 0."""
    if isinstance(rows, slice):
        return rows if rows.step is None or rows.step > 0 else list(range(*rows.indices(count)))
    try:
        chosen = torch.as_tensor(list(rows) if isinstance(rows, range) else rows)
    except (TypeError, ValueError, RuntimeError):
        received = type(rows).__name__
        raise InputError(f"rows must be an integer, a slice, integers or a mask, got {received}") from None
    chosen = chosen if chosen.numel() or chosen.dtype == torch.bool else chosen.long()
    if chosen.dtype == torch.bool:
        if chosen.shape != (count,):
            raise InputError(f"rows must be a mask of {count} entries, got {list(chosen.shape)}")
        return chosen.nonzero().flatten().tolist()
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dim() > 1:
        received = f"{chosen.dtype} {list(chosen.shape)}"
        raise InputError(f"rows must be an integer, a slice, integers or a mask, got {received}")
    numbers: list[int] = chosen.flatten().tolist()
    for number in numbers:
        if not -count <= number < count:
            raise IndexError(f"row must lie in [{-count}, {count}), got {number}")
    numbers = [number % count for number in numbers]
    return slice(numbers[0], numbers[0] + 1) if chosen.dim() == 0 else numbers


def _joined(parts: list[Any]) -> Any:
    """Returns one entry for all rows of several explanations; None where it cannot be made."""
    if any(part is None for part in parts):
        return None
    if not isinstance(parts[0], Tensor):
        return [row for part in parts for row in part]
    return torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else None


def _short(values: list[Any]) -> str:
    return f"[{', '.join(map(str, values[:3]))}{', ...' if len(values) > 3 else ''}]"
