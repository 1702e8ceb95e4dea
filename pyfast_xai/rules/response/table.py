"""What a rule is, and the table of the gradient that others are laid over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pyfast_xai.tape import Node

Pull = Callable[..., None]
Saves = Callable[[Node], Iterable[str]]
Runs = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """How a dense reading treats one op.

    Attributes:
        pull: `pull(step, *args, **kwargs)`, with the arguments of the node in which a `Value` stands for every tensor
            that depends on the inputs; calls `step.send(argument, gradient)`.
        saves: names of the op's arguments that `pull` reads.
        runs: `runs(node, keep, *args, **kwargs)` with the real tensors does the op in its place and may keep of the
            result; None runs the op itself.
        unless: the nodes that this rule is not for; they are differentiated by autograd.
    """

    pull: Pull
    saves: Saves
    runs: Runs | None = None
    unless: Callable[[Node], bool] | None = None


Table = dict[str, Rule]
GRADIENT: Table = {}


def rule(
    *names: str,
    saves: Iterable[str] | Saves = (),
    runs: Runs | None = None,
    unless: Callable[[Node], bool] | None = None,
    table: Table = GRADIENT,
) -> Callable[[Pull], Pull]:
    """Register a response rule.

    Args:
        *names: ops by schema name, without overload or trailing underscore, e.g. "aten::relu"; `aten::` may be left
            out. The in-place form is meant too.
        saves: names of the op's tensor arguments that the rule reads, or a function of the node that gives them.
        runs: see `Rule`.
        unless: see `Rule`.
        table: the gradient, or a table to be laid over it.
    """
    given = saves if callable(saves) else (lambda node, fixed=tuple(saves): fixed)

    def register(function: Pull) -> Pull:
        for name in names:
            table[name if "::" in name else f"aten::{name}"] = Rule(function, given, runs, unless)
        return function

    return register
