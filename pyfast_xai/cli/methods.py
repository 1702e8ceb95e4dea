"""`pyfast-xai methods`."""

import inspect
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, options, settings
from pyfast_xai.cli.messages import one_sentence

if TYPE_CHECKING:
    from pyfast_xai.explainers import Explainer


def methods(
    method: Annotated[
        list[str] | None,
        typer.Argument(help="Methods whose settings are shown.", metavar="[METHOD]...", show_default="all, briefly"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the explainers, or show the settings of some."""
    from pyfast_xai.explainers import METHODS

    with one_sentence():
        names = list(METHODS) if not method else arguments.methods(method)
    descriptions = [_description(name, METHODS[name]) for name in names]
    console = Console(highlight=False)
    if as_json:
        typer.echo(json.dumps(descriptions))
    elif method:
        for description in descriptions:
            _show(console, description)
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method", no_wrap=True)
        table.add_column("what it shows")
        for description in descriptions:
            table.add_row(Text(description["method"], style="bold"), Text(description["summary"]))
        console.print(table)
        console.print(Text("`pyfast-xai methods NAME` shows the settings and the paper of one.", "dim"), soft_wrap=True)


def _description(name: str, explainer: "type[Explainer]") -> dict[str, Any]:
    """Returns the description of a method, JSON-ready."""
    documented = _arguments(explainer)
    parameters = inspect.signature(explainer).parameters
    return {
        "method": name,
        "class": explainer.__name__,
        "summary": _paragraphs(explainer)[0],
        "paper": explainer.paper,
        "settings": [
            {
                "name": setting,
                "default": _default(parameters[setting].default),
                "values": settings.value_text(kinds),
                "meaning": documented.get(setting, ""),
            }
            for setting, kinds in settings.settable(name).items()
        ],
    }


def _default(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _paragraphs(explainer: type) -> list[str]:
    """Returns the paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in (inspect.getdoc(explainer) or "").split("\n\n")]


def _arguments(explainer: type) -> dict[str, str]:
    """Returns the documentation of the arguments, that of a class before that of its bases."""
    meanings: dict[str, str] = {}
    for kind in explainer.__mro__:
        text = inspect.cleandoc(kind.__doc__ or "")
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
        for name, meaning in re.findall(
            r"^    (\w+): ((?:.*\n?)(?:^     .*\n?)*)", section[1] if section else "", re.M
        ):
            meanings.setdefault(name, " ".join(meaning.split()))
    return meanings


def _show(console: Console, description: dict[str, Any]) -> None:
    """Prints one method with its settings."""
    console.print(Text.assemble((description["method"], "bold"), f"  pyfast_xai.{description['class']}"))
    console.print(Text(description["summary"]))
    console.print(Text(description["paper"], "dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("--set", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=18)
    table.add_column("meaning")
    for setting in description["settings"]:
        meaning = setting["meaning"] or f"{setting['values']}."
        table.add_row(Text(setting["name"], style="bold"), Text(_default_text(setting["default"])), Text(meaning))
    console.print(table)


def _default_text(default: Any) -> str:
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)
