"""`pyfast-xai status`, `verify`, `retry` and `export`: looking after the folder of a run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import arguments, options
from pyfast_xai.cli import run as running
from pyfast_xai.cli.live import Live
from pyfast_xai.cli.messages import FAILED, SOME_FAILED, count, one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar

Folder = Annotated[str, typer.Argument(help="Folder of a run, or its URL.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Print how far a run is, also while it works."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        present = running.imported().status(folder)
    share = present.rows / present.items
    human.print(
        Text(
            f"{present.rows} of {count(present.items, 'row')} ({share:.1%}) in {present.parts} of "
            f"{count(present.shards, 'part')}, {present.bytes / 1e6:.1f} MB, {count(present.errors, 'error row')}"
        ),
        soft_wrap=True,
    )
    for kind, number in present.kinds.items():
        human.print(Text(f"  {number}  {printable(kind)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(asdict(present)))


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
            verified = datasets.verify(folder, opened, bar.show)
    for fault in verified.faults:
        human.print(Text.assemble(("fault  ", "bold red"), printable(fault)), soft_wrap=True)
    verdict = (
        "sound" if not verified.faults else f"{count(len(verified.faults), 'fault')}; delete such a part and run again"
    )
    human.print(
        Text(f"{count(verified.rows, 'row')} read, {verified.missing} not there yet: {verdict}"), soft_wrap=True
    )
    if as_json:
        typer.echo(json.dumps(asdict(verified)))
    if verified.faults:
        raise typer.Exit(FAILED)


def retry(
    context: typer.Context,
    folder: Folder,
    model: Annotated[
        str | None,
        typer.Option(help="Name the model; needed for package.module:callable and --trust-model.", metavar="MODEL"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Name the weights; needed for --trust-model.", metavar="FILE|NAME")
    ] = None,
    trust_model: options.TrustModel = False,
    source: Annotated[
        list[str] | None, typer.Option(help="Name the source; needed for hf:NAME and URLs.", metavar="SOURCE")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images at a time.", show_default="that of the run")] = None,
    as_json: Json = False,
) -> None:
    """Explain the error rows of a run anew, in their place. Exit code 3 where some are left."""
    human = Console(stderr=True, highlight=False)
    with running.resumable(human, running.command_line(context)), one_sentence():
        datasets = running.imported()
        made = datasets.open(folder).manifest.made
        request = running.RunRequest.stored(made.get("request"))
        # A folder that somebody sent imports and fetches nothing by itself.
        if model is None and ":" in request.model:
            refuse(f"model must be named again for what is imported, got {request.model!r} from _run.parquet alone")
        # Nor does it say what is trusted.
        if trust_model and model is None:
            refuse(f"model must be named again where it is trusted, got {request.model!r} from _run.parquet alone")
        if trust_model and weights is None and request.weights is not None:
            refuse(
                f"weights must be named again where they are trusted, got {request.weights!r} from _run.parquet alone"
            )
        if source is None and any(name.startswith("hf:") or "://" in name for name in request.source):
            refuse("source must be named again for what is fetched, got hf: or a URL from _run.parquet alone")
        places = made.get("source")
        request = replace(
            request,
            model=model or request.model,
            weights=weights or request.weights,
            batch_size=batch_size or request.batch_size,
        )
        loaded = request.network(trust_model)
        run_options = request.run_options(folder, loaded, device=arguments.device(request.device))
        job = datasets.prepare(
            source or (places if isinstance(places, list) else request.source),
            loaded,
            run_options,
            made={"request": made.get("request")},
        )
        with Live(datasets.status(folder).errors) as live:
            done = datasets.retry(job, live)
    running.report(human, done, as_json)
    if done.errors:
        raise typer.Exit(SOME_FAILED)


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="File or folder to write; must not be there.", show_default=False)],
    to: Annotated[str, typer.Option(help="csv (no maps), webdataset, zarr, huggingface or fiftyone.")] = "csv",
    as_json: Json = False,
) -> None:
    """Write the rows of a run as CSV, WebDataset tars, Zarr, or a folder for the Hugging Face Hub or FiftyOne."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        datasets = running.imported()
        with Bar(datasets.status(folder).rows, "exporting") as bar:
            rows = datasets.export(folder, to, out, bar.show)
    human.print(Text(f"{count(rows, 'row')} written to {printable(out)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "out": str(out)}))
