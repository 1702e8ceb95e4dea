"""The module that is recorded in place of the caller's function: it also copies the results of some layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pyfast_xai.tape.module_hooks import following, unwrap

Forward = Callable[..., Any]
FUNCTION = "_function"  # the path of a module that is called
PROBES = "probes."  # the paths of operations begin so that copy what a layer returned


class _Enough(BaseException):
    """Leaves the forward early; not an Exception, so that no model catches it by accident."""


class _Probe(nn.Module):
    """Its place on the tape tells which values some tensors were; the copies are safe from in-place operations."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)


class Called(nn.Module):
    """The module that is recorded: the function, the modules it runs, and a probe for each layer.

    It returns what the function returned, None where it stops at the layers; a copy of what each layer returned or was
    given in its last call, None where it did not run; and the keys where that was a dict.

    Args:
        function: a module or a function.
        layers: modules that it runs.
        at_input: copy what the layers are given.
        stop: go no further than the layers.
    """

    def __init__(self, function: Forward, layers: Sequence[nn.Module], at_input: bool, stop: bool) -> None:
        super().__init__()
        self._function, self.layers, self._at_input, self._stop = function, layers, at_input, stop
        self.probes = nn.ModuleList(_Probe() for _ in layers)  # their paths on the tape
        self.models = nn.ModuleList(modules_behind(function))

    def forward(self, *tensors: Tensor, places: tuple[int | None, ...], others: tuple[Any, ...]) -> Any:
        """Calls the function.

        Args:
            *tensors: the tensors among its arguments, each once: one that comes twice has the sum of both gradients.
            places: the index of each argument among the tensors; None for one that is no tensor.
            others: the arguments, None for those that are tensors.
        """
        args = [other if place is None else tensors[place] for place, other in zip(places, others, strict=True)]
        copies: list[list[Tensor] | None] = [None] * len(self.layers)
        names: list[list[str] | None] = [None] * len(self.layers)

        def see(module: nn.Module, result: Any) -> None:
            for i, (layer, probe) in enumerate(zip(self.layers, self.probes, strict=True)):
                if layer is module:
                    names[i] = list(result) if isinstance(result, dict) else None
                    copies[i] = list(probe(*tensors_of(result)))
            if self._stop and None not in copies:
                raise _Enough

        if not self.layers:
            return self._function(*args), copies, names
        watched = (see, _ignore) if self._at_input else (_ignore, see)
        try:
            with following(*watched):
                return self._function(*args), copies, names
        except _Enough:
            return None, copies, names


def _ignore(module: nn.Module, result: Any) -> None:
    pass


def tensors_of(result: Any) -> list[Tensor]:
    """Returns the tensors a layer returned or was given: one, or some in a tuple, list or dict."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if isinstance(part, Tensor)] if isinstance(result, (dict, list, tuple)) else []


def modules_behind(function: Forward) -> list[nn.Module]:
    """Returns the modules that a function is seen to use: itself, the object it is bound to, what it closes over."""
    if isinstance(function, nn.Module):
        return [unwrap(function)]
    held: list[Any] = [getattr(function, "__self__", None)]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    if isinstance(function, functools.partial):
        held += [function.func, *function.args, *function.keywords.values()]
    modules = [unwrap(one) for one in held if isinstance(one, nn.Module)]
    if isinstance(function, functools.partial):
        modules += [module for module in modules_behind(function.func) if module not in modules]
    return modules


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
