"""The `pyfast-xai` command. Nothing heavy is imported before a command runs, so that help comes at once."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from pyfast_xai.explainers import Explainer
    from pyfast_xai.images import Preprocess
    from pyfast_xai.models import LoadedModel

FAILED, USAGE, SOME_FAILED = 1, 2, 3
SEGMENT = 0.4  # share of a map's range: a tight cut, for the small objects of the demo
SIDE = 448  # about how many pixels the shorter side of a picture is drawn with

app = typer.Typer(
    help="Fast visual explanations of convolutional networks.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images failed and the others are done.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from pyfast_xai import __version__

        typer.echo(f"pyfast-xai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fast visual explanations of convolutional networks."""


# Commands


@app.command()
def explain(
    images: Annotated[list[str], typer.Argument(help="Files, folders and patterns.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="digits, torchvision/NAME, timm/NAME or package.module:callable.", show_default=False, metavar="MODEL"
        ),
    ],
    weights: Annotated[
        str | None, typer.Option(help="safetensors or a state dict; DEFAULT or a published name.", metavar="FILE|NAME")
    ] = None,
    method: Annotated[str, typer.Option(help="Explainers, separated by commas; see `methods`.")] = (
        "fixations,eigen-cam"
    ),
    target: Annotated[str, typer.Option(help="none for the predicted class, an index or a class name.")] = "none",
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)] = Path("out/explain"),
    layer: Annotated[str | None, typer.Option(help="Layer for the methods that look at one.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Cut boxes at this share of a map's range, 0 to 1.", show_default="per method"),
    ] = None,
    colormap: Annotated[str, typer.Option(help="turbo, jet, viridis, inferno or gray.")] = "turbo",
    alpha: Annotated[float, typer.Option(help="Opacity of the heat, 0 to 1.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there")] = None,
    classes: Annotated[
        int | None, typer.Option(help="Outputs of a network whose weights have another number than usual.", min=1)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the network's input, in pixels.", min=1, show_default="the network's")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of the channels in 0..1, e.g. 0.5,0.5,0.5.", show_default="the network's")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Of the channels, e.g. 0.5,0.5,0.5.", show_default="the network's")
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Refuse larger pictures.", min=1)] = 64_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Explain what a network sees in pictures.

    Writes an overlay for each image and method, a sheet for each image, explanations.json and errors.json.
    """
    from pyfast_xai.images import find_images

    # With --json stdout belongs to the machine.
    human = Console(stderr=as_json, highlight=False)
    job_started = time.perf_counter()
    with _one_sentence():
        files = find_images(images)
        names = _methods(method)
        loaded = _loaded(model, weights, classes, size, mean, std)
        where = _device(device)
        explainers = _explainers(names, loaded, where, layer)
        if threshold is not None and not 0 < threshold < 1:
            _refuse(f"threshold must lie between 0 and 1, got {threshold}")
        if not 0 <= alpha <= 1:
            _refuse(f"alpha must lie in 0 to 1, got {alpha}")
        job = _Job(
            loaded=loaded,
            explainers=explainers,
            target=_target(target, loaded.classes),
            folder=out,
            device=where,
            colormap=_known("colormap", colormap, _colormaps()),
            alpha=alpha,
            threshold=threshold,
            max_pixels=max_pixels,
        )
        out.mkdir(parents=True, exist_ok=True)
        with _progress(len(files), "explaining") as advance:
            records, errors = job.run(files, batch, advance)
        results = {
            "model": loaded.name,
            "methods": names,
            "layout": {
                "box": "x1, y1, x2, y2 in inclusive pixels",
                "points": "y, x in pixels",
                "size": "height, width",
            },
            "spaces": {"original": "the file, upright", "input": "the network's input"},
            "images": records,
        }
        _write(out / "explanations.json", results)
        _write(out / "errors.json", {"errors": errors})
    for error in errors:
        human.print(Text.assemble(("failed  ", "bold red"), _printable(error["error"])), soft_wrap=True)
    if records:
        human.print(_results_table(records, names), soft_wrap=False)
    seconds = time.perf_counter() - job_started
    done = f"{_count(len(records), 'image')} explained in {seconds:.1f} s{f', {len(errors)} failed' if errors else ''}"
    human.print(Text(f"{done}. Pictures: {_printable(out)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({**results, "errors": errors}))
    if errors:
        raise typer.Exit(SOME_FAILED)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)] = Path("out/demo"),
    count: Annotated[int, typer.Option(help="Scenes to explain.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of the scenes.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Explain a small network on scenes with known boxes by every method, and measure how well each points."""
    from pyfast_xai import render
    from pyfast_xai.demo import make_scenes
    from pyfast_xai.explainers import METHODS
    from pyfast_xai.models import load_model

    human = Console(stderr=as_json, highlight=False)
    with _one_sentence():
        scenes = make_scenes(count, seed)
        network = load_model("digits")
        correct = network.model(scenes.images).argmax(1) == scenes.labels
        zoom = 4
        ground = _enlarged(scenes.images, zoom)
        truth = render.draw_boxes(ground, _zoomed(scenes.boxes.float(), zoom), render.GREEN)
        sheet, titles = [list(truth)], [[f"a {label}" for label in scenes.labels.tolist()]]
        out.mkdir(parents=True, exist_ok=True)
        rows = [_centre_figures(scenes, correct)]
        records: list[dict[str, Any]] = [
            {"scene": n, "label": int(scenes.labels[n]), "truth": scenes.boxes[n].tolist(), "correct": bool(correct[n])}
            for n in range(count)
        ]
        with _progress(count * len(METHODS), "explaining") as advance:
            for name, explainer_class in METHODS.items():
                explainer = explainer_class(network.model, labels=network.classes)
                explainer(scenes.images[:1])  # kernels are compiled on first use
                boxes, segments, peaks, seconds = [], [], [], 0.0
                pictures, captions = [], []
                for start in range(0, count, 16):
                    part = slice(start, start + 16)
                    began = time.perf_counter()
                    explanation = explainer(scenes.images[part])
                    own_boxes, own_peaks = explanation.boxes(), explanation.peak()
                    seconds += time.perf_counter() - began
                    boxes.append(own_boxes)
                    segments.append(explanation.boxes(SEGMENT))
                    peaks.append(own_peaks)
                    drawn = render.draw_boxes(explanation.overlay(ground[part]), _zoomed(own_boxes, zoom))
                    pictures += list(drawn)
                    captions += explanation.captions() if explanation.target is not None else [""] * len(drawn)
                    for record, row in zip(records[part], explanation.rows(), strict=True):
                        record[name] = {key: row[key] for key in ("target", "score", "box", "points") if key in row}
                    advance(len(drawn))
                for n, picture in enumerate(pictures):
                    (out / f"scene-{n:03d}.{name}.png").write_bytes(render.png_bytes(render.to_pil(picture)))
                sheet.append(pictures)
                titles.append(captions)
                rows.append(_figures(name, _cat(boxes), _cat(segments), _cat(peaks), scenes, correct, seconds / count))
        # Eight scenes side by side, method under method.
        blocks = [range(start, min(start + 8, count, 32)) for start in range(0, min(count, 32), 8)]
        contact = render.montage(
            [[row[n] for n in block] for block in blocks for row in sheet],
            labels=[label for _ in blocks for label in ("scene", *METHODS)],
            titles=[[row[n] for n in block] for block in blocks for row in titles],
            side=176,
        )
        (out / "demo.png").write_bytes(render.png_bytes(contact))
        summary = {"scenes": count, "seed": seed, "top1": float(correct.float().mean()), "methods": rows}
        layout = {"box": "x1, y1, x2, y2 in inclusive pixels of the scene", "points": "y, x in pixels of the scene"}
        _write(out / "demo.json", {**summary, "layout": layout, "images": records})
    table = Table(box=box.SIMPLE_HEAD, title=f"{int(correct.sum())} of {_count(count, 'scene')} classified correctly")
    table.add_column("method")
    for heading in ("box IoU ≥ 0.5", f"cut at {SEGMENT:.0%}", "peak in box", "ms per image"):
        table.add_column(heading, justify="right")
    for row in rows:
        cost = "" if row["seconds"] is None else f"{1000 * row['seconds']:.1f}"
        style = "dim" if row["seconds"] is None else None
        table.add_row(
            row["method"], _percent(row["box"]), _percent(row["segment"]), _percent(row["peak"]), cost, style=style
        )
    human.print(table)
    human.print(
        Text(f"Pictures: {out / 'demo.png'} and {_count(count * len(METHODS), 'overlay')} beside it"), soft_wrap=True
    )
    if as_json:
        typer.echo(json.dumps(summary))


