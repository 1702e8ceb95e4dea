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

Folder = Annotated[str, typer.Argument(help="The folder of a run, or its URL in an object store.", show_default=False)]


def status(folder: Folder, as_json: options.Json = False) -> None:
    """Print how many rows of a run are done and which errors there were; the run may still be working."""
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
        list[str] | None,
        typer.Option(
            help="The source of the run, as `run` takes it: every input of it must have its row.",
            metavar="SOURCE",
            show_default="rows are compared with the run's own list",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Read every part of a run and check its checksums, that no row is missing, and that none is there twice.

    Exit code 1 says that something is wrong.
    """
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
        typer.Option(
            help="The network; it must be named again for package.module:callable and with --trust-model.",
            metavar="MODEL",
            show_default="that of the run",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The weights; they must be named again with --trust-model.",
            metavar="FILE|NAME",
            show_default="those of the run",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    trust_model: options.TrustModel = False,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="The source; it must be named again for hf:NAME and URLs.",
            metavar="SOURCE",
            show_default="that of the run",
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="How many images are explained at a time.",
            show_default="that of the run",
            rich_help_panel=options.SPEED,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Explain the error rows of a run again and put the results in their place.

    Exit code 3 says that some rows failed again.
    """
    human = Console(stderr=True, highlight=False)
    with running.resumable(human, running.command_line(context)), one_sentence():
        datasets = running.imported()
        results = datasets.open(folder)
        made = results.manifest.made
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
        request = replace(
            request,
            model=model or request.model,
            weights=weights or request.weights,
            batch_size=batch_size or request.batch_size,
        )
        loaded = request.network(trust_model)
        run_options = request.run_options(folder, loaded, device=arguments.device(request.device))
        job = datasets.prepare(
            source or results.source(),
            loaded,
            run_options,
            made={"request": made.get("request")},
        )
        with Live(datasets.status(folder).errors) as live:
            summary = datasets.retry(job, live)
    running.report(human, summary, as_json)
    if summary.errors:
        raise typer.Exit(SOME_FAILED)


def export(
    folder: Folder,
    out: Annotated[
        Path, typer.Option(help="The file or folder that is written; it must not exist yet.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(help="The format: csv (without the maps), webdataset, zarr, huggingface or fiftyone."),
    ] = "csv",
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the pictures are now, for huggingface and fiftyone; it must be named for hf:NAME and URLs.",
            metavar="SOURCE",
            show_default="where they were",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the rows of a run as CSV, WebDataset tars, Zarr, or a folder for the Hugging Face Hub or FiftyOne."""
    human = Console(stderr=as_json, highlight=False)
    with one_sentence():
        datasets = running.imported()
        with Bar(datasets.status(folder).rows, "exporting") as bar:
            rows = datasets.export(folder, to, out, bar.show, source)
    human.print(Text(f"{count(rows, 'row')} written to {printable(out)}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "out": str(out)}))
