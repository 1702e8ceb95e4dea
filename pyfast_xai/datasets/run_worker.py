"""A worker: shards of a listing in, parts of a store out. Decoding runs ahead of the model, writing behind it."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pyfast_xai.datasets.batching import BatchExplainer, out_of_memory
from pyfast_xai.datasets.color_swap import ColorSwapProbe
from pyfast_xai.datasets.columns import Part
from pyfast_xai.datasets.decode import Decoded, decode, normalised, pillow_for_threads, recycle_pixels
from pyfast_xai.datasets.job import Job
from pyfast_xai.datasets.schema import PartInfo
from pyfast_xai.datasets.sources import Item
from pyfast_xai.datasets.store import PartStore
from pyfast_xai.errors import InputError

_IN_A_ROW = 8  # images for which memory does not suffice, one after another, before the process counts as short of it


@dataclass(frozen=True)
class RunProgress:
    """The progress of a worker.

    Attributes:
        rows: in parts that are written.
        errors: among them.
        images: that went through, in finished parts or not.
        seconds: since the worker started.
        waiting: of these, for decoding.
        explaining: of these, in the model and the method.
        writing: of these, for the part writer.
        shard: the part that was finished last; None before the first.
        batch_size: images at a time.
        threads: that decode at a time.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> seen = []
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> def show(progress):
        ...     seen.append(progress.rows)
        >>> summary = datasets.explain("black.png", demo.load(), progress=show, **options)
        >>> seen[-1]
        1
    """

    rows: int = 0
    errors: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    explaining: float = 0.0
    writing: float = 0.0
    shard: int | None = None
    batch_size: int = 0
    threads: int = 0


RunCallback = Callable[[RunProgress], None]
Stop = Callable[[RunProgress], bool]


class RunWorker:
    """Explains shards of a run, each as one part of its store.

    Args:
        job: the run.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> job = datasets.prepare("black.png", demo.load(), preprocess=Preprocess(96), method="saliency", out="run")
        >>> worker = datasets.RunWorker(job)
        >>> type(worker).__name__
        'RunWorker'
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self._job, self._settings = job, settings
        probe = ColorSwapProbe(job.explainer, settings.preprocess) if settings.stored.color_swap else None
        self._batches_of = BatchExplainer(job.explainer, settings.top_k, settings.batch_size, probe)
        self._some_explained = not settings.strict
        self._memory = _MemoryWatch()

    def run(
        self,
        shards: Iterable[int] | Mapping[int, Sequence[int]],
        progress: RunCallback | None = None,
        stop: Stop | None = None,
    ) -> RunProgress:
        """Explains shards, in order.

        Whatever ends this early, an exception or ctrl-C among it, a part that is not finished leaves no trace, and
        every other one is whole. A model that lies elsewhere is moved to the device of the run and back.

        Args:
            shards: numbers of shards, each of which is made whole; or for each number the indices of some of its
                items, whose rows take the place of those in the part that is there. These items are read as they are
                now.
            progress: called after each batch and each part.
            stop: called after each part that is written; True ends the run there.

        Returns:
            What was done.

        Raises:
            OSError: the disk is full, or the source is gone.
            MemoryError: memory does not suffice for image after image.
            Exception: of the explainer, where it fails on every image of its first batch; see `WorkerSettings.strict`.
        """
        start = time.perf_counter()
        done = RunProgress(batch_size=self._batches_of.batch_size)
        report = progress or (lambda _: None)
        plan = _Plan(self._job, shards)
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(on_device(self._job.explainer.model, self._settings.device))
            stack.enter_context(pillow_for_threads(self._settings.max_pixels, self._settings.workers))
            decoder = stack.enter_context(_Decoder(self._job, plan))
            writer = stack.enter_context(_Writer(self._job.store))
            for shard, decoded in decoder:
                part = Part(plan.indices(shard), self._settings.stored, self._settings.preprocess)
                for seconds, images in self._steps(decoded, part, writer, device):
                    writer.check()
                    done = replace(
                        done,
                        images=done.images + images,
                        seconds=time.perf_counter() - start,
                        waiting=decoder.waiting,
                        explaining=done.explaining + seconds,
                        batch_size=self._batches_of.batch_size,
                        threads=decoder.threads.limit,
                    )
                    decoder.adapt(done)
                    done = writer.counted(done)
                    report(done)
                self._memory.check_part(len(part.indices))
                writer.finish(shard, part, self._info(shard), plan.is_whole)
                if stop is not None:
                    writer.wait()
                done = writer.counted(replace(done, seconds=time.perf_counter() - start))
                report(done)
                if stop is not None and stop(done):
                    break
            writer.wait()
        done = writer.counted(replace(done, seconds=time.perf_counter() - start))
        report(done)
        return done

    def _info(self, shard: int) -> PartInfo:
        start, stop = self._job.shards.range(shard)
        return PartInfo(self._job.manifest.fingerprint, shard, start, stop, 0, self._batches_of.batch_size)

    def _steps(
        self, decoded: Iterator[Decoded], part: Part, writer: "_Writer", device: torch.device
    ) -> Iterator[tuple[float, int]]:
        """Explains the images of a shard, those of one shape together; yields the seconds and images of each step.

        Which images share a batch depends on the shard and the batch size alone, so a part that is made anew is the
        same to the last bit.
        """
        pending: dict[Any, list[Decoded]] = {}
        for image in decoded:
            if image.input is None:
                if image.error is not None and out_of_memory(image.error):
                    self._memory.ran_out(math.inf, image.error)
                writer.submit(_Failed(part, image))
                yield 0.0, 1
                continue
            group = pending.setdefault((image.input.dtype, image.input.shape), [])
            group.append(image)
            if len(group) >= self._batches_of.batch_size:
                ready = group.copy()
                group.clear()
                yield self._explain(ready, part, writer, device), len(ready)
        for rest in pending.values():
            if rest:
                yield self._explain(rest, part, writer, device), len(rest)

    def _explain(self, images: list[Decoded], part: Part, writer: "_Writer", device: torch.device) -> float:
        start = time.perf_counter()
        stacked = torch.stack([image.input for image in images if image.input is not None])
        on_gpu = device.type == "cuda"
        stacked = (stacked.pin_memory() if on_gpu else stacked).to(device, non_blocking=on_gpu)
        if stacked.dtype == torch.uint8:
            stacked = normalised(stacked, self._settings.preprocess)
        results = self._batches_of(stacked, self._targets(images))
        size = stacked[0].numel()
        for result in results:
            if result.error is None:
                self._memory.fitted(size)
            elif out_of_memory(result.error):
                self._memory.ran_out(size, result.error)
        if not self._some_explained:
            failures = [result.error for result in results]
            kinds = {(type(error), str(error)) for error in failures}
            first = failures[0]
            if len(images) > 1 and first is not None and len(kinds) == 1 and not out_of_memory(first):
                raise first
            self._some_explained = any(error is None for error in failures)
        seconds = (time.perf_counter() - start) / len(images)
        # The pixels are not needed any more.
        images = [replace(image, input=None) for image in images]
        for result in results:
            writer.submit(_Explained(part, images, result, seconds))
        return seconds * len(images)

    def _targets(self, images: list[Decoded]) -> int | Sequence[int] | None:
        target = self._settings.target
        return target if target != "label" else [_label(image) for image in images]


