"""Options that several commands take, each said once."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated

import typer

NETWORK, METHOD, RESULTS, SPEED = "Network", "Method and target", "Results", "Speed and limits"  # groups of options

_MODELS = "digits (of the demo), torchvision/NAME, timm/NAME, package.module:callable, or with --trust-model a file"

Images = Annotated[
    list[str], typer.Argument(help="The pictures: files, folders and patterns such as 'a/*.jpg'.", show_default=False)
]
Model = Annotated[
    str,
    typer.Option(help=f"The network: {_MODELS}.", show_default=False, metavar="MODEL", rich_help_panel=NETWORK),
]
ModelArgument = Annotated[str, typer.Argument(help=f"The network: {_MODELS}.", metavar="MODEL", show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(
        help="The weights: a safetensors file, a state dict, DEFAULT or the name of published ones.",
        metavar="FILE|NAME",
        rich_help_panel=NETWORK,
    ),
]
TrustModel = Annotated[
    bool,
    typer.Option(
        "--trust-model",
        help="Load full pickles, TorchScript and .pt2, which run whatever their author wrote into them.",
        rich_help_panel=NETWORK,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a parameter of a method, e.g. fixations.variant=paper; `pyfast-xai methods NAME` lists them.",
        metavar="METHOD.NAME=VALUE",
        rich_help_panel=METHOD,
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        help="The layer for methods that look at one; `pyfast-xai layers MODEL` lists them.",
        show_default="found by the method",
        rich_help_panel=METHOD,
    ),
]
BoxRule = Annotated[
    str | None,
    typer.Option(
        help="How boxes are made: segment:0.4 (threshold), mass:0.05 (share cut at each side) or hull (of points).",
        metavar="RULE[:NUMBER]",
        show_default="per method",
        rich_help_panel=METHOD,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="The device that computes, such as cpu or cuda:1.", show_default="cuda if there", rich_help_panel=SPEED
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        help="The number of outputs, where the weights have another than usual.", min=1, rich_help_panel=NETWORK
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        help="The side of the network's input, in pixels.",
        min=1,
        show_default="the network's",
        rich_help_panel=NETWORK,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="What is subtracted from each channel in 0..1, e.g. 0.5,0.5,0.5.",
        show_default="the network's",
        rich_help_panel=NETWORK,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="What each channel is divided by then, e.g. 0.5,0.5,0.5.",
        show_default="the network's",
        rich_help_panel=NETWORK,
    ),
]
MaxPixels = Annotated[
    int, typer.Option(help="Refuse pictures with more pixels than this.", min=1, rich_help_panel=SPEED)
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]


@dataclass(frozen=True)
class Network:
    """A network as a command line names it; `arguments.network` loads it."""

    model: Model
    weights: Weights = None
    num_classes: NumClasses = None
    size: Size = None
    mean: Mean = None
    std: Std = None
    trust_model: TrustModel = False


def takes_network(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a `Network` in place of its argument `network`."""
    network_names = [field.name for field in fields(Network)]

    @functools.wraps(command)
    def taking(**options: object) -> None:
        network_options = {name: options.pop(name) for name in network_names}
        command(network=Network(**network_options), **options)  # type: ignore[arg-type]

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
