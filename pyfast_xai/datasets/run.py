"""One call from a source and a model to a folder of parts; called again, it goes on where it stopped."""

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyfast_xai import __version__
from pyfast_xai.datasets.columns import Kept, Maps
from pyfast_xai.datasets.decode import decoder
from pyfast_xai.datasets.durable import alone_in, sync_folder
from pyfast_xai.datasets.engine import Engine, Progress, Settings, Target
from pyfast_xai.datasets.manifest import Manifest, begin, plain, weights_digest
from pyfast_xai.datasets.schema import VERSION, About
from pyfast_xai.datasets.sources import Source, open_source
from pyfast_xai.datasets.store import Shards, Store
from pyfast_xai.datasets.swapping import SWAPS
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.base import Explainer
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import MAX_PIXELS, Preprocess
from pyfast_xai.models import LoadedModel

# Memory decides from there, see `answering.Asker`.
FIRST_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Summary:
    """How a run stands.

    Attributes:
        folder: of the run.
        items: in the source.
        rows: in parts that are written, by this call or before.
        errors: among them.
        before: rows that were there before this call.
        progress: of this call.
        too_many_errors: more than were allowed, or nothing but errors.
    """

    folder: Path
    items: int
    rows: int
    errors: int
    before: int
    progress: Progress
    too_many_errors: bool

    @property
    def complete(self) -> bool:
        return self.rows == self.items


@dataclass(frozen=True)
class Job:
    """A run, ready to be worked on: by one engine, or by one on each of several machines.

    Attributes:
        source: of the items.
        explainer: its model lies on `settings.device`.
        store: of the parts.
        shards: how the source is cut.
        manifest: what the run is of.
        settings: how an engine works.
    """

    source: Source
    explainer: Explainer
    store: Store
    shards: Shards
    manifest: Manifest
    settings: Settings

    def with_settings(self, **changes: Any) -> "Job":
        """The same run, worked on in another way."""
        return replace(self, settings=replace(self.settings, **changes))

    def engine(self) -> Engine:
        return Engine(self.source, self.explainer, self.store, self.shards, self.manifest.fingerprint, self.settings)

    def finished(self) -> dict[int, About]:
        """The parts that are there.

        Raises:
            InputError: one is of another run.
        """
        found = self.store.finished()
        for shard, about in found.items():
            if about.fingerprint != self.manifest.fingerprint or (about.start, about.stop) != self.shards.range(shard):
                raise InputError(f"part {str(self.store.path(shard))!r} must be of this run, got one of another")
        return found

    def remaining(self) -> list[int]:
        """Numbers of the shards that have no part yet."""
        return Begun(self, self.finished(), None).remaining


def explain(
    source: Any,
    model: nn.Module | LoadedModel,
    *,
    method: str | Explainer,
    out: str | Path,
    method_settings: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    target: Target = None,
    top_k: int = 5,
    maps: Maps = "native",
    map_dtype: str = "float16",
    pictures: bool = False,
    color_swap: bool = False,
    accelerate: bool = False,
    threshold: float | None = None,
    batch: int | Literal["auto"] = "auto",
    shard_size: int = 512,
    workers: int | None = None,
    device: str | torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
    max_errors: int | float | None = None,
    progress: Callable[[Progress], None] | None = None,
    made: Mapping[str, Any] | None = None,
) -> Summary:
    """Explain every image of a source; called again, go on where it stopped.

    Each input becomes exactly one row, one that cannot be read or explained a row with `status="error"`. A part is
    whole or not there, whenever the process or the machine stops.

    Args:
        source: see `sources.open_source`.
        model: in evaluation mode; of a `LoadedModel` preprocessing and names of the classes are known.
        method: name of an explainer, or one made for the model.
        out: folder of the run; made if it is not there.
        method_settings: of the explainer, where it is named.
        preprocess: how the model wants its pictures; needed for a plain module.
        labels: names of the classes.
        target: None for the predicted class, an index for all, or "label" for the class that the source says.
        top_k: classes told of each image. They cost nothing where the method runs the whole model, and one forward
            pass where it does not (Eigen-CAM); 0 for none.
        maps: see `columns.Kept`.
        map_dtype: see `columns.Kept`.
        pictures: keep each heat map as PNG, too.
        color_swap: keep what the model answers once colours have traded places, too: two more forward passes an image.
        accelerate: replay the model instead of running it, see `Explainer.accelerate`.
        threshold: share of a map's range at which boxes are cut; None for the method's own.
        batch: images at a time; "auto" begins with 16 on a CPU and 128 on a GPU, and a run that goes on with what it
            had. Halved where memory runs out.
        shard_size: rows of a part; what is lost at most when the process stops.
        workers: threads that decode; None for one a core, at most 8.
        device: where the model runs; None where it is.
        max_pixels: larger pictures are refused.
        max_errors: stop after the part in which there are more error rows, a number or a share below 1; None goes on,
            but for a method that fails in the same way on every image of its first batch.
        progress: called after each batch and each part, from this thread.
        made: texts noted in `_run.json` so that `retry` can make source and model again.

    Returns:
        How the run stands.

    Raises:
        InputError: an argument that cannot be, or another run that lies in `out`, with what differs.
        OSError: the disk is full or gone; all that is written stays, and the same call goes on.
    """
    folder = Path(out)
    job = prepare(
        source, model, method=method, out=folder, method_settings=method_settings, preprocess=preprocess,
        labels=labels, target=target, top_k=top_k, maps=maps, map_dtype=map_dtype, pictures=pictures,
        color_swap=color_swap, accelerate=accelerate, threshold=threshold, batch=batch, shard_size=shard_size,
        workers=workers, device=device, max_pixels=max_pixels, strict=max_errors is None, made=made,
    )  # fmt: skip
    limit = limit_of(max_errors, job.shards.items)
    with going_on(job, limit) as begun:
        job = begun.job
        if batch == "auto" and begun.finished:
            job = job.with_settings(batch=begun.finished[max(begun.finished)].batch)
        done = Progress(batch=job.settings.batch)
        if not begun.too_many(done):
            done = job.engine().run(begun.remaining, progress, None if limit is None else begun.too_many)
    return begun.summary(done)


