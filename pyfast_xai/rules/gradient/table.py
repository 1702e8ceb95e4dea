"""Gradient rules, and the table of the plain gradient that others are laid over."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from pyfast_xai.rules.saving import Saves
from pyfast_xai.tape import Node

Backward = Callable[..., None]
Runs = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """The rule that propagates a gradient through one op.

    Attributes:
        backward: `backward(ctx, *args, **kwargs)`, with the arguments of the node, in which a `Value` stands for every
            tensor that depends on the inputs; it calls `ctx.propagate(argument, gradient)`.
        saves: names of the op's tensor arguments that `backward` reads, or a function of the node that gives them.
        runs: `runs(node, keep, *args, **kwargs)` with the real tensors does the op in its place and may keep of the
            result; None runs the op itself.
        unless: the nodes that this rule is not for; they are differentiated by autograd.
        blocks: no gradient passes: the derivative is zero wherever there is one. True, or a function of the node.
    """

    backward: Backward
    saves: Saves = ()
    runs: Runs | None = None
    unless: Callable[[Node], bool] | None = None
    blocks: bool | Callable[[Node], bool] = False

    def is_for(self, node: Node) -> bool:
        """Returns whether the rule is one for this node."""
        return self.unless is None or not self.unless(node)

    def stops_at(self, node: Node) -> bool:
        """Returns whether no gradient passes this node."""
        return self.blocks(node) if callable(self.blocks) else self.blocks


Table = Mapping[str, Rule]


class NamedTable(dict[str, Rule]):
    """The rules of a reading, by the name of the op.

    A table is copied and pickled by its name, so that a copy of an explainer reads the rules that are registered where
    it lands.

    Args:
        name: name of the variable that holds the table.
        module: `__name__` of the module that defines the variable.
    """

    def __init__(self, name: str, module: str) -> None:
        super().__init__()
        self._name, self.__module__ = name, module

    def __reduce__(self) -> str:
        return self._name


GRADIENT = NamedTable("GRADIENT", __name__)


def rule(
    *names: str,
    saves: Saves = (),
    runs: Runs | None = None,
    unless: Callable[[Node], bool] | None = None,
    blocks: bool | Callable[[Node], bool] = False,
    table: MutableMapping[str, Rule] = GRADIENT,
) -> Callable[[Backward], Backward]:
    """Registers a gradient rule, also for explainers that exist already.

    Args:
        *names: ops by schema name, without overload or trailing underscore, e.g. "aten::relu"; `aten::` may be left
            out. The in-place form is meant too.
        saves: names of the op's tensor arguments that the rule reads, or a function of the node that gives them.
        runs: see `Rule`.
        unless: see `Rule`.
        blocks: see `Rule`.
        table: the gradient, or a table to be laid over it.
    """

    def register(function: Backward) -> Backward:
        for name in names:
            table[name if "::" in name else f"aten::{name}"] = Rule(function, saves, runs, unless, blocks)
        return function

    return register
