"""`pyfast-xai evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, options, settings
from pyfast_xai.cli.messages import SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar


@options.takes_network
def evaluate(
    images: options.Images,
    network: options.Network,
    annotations: Annotated[
        Path,
        typer.Option(
            help="COCO's JSON, a JSON list of {file, label, boxes}, PASCAL VOC's or ILSVRC's XML, "
            "LOC_val_solution.csv, a folder with class_labels.txt and localization.txt, or a folder of mask PNGs.",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="The explainers: repeat the option, or separate names by commas; `pyfast-xai methods` lists them. "
            "centre and noise are baselines.",
            show_default="centre,fixations,eigen-cam",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "--metrics",
            help="The measures, likewise: box-error, pointing, deletion and others (docs/evaluation.md).",
            show_default="box-error,pointing",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    set_: options.Set = None,
    target: Annotated[
        str,
        typer.Option(
            help="The class that is explained: the predicted one, or that of the label.",
            rich_help_panel=options.METHOD,
        ),
    ] = "predicted",
    out: Annotated[
        Path,
        typer.Option(
            help="The folder of the results, another than that of the pictures.",
            file_okay=False,
            rich_help_panel=options.RESULTS,
        ),
    ] = Path("out/evaluate"),
    layer: options.Layer = None,
    batch_size: Annotated[
        int, typer.Option(help="How many images are explained at a time.", min=1, rich_help_panel=options.SPEED)
    ] = 16,
    resamples: Annotated[
        int,
        typer.Option(
            help="How often the pictures are drawn anew for 95 % intervals.", min=0, rich_help_panel=options.RESULTS
        ),
    ] = 1000,
    device: options.Device = None,
    as_json: options.Json = False,
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
        choices = {**evaluation.BASELINES, **METHODS}
        names = arguments.names("method", method or "centre,fixations,eigen-cam", choices)
        chosen_metrics = arguments.names("metric", metrics or "box-error,pointing", evaluation.METRICS)
        arguments.one_of("target", target, ("predicted", "label"))
        explainers = [name for name in names if name in METHODS]
        chosen = settings.read(set_ or [], explainers)
        truth, unannotated = evaluation.read_annotations(annotations, files)
        if not truth:
            refuse(f"annotations must be of the pictures, got {str(annotations)!r}, which tells of none of them")
        loaded = arguments.network(network)
        device_name = arguments.device(device)
        loaded.model.to(device_name)
        with Bar(len(truth) * len(names), "measuring") as bar:
            makers = arguments.makers(explainers, loaded, bar, layer, chosen)
            evaluated = evaluation.evaluate(
                *(loaded.model, truth, loaded.preprocess),
                {name: makers.get(name, choices[name]) for name in names},
                chosen_metrics,
                target="label" if target == "label" else "predicted",
                labels=loaded.labels,
                batch_size=batch_size,
                device=device_name,
                resamples=resamples,
                progress=bar.show,
            )
        paths = evaluated.write(out)
    for _, reason in evaluated.errors:
        human.print(Text.assemble(("failed  ", "bold red"), printable(reason)), soft_wrap=True)
    heads, rows = evaluated.table()
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        table.add_row(*row)
    human.print(table)
    summary = [count(evaluated.pictures, "picture"), f"{evaluated.small} of them with small objects only"]
    if unannotated:
        summary.append(f"{len(unannotated)} without annotation left out")
    if evaluated.errors:
        summary.append(f"{len(evaluated.errors)} failed")
    plots = "" if any(path.suffix == ".png" for path in paths) else " Plots need matplotlib: pip install matplotlib."
    human.print(Text(f"{', '.join(summary)}. Results: {printable(out)}.{plots}"), soft_wrap=True)
    if as_json:
        typer.echo((out / "evaluation.json").read_text())
    if evaluated.errors:
        raise typer.Exit(SOME_FAILED)
