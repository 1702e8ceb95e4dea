"""`pyfast-xai layers`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pyfast_xai.cli import arguments, options
from pyfast_xai.cli.messages import one_sentence


def layers(
    model: options.ModelArgument,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    size: options.Size = None,
    trust_model: options.TrustModel = False,
    operations: Annotated[
        bool, typer.Option("--operations", help="List the results of operations that no module returns, too.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the layers of a network that can be explained: names, shapes, and the methods that take them by default."""
    import torch

    import pyfast_xai

    with one_sentence():
        loaded = arguments.network(options.Network(model, weights, num_classes, size, trust_model=trust_model))
        images = torch.zeros(1, len(loaded.preprocess.mean), *loaded.preprocess.shape)
        listing = pyfast_xai.layers(loaded.model, images, operations=operations)
    if as_json:
        typer.echo(json.dumps([asdict(layer) for layer in listing]))
        return
    console = Console(highlight=False)
    console.print(Text(repr(listing)), soft_wrap=True)
    console.print(Text("Give a name by --layer, or as layer= of an explainer.", "dim"), soft_wrap=True)
