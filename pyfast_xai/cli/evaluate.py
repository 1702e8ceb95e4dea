"""`pyfast-xai evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, settings
from pyfast_xai.cli.messages import SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar


def evaluate(
    images: Annotated[list[str], typer.Argument(help="Files, folders and patterns.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="digits, torchvision/NAME, timm/NAME or package.module:callable.", show_default=False, metavar="MODEL"
        ),
    ],
    annotations: Annotated[
        Path,
        typer.Option(
            help="COCO's JSON, a JSON list of {file, label, boxes}, PASCAL VOC's or ILSVRC's XML, "
            "LOC_val_solution.csv, a folder with class_labels.txt and localization.txt, or a folder of mask PNGs.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str | None, typer.Option(help="safetensors or a state dict; DEFAULT or a published name.", metavar="FILE|NAME")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--methods", help="Explainers, separated by commas; see `methods`. centre and noise are baselines."
        ),
    ] = "centre,fixations,eigen-cam",
    metrics: Annotated[str, typer.Option(help="Separated by commas; a wrong one lists them.")] = "box-error,pointing",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of a method, e.g. fixations.variant=paper.", metavar="METHOD.NAME=VALUE"),
    ] = None,
    target: Annotated[str, typer.Option(help="Class to explain: the predicted one, or that of the label.")] = (
        "predicted"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder of the results, another than that of the pictures.", file_okay=False)
    ] = Path("out/evaluate"),
    layer: Annotated[str | None, typer.Option(help="Layer for the methods that look at one.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    resamples: Annotated[int, typer.Option(help="Of the pictures, for 95 % intervals.", min=0)] = 1000,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Measure explainers on annotated pictures.

    Writes evaluation.csv, evaluation.json and, where matplotlib is installed, plots of accuracy against cost.
    """
    from pyfast_xai import evaluation
    from pyfast_xai.explainers import METHODS
    from pyfast_xai.images import find_images

    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        files = find_images(images, without=out)
        out = arguments.folder(out, files)
        known = {**evaluation.BASELINES, **METHODS}
        names = arguments.names("methods", method, known)
        asked = arguments.names("metrics", metrics, evaluation.MEASURES)
        arguments.one_of("target", target, ("predicted", "label"))
        explainers = [name for name in names if name in METHODS]
        chosen = settings.read(set_ or [], explainers)
        truth, without = evaluation.read_annotations(annotations, files)
        if not truth:
            refuse(f"annotations must be of the pictures, got {str(annotations)!r}, which tells of none of them")
        loaded = arguments.network(model, weights, classes, size, mean, std)
        where = arguments.device(device)
        loaded.model.to(where)
        with Bar(len(truth) * len(names), "measuring") as bar:
            makers = arguments.makers(explainers, loaded, bar, layer, chosen)
            found = evaluation.evaluate(
                *(loaded.model, truth, loaded.preprocess),
                {name: makers.get(name, known[name]) for name in names},
                asked,
                target="label" if target == "label" else "predicted",
                classes=loaded.classes,
                batch=batch,
                device=where,
                resamples=resamples,
                progress=bar.advance,
            )
        paths = found.write(out)
    for _, why in found.errors:
        human.print(Text.assemble(("failed  ", "bold red"), printable(why)), soft_wrap=True)
    heads, rows = found.table()
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        table.add_row(*row)
    human.print(table)
    told = [count(found.pictures, "picture"), f"{found.small} of them with small objects only"]
    if without:
        told.append(f"{len(without)} without annotation left out")
    if found.errors:
        told.append(f"{len(found.errors)} failed")
    plots = "" if any(path.suffix == ".png" for path in paths) else ' Plots need pip install "pyfast-xai[plot]".'
    human.print(Text(f"{', '.join(told)}. Results: {printable(out)}.{plots}"), soft_wrap=True)
    if as_json:
        typer.echo((out / "evaluation.json").read_text())
    if found.errors:
        raise typer.Exit(SOME_FAILED)