@app.command()
def backends() -> None:
    """Show which backend serves each op on each device, and why."""
    import platform
    from importlib import metadata

    import torch

    import pyfast_xai
    from pyfast_xai import ops

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "device", "backend", "why"):
        table.add_column(heading, overflow="fold")
    for served in ops.report():
        table.add_row(served.op, served.device, Text(served.backend, style="bold"), Text(served.reason))
    console.print(table)

    def version(package: str) -> str:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
        return "not installed"

    # CuPy comes in one package a CUDA release.
    cupy = next((v for p in ("cupy", "cupy-cuda13x", "cupy-cuda12x") if (v := version(p)) != "not installed"), None)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    facts.add_row("pyfast-xai", pyfast_xai.__version__)
    facts.add_row("torch", torch.__version__)
    for package in ("numba", "triton"):
        facts.add_row(package, version(package))
    facts.add_row("cupy", cupy or "not installed")
    facts.add_row("python", platform.python_version())
    facts.add_row("forced", os.environ.get("PYFAST_XAI_BACKEND", "none"))
    facts.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        facts.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(facts)


@app.command()
def methods() -> None:
    """List the explainers."""
    from pyfast_xai.explainers import METHODS

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    table.add_column("what it shows")
    table.add_column("paper")
    for name, explainer in METHODS.items():
        first = (explainer.__doc__ or "").strip().splitlines()[0]
        table.add_row(Text(name, style="bold"), Text(first), Text(explainer.paper))
    Console(highlight=False).print(table)


