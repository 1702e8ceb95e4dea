"""Composites: which rule an operation gets, by its kind, its depth, and the name or type of its module."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.rules.kinds import GROUPS, KINDS, kind_of
from pyfast_xai.rules.relevance.layer_rules import (
    AlphaBeta,
    Bilinear,
    Epsilon,
    Flat,
    Gamma,
    Gate,
    LayerRule,
    Norm,
    Pass,
    Stabilizer,
    Taylor,
    ZBox,
    ZPlus,
)
from pyfast_xai.tape import Node, Tape
from pyfast_xai.tape.graph import unknown_name

# A kind ("convolution"), its first or last operation ("first layer"), a path or a pattern of one ("features.*"), a
# type of modules, or a function of the operation; several in a tuple.
Selector = str | type[nn.Module] | Callable[[Node], bool] | tuple[Any, ...]

_DEFAULTS: Mapping[str, LayerRule] = {
    **dict.fromkeys(KINDS, Epsilon()),
    "batch_norm": Pass(),
    "activation": Pass(),
    "sum": Norm(),
    "pool": Norm(),
    "product": Gate(),
    "matmul": Bilinear(),
    "attention": Bilinear(),
    "softmax": Taylor(),
}


class Composite:
    """Rules for the operations of a model; the first that fits an operation is its rule.

    Args:
        rules: pairs, or a dict, of what an operation must be and its rule. A string is a kind of operations (see
            `rules.kinds`, "layer" for a convolution or a linear layer), "first" or "last" and a kind for
            the operation next to the images or to the output, or the path of a module, which means all inside it, also
            as a pattern ("features.*"), or the name of an operation, or "convolution in layer1" for a kind and where it
            is; a type of modules means their operations, and a
            function of the recorded `Node` returns whether it is meant. A tuple means any of its parts. What no
            pair fits gets `Epsilon`; activations and batch norm `Pass`, sums and average pools `Norm`, a product
            `Gate`, attention and products of matrices `Bilinear`, and softmax `Taylor`.

    Raises:
        InputError: a rule that is none, or something that does not say which operations are meant.

    Example:
        >>> from pyfast_xai import Composite
        >>> from pyfast_xai.rules.relevance import Epsilon, Flat, Gamma
        >>> composite = Composite({"first layer": Flat(), "convolution": Gamma(0.1), "classifier.*": Epsilon(0.25)})
        >>> len(composite.rules)
        3
    """

    def __init__(self, rules: Mapping[Any, LayerRule] | Iterable[tuple[Any, LayerRule]] = ()) -> None:
        pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
        for selector, rule in pairs:
            if not isinstance(rule, LayerRule):
                raise InputError(f"rules must hold layer rules, such as Epsilon(), got {rule!r}")
            _check(selector)
        self.rules: list[tuple[Any, LayerRule]] = pairs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rules!r})"

    @property
    def by_name(self) -> bool:
        """Returns whether some operations are meant by their names or paths."""
        return any(_is_name(part) for selector, _ in self.rules for part in _parts(selector))

    def plan(self, tape: Tape, modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, LayerRule]]:
        """Returns the kind and the rule of each operation that changes numbers, by its place on the tape.

        Args:
            tape: tape of a forward pass.
            modules: modules of the model, by their paths.

        Raises:
            InputError: a name that no operation and no module has.
        """
        kinds = {node.index: kind for node in tape if (kind := kind_of(node)) is not None}
        tests = [(self._test(selector, tape, kinds, modules), rule) for selector, rule in self.rules]
        plan = {}
        for node in tape:
            kind = kinds.get(node.index)
            if kind is not None:
                chosen = (rule for fits, rule in tests if fits(node))
                plan[node.index] = kind, next(chosen, _DEFAULTS[kind])
        return plan

    def _test(
        self, selector: Any, tape: Tape, kinds: Mapping[int, str], modules: Mapping[str, nn.Module]
    ) -> Callable[[Node], bool]:
        tests = [_test(part, tape, kinds, modules) for part in _parts(selector)]
        return lambda node: any(test(node) for test in tests)


def _parts(selector: Any) -> tuple[Any, ...]:
    return selector if isinstance(selector, tuple) else (selector,)


def _is_name(part: Any) -> bool:
    return isinstance(part, str) and part not in GROUPS and _end_of(part) is None


def _end_of(part: str) -> tuple[str, str] | None:
    """Returns the end and the kind that "first layer" and its like name."""
    end, _, kind = part.partition(" ")
    return (end, kind) if end in ("first", "last") and kind in GROUPS else None


def _kind_and_place(part: str) -> tuple[str, str] | None:
    """Returns the kind and the path that "convolution in layer1" and its like name."""
    kind, _, place = part.partition(" in ")
    return (kind, place) if kind in GROUPS and place else None


def _check(selector: Any) -> None:
    for part in _parts(selector):
        if isinstance(part, str) and " " in part and _end_of(part) is None and _kind_and_place(part) is None:
            raise InputError(
                f"rules must name 'first' or 'last' and one of {', '.join(map(repr, GROUPS))}, got {part!r}"
            )
        if not isinstance(part, str) and not callable(part):
            raise InputError(f"rules must name kinds, paths, types or functions, got {part!r}")


def _test(part: Any, tape: Tape, kinds: Mapping[int, str], modules: Mapping[str, nn.Module]) -> Callable[[Node], bool]:
    if isinstance(part, type):
        return lambda node: isinstance(modules.get(node.path), part)
    if not isinstance(part, str):
        return part
    if part in GROUPS:
        return lambda node: kinds[node.index] in GROUPS[part]
    end = _end_of(part)
    if end is not None:
        meant = [index for index, kind in kinds.items() if kind in GROUPS[end[1]]]
        chosen = meant[:1] if end[0] == "first" else meant[-1:]
        return lambda node: node.index in chosen
    both = _kind_and_place(part)
    if both is not None:
        of_kind, inside = (_test(test, tape, kinds, modules) for test in both)
        return lambda node: of_kind(node) and inside(node)
    known = [*filter(None, modules), *(node.name for node in tape)]
    if not any(_inside(part, name) for name in known):
        raise InputError(unknown_name(part, known, "composite"))
    return lambda node: _inside(part, node.path) or _inside(part, node.name)


def _inside(pattern: str, name: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


class EpsilonPlus(Composite):
    """Uses `ZPlus` for convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.

    Example:
        >>> from pyfast_xai.rules.relevance import EpsilonPlus
        >>> len(EpsilonPlus(epsilon=0.25).rules)
        4
    """

    def __init__(self, epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(_layers(ZPlus(stabilizer), epsilon, stabilizer))


class EpsilonPlusFlat(Composite):
    """Uses `Flat` for the first layer, `ZPlus` for other convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.

    Example:
        >>> from pyfast_xai.rules.relevance import EpsilonPlusFlat
        >>> EpsilonPlusFlat().rules[0]
        ('first layer', Flat(stabilizer=1e-06))
    """

    def __init__(self, epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__([("first layer", Flat(stabilizer)), *_layers(ZPlus(stabilizer), epsilon, stabilizer)])


class EpsilonAlpha2Beta1(Composite):
    """Uses `AlphaBeta(2, 1)` for convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.

    Example:
        >>> from pyfast_xai.rules.relevance import EpsilonAlpha2Beta1
        >>> len(EpsilonAlpha2Beta1().rules)
        4
    """

    def __init__(self, epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(_layers(AlphaBeta(2, 1, stabilizer), epsilon, stabilizer))


class EpsilonAlpha2Beta1Flat(Composite):
    """Uses `Flat` for the first layer, `AlphaBeta(2, 1)` for other convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.

    Example:
        >>> from pyfast_xai.rules.relevance import EpsilonAlpha2Beta1Flat
        >>> len(EpsilonAlpha2Beta1Flat().rules)
        5
    """

    def __init__(self, epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6) -> None:
        layers = _layers(AlphaBeta(2, 1, stabilizer), epsilon, stabilizer)
        super().__init__([("first layer", Flat(stabilizer)), *layers])


class EpsilonGammaBox(Composite):
    """Uses `ZBox` for the first convolution, `Gamma` for the others and `Epsilon` for linear layers.

    Args:
        low: the smallest value of a pixel, see `ZBox`.
        high: the largest.
        epsilon: epsilon of the linear layers.
        gamma: gamma of the convolutions.
        stabilizer: stabilizer of the other rules.

    Example:
        >>> from pyfast_xai.rules.relevance import EpsilonGammaBox
        >>> EpsilonGammaBox(-2.1, 2.6).rules[0]
        ('first convolution', ZBox(low=-2.1, high=2.6, stabilizer=1e-06))
    """

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        epsilon: Stabilizer = 1e-6,
        gamma: float = 0.25,
        stabilizer: Stabilizer = 1e-6,
    ) -> None:
        layers = _layers(Gamma(gamma, stabilizer), epsilon, stabilizer)
        super().__init__([("first convolution", ZBox(low, high, stabilizer)), *layers])


class GammaAttention(Composite):
    """Uses `Gamma` for convolutions and linear layers, for transformers (Achtibat et al., AttnLRP, 2024).

    Args:
        gamma: gamma of the convolutions, which embed the patches.
        linear_gamma: gamma of the linear layers.
        values_only: take attention for a constant, so that all relevance goes through the values.

    Example:
        >>> from pyfast_xai.rules.relevance import GammaAttention
        >>> len(GammaAttention().rules)
        3
    """

    def __init__(self, gamma: float = 0.25, linear_gamma: float = 0.05, *, values_only: bool = False) -> None:
        bilinear = Bilinear(first=0) if values_only else Bilinear()
        rules = {"convolution": Gamma(gamma), "linear": Gamma(linear_gamma), ("attention", "matmul"): bilinear}
        super().__init__(rules)


def _layers(convolution: LayerRule, epsilon: Stabilizer, stabilizer: Stabilizer) -> list[tuple[Any, LayerRule]]:
    return [
        ("convolution", convolution),
        ("linear", Epsilon(epsilon)),
        (("sum", "pool"), Norm(stabilizer)),
        (("attention", "matmul"), Bilinear(stabilizer=stabilizer)),
    ]


# Composites without arguments, by name.
COMPOSITES: dict[str, Callable[[], Composite]] = {
    "epsilon": Composite,
    "epsilon-plus": EpsilonPlus,
    "epsilon-plus-flat": EpsilonPlusFlat,
    "epsilon-alpha2-beta1": EpsilonAlpha2Beta1,
    "epsilon-alpha2-beta1-flat": EpsilonAlpha2Beta1Flat,
    "gamma-attention": GammaAttention,
}
