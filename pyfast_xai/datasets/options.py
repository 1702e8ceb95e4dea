"""The options of a run, in one object for every way to start it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pyfast_xai.datasets.columns import DTYPES, Maps
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Accelerate, Explainer, one_of
from pyfast_xai.images import MAX_PIXELS, Preprocess
from pyfast_xai.localize import BoxRule

Target = int | Literal["label"] | None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run; source and model come beside it.

    Example:
        >>> from pyfast_xai.datasets import RunOptions
        >>> RunOptions(method="eigen-cam", out="explained", top_k=0).shard_size
        512

    Attributes:
        method: name of an explainer, or one made for the model.
        out: folder of the run, made if it is not there; or the URL of one in an object store.
        method_settings: of the explainer, where it is named.
        preprocess: how the model wants its pictures; needed for a plain module.
        labels: names of the classes.
        target: None for the predicted class, an index for all, or "label" for the class that the source names.
        top_k: classes that come with each image, read in the method's own forward pass; 0 for none.
        maps: see `columns.StoredColumns`.
        map_dtype: see `columns.StoredColumns`.
        pictures: store each heat map as PNG, too.
        color_swap: store what the model answers with swapped colours, too: two more forward passes an image.
        reduced_jpeg: decode JPEG files at a half, a quarter or an eighth of their size, where that divides their sides
            and leaves twice those that the network sees: several times sooner for files of a camera, and the input
            differs by a few grey levels.
        accelerate: "auto" to replay the model once that has proven faster, True to do so from the first batch on, False
            to run it for every batch, see the setting of `Explainer`. "auto" leaves an explainer as it was made.
        box_rule: how boxes are made, a rule of `localize` or its text; None for the method's default.
        batch_size: images at a time; "auto" starts with 16 on a CPU and 128 on a GPU, and a run that goes on with
            what it had. Halved where memory runs out.
        shard_size: rows of a part; what is lost at most when the process stops.
        workers: threads that decode; None for as many as the model keeps busy, at most one a core.
        device: where the model runs; None where it is. A model that lies elsewhere is moved for the time of the run.
        max_pixels: larger pictures become error rows.
        max_errors: stop after the part in which there are more error rows, a number or a share below 1; None goes on,
            but for a method that fails in the same way on every image of its first batch.

    Raises:
        InputError: a value that cannot be.
    """

    method: str | Explainer
    out: str | Path
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    labels: Sequence[str] | None = None
    target: Target = None
    top_k: int = 5
    maps: Maps = "native"
    map_dtype: str = "float16"
    pictures: bool = False
    color_swap: bool = False
    reduced_jpeg: bool = False
    accelerate: Accelerate = "auto"
    box_rule: BoxRule | str | None = None
    batch_size: int | Literal["auto"] = "auto"
    shard_size: int = 512
    workers: int | None = None
    device: str | torch.device | None = None
    max_pixels: int = MAX_PIXELS
    max_errors: int | float | None = None

    def __post_init__(self) -> None:
        if not str(self.out):
            raise InputError("out must be a folder, got an empty text")
        for name in ("shard_size", "max_pixels"):
            if not _is_integer(getattr(self, name), 1):
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.target not in (None, "label") and not _is_integer(self.target, 0):
            raise InputError(f"target must be None, an index or 'label', got {self.target!r}")
        if self.batch_size != "auto" and not _is_integer(self.batch_size, 1):
            raise InputError(f"batch_size must be 'auto' or at least 1, got {self.batch_size!r}")
        if self.workers is not None and not _is_integer(self.workers, 1):
            raise InputError(f"workers must be at least 1, got {self.workers!r}")
        if not _is_integer(self.top_k, 0):
            raise InputError(f"top_k must be at least 0, got {self.top_k!r}")
        one_of("accelerate", self.accelerate, (True, False, "auto"))
        if not self.accelerate and isinstance(self.method, Explainer):
            raise InputError(
                "accelerate must be 'auto' or True where method is an explainer, which has its own setting, got False"
            )
        if self.color_swap and not self.top_k:
            raise InputError("top_k must be at least 1 for color_swap, which follows the model's answer, got 0")
        if self.maps not in ("native", "heatmap", "none"):
            raise InputError(f"maps must be 'native', 'heatmap' or 'none', got {self.maps!r}")
        if self.map_dtype not in DTYPES:
            raise InputError(f"map_dtype must be one of {', '.join(DTYPES)}, got {self.map_dtype!r}")
        limit = self.max_errors
        if limit is not None and (
            isinstance(limit, bool) or not limit >= 0 or (isinstance(limit, float) and limit > 1)
        ):
            raise InputError(f"max_errors must be a number of rows or a share below 1, got {limit}")

    def most_errors(self, items: int) -> float | None:
        """Returns how many error rows are allowed among so many items; None for any number."""
        return self.max_errors * items if isinstance(self.max_errors, float) else self.max_errors


def options_of(options: RunOptions | None, settings: Mapping[str, Any]) -> RunOptions:
    """Returns options with some of them changed; without options, those that the settings make."""
    return RunOptions(**settings) if options is None else replace(options, **settings)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