# What was asked for


def _methods(given: str) -> list[str]:
    from pyfast_xai.explainers import METHODS

    names = list(dict.fromkeys(filter(None, (part.strip() for part in given.split(",")))))
    if not names:
        _refuse(f"method must be one of {', '.join(METHODS)}, got none")
    return [_known("method", name, METHODS) for name in names]


def _known(option: str, given: str, known: Any) -> str:
    if given not in known:
        _refuse(f"{option} must be one of {', '.join(known)}, got {given!r}")
    return given


def _refuse(message: str) -> NoReturn:
    from pyfast_xai.errors import InputError

    raise InputError(message)


def _colormaps() -> Sequence[str]:
    from pyfast_xai.render import COLORMAPS

    return COLORMAPS


def _loaded(
    spec: str, weights: str | None, classes: int | None, size: int | None, mean: str | None, std: str | None
) -> "LoadedModel":
    from dataclasses import replace

    from pyfast_xai.models import load_model

    loaded = load_model(spec, weights, classes)
    changes: dict[str, Any] = {}
    if size is not None:
        # The usual margin around the crop.
        changes.update(size=size, resize=None if loaded.preprocess.resize is None else round(size * 8 / 7))
    if mean is not None:
        changes["mean"] = _numbers("mean", mean)
    if std is not None:
        changes["std"] = _numbers("std", std)
    return replace(loaded, preprocess=replace(loaded.preprocess, **changes))


