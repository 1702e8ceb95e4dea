"""`pyfast-xai demo`."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, messages, results
from pyfast_xai.cli.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from pyfast_xai.demo import Scenes
    from pyfast_xai.explainers import Explainer

BATCH = 16
SEGMENT = 0.4  # share of a map's range: a tight cut, for the small objects of the scenes
SHOWN = 8  # scenes on the sheet
ZOOM = 4  # pixels a side in which one of a scene is drawn
# One of each kind that is quick.
METHODS = ("fixations", "eigen-cam", "saliency", "deconvnet", "guided-backprop", "clear", "grad-cam")


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the results.", file_okay=False)] = Path("out/demo"),
    count: Annotated[int, typer.Option(help="How many scenes are explained.", min=1)] = 64,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="The explainers: repeat the option, or separate names by commas; `pyfast-xai methods` lists them.",
            show_default="one of each kind",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The number that the scenes are drawn from.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Explain a small network on scenes with known boxes, and measure how well each method points."""
    from torch.nn import functional

    from pyfast_xai import render
    from pyfast_xai.demo import make_scenes
    from pyfast_xai.explainers import METHODS as KNOWN
    from pyfast_xai.local_path import local_path
    from pyfast_xai.models import load_model

    human = Console(stderr=as_json, highlight=False)
    with messages.one_sentence():
        local_path("out", out)
        names = list(METHODS) if method is None else arguments.methods(method)
        scenes = make_scenes(count, seed)
        network = load_model("digits")
        correct = network.model(scenes.images).argmax(1) == scenes.labels
        ground = functional.interpolate(scenes.images, scale_factor=ZOOM, mode="bicubic").clamp(0, 1)
        truth = render.draw_boxes(ground, results.zoomed(scenes.boxes.float(), ZOOM), render.GREEN)
        sheet, titles = [list(truth)], [[f"a {label}" for label in scenes.labels.tolist()]]
        rows = [_figures("centred box, centre point", _guessed(scenes), scenes, correct)]
        records: list[dict[str, Any]] = [
            {"scene": n, "label": int(scenes.labels[n]), "truth": scenes.boxes[n].tolist(), "correct": bool(correct[n])}
            for n in range(count)
        ]
        out.mkdir(parents=True, exist_ok=True)
        with Bar(count * len(names), "explaining") as bar:
            for name, explainer in arguments.explainers(names, network, bar).items():
                explained = _explained(explainer, scenes, ground, bar)
                for n, picture in enumerate(explained.pictures):
                    results.write_png(out / f"scene-{n:03d}.{name}.png", render.to_pil(picture))
                    records[n][name] = explained.records[n]
                sheet.append(explained.pictures)
                titles.append(explained.captions)
                rows.append(_figures(name, explained, scenes, correct))
        contact = render.montage(
            [row[:SHOWN] for row in sheet],
            labels=["scene", *names],
            titles=[row[:SHOWN] for row in titles],
            side=144,
            heading=f"{min(count, SHOWN)} of {messages.count(count, 'scene')}: what makes the network see the digit",
            keys=[
                render.Key("where the digit is", color=render.GREEN),
                render.Key("where the method points", color=render.YELLOW),
                render.Key("hot: matters most", colormap=render.DEFAULT_COLORMAP, low="cold"),
            ],
        )
        results.write_png(out / "demo.png", contact)
        summary = {"scenes": count, "seed": seed, "top1": float(correct.float().mean()), "methods": rows}
        layout = {"box": "x1, y1, x2, y2 in inclusive pixels of the scene", "points": "y, x in pixels of the scene"}
        results.write_json(out / "demo.json", {**summary, "layout": layout, "images": records})
    scene_count = messages.count(count, "scene")
    human.print(_table(rows, f"{int(correct.sum())} of {scene_count} classified correctly"))
    human.print(Text(_NOTE, "dim"))
    if method is None:
        others = ",".join(name for name in KNOWN if name not in names)
        human.print(Text(f"There are more: --method {others}"), soft_wrap=True)
    overlays = messages.count(count * len(names), "overlay")
    human.print(Text(f"Pictures: {out / 'demo.png'} and {overlays} beside it"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(summary))


_NOTE = (
    "A box counts where it overlaps the digit's by half. Methods choose boxes for objects that fill a photograph; "
    "the digits are small, so that such a box is too wide for them and may fall below a box of their mean size in the "
    f"middle. The column beside it cuts the same map at {SEGMENT:.0%} of its range, and the peak needs no box at all."
)


@dataclass
class _Explained:
    """The results of a method on the scenes."""

    boxes: "Tensor"  # [N, 4]
    segments: "Tensor"  # [N, 4], cut at SEGMENT
    peaks: "Tensor"  # [N, 2] as (y, x)
    seconds: float | None = None  # that a scene takes
    pictures: "list[Tensor]" = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)


