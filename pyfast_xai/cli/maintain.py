"""`pyfast-xai status`, `verify`, `retry` and `export`: looking after the folder of a run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import options
from pyfast_xai.cli import run as running
from pyfast_xai.cli.live import Live
from pyfast_xai.cli.messages import FAILED, SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar

Folder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Tell how far a run is; may be asked while it works."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        found = running.imported().status(folder)
    share = found.rows / found.items
    human.print(
        Text(
            f"{found.rows} of {count(found.items, 'row')} ({share:.1%}) in {found.parts} of "
            f"{count(found.shards, 'part')}, {found.bytes / 1e6:.1f} MB, {count(found.errors, 'error row')}"
        ),
        soft_wrap=True,
    )
    for kind, number in found.kinds.items():
        human.print(Text(f"  {number}  {printable(kind)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(asdict(found)))


def verify(
    folder: Folder,
    source: Annotated[
        list[str] | None, typer.Option(help="Compare ids with this source, given as to `run`.", metavar="SOURCE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every part, checksums among it: counts, duplicates, gaps. Exit code 1 where something is wrong."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        datasets = running.imported()
        opened = datasets.open_source(source, without=folder) if source else None
        with Bar(datasets.status(folder).parts, "verifying") as bar:
            found = datasets.verify(folder, opened, lambda _done, _all: bar.advance(1))
    for fault in found.faults:
        human.print(Text.assemble(("fault  ", "bold red"), printable(fault)), soft_wrap=True)
    told = "sound" if not found.faults else f"{count(len(found.faults), 'fault')}; delete such a part and run again"
    human.print(Text(f"{count(found.rows, 'row')} read, {found.missing} not there yet: {told}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    if found.faults:
        raise typer.Exit(FAILED)


def retry(
    context: typer.Context,
    folder: Folder,
    model: Annotated[
        str | None,
        typer.Option(help="The model again; needed for package.module:callable and --trust-model.", metavar="MODEL"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The weights again; needed for --trust-model.", metavar="FILE|NAME")
    ] = None,
    trust_model: options.TrustModel = False,
    source: Annotated[
        list[str] | None, typer.Option(help="The source again; needed for hf:NAME.", metavar="SOURCE")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Images at a time.", show_default="that of the run")] = None,
    as_json: Json = False,
) -> None:
    """Explain the error rows of a run again, in their place. Exit code 3 where some are left."""
    human = Console(stderr=True, highlight=False)
    with running.resumable(human, running.command_line(context)), one_sentence():
        datasets = running.imported()
        results = datasets.open(folder)
        noted: Any = results.manifest.made.get("asked")
        asked = running.Asked.noted(noted)
        # A folder that somebody sent imports and fetches nothing by itself.
        if model is None and ":" in asked.model:
            refuse(f"model must be named again for what is imported, got {asked.model!r} from _run.json alone")
        # Nor does it say what is trusted.
        if trust_model and model is None:
            refuse(f"model must be named again where it is trusted, got {asked.model!r} from _run.json alone")
        if trust_model and weights is None and asked.weights is not None:
            refuse(f"weights must be named again where they are trusted, got {asked.weights!r} from _run.json alone")
        if source is None and any(name.startswith("hf:") for name in asked.source):
            refuse("source must be named again for what is fetched, got hf: from _run.json alone")
        places = results.manifest.made.get("source")
        asked = replace(asked, model=model or asked.model, weights=weights or asked.weights, batch=batch or asked.batch)
        keywords = asked.keywords(trust_model)
        keywords["source"] = source or (places if isinstance(places, list) else asked.source)
        job = datasets.prepare(**keywords, out=folder)
        with Live(datasets.status(folder).errors) as live:
            done = datasets.retry(job, live)
    running.tell(human, done, as_json)
    if done.errors:
        raise typer.Exit(SOME_FAILED)


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="File or folder to write; must not be there.", show_default=False)],
    to: Annotated[str, typer.Option(help="csv (no maps), webdataset or zarr.")] = "csv",
    as_json: Json = False,
) -> None:
    """Write the rows of a run as CSV, WebDataset tars or Zarr."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        datasets = running.imported()
        with Bar(datasets.status(folder).rows, "exporting") as bar:
            rows = datasets.export(folder, to, out, lambda _done, _all: bar.advance(1))
    human.print(Text(f"{count(rows, 'row')} written to {printable(out)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "out": str(out)}))