def _numbers(option: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        _refuse(f"{option} must be numbers separated by commas, got {given!r}")


def _device(given: str | None) -> str:
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=given)
    except Exception as error:  # each device type refuses in its own way
        _refuse(f"device must be one that is here, such as cpu, got {given!r} ({str(error).splitlines()[0]})")
    return given


def _target(given: str, classes: list[str] | None) -> int | None:
    import difflib

    if given.lower() == "none":
        return None
    # A class may be called by a number, as the digits are; then the name says the same or more.
    named = [i for i, name in enumerate(classes or []) if name.casefold() == given.casefold()]
    if named:
        return named[0]
    index = int(given) if given.removeprefix("-").isdecimal() else None
    if index is not None:
        if index < 0 or (classes and index >= len(classes)):
            _refuse(f"target must lie in [0, {len(classes) if classes else 'classes'}), got {index}")
        return index
    if not classes:
        _refuse(f"target must be none or an index for a model whose classes have no names, got {given!r}")
    close = difflib.get_close_matches(given.lower(), [name.lower() for name in classes], 3)
    hint = f"; close names are {', '.join(map(repr, close))}" if close else ""
    _refuse(f"target must be none, an index or a class of the model, got {given!r}{hint}")


def _explainers(names: Sequence[str], loaded: "LoadedModel", device: str, layer: str | None) -> "dict[str, Explainer]":
    import inspect

    from pyfast_xai.explainers import METHODS

    model = loaded.model.to(device)
    takes_layer = [name for name in names if "layer" in inspect.signature(METHODS[name]).parameters]
    if layer is not None and not takes_layer:
        _refuse(f"layer must be left out for {', '.join(names)}, which looks at no single layer, got {layer!r}")
    settings = {name: {"layer": layer} if layer is not None and name in takes_layer else {} for name in names}
    return {name: METHODS[name](model, labels=loaded.classes, **settings[name]) for name in names}


# Explaining


@dataclass
class _Picture:
    """An image on its way through: its input, and what is drawn on."""

    path: Path
    stem: str
    input: "Tensor"  # [C, H, W]
    shown: "Tensor"  # [3, zoom H, zoom W]
    size: tuple[int, int]  # (W, H) of the file, in pixels