def _explained(explainer: "Explainer", scenes: "Scenes", ground: "Tensor", bar: Bar) -> _Explained:
    """Explain all scenes; `ground` is what is drawn on."""
    import torch

    from pyfast_xai import render

    explainer(scenes.images[:1])  # kernels are compiled on first use
    boxes, segments, peaks, seconds = [], [], [], 0.0
    pictures, captions, records = [], [], []
    for start in range(0, len(ground), BATCH):
        part = slice(start, start + BATCH)
        started = time.perf_counter()
        explanation = explainer(scenes.images[part])
        boxes.append(explanation.boxes())
        peaks.append(explanation.peak())
        seconds += time.perf_counter() - started
        segments.append(explanation.boxes(f"segment:{SEGMENT}"))
        picture = render.draw_boxes(explanation.overlay(ground[part]), results.zoomed(boxes[-1], ZOOM))
        pictures += list(picture)
        captions += [""] * len(picture) if explanation.target is None else explanation.captions()
        fields = ("target", "score", "box", "points")
        records += [{key: row[key] for key in fields if key in row} for row in explanation.rows()]
        bar.advance(len(picture))
    located = torch.cat(boxes), torch.cat(segments), torch.cat(peaks)
    return _Explained(*located, seconds / len(ground), pictures, captions, records)


def _guessed(scenes: "Scenes") -> _Explained:
    """Returns the results of a blind guess: the middle of each scene, and a box of the mean size around it."""
    import torch

    mean_size = (scenes.boxes[:, 2:] - scenes.boxes[:, :2] + 1).float().mean()
    middle = scenes.images.shape[-1] / 2
    low, high = middle - mean_size / 2, middle + mean_size / 2 - 1
    boxes = torch.stack([low, low, high, high]).expand(len(scenes.boxes), 4)
    return _Explained(boxes, boxes, torch.full((len(scenes.boxes), 2), int(middle)))


def _figures(name: str, explained: _Explained, scenes: "Scenes", correct: "Tensor") -> dict[str, Any]:
    """Returns the shares of correctly classified scenes whose boxes overlap by half, and whose peak is in the box."""
    from pyfast_xai import localize

    y, x = explained.peaks.unbind(1)
    x1, y1, x2, y2 = scenes.boxes.unbind(1)
    inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
    truth = scenes.boxes.float()
    hits = (localize.iou(explained.boxes, truth) >= 0.5, localize.iou(explained.segments, truth) >= 0.5, inside)
    shares = [float(hit[correct].float().mean()) if bool(correct.any()) else 0.0 for hit in hits]
    return {"method": name, "box": shares[0], "segment": shares[1], "peak": shares[2], "seconds": explained.seconds}


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("method")
    for heading in ("box IoU ≥ 0.5", f"cut at {SEGMENT:.0%}", "peak in box", "ms per image"):
        table.add_column(heading, justify="right")
    for row in rows:
        guessed = row["seconds"] is None
        cost = "" if guessed else f"{1000 * row['seconds']:.1f}"
        shares = [f"{row[key]:.1%}" for key in ("box", "segment", "peak")]
        table.add_row(row["method"], *shares, cost, style="dim" if guessed else None)
    return table
