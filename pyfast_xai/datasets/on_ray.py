"""The same run on many processes and machines: Ray hands out shards, a worker in each actor writes its parts."""

import logging
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pyfast_xai.datasets.job import Job
from pyfast_xai.datasets.options import RunOptions, options_of
from pyfast_xai.datasets.run import Summary, open_run, prepare
from pyfast_xai.datasets.run_worker import RunCallback, RunProgress, RunWorker
from pyfast_xai.errors import InputError
from pyfast_xai.models import LoadedModel


def explain_on_ray(
    source: Any,
    model: nn.Module | LoadedModel,
    options: RunOptions | None = None,
    *,
    address: str | None = None,
    actors: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: RunCallback | None = None,
    **settings: Any,
) -> Summary:
    """Explains as `datasets.explain` does, with Ray: the same folder, promises and resumption.

    The rows are the same up to rounding, with `accelerate=False` to the last bit.

    Ray Data schedules shards, a row each; the actors run the worker of one machine and write the parts. An actor that
    dies is replaced, and its shard made anew. Source and `out` must be reachable by every actor under the same name.

    Args:
        source: see `sources.open_source`.
        model: see `datasets.explain`; it is sent to the actors as it is.
        options: see `datasets.explain`; where `device` is None, the models of actors with GPUs run on "cuda".
        address: of a Ray cluster, "auto" for the one this machine belongs to; None starts Ray here.
        actors: how many; None for as many as there is room for.
        cpus: cores of each.
        gpus: GPUs of each, a share of one allowed.
        progress: called after each part, from this thread.
        **settings: see `datasets.explain`.

    Returns:
        How the run stands.

    Raises:
        InputError: Ray is not installed, or as `datasets.explain`.
        OSError: as `datasets.explain`, from the worker that met it.

    Example:
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> options = {"preprocess": Preprocess(96), "method": "grad-cam", "out": "run"}
        >>> datasets.explain_on_ray("photos/", demo.load(), actors=2, **options)  # doctest: +SKIP
    """
    imported()
    options = options_of(options, settings)
    if options.device is None and gpus:
        options = replace(options, device="cuda")
    job = prepare(source, model, options)
    return run_on_ray(job, address=address, actors=actors, cpus=cpus, gpus=gpus, progress=progress)


def run_on_ray(
    job: Job,
    *,
    address: str | None = None,
    actors: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: RunCallback | None = None,
) -> Summary:
    """Runs the rest of a run that `prepare` made, with Ray; see `explain_on_ray` for the arguments.

    Example:
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> options = {"preprocess": Preprocess(96), "method": "grad-cam", "out": "run"}
        >>> job = datasets.prepare("photos/", demo.load(), **options)  # doctest: +SKIP
        >>> datasets.run_on_ray(job, actors=2)  # doctest: +SKIP
    """
    ray = imported()
    with open_run(job) as opened:
        done, shards = RunProgress(batch_size=opened.job.settings.batch_size), opened.remaining
        if shards and not opened.too_many(done):
            is_started = not ray.is_initialized()
            if is_started:
                cluster = {"include_dashboard": False} if address is None else {"address": address}
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **cluster)
            start = time.perf_counter()
            try:
                for part in _parts(ray, opened.job, shards, actors, cpus, gpus):
                    if part["fault"]:
                        raise pickle.loads(part["fault"])  # an actor of this run pickled it
                    done = replace(_added(done, part), seconds=time.perf_counter() - start)
                    if progress is not None:
                        progress(done)
                    if opened.too_many(done):
                        break
            finally:
                if is_started:
                    ray.shutdown()
    return opened.summary(done)


def imported() -> Any:
    """Returns Ray with its data sets.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise InputError("ray must be installed for a run on it: pip install 'ray[data]'") from error
    return ray


def _parts(
    ray: Any, job: Job, shards: list[int], actors: int | None, cpus: float, gpus: float
) -> Iterator[Mapping[str, Any]]:
    """Yields what was done, part by part."""
    context = ray.data.DataContext.get_current()
    previous = context.enable_progress_bars, context.execution_options.verbose_progress
    context.enable_progress_bars = context.execution_options.verbose_progress = False
    max_actors = int(ray.cluster_resources().get("CPU", 1) / cpus) if cpus else 1
    size = min(actors or max(1, max_actors), len(shards))
    # Referred to until the last part: an actor that takes the place of a dead one reads it, too.
    try:
        reference = ray.put(job)
    except (TypeError, RuntimeError, pickle.PicklingError) as error:  # each module raises errors of its own
        raise InputError(
            f"model must be one that can be sent to workers (pickled), got {type(job.explainer.model).__qualname__}; "
            "exported programs (.pt2) are explained without Ray"
        ) from error
    table = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    results = table.map_batches(
        ShardActor,
        batch_size=1,
        fn_constructor_args=(reference,),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=cpus,
        **({"num_gpus": gpus} if gpus else {}),
    )
    try:
        yield from results.iter_rows()
    finally:
        context.enable_progress_bars, context.execution_options.verbose_progress = previous


class ShardActor:
    """Explains shards, one after another.

    Args:
        job: the run, or Ray's reference to it.
    """

    def __init__(self, job: Any) -> None:
        if not isinstance(job, Job):
            import ray

            job = ray.get(job)
        if job.settings.device is not None:
            # This copy of the model stays there.
            job.explainer.model.to(job.settings.device)
        self._worker = RunWorker(job)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Explains the shards of a batch; returns what was done, a row each."""
        columns: dict[str, list[Any]] = {}
        for shard in batch["shard"]:
            done, fault = RunProgress(shard=int(shard)), b""
            try:
                done = self._worker.run([int(shard)])
            except Exception as error:  # Ray would wrap it beyond recognition
                fault = _pickled(error)
            for name, value in (*vars(done).items(), ("fault", fault)):
                columns.setdefault(name, []).append(value)
        return columns


def _pickled(error: Exception) -> bytes:
    """Returns an exception on its way to the driver."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def _added(done: RunProgress, part: Mapping[str, Any]) -> RunProgress:
    """Returns both together."""
    latest = ("shard", "batch_size", "threads")
    sums = {name: getattr(done, name) + part[name] for name in vars(done) if name not in (*latest, "seconds")}
    return replace(done, **sums, **{name: int(part[name]) for name in latest})
