"""`pyfast-xai run`, and what `retry` shares with it."""

import contextlib
import json
import os
import shlex
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import arguments, options, settings
from pyfast_xai.cli.live import Live
from pyfast_xai.cli.messages import FAILED, SOME_FAILED, count, one_sentence, printable, refuse

if TYPE_CHECKING:
    from pyfast_xai.datasets import Summary


@dataclass(frozen=True)
class Asked:
    """What a run was asked for; noted in its `_run.json`, so that `retry` can ask again."""

    source: list[str]
    model: str
    weights: str | None
    method: str
    set: list[str]
    target: str
    layer: str | None
    threshold: float | None
    top_k: int
    maps: str
    map_dtype: str
    pictures: bool
    color_swap: bool
    accelerate: bool
    batch: str
    shard_size: int
    workers: int | None
    device: str | None
    classes: int | None
    size: int | None
    mean: str | None
    std: str | None
    max_pixels: int

    @classmethod
    def noted(cls, told: Any) -> "Asked":
        """From a file, which somebody else may have written."""
        types = get_type_hints(cls)
        names = {field.name for field in fields(cls)}
        if not isinstance(told, dict) or set(told) != names:
            refuse("_run.json must note how the run was asked for, as `run` does; a run from Python is retried there")
        for name, value in told.items():
            lists = types[name] == list[str]
            right = (
                isinstance(value, list) and all(isinstance(one, str) for one in value)
                if lists
                else type(value) in (get_args(types[name]) or (types[name],))
            )
            if not right and not (type(value) is int and float in get_args(types[name])):
                refuse(f"{name} in _run.json must be a {types[name]}, got {type(value).__name__}")
        return cls(**told)

    def keywords(self, trust: bool) -> dict[str, Any]:
        """Arguments of `datasets.prepare`, but for `out`.

        Args:
            trust: from the command line alone: no file says whom to trust.
        """
        import inspect

        from pyfast_xai.explainers import METHODS

        arguments.one_of("method", self.method, METHODS)
        chosen = settings.read(self.set, [self.method])[self.method]
        if self.layer is not None:
            if "layer" not in inspect.signature(METHODS[self.method]).parameters:
                refuse(f"layer must be left out for {self.method}, which looks at no single layer, got {self.layer!r}")
            chosen.setdefault("layer", self.layer)
        named = (self.model, self.weights, self.classes, self.size, self.mean, self.std)
        loaded = arguments.network(options.Network(*named, trust_model=trust))
        target: Any = "label" if self.target == "label" else arguments.target(self.target, loaded.classes)
        return {
            "source": self.source,
            "model": loaded,
            "method": self.method,
            "method_settings": chosen,
            "target": target,
            "top_k": self.top_k,
            "maps": self.maps,
            "map_dtype": self.map_dtype,
            "pictures": self.pictures,
            "color_swap": self.color_swap,
            "accelerate": self.accelerate,
            "threshold": self.threshold,
            "batch": _batch(self.batch),
            "shard_size": self.shard_size,
            "workers": self.workers,
            "device": arguments.device(self.device),
            "max_pixels": self.max_pixels,
            "made": {"asked": asdict(self)},
        }