def prepare(
    source: Any,
    model: nn.Module | LoadedModel,
    *,
    method: str | Explainer,
    out: str | Path,
    method_settings: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    target: Target = None,
    top_k: int = 5,
    maps: Maps = "native",
    map_dtype: str = "float16",
    pictures: bool = False,
    color_swap: bool = False,
    accelerate: bool = False,
    threshold: float | None = None,
    batch: int | Literal["auto"] = "auto",
    shard_size: int = 512,
    workers: int | None = None,
    device: str | torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
    strict: bool = True,
    made: Mapping[str, Any] | None = None,
) -> Job:
    """A run as `explain` does it, without doing it; nothing is written. See there for the arguments.

    Args:
        strict: see `engine.Settings`.
    """
    if shard_size < 1:
        raise InputError(f"shard_size must be at least 1, got {shard_size}")
    if not isinstance(max_pixels, int) or max_pixels < 1:
        raise InputError(f"max_pixels must be at least 1, got {max_pixels}")
    name = ""
    if isinstance(model, LoadedModel):
        preprocess, labels, name = preprocess or model.preprocess, labels or model.classes, model.name
        model = model.model
    if preprocess is None:
        raise InputError("preprocess must say how the model wants its pictures, got None for a plain module")
    if target not in (None, "label") and (not isinstance(target, int) or isinstance(target, bool) or target < 0):
        raise InputError(f"target must be None, an index or 'label', got {target!r}")
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch must be 'auto' or at least 1, got {batch!r}")
    if color_swap and not top_k:
        raise InputError("top_k must be at least 1 for color_swap, which follows the model's answer, got 0")
    if color_swap and len(preprocess.mean) != 3:
        raise InputError("color_swap must be left out for a model of grey pictures, which sees no colours")
    explainer, settings = _explainer(model, method, method_settings or {}, labels)
    if accelerate:
        explainer.accelerate()
    where = str(device) if device is not None else _place(explainer.model)
    explainer.model.to(where)
    opened = open_source(source, without=out)
    if len(opened) == 0:
        raise InputError("source must have at least one item, got none")
    kept = Kept(
        maps,
        map_dtype,
        pictures,
        color_swap,
        threshold,
        getattr(explainer, "sigma", None),
        None if labels is None else list(labels),
    )
    listing = opened.listing()
    described = {
        "schema": VERSION,
        "source": {"kind": listing.kind, "items": listing.items, "ids": listing.ids, "content": listing.content},
        "shard_size": shard_size,
        "model": {"name": name or type(explainer.model).__qualname__, "weights": weights_digest(explainer.model)},
        "method": {
            "name": explainer.method,
            "settings": plain(settings),
            "threshold": threshold if threshold is not None else getattr(explainer, "threshold", Explanation.threshold),
            "sigma": plain(kept.sigma),
        },
        "preprocess": plain(vars(preprocess)),
        "rows": {
            "target": target, "top_k": top_k, "maps": maps, "map_dtype": map_dtype, "pictures": pictures,
            "threshold": threshold, "max_pixels": max_pixels,
        },
        "versions": {"pyfast_xai": __version__, "torch": torch.__version__, "decoder": decoder()},
    }  # fmt: skip
    # So that runs without these go on with what they were begun as.
    if color_swap:
        described["rows"]["color_swap"] = SWAPS
    if explainer.accelerated:
        described["method"]["accelerated"] = True
    described = json.loads(json.dumps(described))
    noted = {"source": opened.spec, "classes": kept.classes, **(made or {})}
    first = FIRST_BATCH.get(where.split(":")[0], FIRST_BATCH["cpu"])
    chosen = Settings(
        preprocess, target, top_k, max_pixels, first if batch == "auto" else batch,
        cores() if workers is None else workers, where, kept, strict,
    )  # fmt: skip
    return Job(opened, explainer, Store(out), Shards(len(opened), shard_size), Manifest(described, noted), chosen)