@dataclass
class _Job:
    """One call of `explain`: settings, and the loop over batches."""

    loaded: "LoadedModel"
    explainers: "dict[str, Explainer]"
    target: int | None
    folder: Path
    device: str
    colormap: str
    alpha: float
    threshold: float | None
    max_pixels: int

    @property
    def preprocess(self) -> "Preprocess":
        return self.loaded.preprocess

    def run(self, files: Sequence[Path], batch: int, advance: Any) -> tuple[list[dict], list[dict]]:
        """Explain every file.

        Returns:
            A record for each image that was explained, and one for each that was not.
        """
        from pyfast_xai.errors import InputError

        records: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        stems: set[str] = set()
        for start in range(0, len(files), batch):
            pictures = []
            for path in files[start : start + batch]:
                try:
                    pictures.append(self.open(path, _stem(path, stems)))
                except InputError as error:
                    errors.append({"file": str(path), "error": str(error)})
            try:
                records += self.explain(pictures)
            except InputError:
                # One image can spoil a batch; the fault of a setting shows in every one.
                if len(pictures) == 1 and not records:
                    raise
                done, failed = self.one_by_one(pictures)
                if not records and not done:
                    raise
                records += done
                errors += failed
            advance(len(files[start : start + batch]))
        return records, errors

    def open(self, path: Path, stem: str) -> _Picture:
        from pyfast_xai.images import load_image

        image = load_image(path, self.max_pixels)
        zoom = max(1, round(SIDE / min(self.preprocess.shape)))
        return _Picture(path, stem, self.preprocess(image)[0], self.preprocess.shown(image, zoom), image.size)

    def one_by_one(self, pictures: Sequence[_Picture]) -> tuple[list[dict], list[dict]]:
        from pyfast_xai.errors import InputError

        records, errors = [], []
        for picture in pictures:
            try:
                records += self.explain([picture])
            except InputError as error:
                errors.append({"file": str(picture.path), "error": f"image {str(picture.path)!r}: {error}"})
        return records, errors

    def explain(self, pictures: Sequence[_Picture]) -> list[dict[str, Any]]:
        """Explain a batch by every method, write its pictures, and return a record for each image."""
        import torch

        from pyfast_xai import render

        if not pictures:
            return []
        inputs = torch.stack([picture.input for picture in pictures]).to(self.device)
        shown = torch.stack([picture.shown for picture in pictures])
        zoom = shown.shape[-1] // inputs.shape[-1]
        # All methods first: a batch that fails leaves no half of its pictures.
        explanations = {name: explainer(inputs, self.target) for name, explainer in self.explainers.items()}
        records: list[dict[str, Any]] = [
            {"file": str(p.path), "size": {"original": [p.size[1], p.size[0]], "input": list(inputs.shape[2:])}}
            for p in pictures
        ]
        columns: list[list[Any]] = [[picture] for picture in shown]
        for name, explanation in explanations.items():
            boxes = explanation.boxes(self.threshold).cpu()
            drawn = explanation.overlay(shown, alpha=self.alpha, colormap=self.colormap)
            drawn = render.draw_boxes(drawn, _zoomed(boxes, zoom))
            for n, picture in enumerate(pictures):
                overlay = f"{picture.stem}.{name}.png"
                (self.folder / overlay).write_bytes(render.png_bytes(render.to_pil(drawn[n])))
                columns[n].append(drawn[n])
                points = None if explanation.points is None else explanation.points[n].cpu()
                records[n][name] = {**self.record(explanation, n, boxes[n], points, picture), "overlay": overlay}
        for picture, record, row in zip(pictures, records, columns, strict=True):
            titles = [picture.path.name, *(_title(name, record[name]) for name in explanations)]
            record["sheet"] = f"{picture.stem}.png"
            sheet = render.montage([row], titles=[titles], side=SIDE)
            (self.folder / record["sheet"]).write_bytes(render.png_bytes(sheet))
        return records

    def record(self, explanation: Any, n: int, box: "Tensor", points: Any, picture: _Picture) -> dict[str, Any]:
        """What is told of one image by one method."""
        found: dict[str, Any] = {}
        if explanation.target is not None:
            target = int(explanation.target[n])
            names = self.loaded.classes
            found["target"] = target
            found["class"] = names[target] if names and target < len(names) else None
        if explanation.score is not None:
            found["score"] = float(explanation.score[n])
        there = not bool(box.isnan().any())
        original = self.preprocess.boxes_in(box[None], picture.size)[0]
        found["box"] = {
            "original": original.int().tolist() if there else None,
            "input": box.int().tolist() if there else None,
        }
        if points is not None:
            placed = self.preprocess.points_in(points, picture.size)
            found["points"] = {"original": placed.tolist(), "input": points.tolist()}
        return found


def _write(path: Path, table: dict[str, Any]) -> None:
    """JSON with a line for each key, and for each entry of a list: to be read, searched and compared by line."""
    lines = []
    for key, value in table.items():
        entries = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n  {entries}\n ]" if entries else json.dumps(value)))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _stem(path: Path, taken: set[str]) -> str:
    """A name for the results of an image that no other image has, not even where letter case does not count."""
    # Room for what is appended, in bytes, as file systems count.
    stem = os.fsdecode(os.fsencode(path.stem or path.name)[:160])
    name, count = stem, 1
    while name.casefold() in taken:
        count += 1
        name = f"{stem}-{count}"
    taken.add(name.casefold())
    return name


