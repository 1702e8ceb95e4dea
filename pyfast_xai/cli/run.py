"""`pyfast-xai run`, and what `retry` shares with it."""

import contextlib
import json
import os
import shlex
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import arguments, options, settings
from pyfast_xai.cli.live import Live
from pyfast_xai.cli.messages import FAILED, SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Counter

if TYPE_CHECKING:
    from pyfast_xai.datasets import RunOptions, Summary
    from pyfast_xai.models import LoadedModel

_RAY, _WATCHING = "Ray", "Watching"  # groups of options


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The arguments of a run as they were written, files by their whole paths; stored with it for `retry`."""

    source: list[str]
    model: str
    weights: str | None
    method: str
    set: list[str]
    target: str
    layer: str | None
    box_rule: str | None
    top_k: int
    maps: str
    map_dtype: str
    pictures: bool
    color_swap: bool
    reduced_jpeg: bool
    accelerate: bool | None
    batch_size: str
    shard_size: int
    workers: int | None
    device: str | None
    num_classes: int | None
    size: int | None
    mean: str | None
    std: str | None
    max_pixels: int

    @classmethod
    def stored(cls, value: Any) -> "RunRequest":
        """Returns the request that a file holds, which somebody else may have written."""
        types = get_type_hints(cls)
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            refuse("_run.parquet must hold the command line of `run`; a run from Python is retried there")
        for name, entry in value.items():
            is_list = types[name] == list[str]
            is_valid = (
                isinstance(entry, list) and all(isinstance(item, str) for item in entry)
                if is_list
                else type(entry) in (get_args(types[name]) or (types[name],))
            )
            if not is_valid and not (type(entry) is int and float in get_args(types[name])):
                refuse(f"{name} in _run.parquet must be a {types[name]}, got {type(entry).__name__}")
        return cls(**value)

    def network(self, trust: bool) -> "LoadedModel":
        """Returns the network of the run.

        Args:
            trust: from the command line alone: no file says whom to trust.
        """
        names = (self.model, self.weights, self.num_classes, self.size, self.mean, self.std)
        return arguments.network(options.Network(*names, trust_model=trust))

    def run_options(
        self, out: str, loaded: "LoadedModel", max_errors: int | float | None = None, device: str | None = None
    ) -> "RunOptions":
        """Returns what the run is to do."""
        import inspect

        from pyfast_xai.datasets import RunOptions
        from pyfast_xai.explainers import METHODS

        arguments.one_of("method", self.method, METHODS)
        chosen = settings.read(self.set, [self.method])[self.method]
        if self.layer is not None:
            if "layer" not in inspect.signature(METHODS[self.method]).parameters:
                refuse(f"layer must be left out for {self.method}, which looks at no single layer, got {self.layer!r}")
            chosen.setdefault("layer", self.layer)
        target: Any = "label" if self.target == "label" else arguments.target(self.target, loaded.labels)
        maps: Any = self.maps
        return RunOptions(
            method=self.method,
            out=out,
            method_settings=chosen,
            target=target,
            top_k=self.top_k,
            maps=maps,
            map_dtype=self.map_dtype,
            pictures=self.pictures,
            color_swap=self.color_swap,
            reduced_jpeg=self.reduced_jpeg,
            accelerate="auto" if self.accelerate is None else self.accelerate,
            box_rule=self.box_rule,
            batch_size=_batch(self.batch_size),
            shard_size=self.shard_size,
            workers=self.workers,
            device=device,
            max_pixels=self.max_pixels,
            max_errors=max_errors,
        )


@options.takes_network
def run(
    context: typer.Context,
    source: Annotated[
        list[str],
        typer.Argument(
            help="The pictures: files, folders, patterns; a .csv list; .parquet or .tar files; any of these as s3://, "
            "gs:// or az://; hf:NAME[:SPLIT][@REVISION].",
            show_default=False,
        ),
    ],
    network: options.Network,
    out: Annotated[
        str,
        typer.Option(
            help="The folder of the run, or its URL in an object store.",
            show_default=False,
            rich_help_panel=options.RESULTS,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="The explainer, one a run; `pyfast-xai methods` lists them.",
            show_default="eigen-cam",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    set_: options.Set = None,
    target: Annotated[
        str,
        typer.Option(
            help="The class that is explained: none for the predicted one, an index, a name, or label (the source's).",
            rich_help_panel=options.METHOD,
        ),
    ] = "none",
    layer: options.Layer = None,
    box_rule: options.BoxRule = None,
    top_k: Annotated[
        int,
        typer.Option(
            help="How many classes are stored with each image; 0 for none.", min=0, rich_help_panel=options.RESULTS
        ),
    ] = 5,
    maps: Annotated[
        str,
        typer.Option(
            help="What is stored of each map: native (of the layer), heatmap or none.", rich_help_panel=options.RESULTS
        ),
    ] = "native",
    map_dtype: Annotated[
        str,
        typer.Option(help="The numbers of stored maps: float16, float32 or uint8.", rich_help_panel=options.RESULTS),
    ] = "float16",
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Store each heat map as PNG, too.", rich_help_panel=options.RESULTS),
    ] = False,
    color_swap: Annotated[
        bool,
        typer.Option(
            "--color-swap",
            help="Run the network with colours swapped, too, for `report`: two more forward passes.",
            rich_help_panel=options.METHOD,
        ),
    ] = False,
    reduced_jpeg: Annotated[
        bool,
        typer.Option(
            "--reduced-jpeg",
            help="Decode large JPEG files at a fraction of their size: sooner, inputs differ by a few grey levels.",
            rich_help_panel=options.SPEED,
        ),
    ] = False,
    accelerate: Annotated[
        bool | None,
        typer.Option(
            help="Replay the network, batch norm folded, from the first batch on, the same up to rounding; or never. "
            "Without either, once that has proven faster.",
            rich_help_panel=options.SPEED,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            help="How many images are explained at a time; halved where memory runs out.",
            rich_help_panel=options.SPEED,
        ),
    ] = "auto",
    shard_size: Annotated[
        int,
        typer.Option(
            help="How many rows a part holds, which is what a crash loses at most.",
            min=1,
            rich_help_panel=options.RESULTS,
        ),
    ] = 512,
    workers: Annotated[
        int | None,
        typer.Option(
            help="How many threads decode.", min=1, show_default="as few as keep up", rich_help_panel=options.SPEED
        ),
    ] = None,
    device: options.Device = None,
    max_pixels: options.MaxPixels = 64_000_000,
    max_errors: Annotated[
        str | None,
        typer.Option(
            help="Stop above so many error rows, e.g. 100 or 1%.", show_default="never", rich_help_panel=options.SPEED
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Work on Ray: local starts it here, auto joins this machine's cluster, or HOST:PORT.",
            metavar="local|auto|HOST:PORT",
            rich_help_panel=_RAY,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            help="How many workers there are on Ray.",
            min=1,
            show_default="as many as there is room for",
            rich_help_panel=_RAY,
        ),
    ] = None,
    gpus: Annotated[
        float,
        typer.Option(help="How many GPUs each worker on Ray has; shares are allowed.", min=0, rich_help_panel=_RAY),
    ] = 0,
    log: Annotated[
        Path | None,
        typer.Option(help="Append a line of JSON for each part to this file.", rich_help_panel=_WATCHING),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option(help="Keep figures in this file, in Prometheus' text format.", rich_help_panel=_WATCHING),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Explain a data set into a folder of Parquet parts; the same command goes on where it stopped.

    Every input becomes one row, a bad one an error row. Exit code 3: more error rows than --max-errors, or no other.
    """
    human = Console(stderr=True, highlight=False)
    command = command_line(context)
    with one_sentence():
        name = arguments.only("method", method or ["eigen-cam"])
    request = RunRequest(
        source=source,
        model=_absolute(network.model),
        weights=None if network.weights is None else _absolute(network.weights),
        method=name,
        set=list(set_ or []),
        target=target,
        layer=layer,
        box_rule=box_rule,
        top_k=top_k,
        maps=maps,
        map_dtype=map_dtype,
        pictures=pictures,
        color_swap=color_swap,
        reduced_jpeg=reduced_jpeg,
        accelerate=accelerate,
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        device=device,
        num_classes=network.num_classes,
        size=network.size,
        mean=network.mean,
        std=network.std,
        max_pixels=max_pixels,
    )
    with resumable(human, command), one_sentence():
        datasets = imported()
        limit = _limit(max_errors)
        if ray is None and (actors is not None or gpus):
            refuse("actors and gpus must be left out where ray is not given")
        if ray is not None:
            datasets.on_ray.imported()
        loaded = request.network(network.trust_model)
        # The driver of a cluster may have no GPU.
        device_name = arguments.device(device) if ray is None else device or ("cuda" if gpus else None)
        run_options = request.run_options(out, loaded, limit, device_name)
        with Counter("listing") as counter:
            job = datasets.prepare(
                source, loaded, run_options, listed=_advance(counter), made={"request": asdict(request)}
            )
        items_before, errors = _stand(out)
        with Live(job.shards.items, items_before, errors, log, prometheus) as live:
            if ray is None:
                summary = datasets.run_job(job, live)
            else:
                address = None if ray == "local" else ray
                summary = datasets.run_on_ray(job, address=address, actors=actors, gpus=gpus, progress=live)
    report(human, summary, as_json)
    if summary.too_many_errors:
        if not summary.complete:
            human.print(Text(f"resume  {command}"), soft_wrap=True)
        raise typer.Exit(SOME_FAILED)