def _label(image: Decoded) -> int:
    assert image.label is not None  # `_Decoder` lets no other through
    return image.label


@contextlib.contextmanager
def on_device(model: nn.Module, device: str | None) -> Iterator[torch.device]:
    """Moves a model to a device and back.

    Args:
        model: with all its tensors in one place; moved only where that is another one.
        device: None leaves the model where it is.

    Yields:
        Where its inputs must lie.

    Raises:
        InputError: the model lies in several places, and is to be moved.
    """
    tensors = [*model.parameters(), *model.buffers()]
    places = list(dict.fromkeys(tensor.device for tensor in tensors))
    original = places[0] if places else torch.device("cpu")
    target = original if device is None else torch.device(device)
    # cuda is the current GPU, whatever its number.
    if target.index is None and target.type == original.type:
        target = original
    if not places or places == [target] or (device is None):
        yield target
        return
    if len(places) > 1:
        raise InputError(
            f"device must be left out for a model that lies on {' and '.join(map(str, places))}, got {device!r}"
        )
    try:
        model.to(target)
        yield target
    finally:
        model.to(original)


class _MemoryWatch:
    """Tells a process that is short of memory from single images that are too large for it."""

    def __init__(self) -> None:
        self._in_a_row, self._largest, self._error = 0, 0.0, ""

    def fitted(self, size: int) -> None:
        """Notes an image that was explained, of so many numbers."""
        self._in_a_row, self._largest = 0, max(self._largest, size)

    def ran_out(self, size: float, error: Exception) -> None:
        """Notes an image for which memory did not suffice even alone.

        Args:
            size: numbers of the image; infinity where that is not known.
            error: that said so.

        Raises:
            MemoryError: memory sufficed for as large an image before, or has run out for image after image.
        """
        self._in_a_row += 1
        self._error = " ".join(str(error).split()) or type(error).__name__
        if size <= self._largest or self._in_a_row >= _IN_A_ROW:
            self._stop()

    def check_part(self, rows: int) -> None:
        """Raises before a part is written that would be nothing but images for which memory did not suffice.

        Args:
            rows: of the part.

        Raises:
            MemoryError: it is such a part, and no image was explained yet.
        """
        if rows > 1 and self._in_a_row >= rows and not self._largest:
            self._stop()

    def _stop(self) -> None:
        raise MemoryError(
            f"memory must suffice for one image at a time, ran out for {self._in_a_row} one after another "
            f"({self._error[:200]}); the run goes on once there is more of it"
        )


class _Plan:
    """The shards and items to explain."""

    def __init__(self, job: Job, shards: Iterable[int] | Mapping[int, Sequence[int]]) -> None:
        self._job = job
        self._indices = shards if isinstance(shards, Mapping) else None
        self.shards = list(shards)
        self.is_whole = self._indices is None

    def indices(self, shard: int) -> Sequence[int]:
        return range(*self._job.shards.range(shard)) if self._indices is None else self._indices[shard]

    def items(self, shard: int) -> Iterator[Item]:
        return self._job.listing.items(self._job.source, self.indices(shard), check=self.is_whole)