def _title(method: str, record: dict[str, Any]) -> str:
    if "target" not in record:
        return method
    name = record["class"] or f"class {record['target']}"
    return f"{method}: {name}" + (f" {record['score']:.0%}" if "score" in record else "")


def _zoomed(boxes: "Tensor", zoom: int) -> "Tensor":
    """Inclusive boxes on a picture `zoom` times as large."""
    return boxes * zoom + boxes.new_tensor([0, 0, zoom - 1, zoom - 1])


# Measuring


def _enlarged(images: "Tensor", zoom: int) -> "Tensor":
    from torch.nn import functional

    return functional.interpolate(images, scale_factor=zoom, mode="bicubic", align_corners=False).clamp(0, 1)


def _cat(parts: Sequence["Tensor"]) -> "Tensor":
    import torch

    return torch.cat(list(parts))


def _figures(
    name: str,
    boxes: "Tensor",
    segments: "Tensor",
    peaks: "Tensor",
    scenes: Any,
    correct: "Tensor",
    seconds: float | None,
) -> dict[str, Any]:
    """Shares of the correctly classified scenes whose boxes overlap by half, and whose peak lies in the true box."""
    from pyfast_xai import localize

    y, x = peaks.unbind(1)
    x1, y1, x2, y2 = scenes.boxes.unbind(1)
    inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
    truth = scenes.boxes.float()
    hits = (localize.iou(boxes, truth) >= 0.5, localize.iou(segments, truth) >= 0.5, inside)
    shares = [float(hit[correct].float().mean()) if bool(correct.any()) else 0.0 for hit in hits]
    return {"method": name, "box": shares[0], "segment": shares[1], "peak": shares[2], "seconds": seconds}


def _centre_figures(scenes: Any, correct: "Tensor") -> dict[str, Any]:
    """What knowing nothing of a scene is worth: its middle, and a box of the mean size around it."""
    import torch

    side = (scenes.boxes[:, 2:] - scenes.boxes[:, :2] + 1).float().mean()
    middle = scenes.images.shape[-1] / 2
    low, high = middle - side / 2, middle + side / 2 - 1
    boxes = torch.stack([low, low, high, high]).expand(len(scenes.boxes), 4)
    peaks = torch.full((len(scenes.boxes), 2), int(middle))
    return _figures("centred box, centre point", boxes, boxes, peaks, scenes, correct, None)


# Telling


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """End with one line instead of a traceback where the fault lies with what was given or what is installed."""
    from pyfast_xai.errors import BackendError, InputError, UnsupportedOpError

    try:
        yield
    except (InputError, BackendError, UnsupportedOpError, OSError) as error:
        console = Console(stderr=True, highlight=False)
        message = " ".join(str(error).split())
        console.print(Text.assemble(("error  ", "bold red"), _printable(message)), soft_wrap=True)
        raise typer.Exit(USAGE if isinstance(error, InputError) else FAILED) from None


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A bar on a terminal's stderr once a second has passed; gives the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task(what, total=total)
    late = threading.Timer(1.0, progress.start)
    late.daemon = True
    late.start()
    try:
        yield lambda count: progress.advance(task, count)
    finally:
        late.cancel()
        late.join()
        if progress.live.is_started:
            progress.stop()


def _results_table(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    shown = records[:20]
    for record in shown:
        table.add_row(Text(_printable(record["file"])), *(Text(_cell(record[name])) for name in names))
    if len(records) > len(shown):
        table.add_row(Text(f"and {len(records) - len(shown)} more", style="dim"))
    return table


def _cell(record: dict[str, Any]) -> str:
    place = record["box"]["original"]
    where = "no evidence" if place is None else f"box {' '.join(map(str, place))}"
    if "target" not in record:
        return where
    name = record["class"] or f"class {record['target']}"
    return f"{name} {record['score']:.0%}, {where}" if "score" in record else f"{name}, {where}"


def _printable(text: Any) -> str:
    """`text` with bytes that are no text, and control characters, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    app()