@options.takes_network
def run(
    context: typer.Context,
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, patterns; a .csv list; .parquet or .tar files; hf:NAME[:SPLIT][@REVISION].",
            show_default=False,
        ),
    ],
    network: options.Network,
    out: Annotated[Path, typer.Option(help="Folder of the run.", file_okay=False, show_default=False)],
    method: Annotated[str, typer.Option(help="One explainer; see `methods`.")] = "eigen-cam",
    set_: options.Set = None,
    target: Annotated[
        str, typer.Option(help="none for the predicted class, an index, a class name, or label for the source's.")
    ] = "none",
    layer: options.Layer = None,
    threshold: options.Threshold = None,
    top_k: Annotated[int, typer.Option(help="Classes told of each image; 0 for none.", min=0)] = 5,
    maps: Annotated[str, typer.Option(help="native, heatmap or none: what is kept of each map.")] = "native",
    map_dtype: Annotated[str, typer.Option(help="float16, float32 or uint8.")] = "float16",
    pictures: Annotated[bool, typer.Option("--pictures", help="Keep each heat map as PNG, too.")] = False,
    color_swap: Annotated[
        bool,
        typer.Option("--color-swap", help="Ask again with colours swapped, for `report`: two more forward passes."),
    ] = False,
    accelerate: Annotated[
        bool,
        typer.Option("--accelerate", help="Replay the network, batch norm folded: sooner, the same up to rounding."),
    ] = False,
    batch: Annotated[str, typer.Option(help="Images at a time; halved where memory runs out.")] = "auto",
    shard_size: Annotated[int, typer.Option(help="Rows of a part: what a crash loses at most.", min=1)] = 512,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode.", min=1, show_default="one a core, at most 8")
    ] = None,
    device: options.Device = None,
    max_pixels: options.MaxPixels = 64_000_000,
    max_errors: Annotated[
        str | None, typer.Option(help="Stop above so many error rows, e.g. 100 or 1%.", show_default="never")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Work on Ray: local starts it here, auto joins this machine's cluster, or HOST:PORT.",
            metavar="local|auto|HOST:PORT",
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="Workers on Ray.", min=1, show_default="as many as there is room for")
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each worker on Ray; shares are allowed.", min=0)] = 0,
    log: Annotated[Path | None, typer.Option(help="Append a line of JSON for each part to this file.")] = None,
    prometheus: Annotated[
        Path | None, typer.Option(help="Keep figures in this file, in Prometheus' text format.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Explain a data set into a folder of Parquet parts; the same command goes on where it stopped.

    Every input becomes one row, a bad one an error row. Exit code 3: more error rows than --max-errors, or no other.
    """
    human = Console(stderr=True, highlight=False)
    again = command_line(context)
    asked = Asked(
        source, network.model, network.weights, method, list(set_ or []), target, layer, threshold, top_k, maps,
        map_dtype, pictures, color_swap, accelerate, batch, shard_size, workers, device, network.classes, network.size,
        network.mean, network.std, max_pixels,
    )  # fmt: skip
    with resumable(human, again), one_sentence():
        datasets = imported()
        limit = _limit(max_errors)
        if ray is None and (actors is not None or gpus):
            refuse("actors and gpus must be left out where ray is not given")
        keywords = asked.keywords(network.trust_model)
        keywords["source"] = opened = datasets.open_source(source, without=out)
        arguments.folder(out, [Path(place) for place in _places(opened)])
        before, errors = _stand(out)
        with Live(len(opened), before, errors, log, prometheus) as live:
            if ray is None:
                done = datasets.explain(**keywords, out=out, max_errors=limit, progress=live)
            else:
                keywords["device"] = device
                where = None if ray == "local" else ray
                done = datasets.explain_on_ray(
                    **keywords, out=out, max_errors=limit, progress=live, address=where, actors=actors, gpus=gpus
                )
    tell(human, done, as_json)
    if done.too_many_errors:
        if not done.complete:
            human.print(Text(f"resume  {again}"), soft_wrap=True)
        raise typer.Exit(SOME_FAILED)


def imported() -> Any:
    """The part of the package that needs more than the rest."""
    try:
        from pyfast_xai import datasets
    except ImportError as error:
        refuse(str(error))
    return datasets


def _batch(given: str) -> Any:
    if given == "auto":
        return given
    if not given.isdecimal() or int(given) < 1:
        refuse(f"batch must be auto or a number of at least 1, got {given!r}")
    return int(given)


def _limit(given: str | None) -> int | float | None:
    if given is None:
        return None
    try:
        limit = float(given[:-1]) / 100 if given.endswith("%") else int(given)
        if limit >= 0:
            return limit
    except ValueError:
        pass
    refuse(f"max-errors must be a number of rows or a share such as 1%, got {given!r}")


def _places(source: Any) -> list[str]:
    """A file of each folder of a source of files: results must not lie among them."""
    places = [item.place for item in source.items(0, len(source))] if source.kind == "files" else []
    # Of a million files in a few folders, the folders are asked.
    return list({os.path.dirname(place): place for place in places}.values())


def _stand(out: Path) -> tuple[int, int]:
    """Rows and errors that are there."""
    from pyfast_xai.datasets import status

    if not (out / "_run.json").is_file():
        return 0, 0
    found = status(out)
    return found.rows, found.errors


def tell(human: Console, done: "Summary", as_json: bool) -> None:
    """The end of a run, for a person and for a machine."""
    told, speed = done.progress, done.progress.images / done.progress.seconds if done.progress.seconds else 0.0
    here = f"{count(told.images, 'image')} in {told.seconds:.1f} s, {speed:.1f} a second"
    spent = f"{told.waiting:.1f} s waiting for decoding, {told.explaining:.1f} s explaining"
    errors = f", {count(done.errors, 'error row')}" if done.errors else ""
    human.print(Text(f"{done.rows} of {count(done.items, 'row')} there{errors}. {here} ({spent})."), soft_wrap=True)
    human.print(Text(f"Rows: {printable(done.folder)}"), soft_wrap=True)
    if as_json:
        summary = {
            "folder": str(done.folder),
            "items": done.items,
            "rows": done.rows,
            "errors": done.errors,
            "before": done.before,
            "complete": done.complete,
            **{f"this_{name}": value for name, value in asdict(told).items()},
        }
        typer.echo(json.dumps(summary))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as ctrl-C is."""


@contextlib.contextmanager
def resumable(human: Console, again: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run with whole parts only; the last line told is the command that goes on."""

    def terminate(*_: object) -> None:
        raise _Terminated

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, _Terminated) else 130
        human.print(Text("interrupted; every part that is there is whole"), soft_wrap=True)
        human.print(Text(f"resume  {again}"), soft_wrap=True)
        raise typer.Exit(code) from None
    except typer.Exit as error:
        # A wrong command would be as wrong again.
        if error.exit_code == 1:
            human.print(Text(f"resume  {again}"), soft_wrap=True)
        raise
    except Exception:  # a model or a method that fails on everything; how it goes on stays the last line
        traceback.print_exc()
        human.print(Text(f"resume  {again}"), soft_wrap=True)
        raise typer.Exit(FAILED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def command_line(context: typer.Context) -> str:
    """The command that was given, with all that differs from the defaults."""
    words, options = [], []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value in (None, [], ()) or value == parameter.default:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            words += [str(one) for one in values]
        elif value is True:
            options.append(parameter.opts[0])
        else:
            options += [word for one in values for word in (parameter.opts[0], str(one))]
    name = context.command.name or ""
    return printable(shlex.join(["pyfast-xai", name, *words, *options]))
