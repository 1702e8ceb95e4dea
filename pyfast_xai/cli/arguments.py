"""Arguments of commands: each function converts an argument to the object it names, or refuses it in one sentence."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfast_xai.cli import options
from pyfast_xai.cli.messages import refuse

if TYPE_CHECKING:
    from torch import nn

    from pyfast_xai.cli.progress import Bar
    from pyfast_xai.explainers import Explainer
    from pyfast_xai.models import LoadedModel


def one_of(option: str, value: str, choices: Collection[str]) -> str:
    import difflib

    if value in choices:
        return value
    unhyphenated = {name.replace("-", ""): name for name in choices}
    close = difflib.get_close_matches(re.sub("[-_ ]", "", value).lower(), unhyphenated, n=1, cutoff=0.75)
    if close:
        refuse(f"{option} {value!r} does not exist; did you mean {unhyphenated[close[0]]!r}?")
    refuse(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def methods(values: str | Sequence[str]) -> list[str]:
    """Returns the names of explainers, each once."""
    from pyfast_xai.explainers import METHODS

    return names("method", values, METHODS)


def only(option: str, values: Sequence[str]) -> str:
    """Returns the one value of an option that could be repeated."""
    chosen = [part.strip() for entry in values for part in entry.split(",")]
    if len(chosen) != 1:
        refuse(f"{option} must be a single one here, got {', '.join(chosen)}: run the command for each")
    return chosen[0]


def names(option: str, option_values: str | Sequence[str], choices: Collection[str]) -> list[str]:
    """Returns the names of an option that is repeated, or that holds several separated by commas, each once."""
    values = [option_values] if isinstance(option_values, str) else option_values
    chosen = list(dict.fromkeys(filter(None, (part.strip() for value in values for part in value.split(",")))))
    if not chosen:
        refuse(f"{option} must be one of {', '.join(choices)}, got none")
    return [one_of(option, name, choices) for name in chosen]


def folder(out: Path, pictures: Iterable[Path]) -> Path:
    """Returns the folder of the results, which may not hold the pictures: results would overwrite or join them."""
    from pyfast_xai.local_path import local_path

    out_path = os.path.realpath(local_path("out", out))
    for path in pictures:
        # A link may lie in one folder and lead to another.
        if out_path in (os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))):
            refuse(f"out must be a folder without pictures to explain, got {str(out)!r}, where {path.name!r} lies")
    return out


def network(options_: options.Network) -> "LoadedModel":
    from dataclasses import replace

    from pyfast_xai.models import load_model

    loaded = load_model(options_.model, options_.weights, options_.num_classes, trust=options_.trust_model)
    changes: dict[str, Any] = {}
    if options_.size is not None:
        # The usual margin around the crop.
        changes.update(
            size=options_.size, resize=None if loaded.preprocess.resize is None else round(options_.size * 8 / 7)
        )
    if options_.mean is not None:
        changes["mean"] = _numbers("mean", options_.mean)
    if options_.std is not None:
        changes["std"] = _numbers("std", options_.std)
    return replace(loaded, preprocess=replace(loaded.preprocess, **changes))


def _numbers(option: str, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        refuse(f"{option} must be numbers separated by commas, got {value!r}")


def device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # each device type raises errors of its own
        refuse(f"device must be one that is here, such as cpu, got {name!r} ({str(error).splitlines()[0]})")
    return name


def target(value: str, classes: list[str] | None) -> int | None:
    """Returns the index of a class; None for the predicted one."""
    import difflib

    if value.lower() == "none":
        return None
    # A class may be called by a number, as the digits are; then the name says the same or more.
    named = [i for i, name in enumerate(classes or []) if name.casefold() == value.casefold()]
    if named:
        return named[0]
    index = int(value) if value.removeprefix("-").isdecimal() else None
    if index is not None:
        if index < 0 or (classes and index >= len(classes)):
            refuse(f"target must lie in [0, {len(classes) if classes else 'classes'}), got {index}")
        return index
    if not classes:
        refuse(f"target must be none or an index for a model whose classes have no names, got {value!r}")
    close = difflib.get_close_matches(value.lower(), [name.lower() for name in classes], 3)
    hint = f"; close names are {', '.join(map(repr, close))}" if close else ""
    refuse(f"target must be none, an index or a class of the model, got {value!r}{hint}")


def explainers(
    names: Sequence[str],
    loaded: "LoadedModel",
    bar: "Bar",
    layer: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> "dict[str, Explainer]":
    """Returns the explainers of a network; see `makers`."""
    return {name: make(loaded.model) for name, make in makers(names, loaded, bar, layer, settings).items()}


def makers(
    names: Sequence[str],
    loaded: "LoadedModel",
    bar: "Bar",
    layer: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> "dict[str, Callable[[nn.Module], Explainer]]":
    """Returns functions that make explainers of a model.

    Args:
        names: of methods.
        loaded: the network, on its device.
        bar: where slow ones tell how far they are.
        layer: for the methods that look at one.
        settings: of each method, from `--set`; they go before `layer`.
    """
    import functools
    import inspect

    from pyfast_xai.explainers import METHODS

    parameters = {name: inspect.signature(METHODS[name]).parameters for name in names}
    if layer is not None and not any("layer" in accepted for accepted in parameters.values()):
        refuse(f"layer must be left out for {', '.join(names)}, which looks at no single layer, got {layer!r}")
    factories: dict[str, Callable[[nn.Module], Explainer]] = {}
    for name, accepted in parameters.items():
        arguments: dict[str, Any] = {}
        if layer is not None and "layer" in accepted:
            arguments["layer"] = layer
        if "progress" in accepted:
            arguments["progress"] = bar.callback(name)
        method_settings = (settings or {}).get(name, {})
        factories[name] = functools.partial(METHODS[name], labels=loaded.labels, **{**arguments, **method_settings})
    return factories
