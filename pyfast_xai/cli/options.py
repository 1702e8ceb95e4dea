"""Options that several commands take, each said once."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated

import typer

Images = Annotated[list[str], typer.Argument(help="Files, folders and patterns.", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        help="digits, torchvision/NAME, timm/NAME, package.module:callable; with --trust-model a whole model's file.",
        show_default=False,
        metavar="MODEL",
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="safetensors or a state dict; DEFAULT or a published name.", metavar="FILE|NAME")
]
TrustModel = Annotated[
    bool,
    typer.Option(
        "--trust-model",
        help="Load full pickles, TorchScript and .pt2, which run whatever their author wrote into them.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of a method, e.g. fixations.variant=paper.", metavar="METHOD.NAME=VALUE"),
]
Layer = Annotated[str | None, typer.Option(help="Layer for the methods that look at one.")]
Threshold = Annotated[
    float | None, typer.Option(help="Cut boxes at this share of a map's range, 0 to 1.", show_default="per method")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there")]
Classes = Annotated[
    int | None, typer.Option(help="Outputs of a network whose weights have another number than usual.", min=1)
]
Size = Annotated[
    int | None, typer.Option(help="Side of the network's input, in pixels.", min=1, show_default="the network's")
]
Mean = Annotated[
    str | None, typer.Option(help="Of the channels in 0..1, e.g. 0.5,0.5,0.5.", show_default="the network's")
]
Std = Annotated[str | None, typer.Option(help="Of the channels, e.g. 0.5,0.5,0.5.", show_default="the network's")]
MaxPixels = Annotated[int, typer.Option(help="Refuse larger pictures.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]


@dataclass(frozen=True)
class Network:
    """A network as a command line names it; `arguments.network` loads it."""

    model: Model
    weights: Weights = None
    classes: Classes = None
    size: Size = None
    mean: Mean = None
    std: Std = None
    trust_model: TrustModel = False


def takes_network(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a `Network` in place of its argument `network`."""
    own = [field.name for field in fields(Network)]

    @functools.wraps(command)
    def taking(**given: object) -> None:
        named = {name: given.pop(name) for name in own}
        command(network=Network(**named), **given)  # type: ignore[arg-type]

    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name != "network":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        for field in fields(Network):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
            )
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return taking
