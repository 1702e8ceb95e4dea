"""The same run on many processes and machines: Ray hands out shards, an engine in each worker writes its own parts."""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfast_xai.datasets.engine import Progress
from pyfast_xai.datasets.run import FIRST_BATCH, Job, Summary, going_on, limit_of, prepare
from pyfast_xai.errors import InputError
from pyfast_xai.models import LoadedModel


def explain_on_ray(
    source: Any,
    model: nn.Module | LoadedModel,
    *,
    out: str | Path,
    address: str | None = None,
    actors: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    batch: Any = "auto",
    device: str | torch.device | None = None,
    max_errors: int | float | None = None,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Summary:
    """`datasets.explain` with Ray: the same folder, promises and resumption, and the same rows.

    Ray Data schedules shards, a row each; the workers run the engine of one machine and write the parts. A worker that
    dies is replaced, and its shard made again. Source and `out` must be reachable by every worker under the same name.
    What an object store promises of a rename is less than what a file system does: `out` is a file system's folder.

    Args:
        source: see `sources.open_source`.
        model: see `datasets.explain`; it is sent to the workers as it is.
        out: folder of the run.
        address: of a Ray cluster, "auto" for the one this machine belongs to; None starts Ray here.
        actors: workers; None for as many as there is room for.
        cpus: cores of each.
        gpus: GPUs of each, a share of one allowed.
        batch: see `datasets.explain`.
        device: where a worker's model runs; None for "cuda" where it has GPUs.
        max_errors: see `datasets.explain`; looked at after each part.
        progress: called after each part, from this thread.
        **settings: further arguments of `datasets.explain`.

    Returns:
        How the run stands.

    Raises:
        InputError: Ray is not installed, or as `datasets.explain`.
        OSError: as `datasets.explain`, from the worker that met it.
    """
    try:
        import ray.data
    except ImportError as error:
        raise InputError("ray must be installed for a run on it: pip install 'pyfast-xai[ray]'") from error
    folder, where = Path(out), str(device or ("cuda" if gpus else "cpu"))
    first = FIRST_BATCH.get(where.split(":")[0], FIRST_BATCH["cpu"]) if batch == "auto" else batch
    # The driver may have no GPU: a worker moves the model.
    job = prepare(source, model, out=folder, batch=first, device="cpu", strict=max_errors is None, **settings)
    job = job.with_settings(device=where)
    limit = limit_of(max_errors, job.shards.items)
    with going_on(job, limit) as begun:
        done, numbers = Progress(batch=first), begun.remaining
        if numbers and not begun.too_many(done):
            began = not ray.is_initialized()
            if began:
                local = {"include_dashboard": False} if address is None else {"address": address}
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
            start = time.perf_counter()
            try:
                for part in _parts(ray, begun.job, numbers, actors, cpus, gpus):
                    if part["fault"]:
                        raise pickle.loads(part["fault"])  # made by our own worker
                    done = replace(_added(done, part), seconds=time.perf_counter() - start)
                    if progress is not None:
                        progress(done)
                    if begun.too_many(done):
                        break
            finally:
                if began:
                    ray.shutdown()
    return begun.summary(done)


def _parts(
    ray: Any, job: Job, numbers: list[int], actors: int | None, cpus: float, gpus: float
) -> Iterator[Mapping[str, Any]]:
    """What was done, part by part."""
    context = ray.data.DataContext.get_current()
    told = context.enable_progress_bars, context.execution_options.verbose_progress
    context.enable_progress_bars = context.execution_options.verbose_progress = False
    room = int(ray.cluster_resources().get("CPU", 1) / cpus) if cpus else 1
    workers = min(actors or max(1, room), len(numbers))
    # Held until the last part: a worker that takes the place of a dead one asks for it again.
    try:
        held = ray.put(job)
    except (TypeError, RuntimeError, pickle.PicklingError) as error:  # each module refuses in its own way
        raise InputError(
            f"model must be one that can be sent to workers (pickled), got {type(job.explainer.model).__qualname__}; "
            "exported programs (.pt2) are explained without Ray"
        ) from error
    shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    results = shards.map_batches(
        Worker,
        batch_size=1,
        fn_constructor_args=(held,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        **({"num_gpus": gpus} if gpus else {}),
    )
    try:
        yield from results.iter_rows()
    finally:
        context.enable_progress_bars, context.execution_options.verbose_progress = told


class Worker:
    """Explains shards, one after another.

    Args:
        job: the run, or Ray's reference to it.
    """

    def __init__(self, job: Any) -> None:
        if not isinstance(job, Job):
            import ray

            job = ray.get(job)
        job.explainer.model.to(job.settings.device)
        self._engine = job.engine()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Explain the shards of a batch; what was done, a row each."""
        told: dict[str, list[Any]] = {}
        for shard in batch["shard"]:
            done, fault = Progress(shard=int(shard)), b""
            try:
                done = self._engine.run([int(shard)])
            except Exception as error:  # Ray would wrap it beyond recognition
                fault = _packed(error)
            for name, value in (*vars(done).items(), ("fault", fault)):
                told.setdefault(name, []).append(value)
        return told


def _packed(error: Exception) -> bytes:
    """An exception on its way to the driver."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed


def _added(done: Progress, part: Mapping[str, Any]) -> Progress:
    """Both together."""
    sums = {name: getattr(done, name) + part[name] for name in vars(done) if name not in ("shard", "batch", "seconds")}
    return replace(done, **sums, shard=int(part["shard"]), batch=int(part["batch"]))
