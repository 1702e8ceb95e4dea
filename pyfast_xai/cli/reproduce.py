"""`pyfast-xai reproduce`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from pyfast_xai.cli import arguments, options
from pyfast_xai.cli.messages import FAILED, USAGE, one_sentence, printable
from pyfast_xai.cli.progress import Counter


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(
            help="fixations, eigen-cam, fgvis, backprop, clear; or comparison, of all explainers.", show_default=False
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(help="Folder of data sets; `pyfast_xai.reproduce.data` says how they lie.", show_default=False),
    ],
    experiment: Annotated[
        str | None, typer.Option(help="Separated by commas; a wrong one lists them.", show_default="all of the paper")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)] = Path("out/reproduce"),
    pictures: Annotated[int, typer.Option(help="At most so many; 0 for all there are.", min=0)] = 200,
    networks: Annotated[
        str | None, typer.Option(help="Separated by commas.", show_default="the paper's, or all of a collection")
    ] = None,
    half: Annotated[
        str, typer.Option(help="all ILSVRC pictures, those that defaults were chosen by (tuning), or held-out ones.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of pictures, and of what is random.")] = 0,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON on stdout.")] = False,
) -> None:
    """Run the experiments of a paper and put its figures beside those measured.

    An experiment whose data set is not there says what it needs; the others run.
    """
    from pyfast_xai.errors import InputError
    from pyfast_xai.reproduce import EXPERIMENTS, Data
    from pyfast_xai.reproduce.data import HALVES

    human = Console(stderr=as_json, highlight=False)
    tables, missing = {}, 0
    with one_sentence():
        arguments.one_of("paper", paper, EXPERIMENTS)
        chosen_half = next((known for known in HALVES if known == half), None)
        if chosen_half is None:
            arguments.refuse(f"half must be one of {', '.join(HALVES)}, got {half!r}")
        known = EXPERIMENTS[paper]
        names = list(known) if experiment is None else arguments.names("experiment", experiment, known)
        chosen = () if networks is None else tuple(filter(None, (name.strip() for name in networks.split(","))))
        if not data.is_dir():
            arguments.refuse(f"data must be a folder of data sets, got {str(data)!r}")
        where = arguments.device(device)
        for name in names:
            with Counter(f"{paper} {name}") as counter:
                given = Data(data, pictures or None, chosen, batch_size, where, seed, counter.tell, chosen_half)
                try:
                    outcome = known[name](given)
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