def _absolute(name: str) -> str:
    """Returns a name that is one of a file as a path that serves in every working folder."""
    return str(Path(name).absolute()) if os.path.isfile(name) else name


def _advance(counter: Counter) -> Callable[[int], None]:
    """Returns what shows how many items are listed."""
    displayed = 0

    def advance(items: int) -> None:
        nonlocal displayed
        counter.update("inputs", items - displayed)
        displayed = items

    return advance


def imported() -> Any:
    """Returns the part of the package that needs more than the rest."""
    try:
        from pyfast_xai import datasets
    except ImportError as error:
        refuse(str(error))
    return datasets


def _batch(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        refuse(f"batch-size must be auto or a number of at least 1, got {text!r}")
    return int(text)


def _limit(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        limit = float(text[:-1]) / 100 if text.endswith("%") else int(text)
        if limit >= 0:
            return limit
    except ValueError:
        pass
    refuse(f"max-errors must be a number of rows or a share such as 1%, got {text!r}")


def _stand(out: str) -> tuple[int, int]:
    """Returns the number of rows and errors in the folder."""
    from pyfast_xai.datasets import status
    from pyfast_xai.datasets.folders import run_folder
    from pyfast_xai.datasets.manifest import NAME

    if NAME not in run_folder(out).names():
        return 0, 0
    present = status(out)
    return present.rows, present.errors


def report(human: Console, run_summary: "Summary", as_json: bool) -> None:
    """Prints the end of a run, for a person and for a machine."""
    progress = run_summary.progress
    speed = progress.images / progress.seconds if progress.seconds else 0.0
    rate = f"{count(progress.images, 'image')} in {progress.seconds:.1f} s, {speed:.1f} a second"
    spent = f"{progress.waiting:.1f} s waiting for decoding, {progress.explaining:.1f} s explaining"
    errors = f", {count(run_summary.errors, 'error row')}" if run_summary.errors else ""
    human.print(
        Text(f"{run_summary.rows} of {count(run_summary.items, 'row')} there{errors}. {rate} ({spent})."),
        soft_wrap=True,
    )
    human.print(Text(f"Rows: {printable(run_summary.folder)}"), soft_wrap=True)
    if as_json:
        summary = {
            "folder": str(run_summary.folder),
            "items": run_summary.items,
            "rows": run_summary.rows,
            "errors": run_summary.errors,
            "before": run_summary.before,
            "complete": run_summary.complete,
            **{f"this_{name}": value for name, value in asdict(progress).items()},
        }
        typer.echo(json.dumps(summary))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as ctrl-C is."""


@contextlib.contextmanager
def resumable(human: Console, command: str) -> Iterator[None]:
    """Ends a run with whole parts only after ctrl-C and SIGTERM; the last line is the command that goes on.

    Args:
        human: where people read.
        command: that goes on.
    """

    def terminate(*_: object) -> None:
        raise _Terminated

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, _Terminated) else 130
        human.print(Text("interrupted; every part that is there is whole"), soft_wrap=True)
        human.print(Text(f"resume  {command}"), soft_wrap=True)
        raise typer.Exit(code) from None
    except typer.Exit as error:
        # A wrong command would be as wrong the next time.
        if error.exit_code == 1:
            human.print(Text(f"resume  {command}"), soft_wrap=True)
        raise
    except Exception as error:  # a model or a method that fails on everything; the last line is how it goes on
        if _is_out_of_memory(error):
            message = " ".join(str(error).split()) or "memory does not suffice"
            human.print(Text.assemble(("error  ", "bold red"), printable(message)), soft_wrap=True)
        else:
            traceback.print_exc()
        human.print(Text(f"resume  {command}"), soft_wrap=True)
        raise typer.Exit(FAILED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)


def _is_out_of_memory(error: Exception) -> bool:
    from pyfast_xai.datasets.batching import out_of_memory

    return out_of_memory(error)


def command_line(context: typer.Context) -> str:
    """Returns the command that was given, with all that differs from the defaults."""
    arguments, flags = [], []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value in (None, [], ()) or value == parameter.default:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            arguments += [str(item) for item in values]
        elif value is True:
            flags.append(parameter.opts[0])
        else:
            flags += [argument for item in values for argument in (parameter.opts[0], str(item))]
    name = context.command.name or ""
    return printable(shlex.join(["pyfast-xai", name, *arguments, *flags]))
