"""Runs that explain a source into a folder of parts; repeating the call resumes a run."""

import contextlib
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfast_xai import __version__, localize
from pyfast_xai.datasets.color_swap import SWAPS
from pyfast_xai.datasets.columns import StoredColumns
from pyfast_xai.datasets.decode import decoder
from pyfast_xai.datasets.folders import Folder, LocalFolder
from pyfast_xai.datasets.job import Job, WorkerSettings
from pyfast_xai.datasets.listing import StoredListing, take_listing
from pyfast_xai.datasets.manifest import NAME, Manifest, check_same_run, plain, read_manifest, weights_digest
from pyfast_xai.datasets.options import RunOptions, options_of
from pyfast_xai.datasets.run_worker import RunCallback, RunProgress, RunWorker
from pyfast_xai.datasets.schema import VERSION, PartInfo
from pyfast_xai.datasets.sources import Source, open_source
from pyfast_xai.datasets.sources.files import Files
from pyfast_xai.datasets.store import PartStore, Shards
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.images import Preprocess, is_picture
from pyfast_xai.models import LoadedModel

# Memory decides from there, see `batching.BatchExplainer`.
FIRST_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Summary:
    """The state of a run.

    Attributes:
        folder: of the run; a path, or a URL.
        items: in the source.
        rows: in parts that are written, by this call or before.
        errors: among them.
        before: rows that were there before this call.
        progress: of this call.
        too_many_errors: more than were allowed, or nothing but errors.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> summary.items, summary.rows, summary.complete
        (1, 1, True)
    """

    folder: Path | str
    items: int
    rows: int
    errors: int
    before: int
    progress: RunProgress
    too_many_errors: bool

    @property
    def complete(self) -> bool:
        """Returns whether every item has its row."""
        return self.rows == self.items


def explain(
    source: Any,
    model: nn.Module | LoadedModel,
    options: RunOptions | None = None,
    *,
    progress: RunCallback | None = None,
    **settings: Any,
) -> Summary:
    """Explains every image of a source; repeating the call resumes where it stopped.

    Each input becomes exactly one row, one that cannot be read or explained a row with `status="error"`. A part is
    whole or not there, whenever the process or the machine stops.

        options = datasets.RunOptions(method="eigen-cam", out="explained", preprocess=preprocess)
        datasets.explain("photos/", model, options)
        datasets.explain("photos/", model, method="eigen-cam", out="explained", preprocess=preprocess)  # the same

    Args:
        source: see `sources.open_source`.
        model: in evaluation mode; with a `LoadedModel`, preprocessing and names of the classes are known.
        options: what the run is to do.
        progress: called after each batch and each part, from this thread.
        **settings: attributes of `RunOptions`, in place of those of `options` or without any.

    Returns:
        How the run stands.

    Raises:
        InputError: an argument that cannot be, or another run that lies in `out`, with the differences.
        OSError: the disk is full or gone; all that is written stays, and the same call goes on.
        MemoryError: memory does not suffice for image after image.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "grad-cam", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> summary.rows, summary.errors
        (1, 0)
        >>> datasets.open("run")[0].explanation().heatmap.shape
        torch.Size([1, 96, 96])
    """
    return run_job(prepare(source, model, options, **settings), progress)


def run_job(job: Job, progress: RunCallback | None = None) -> Summary:
    """Runs the rest of a run that `prepare` made; see `explain`.

    Args:
        job: the run.
        progress: called after each batch and each part, from this thread.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> job = datasets.prepare("black.png", demo.load(), preprocess=Preprocess(96), method="saliency", out="run")
        >>> datasets.run_job(job).complete
        True
    """
    with open_run(job) as opened:
        done = RunProgress(batch_size=opened.job.settings.batch_size)
        if not opened.too_many(done):
            stop = None if job.max_errors is None else opened.too_many
            done = RunWorker(opened.job).run(opened.remaining, progress, stop)
    return opened.summary(done)


