"""A run, ready to be worked on: by one worker, or by one on each of several machines."""

from dataclasses import dataclass, field, replace
from typing import Any

from pyfast_xai.datasets.columns import StoredColumns
from pyfast_xai.datasets.listing import StoredListing
from pyfast_xai.datasets.manifest import Manifest
from pyfast_xai.datasets.options import Target
from pyfast_xai.datasets.schema import PartInfo
from pyfast_xai.datasets.sources import Source
from pyfast_xai.datasets.store import PartStore, Shards
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.images import Preprocess


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker.

    Attributes:
        preprocess: of the network.
        target: None for the predicted class, an index for all, or "label" for the class that the source names; an
            image without one is an error row.
        top_k: classes that come with each image.
        max_pixels: larger pictures are error rows.
        reduced_jpeg: see `RunOptions`.
        batch_size: images at a time.
        workers: threads that decode, at most.
        adapt: use fewer of these threads where fewer keep up with the model.
        device: where the model runs; None where it is.
        stored: what is stored of each explanation.
        strict: a method that fails on every image of its first batch ends the run, for then its settings are at fault.
    """

    preprocess: Preprocess
    target: Target = None
    top_k: int = 5
    max_pixels: int = 64_000_000
    reduced_jpeg: bool = False
    batch_size: int = 16
    workers: int = 2
    adapt: bool = False
    device: str | None = None
    stored: StoredColumns = field(default_factory=StoredColumns)
    strict: bool = True


@dataclass(frozen=True)
class Job:
    """A run, ready to be worked on.

    Attributes:
        source: of the items.
        listing: of the source.
        explainer: of the model.
        store: of the parts.
        shards: how the listing is cut.
        manifest: what the run is of.
        settings: how a worker works.
        max_errors: error rows that are allowed; None for any number.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> job = datasets.prepare("black.png", demo.load(), preprocess=Preprocess(96), method="saliency", out="run")
        >>> job.remaining()
        [0]
    """

    source: Source
    listing: StoredListing
    explainer: Explainer
    store: PartStore
    shards: Shards
    manifest: Manifest
    settings: WorkerSettings
    max_errors: float | None = None

    def with_settings(self, **changes: Any) -> "Job":
        """Returns the same run, worked on in another way."""
        return replace(self, settings=replace(self.settings, **changes))

    def finished(self) -> dict[int, PartInfo]:
        """Returns the metadata of the finished parts.

        Raises:
            InputError: one is of another run.
        """
        infos = self.store.finished()
        for shard, info in infos.items():
            if info.fingerprint != self.manifest.fingerprint or (info.start, info.stop) != self.shards.range(shard):
                raise InputError(f"part {str(self.store.path(shard))!r} must be of this run, got one of another")
        return infos

    def remaining(self) -> list[int]:
        """Returns the numbers of the shards that have no part yet."""
        infos = self.finished()
        return [shard for shard in range(len(self.shards)) if shard not in infos]
