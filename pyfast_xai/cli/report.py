"""`pyfast-xai report`: runs as one HTML file."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import options
from pyfast_xai.cli import run as running
from pyfast_xai.cli.messages import count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar

_PICTURES = "Pictures"  # a group of options


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER", help="The folders of runs over the same source, one for each method.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .html file that is written.", rich_help_panel=options.RESULTS)] = Path(
        "report.html"
    ),
    limit: Annotated[
        int,
        typer.Option(
            help="How many pictures are shown, spread evenly over the source; 0 for all.",
            min=0,
            rich_help_panel=_PICTURES,
        ),
    ] = 10_000,
    side: Annotated[
        int,
        typer.Option(help="The longer side of a picture, in pixels.", min=16, max=1024, rich_help_panel=_PICTURES),
    ] = 112,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the pictures are now, if they were moved after the run.",
            metavar="SOURCE",
            show_default="where they were",
            rich_help_panel=_PICTURES,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="How many threads draw pictures.",
            min=1,
            show_default="one a core, at most 8",
            rich_help_panel=options.SPEED,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write runs as one HTML file to look through: pictures with heat maps, methods side by side, classes, errors."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        datasets = running.imported()
        from pyfast_xai import report as reports

        if out.suffix.lower() not in (".html", ".htm"):
            refuse(f"out must be a .html file, got {str(out)!r}")
        rows = max(datasets.status(folder).rows for folder in folders)
        with Bar(min(rows, limit) if limit else rows, "drawing") as bar:
            written = reports.write(
                folders, out, source=source, limit=limit or None, side=side, workers=workers,
                progress=bar.show,
            )  # fmt: skip
    shown = f"{written.items} of {count(written.total, 'picture')}, {count(written.errors, 'error row')}"
    shown += f", {written.bytes / 1e6:.1f} MB"
    if written.pictures < written.items:
        shown += (
            f"; {written.items - written.pictures} without the picture itself: name its --source where it is elsewhere"
        )
    human.print(Text(f"{shown}\nReport: {printable(written.path)}"), soft_wrap=True)
    if as_json:
        result = {key: value for key, value in vars(written).items() if key != "path"}
        typer.echo(json.dumps({"out": str(written.path), **result}))
