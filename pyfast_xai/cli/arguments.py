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


def one_of(option: str, given: str, known: Collection[str]) -> str:
    import difflib

    if given in known:
        return given
    plain = {name.replace("-", ""): name for name in known}
    close = difflib.get_close_matches(re.sub("[-_ ]", "", given).lower(), plain, n=1, cutoff=0.75)
    if close:
        refuse(f"{option} {given!r} does not exist; did you mean {plain[close[0]]!r}?")
    refuse(f"{option} must be one of {', '.join(known)}, got {given!r}")


def methods(given: str | Sequence[str]) -> list[str]:
    """Returns the names of explainers, each once."""
    from pyfast_xai.explainers import METHODS

    return names("method", given, METHODS)


def only(option: str, given: Sequence[str]) -> str:
    """Returns the one value of an option that could be repeated."""
    chosen = [part.strip() for value in given for part in value.split(",")]
    if len(chosen) != 1:
        refuse(f"{option} must be a single one here, got {', '.join(chosen)}: run the command for each")
    return chosen[0]


def names(option: str, given: str | Sequence[str], known: Collection[str]) -> list[str]:
    """Returns the names of an option that is repeated, or that holds several separated by commas, each once."""
    values = [given] if isinstance(given, str) else given
    chosen = list(dict.fromkeys(filter(None, (part.strip() for value in values for part in value.split(",")))))
    if not chosen:
        refuse(f"{option} must be one of {', '.join(known)}, got none")
    return [one_of(option, name, known) for name in chosen]


def folder(out: Path, pictures: Iterable[Path]) -> Path:
    """Returns the folder of the results, which may not hold the pictures: results would overwrite or join them."""
    place = os.path.realpath(out)
    for path in pictures:
        # A link may lie in one folder and lead to another.
        if place in (os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))):
            refuse(f"out must be a folder without pictures to explain, got {str(out)!r}, where {path.name!r} lies")
    return out


def network(asked: options.Network) -> "LoadedModel":
    from dataclasses import replace

    from pyfast_xai.models import load_model

    loaded = load_model(asked.model, asked.weights, asked.num_classes, trust=asked.trust_model)
    changes: dict[str, Any] = {}
    if asked.size is not None:
        # The usual margin around the crop.
        changes.update(size=asked.size, resize=None if loaded.preprocess.resize is None else round(asked.size * 8 / 7))
    if asked.mean is not None:
        changes["mean"] = _numbers("mean", asked.mean)
    if asked.std is not None:
        changes["std"] = _numbers("std", asked.std)
    return replace(loaded, preprocess=replace(loaded.preprocess, **changes))


def _numbers(option: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        refuse(f"{option} must be numbers separated by commas, got {given!r}")


def device(given: str | None) -> str:
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=given)
    except Exception as error:  # each device type refuses in its own way
        refuse(f"device must be one that is here, such as cpu, got {given!r} ({str(error).splitlines()[0]})")
    return given


def target(given: str, classes: list[str] | None) -> int | None:
    """Returns the index of a class; None for the predicted one."""
    import difflib

    if given.lower() == "none":
        return None
    # A class may be called by a number, as the digits are; then the name says the same or more.
    named = [i for i, name in enumerate(classes or []) if name.casefold() == given.casefold()]
    if named:
        return named[0]
    index = int(given) if given.removeprefix("-").isdecimal() else None
    if index is not None:
        if index < 0 or (classes and index >= len(classes)):
            refuse(f"target must lie in [0, {len(classes) if classes else 'classes'}), got {index}")
        return index
    if not classes:
        refuse(f"target must be none or an index for a model whose classes have no names, got {given!r}")
    close = difflib.get_close_matches(given.lower(), [name.lower() for name in classes], 3)
    hint = f"; close names are {', '.join(map(repr, close))}" if close else ""
    refuse(f"target must be none, an index or a class of the model, got {given!r}{hint}")


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

    takes = {name: inspect.signature(METHODS[name]).parameters for name in names}
    if layer is not None and not any("layer" in taken for taken in takes.values()):
        refuse(f"layer must be left out for {', '.join(names)}, which looks at no single layer, got {layer!r}")
    made: dict[str, Callable[[nn.Module], Explainer]] = {}
    for name, taken in takes.items():
        given: dict[str, Any] = {}
        if layer is not None and "layer" in taken:
            given["layer"] = layer
        if "progress" in taken:
            given["progress"] = bar.within(name)
        own = (settings or {}).get(name, {})
        made[name] = functools.partial(METHODS[name], labels=loaded.labels, **{**given, **own})
    return made
