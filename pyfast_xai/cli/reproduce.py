"""`pyfast-xai reproduce`."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from pyfast_xai.cli import arguments, options
from pyfast_xai.cli.messages import FAILED, USAGE, one_sentence, printable
from pyfast_xai.cli.progress import Counter

_DATA = "Data"  # a group of options


def _print_experiments(requested: bool) -> None:
    if requested:
        from pyfast_xai.reproduce import EXPERIMENTS

        for paper, experiments in EXPERIMENTS.items():
            typer.echo(f"{paper:12}{', '.join(experiments)}")
        raise typer.Exit


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(
            help="The paper: fixations, eigen-cam, fgvis, backprop or clear; or comparison, of all explainers.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="The folder of the data sets; an experiment says what it misses there.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ],
    experiment: Annotated[
        list[str] | None,
        typer.Option(
            help="The experiments: repeat the option, or separate names by commas. --list lists them.",
            show_default="all of the paper",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder of the results.", file_okay=False, rich_help_panel=options.RESULTS)
    ] = Path("out/reproduce"),
    pictures: Annotated[
        int,
        typer.Option(help="How many pictures are used at most; 0 for all there are.", min=0, rich_help_panel=_DATA),
    ] = 200,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            help="The networks: repeat the option, or separate names by commas.",
            show_default="the paper's, or all of a collection",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    half: Annotated[
        str,
        typer.Option(
            help="Which ILSVRC pictures are used: all, those by which defaults were chosen (tuning), or the others "
            "(held-out).",
            rich_help_panel=_DATA,
        ),
    ] = "all",
    batch_size: Annotated[
        int, typer.Option(help="How many images are explained at a time.", min=1, rich_help_panel=options.SPEED)
    ] = 16,
    seed: Annotated[
        int,
        typer.Option(help="The seed by which pictures are drawn, and all else that is random.", rich_help_panel=_DATA),
    ] = 0,
    device: options.Device = None,
    list_experiments: Annotated[
        bool,
        typer.Option(
            "--list", is_eager=True, callback=_print_experiments, help="Print the experiments of every paper and exit."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as JSON on stdout.", rich_help_panel=options.RESULTS)
    ] = False,
) -> None:
    """Run the experiments of a paper and put its figures beside those measured.

    An experiment whose data set is not there says what it needs; the others run.
    """
    from pyfast_xai.errors import InputError
    from pyfast_xai.local_path import local_path
    from pyfast_xai.reproduce import EXPERIMENTS, Data
    from pyfast_xai.reproduce.data import HALVES, Half

    human = Console(stderr=as_json, highlight=False)
    tables, missing = {}, 0
    with one_sentence():
        local_path("out", out)
        arguments.one_of("paper", paper, EXPERIMENTS)
        chosen_half: Half = cast(Half, arguments.one_of("half", half, HALVES))
        experiments = EXPERIMENTS[paper]
        names = list(experiments) if experiment is None else arguments.names("experiment", experiment, experiments)
        values = [name.strip() for value in networks or () for name in value.split(",")]
        chosen = tuple(filter(None, values))
        if not data.is_dir():
            arguments.refuse(f"data must be a folder of data sets, got {str(data)!r}")
        device_name = arguments.device(device)
        for name in names:
            with Counter(f"{paper} {name}") as counter:
                inputs = Data(
                    data, pictures or None, chosen, batch_size, device_name, seed, counter.update, chosen_half
                )
                try:
                    outcome = experiments[name](inputs)
                except InputError as error:
                    missing += 1
                    human.print(Text.assemble((f"{name}  ", "bold yellow"), printable(error)), soft_wrap=True)
                    continue
            paths = outcome.write(out / paper, name)
            tables[name] = {"title": outcome.title, "heads": list(outcome.heads), "rows": outcome.rows}
            human.print(Markdown(outcome.markdown()))
            human.print(Text("Written: " + ", ".join(printable(path) for path in paths), "dim"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(tables))
    if missing:
        raise typer.Exit(USAGE if not tables else FAILED if experiment is not None else 0)
