"""The engine: shards of a source in, parts of a store out. Decoding runs ahead of the model, writing behind it."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from pyfast_xai.datasets.answering import Asker
from pyfast_xai.datasets.columns import Kept, Part
from pyfast_xai.datasets.decode import Decoded, decode, normalised, pillow_for_threads
from pyfast_xai.datasets.schema import About
from pyfast_xai.datasets.sources import Item, Source
from pyfast_xai.datasets.store import Shards, Store
from pyfast_xai.datasets.swapping import Swapped
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer
from pyfast_xai.images import Preprocess

Target = int | Literal["label"] | None


@dataclass(frozen=True)
class Settings:
    """How an engine works.

    Attributes:
        preprocess: of the network.
        target: None for the predicted class, an index for all, or "label" for the class that the source says; an
            image without one is an error.
        top_k: classes told of each image.
        max_pixels: larger pictures are refused.
        batch: images at a time.
        workers: threads that decode.
        device: where the model is.
        kept: what is kept of each explanation.
        strict: a method that fails on every image of its first batch ends the run, for then its settings are at fault.
    """

    preprocess: Preprocess
    target: Target = None
    top_k: int = 5
    max_pixels: int = 64_000_000
    batch: int = 16
    workers: int = 2
    device: str = "cpu"
    kept: Kept = field(default_factory=Kept)
    strict: bool = True


@dataclass(frozen=True)
class Progress:
    """How far an engine is.

    Attributes:
        rows: in parts that are written.
        errors: among them.
        images: that went through, in finished parts or not.
        seconds: since it began.
        waiting: of these, for decoding.
        explaining: of these, in the model and the method.
        writing: of these, for the part writer.
        shard: the part that was finished last; None before the first.
        batch: images at a time.
    """

    rows: int = 0
    errors: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    explaining: float = 0.0
    writing: float = 0.0
    shard: int | None = None
    batch: int = 0


Told = Callable[[Progress], None]
Stop = Callable[[Progress], bool]


class Engine:
    """Explains shards, each as one part of a store.

    Args:
        source: of the items.
        explainer: its model lies on `settings.device`.
        store: of the parts.
        shards: how the source is cut.
        fingerprint: of the run, noted in every part.
        settings: how it works.
    """

    def __init__(
        self, source: Source, explainer: Explainer, store: Store, shards: Shards, fingerprint: str, settings: Settings
    ) -> None:
        if settings.batch < 1 or settings.workers < 1 or settings.top_k < 0:
            raise InputError(
                "batch and workers must be at least 1 and top_k at least 0, "
                f"got {settings.batch}, {settings.workers} and {settings.top_k}"
            )
        self._source, self._store, self._shards = source, store, shards
        self._fingerprint, self._settings = fingerprint, settings
        swapped = Swapped(explainer, settings.preprocess) if settings.kept.color_swap else None
        self._ask = Asker(explainer, settings.top_k, settings.batch, swapped)
        self._some_explained = not settings.strict

    def run(self, numbers: Iterable[int], told: Told | None = None, stop: Stop | None = None) -> Progress:
        """Explain shards, in order.

        Whatever ends this early, an exception or ctrl-C among it, a part that is not finished leaves no trace, and
        every other one is whole.

        Args:
            numbers: of the shards.
            told: called after each batch and each part.
            stop: asked after each part, once it is written; True ends the run there.

        Returns:
            What was done.

        Raises:
            OSError: the disk is full, or the source is gone.
            Exception: the explainer's, where it fails on every image of its first batch; see `Settings.strict`.
        """
        began = time.perf_counter()
        progress = Progress(batch=self._ask.batch)
        tell = told or (lambda _: None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(pillow_for_threads(self._settings.max_pixels))
            ahead = stack.enter_context(_Ahead(self._source, self._shards, list(numbers), self._settings))
            writer = stack.enter_context(_Writer(self._store))
            for shard, decoded in ahead:
                start, end = self._shards.range(shard)
                part = Part(start, end, self._settings.kept, self._settings.preprocess)
                for seconds, images in self._batches(decoded, part, writer):
                    writer.check()
                    progress = replace(
                        progress,
                        images=progress.images + images,
                        seconds=time.perf_counter() - began,
                        waiting=ahead.waited,
                        explaining=progress.explaining + seconds,
                        batch=self._ask.batch,
                    )
                    progress = writer.counted(progress)
                    tell(progress)
                writer.finish(shard, part, self._about(shard, start, end))
                if stop is not None:
                    writer.wait()
                progress = writer.counted(replace(progress, seconds=time.perf_counter() - began))
                tell(progress)
                if stop is not None and stop(progress):
                    break
            writer.wait()
        progress = writer.counted(replace(progress, seconds=time.perf_counter() - began))
        tell(progress)
        return progress

    def _about(self, shard: int, start: int, stop: int) -> About:
        return About(self._fingerprint, shard, start, stop, 0, self._ask.batch)

    def _batches(self, decoded: Iterator[Decoded], part: Part, writer: "_Writer") -> Iterator[tuple[float, int]]:
        """Explain the images of a shard, those of one shape together; yields the seconds and images of each step.

        Which images share a batch depends on the shard and the batch size alone, so a part that is made again is the
        same to the last bit.
        """
        waiting: dict[Any, list[Decoded]] = {}
        for image in decoded:
            if image.input is None:
                writer.put(_Failed(part, image))
                yield 0.0, 1
                continue
            own = waiting.setdefault((image.input.dtype, image.input.shape), [])
            own.append(image)
            if len(own) >= self._ask.batch:
                ready = own.copy()
                own.clear()
                yield self._explain(ready, part, writer), len(ready)
        for left in waiting.values():
            if left:
                yield self._explain(left, part, writer), len(left)

    def _explain(self, images: list[Decoded], part: Part, writer: "_Writer") -> float:
        began = time.perf_counter()
        stacked = torch.stack([image.input for image in images if image.input is not None])
        on_gpu = self._settings.device.startswith("cuda")
        stacked = (stacked.pin_memory() if on_gpu else stacked).to(self._settings.device, non_blocking=on_gpu)
        if stacked.dtype == torch.uint8:
            stacked = normalised(stacked, self._settings.preprocess)
        answers = self._ask(stacked, self._targets(images))
        if not self._some_explained:
            failures = [answered.error for answered in answers]
            told = {(type(error), str(error)) for error in failures}
            if len(images) > 1 and failures[0] is not None and len(told) == 1:
                raise failures[0]
            self._some_explained = any(error is None for error in failures)
        seconds = (time.perf_counter() - began) / len(images)
        # What was decoded is not needed any more.
        images = [replace(image, input=None) for image in images]
        for answered in answers:
            writer.put(_Explained(part, images, answered, seconds))
        return seconds * len(images)

    def _targets(self, images: list[Decoded]) -> int | Sequence[int] | None:
        target = self._settings.target
        return target if target != "label" else [_label(image) for image in images]


def _label(image: Decoded) -> int:
    assert image.label is not None  # `_Ahead` lets no other through
    return image.label


class _Ahead:
    """Items of shards, decoded on threads while the model works on earlier ones; only so many wait."""

    def __init__(self, source: Source, shards: Shards, numbers: list[int], settings: Settings) -> None:
        self._source, self._shards, self._numbers, self._settings = source, shards, numbers, settings
        room = 2 * settings.batch + 2 * settings.workers
        self._queue: queue.Queue[Future[Decoded] | BaseException | None] = queue.Queue()
        self._room = threading.Semaphore(room)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(settings.workers, "decode")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> "_Ahead":
        self._feeder.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._room.release()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._feeder.join()

    def __iter__(self) -> Iterator[tuple[int, Iterator[Decoded]]]:
        for shard in self._numbers:
            start, stop = self._shards.range(shard)
            yield shard, self._take(stop - start)

    def _take(self, count: int) -> Iterator[Decoded]:
        for _ in range(count):
            began = time.perf_counter()
            entry = self._queue.get()
            if entry is None:
                raise InputError("source must give as many items as its listing has, got fewer")
            if isinstance(entry, BaseException):
                raise entry
            decoded = entry.result()
            self.waited += time.perf_counter() - began
            self._room.release()
            yield decoded

    def _feed(self) -> None:
        try:
            for shard in self._numbers:
                for item in self._source.items(*self._shards.range(shard)):
                    self._room.acquire()
                    if self._stopped.is_set():
                        return
                    self._queue.put(self._pool.submit(self._decode, item))
            self._queue.put(None)
        except BaseException as error:  # told where the items are waited for
            self._queue.put(error)

    def _decode(self, item: Item) -> Decoded:
        decoded = decode(item, self._settings.preprocess, self._settings.max_pixels)
        if self._settings.target == "label" and decoded.label is None and decoded.error is None:
            missing = InputError(f"label of {item.id!r} must be there where it is explained, got none")
            return replace(decoded, input=None, error=missing)
        return decoded


@dataclass(frozen=True)
class _Failed:
    part: Part
    image: Decoded

    def __call__(self) -> None:
        assert self.image.error is not None
        self.part.fail(self.image, self.image.error)


@dataclass(frozen=True)
class _Explained:
    part: Part
    images: list[Decoded]
    answered: Any
    seconds: float

    def __call__(self) -> None:
        self.part.add(self.images, self.answered, self.seconds)


class _Writer:
    """A thread that turns explanations into rows and finished parts into files, in the order they come.

    What fails there is raised by the next call.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Few: what waits holds maps.
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(8)
        self._error: BaseException | None = None
        self._written: tuple[int, int, int | None] = (0, 0, None)  # rows, errors, and the shard that was last
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        # Parts that are finished are written, also after ctrl-C: it takes milliseconds.
        self._queue.put(None)
        self._thread.join()

    def put(self, task: Callable[[], None]) -> None:
        self.check()
        began = time.perf_counter()
        self._queue.put(task)
        self.waited += time.perf_counter() - began

    def finish(self, shard: int, part: Part, about: About) -> None:
        """Have a part written once its rows are made."""

        def write() -> None:
            self._store.write(shard, part.table(replace(about, errors=part.errors)))
            self._written = (self._written[0] + part.stop - part.start, self._written[1] + part.errors, shard)

        self.put(write)

    def counted(self, progress: Progress) -> Progress:
        """With what is written by now."""
        rows, errors, shard = self._written
        return replace(progress, rows=rows, errors=errors, shard=shard, writing=self.waited)

    def wait(self) -> None:
        """Wait until all is written."""
        self._queue.join()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            task = self._queue.get()
            try:
                if task is None:
                    return
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
