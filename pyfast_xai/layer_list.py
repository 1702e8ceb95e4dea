"""The layers of a model that can be explained, with the names by which explainers take them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.checks import check_images, misfit
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer
from pyfast_xai.explainers.common.layer_search import LayerSearch
from pyfast_xai.explainers.common.tensors import take_rows
from pyfast_xai.tape import Tape, Value, record
from pyfast_xai.tape.module_hooks import unwrap


@dataclass(frozen=True)
class LayerInfo:
    """One layer that holds a map of the image.

    Attributes:
        name: that an explainer takes as `layer`: the path of the outermost module that returns the map, or the name of
            the operation that makes it.
        other_names: of the same map.
        is_module: whether a module returns it.
        shape: of one image's activation, without the batch.
        grid: rows and columns of the map; of volumes slices before them, of signals steps alone.
        auto_of: names of the methods whose `layer="auto"` takes it on this model.
    """

    name: str
    other_names: tuple[str, ...]
    is_module: bool
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    auto_of: tuple[str, ...] = ()


class LayerList(list[LayerInfo]):
    """Layers in the order in which they run; shown as a table."""

    def __repr__(self) -> str:
        rows = [("layer", "activation", "map", "auto of")]
        rows += [(info.name, _by(info.shape), _by(info.grid), _few(info.auto_of)) for info in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def layers(model: nn.Module, images: Tensor, *args: Any, operations: bool = False, **kwargs: Any) -> LayerList:
    """Lists the layers of a model that an explainer can look at.

    The first image runs through the model once. A layer is a value that depends on the image, holds one map of it, and
    leads to the outputs.

    Args:
        model: in evaluation mode; it is not changed.
        images: `[N, C, H, W]`, `[N, C, D, H, W]` or `[N, C, L]`, as the model takes them.
        *args: further arguments of the model.
        operations: list what no module returns, too.
        **kwargs: further keyword arguments of the model.

    Returns:
        The layers in the order in which they run, with their shapes and which of them "auto" takes.

    Raises:
        InputError: images that do not fit.

    Example:
        >>> import torch
        >>> import pyfast_xai
        >>> from pyfast_xai import demo
        >>> pyfast_xai.layers(demo.load(), torch.rand(1, 3, 96, 96))[-1].name
        'block'
    """
    check_images(model, images, ranks=(3, 4, 5))
    args, kwargs = take_rows((args, kwargs), len(images), torch.arange(1, device=images.device))
    try:
        tape = record(unwrap(model), images[:1], *args, **kwargs)
    except Exception as error:
        reason = misfit(model, images, error)
        if reason is None:
            raise
        raise InputError(reason) from error
    chosen = _chosen_by_methods(model, tape)
    names = _module_names(tape)
    listing = LayerList()
    for layer in LayerSearch(tape).layers():
        modules = names.get(layer.value, [])
        if modules or operations or layer.value in chosen:
            # The shortest path is that of the outermost module.
            name, *aliases = [*sorted(modules, key=lambda path: (path.count("."), len(path))), layer.name]
            auto_of = tuple(chosen.get(layer.value, ()))
            listing.append(
                LayerInfo(name, tuple(aliases), bool(modules), layer.value.shape[1:], layer.layout.grid, auto_of)
            )
    return listing


def _module_names(tape: Tape) -> dict[Value, list[str]]:
    """Returns for each value the modules that return it alone, "path@1" for the second of several calls."""
    names: dict[Value, list[str]] = {}
    for path, calls in tape.modules.items():
        for number, outputs in enumerate(calls):
            value = next((output for output in outputs if output is not None), None)
            if path and value is not None:
                names.setdefault(value, []).append(path if len(calls) == 1 else f"{path}@{number}")
    return names


def _chosen_by_methods(model: nn.Module, tape: Tape) -> dict[Value, list[str]]:
    """Returns for each value the methods whose "auto" takes it."""
    chosen: dict[Value, list[str]] = {}
    for method, explainer in METHODS.items():
        if issubclass(explainer, LayerExplainer):
            try:
                values = explainer(model).places(tape)
            except InputError:  # a method for other networks
                continue
            for value in values:
                chosen.setdefault(tape.find(value.name), []).append(method)
    return chosen


def _few(methods: tuple[str, ...]) -> str:
    hidden = len(methods) - 3
    return ", ".join([*methods[:3], *([f"{hidden} more"] if hidden > 0 else [])])


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
