"""`pyfast-xai explain`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, options, results, settings
from pyfast_xai.cli.messages import FAILED, SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar


@options.takes_network
def explain(
    images: options.Images,
    network: options.Network,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="The explainers: repeat the option, or separate names by commas; `pyfast-xai methods` lists them.",
            show_default="fixations,eigen-cam",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    set_: options.Set = None,
    target: Annotated[
        str,
        typer.Option(
            help="The class that is explained: none for the predicted one, an index or a name.",
            rich_help_panel=options.METHOD,
        ),
    ] = "none",
    out: Annotated[
        Path,
        typer.Option(
            help="The folder of the results, another than that of the pictures.",
            file_okay=False,
            rich_help_panel=options.RESULTS,
        ),
    ] = Path("out/explain"),
    layer: options.Layer = None,
    box_rule: options.BoxRule = None,
    colormap: Annotated[
        str,
        typer.Option(
            help="The colours of heat: plasma, turbo, jet, viridis, inferno, magma, cividis, coolwarm or gray.",
            rich_help_panel=options.RESULTS,
        ),
    ] = "plasma",
    alpha: Annotated[
        float, typer.Option(help="The opacity of the heat, 0 to 1.", rich_help_panel=options.RESULTS)
    ] = 0.5,
    batch_size: Annotated[
        int, typer.Option(help="How many images are explained at a time.", min=1, rich_help_panel=options.SPEED)
    ] = 8,
    device: options.Device = None,
    max_pixels: options.MaxPixels = 64_000_000,
    as_json: options.Json = False,
) -> None:
    """Explain what a network sees in pictures.

    Writes an overlay for each image and method, a sheet for each image, explanations.json and errors.json.
    """
    from pyfast_xai import localize
    from pyfast_xai.cli.job import Job
    from pyfast_xai.images import find_images
    from pyfast_xai.render import COLORMAPS

    # With --json stdout belongs to the machine.
    human = Console(stderr=as_json, highlight=False)
    start = time.perf_counter()
    with one_sentence():
        files = find_images(images, without=out)
        out = arguments.folder(out, files)
        names = arguments.methods(method or "fixations,eigen-cam")
        chosen = settings.read(set_ or [], names)
        if box_rule is not None:
            localize.box_rule(box_rule)
        if not 0 <= alpha <= 1:
            refuse(f"alpha must lie in 0 to 1, got {alpha}")
        arguments.one_of("colormap", colormap, COLORMAPS)
        loaded = arguments.network(network)
        device_name = arguments.device(device)
        loaded.model.to(device_name)
        with Bar(len(files), "explaining") as bar:
            job = Job(
                loaded=loaded,
                explainers=arguments.explainers(names, loaded, bar, layer, chosen),
                target=arguments.target(target, loaded.labels),
                folder=out,
                device=device_name,
                colormap=colormap,
                alpha=alpha,
                box_rule=box_rule,
                max_pixels=max_pixels,
            )
            out.mkdir(parents=True, exist_ok=True)
            records, errors = job.run(files, batch_size, bar)
        explained = {
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
        results.write_json(out / "explanations.json", explained)
        results.write_json(out / "errors.json", {"errors": errors})
    for error in errors:
        human.print(Text.assemble(("failed  ", "bold red"), printable(error["error"])), soft_wrap=True)
    if records:
        human.print(_table(records, names), soft_wrap=False)
    seconds = time.perf_counter() - start
    if records:
        summary = f"{count(len(records), 'image')} explained in {seconds:.1f} s"
        failed = f", {len(errors)} failed, see errors.json there" if errors else ""
        human.print(Text(f"{summary}{failed}. Pictures: {printable(out)}"), soft_wrap=True)
    else:
        human.print(Text(f"No image was explained, {len(errors)} failed.", "bold red"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({**explained, "errors": errors}))
    if errors:
        raise typer.Exit(SOME_FAILED if records else FAILED)


def _table(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    # A path that does not fit is cut at its end, never broken.
    table.add_column("image", overflow="ellipsis", no_wrap=True, max_width=32)
    table.add_column("method", no_wrap=True)
    table.add_column("found", overflow="fold")
    rows_shown = records[:20]
    for record in rows_shown:
        for name in names:
            image = printable(Path(record["file"]).name) if name == names[0] else ""
            table.add_row(Text(image), name, Text(_result_text(record[name])))
    if len(records) > len(rows_shown):
        table.add_row(Text(f"and {len(records) - len(rows_shown)} more", style="dim"))
    return table


def _result_text(record: dict[str, Any]) -> str:
    box = record["box"]["original"]
    location = "no evidence" if box is None else f"box {' '.join(map(str, box))}"
    if "target" not in record:
        return location
    name = record["class"] or f"class {record['target']}"
    return f"{name} {record['score']:.0%}, {location}" if "score" in record else f"{name}, {location}"