def _explainer(
    model: nn.Module, method: str | Explainer, settings: Mapping[str, Any], labels: Sequence[str] | None
) -> tuple[Explainer, Mapping[str, Any]]:
    if isinstance(method, Explainer):
        if settings:
            raise InputError("method_settings must be left out where method is an explainer, which has its own")
        public = {k: v for k, v in vars(method).items() if k[0] != "_" and k not in ("model", "labels", "progress")}
        return method, public
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    made = dict(settings)
    if "progress" in inspect.signature(METHODS[method]).parameters:
        made.setdefault("progress", _silent)  # a bar for each batch would be one for each second
    try:
        return METHODS[method](model, labels=labels, **made), {k: v for k, v in settings.items() if k != "progress"}
    except TypeError as error:
        raise InputError(f"method_settings must be those of {method}, got {sorted(settings)} ({error})") from error


def _silent(*_: object) -> None:
    pass


def _place(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)


def cores() -> int:
    """Threads that decode where nobody says how many: one a core that this process may use, at most 8."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, found)


@dataclass(frozen=True)
class Begun:
    """A run that is worked on, and what was there before.

    Attributes:
        job: the run.
        finished: its parts.
        limit: of error rows; None for any number.
        rows: in these parts.
        errors: among them.
    """

    job: Job
    finished: dict[int, About]
    limit: float | None

    @functools.cached_property
    def rows(self) -> int:
        return sum(about.stop - about.start for about in self.finished.values())

    @functools.cached_property
    def errors(self) -> int:
        return sum(about.errors for about in self.finished.values())

    @property
    def remaining(self) -> list[int]:
        """Numbers of the shards that have no part yet."""
        return [shard for shard in range(len(self.job.shards)) if shard not in self.finished]

    def too_many(self, done: Progress) -> bool:
        """Whether there are more error rows than allowed by now."""
        return self.limit is not None and self.errors + done.errors > self.limit

    def summary(self, done: Progress) -> Summary:
        """How the run stands."""
        rows, errors = self.rows + done.rows, self.errors + done.errors
        stopped = too_many(errors, rows, self.limit)
        return Summary(self.job.store.folder, self.job.shards.items, rows, errors, self.rows, done, stopped)


@contextlib.contextmanager
def going_on(job: Job, limit: float | None) -> Iterator[Begun]:
    """Hold the folder of a run, which is made if it is not there, and see what is finished.

    Args:
        job: the run.
        limit: see `Begun`.

    Raises:
        InputError: the folder is of another run, or held by another process.
    """
    folder = job.store.folder
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    with alone_in(folder):
        begin(folder, job.manifest)
        job.store.clean()
        begun = Begun(job, job.finished(), limit)
        # A method that explained some cannot be wrong as a whole.
        yield replace(begun, job=job.with_settings(strict=False)) if begun.rows > begun.errors else begun


def limit_of(max_errors: int | float | None, items: int) -> float | None:
    if max_errors is None:
        return None
    if isinstance(max_errors, bool) or max_errors < 0 or (isinstance(max_errors, float) and max_errors > 1):
        raise InputError(f"max_errors must be a number of rows or a share below 1, got {max_errors}")
    return max_errors * items if isinstance(max_errors, float) else max_errors


def too_many(errors: int, rows: int, limit: float | None) -> bool:
    """Whether there are more error rows than allowed, or nothing but such rows."""
    return errors > limit if limit is not None else errors == rows > 0