def prepare(
    source: Any,
    model: nn.Module | LoadedModel,
    options: RunOptions | None = None,
    *,
    listed: Callable[[int], None] | None = None,
    made: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Job:
    """Returns a run as `explain` does it, without doing it; neither the folder nor the model is changed.

    Args:
        source: see `explain`.
        model: see `explain`.
        options: see `explain`.
        listed: called with the number of items now and then while the source is listed.
        made: texts stored with the run so that `retry` can make source and model anew.
        **settings: see `explain`.

    Raises:
        InputError: an argument that cannot be.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> job = datasets.prepare("black.png", demo.load(), preprocess=Preprocess(96), method="saliency", out="run")
        >>> datasets.run_job(job).rows
        1
    """
    options = options_of(options, settings)
    preprocess, labels, name = options.preprocess, options.labels, ""
    if isinstance(model, LoadedModel):
        preprocess, labels, name = preprocess or model.preprocess, labels or model.labels, model.name
        model = model.model
    if preprocess is None:
        raise InputError("preprocess must say how the model wants its pictures, got None for a plain module")
    if type(preprocess) is not Preprocess:
        raise InputError(
            f"preprocess must be a Preprocess itself, whose settings a run stores and follows, got a "
            f"{type(preprocess).__qualname__}"
        )
    if options.color_swap and len(preprocess.mean) != 3:
        raise InputError("color_swap must be left out for a model of grey pictures, which sees no colours")
    explainer, method_settings = _explainer(model, options, labels)
    stored = StoredColumns(
        maps=options.maps,
        dtype=options.map_dtype,
        pictures=options.pictures,
        color_swap=options.color_swap,
        box_rule=options.box_rule,
        sigma=getattr(explainer, "sigma_share", None),
        labels=None if labels is None else list(map(str, labels)),
    )
    store = PartStore(options.out)
    opened = open_source(source, without=store.folder.path)
    listing, source_facts, anchor = _listing(opened, store.folder, listed)
    if len(listing) == 0:
        raise InputError("source must have at least one item, got none")
    _check_folder(opened, listing, store.folder)
    rule = localize.box_rule(explainer.box_rule if options.box_rule is None else options.box_rule)
    facts: dict[str, Any] = {
        "schema": VERSION,
        "source": source_facts,
        "shard_size": options.shard_size,
        "model": {"name": name or type(explainer.model).__qualname__, "weights": weights_digest(explainer.model)},
        "method": {
            "name": explainer.method,
            "settings": plain(method_settings),
            "box_rule": str(rule),
            "sigma": plain(stored.sigma),
        },
        "preprocess": plain(vars(preprocess)),
        "rows": {
            key: getattr(options, key) for key in ("target", "top_k", "maps", "map_dtype", "pictures", "max_pixels")
        },
        "versions": {"pyfast_xai": __version__, "torch": torch.__version__, "decoder": decoder()},
    }
    # A run without these has the description it had before there were any.
    if options.color_swap:
        facts["rows"]["color_swap"] = SWAPS
    if options.reduced_jpeg:
        facts["rows"]["reduced_jpeg"] = True
    if explainer.accelerated:
        facts["method"]["accelerated"] = True
    provenance = {
        "source": opened.spec,
        "folder": opened.folder,
        "labels": stored.labels,
        "anchor": anchor,
        **(made or {}),
    }
    device = None if options.device is None else str(options.device)
    return Job(
        source=opened,
        listing=listing,
        explainer=explainer,
        store=store,
        shards=Shards(len(listing), options.shard_size),
        manifest=Manifest(_as_json(facts), _as_json(provenance)),
        settings=WorkerSettings(
            preprocess=preprocess,
            target=options.target,
            top_k=options.top_k,
            max_pixels=options.max_pixels,
            reduced_jpeg=options.reduced_jpeg,
            batch_size=_first_batch(options, explainer, store),
            workers=cores() if options.workers is None else options.workers,
            adapt=options.workers is None,
            device=device,
            stored=stored,
            strict=options.max_errors is None,
        ),
        max_errors=options.most_errors(len(listing)),
    )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _first_batch(options: RunOptions, explainer: Explainer, store: PartStore) -> int:
    """Returns how many images go together at first: what the options say, or what the latest part came to."""
    if options.batch_size != "auto":
        return options.batch_size
    shards = store.shards()
    info = store.info(shards[-1]) if shards else None
    if info is not None and info.batch_size >= 1:
        return info.batch_size
    parameter = next(explainer.model.parameters(), None)
    model_device = "cpu" if parameter is None else parameter.device.type
    return FIRST_BATCH.get(
        model_device if options.device is None else torch.device(options.device).type, FIRST_BATCH["cpu"]
    )


def _listing(
    source: Source, folder: Folder, progress: Callable[[int], None] | None
) -> tuple[StoredListing, dict[str, Any], Any]:
    """Returns the listing of a source, its digests, and the anchor of the source.

    The listing of a run that lies in the folder serves where the source shows that it is still right; else the source
    is listed anew.
    """
    # Changes during the listing are detected later.
    anchor = _as_json({"anchor": source.anchor()})["anchor"]
    present = stored_listing(folder)
    if present is not None:
        listing, manifest = present
        facts = manifest.described["source"]
        same_kind = facts["kind"] == source.kind
        with contextlib.suppress(InputError):  # a damaged listing is replaced
            if same_kind and source.is_listed_by(manifest.made.get("anchor"), listing.folders(), listing.sample):
                return listing, facts, anchor
    listing, summary = take_listing(source, progress)
    return (
        listing,
        {"kind": summary.kind, "items": summary.items, "ids": summary.ids, "content": summary.content},
        anchor,
    )


def stored_listing(folder: Folder) -> tuple[StoredListing, Manifest] | None:
    """Returns the listing in the folder of a run, and its manifest; None where there is no whole one."""
    if NAME not in folder.names():
        return None
    try:
        manifest = read_manifest(folder)
        listing = StoredListing(folder, _listing_name(manifest), _as_integer(manifest.described["source"]["items"]))
    except (InputError, KeyError, TypeError):
        return None
    return listing, manifest


def _as_integer(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("items must be a whole number")
    return value


def _listing_name(manifest: Manifest) -> str:
    """Returns the name of the listing of a run: another content of the source has another listing."""
    identity = json.dumps([manifest.described["source"], manifest.made.get("anchor")], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _check_folder(source: Source, listing: StoredListing, folder: Folder) -> None:
    """Refuses a folder among the pictures: results would lie between them, and come with the next listing."""
    if not isinstance(folder, LocalFolder) or not isinstance(source, Files):
        return
    if not any(map(is_picture, folder.names())):
        return
    real_path = os.path.realpath(folder.path)
    for start in range(0, len(listing), 8192):
        name = source.name_in(real_path, listing.entries(start, start + 8192))
        if name is not None:
            raise InputError(
                f"out must be a folder without pictures to explain, got {str(folder.path)!r}, where {name!r} lies"
            )


def _explainer(
    model: nn.Module, options: RunOptions, labels: Sequence[str] | None
) -> tuple[Explainer, Mapping[str, Any]]:
    method, settings = options.method, options.method_settings
    if isinstance(method, Explainer):
        if settings:
            raise InputError("method_settings must be left out where method is an explainer, which has its settings")
        if options.accelerate is True:
            method.accelerate()
        public = {k: v for k, v in vars(method).items() if k[0] != "_" and k not in ("model", "labels", "progress")}
        return method, public
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    arguments = {"accelerate": options.accelerate, **settings}
    if "progress" in inspect.signature(METHODS[method]).parameters:
        arguments.setdefault("progress", False)  # a bar for each batch would be one for each second
    try:
        explainer = METHODS[method](model, labels=labels, **arguments)
        return explainer, {key: value for key, value in settings.items() if key != "progress"}
    except TypeError as error:
        raise InputError(f"method_settings must be those of {method}, got {sorted(settings)} ({error})") from error


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class OpenRun:
    """A run that is worked on, and what was there before.

    Attributes:
        job: the run.
        finished: its parts.
        rows: in these parts.
        errors: among them.
    """

    job: Job
    finished: dict[int, PartInfo]

    @functools.cached_property
    def rows(self) -> int:
        return sum(info.stop - info.start for info in self.finished.values())

    @functools.cached_property
    def errors(self) -> int:
        return sum(info.errors for info in self.finished.values())

    @property
    def remaining(self) -> list[int]:
        """Returns the numbers of the shards that have no part yet."""
        return [shard for shard in range(len(self.job.shards)) if shard not in self.finished]

    def too_many(self, done: RunProgress) -> bool:
        """Returns whether there are more error rows than allowed by now."""
        return self.job.max_errors is not None and self.errors + done.errors > self.job.max_errors

    def summary(self, done: RunProgress) -> Summary:
        """Returns how the run stands."""
        rows, errors = self.rows + done.rows, self.errors + done.errors
        stopped = too_many(errors, rows, self.job.max_errors)
        return Summary(self.job.store.folder.path, self.job.shards.items, rows, errors, self.rows, done, stopped)


@contextlib.contextmanager
def open_run(job: Job, repaired: bool = False) -> Iterator[OpenRun]:
    """Holds the folder of a run, which is made if it is not there, and reads what is finished.

    Args:
        job: the run.
        repaired: pictures may have changed since; their new state is written down.

    Raises:
        InputError: the folder is of another run, or another process holds it.
    """
    folder = job.store.folder
    folder.make()
    with folder.lock():
        present = check_same_run(folder, job.manifest, repaired)
        folder.remove_unfinished()
        if job.listing.is_temporary:
            job = _with_stored_listing(job, present)
        opened = OpenRun(job, job.finished())
        # A method that explained some cannot be wrong as a whole.
        yield replace(opened, job=job.with_settings(strict=False)) if opened.rows > opened.errors else opened


def _with_stored_listing(job: Job, present: Manifest | None) -> Job:
    """Puts a listing that was just taken into the folder of the run; the manifest then says that it is there."""
    folder, columns = job.store.folder, job.settings.stored.schema
    made = job.manifest.made
    if present is not None:
        made = {**present.made, **{name: made[name] for name in ("source", "folder", "anchor")}}
    manifest = Manifest(job.manifest.described, made)
    listing = job.listing.copy_to(folder, _listing_name(manifest), columns)
    if present != manifest:
        manifest.write(folder, columns)
    listing.remove_others()
    return replace(job, listing=listing, manifest=manifest)


def too_many(errors: int, rows: int, limit: float | None) -> bool:
    """Returns whether there are more error rows than allowed, or nothing but such rows."""
    return errors > limit if limit is not None else errors == rows > 0
