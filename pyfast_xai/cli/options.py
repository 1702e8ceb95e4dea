"""Options that several commands take, each said once."""

from typing import Annotated

import typer

Images = Annotated[list[str], typer.Argument(help="Files, folders and patterns.", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        help="digits, torchvision/NAME, timm/NAME or package.module:callable.", show_default=False, metavar="MODEL"
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="safetensors or a state dict; DEFAULT or a published name.", metavar="FILE|NAME")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of a method, e.g. fixations.variant=paper.", metavar="METHOD.NAME=VALUE"),
]
Layer = Annotated[str | None, typer.Option(help="Layer for the methods that look at one.")]
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