class _Threads:
    """A limit on how many threads work at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self._active = limit, 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            while self._active >= self.limit:
                self._changed.wait()
            self._active += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._active -= 1
            self._changed.notify()

    def set(self, limit: int) -> None:
        with self._changed:
            self.limit = limit
            self._changed.notify_all()


class _Decoder:
    """Items of shards, decoded on threads while the model works on earlier ones; only so many wait."""

    def __init__(self, job: Job, plan: _Plan) -> None:
        self._settings, self._plan = job.settings, plan
        settings = job.settings
        capacity = 2 * settings.batch_size + 2 * settings.workers
        self._queue: queue.Queue[Future[Decoded] | BaseException | None] = queue.Queue()
        self._capacity = threading.Semaphore(capacity)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(settings.workers, "decode", recycle_pixels)
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._last_progress = RunProgress()
        self._decoding = 0.0
        self.threads = _Threads(min(2, settings.workers) if settings.adapt else settings.workers)
        self.waiting = 0.0

    def __enter__(self) -> "_Decoder":
        self._feeder.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._capacity.release()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._feeder.join()

    def __iter__(self) -> Iterator[tuple[int, Iterator[Decoded]]]:
        for shard in self._plan.shards:
            yield shard, self._take(len(self._plan.indices(shard)))

    def adapt(self, done: RunProgress) -> None:
        """Lets as many threads decode as keep up with the model.

        Args:
            done: so far; compared with that of the call before.
        """
        if not self._settings.adapt or done.images - self._last_progress.images < self._settings.batch_size:
            return
        seconds = done.seconds - self._last_progress.seconds
        waiting = done.waiting - self._last_progress.waiting
        decoding, self._decoding, self._last_progress = self._decoding, 0.0, done
        limit = self.threads.limit
        if waiting > 0.02 * seconds:
            limit += 1
        elif decoding < 0.7 * (limit - 1) * seconds:
            limit -= 1
        self.threads.set(max(1, min(limit, self._settings.workers)))

    def _take(self, count: int) -> Iterator[Decoded]:
        for _ in range(count):
            start = time.perf_counter()
            entry = self._queue.get()
            if entry is None:
                raise InputError("source must give as many items as its listing has, got fewer")
            if isinstance(entry, BaseException):
                raise entry
            decoded = entry.result()
            self.waiting += time.perf_counter() - start
            self._decoding += decoded.seconds
            self._capacity.release()
            yield decoded

    def _feed(self) -> None:
        try:
            for shard in self._plan.shards:
                for item in self._plan.items(shard):
                    self._capacity.acquire()
                    if self._stopped.is_set():
                        return
                    self._queue.put(self._pool.submit(self._decode, item))
            self._queue.put(None)
        except BaseException as error:  # raised where the items are waited for
            self._queue.put(error)

    def _decode(self, item: Item) -> Decoded:
        with self.threads:
            decoded = decode(item, self._settings.preprocess, self._settings.max_pixels, self._settings.reduced_jpeg)
        if self._settings.target == "label" and decoded.label is None and decoded.error is None:
            reason = decoded.label_error or "got none"
            missing = InputError(f"label of {item.id!r} must be there where it is explained, {reason}")
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
    result: Any
    seconds: float

    def __call__(self) -> None:
        self.part.add(self.images, self.result, self.seconds)


class _Writer:
    """A thread that turns explanations into rows and finished parts into files, in the order they come.

    What fails there is raised by the next call.
    """

    def __init__(self, store: PartStore) -> None:
        self._store = store
        # Few: what waits holds maps.
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(8)
        self._error: BaseException | None = None
        self._written: tuple[int, int, int | None] = (0, 0, None)  # rows, errors, and the shard that was last
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self.waiting = 0.0

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        # Parts that are finished are written, also after ctrl-C: it takes milliseconds.
        self._queue.put(None)
        self._thread.join()

    def submit(self, task: Callable[[], None]) -> None:
        """Queues a task."""
        self.check()
        start = time.perf_counter()
        self._queue.put(task)
        self.waiting += time.perf_counter() - start

    def finish(self, shard: int, part: Part, info: PartInfo, is_whole: bool) -> None:
        """Has a part written after its rows are made; a part that is not whole goes into the one that is there."""

        def write() -> None:
            table = part.table(replace(info, errors=part.errors))
            (self._store.write if is_whole else self._store.replace_rows)(shard, table)
            rows, errors, _ = self._written
            self._written = (rows + table.num_rows, errors + part.errors, shard)

        self.submit(write)

    def counted(self, progress: RunProgress) -> RunProgress:
        """Returns the progress with what is written by now."""
        rows, errors, shard = self._written
        return replace(progress, rows=rows, errors=errors, shard=shard, writing=self.waiting)

    def wait(self) -> None:
        """Waits until all is written."""
        self._queue.join()
        self.check()

    def check(self) -> None:
        """Raises what failed on the thread."""
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
