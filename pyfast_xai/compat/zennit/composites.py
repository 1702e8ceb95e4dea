"""zennit's composites: rules by the types and names of modules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.zennit.canonizers import Canonizer
from pyfast_xai.compat.zennit.core import Composite
from pyfast_xai.compat.zennit.layer import Sum
from pyfast_xai.compat.zennit.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Norm,
    Pass,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    ZBox,
    ZPlus,
)
from pyfast_xai.compat.zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear
from pyfast_xai.rules.relevance import LayerRule
from pyfast_xai.rules.relevance.layer_rules import Stabilizer

LayerMap = list[tuple[Any, LayerRule]]
NameMap = list[tuple[Sequence[str], LayerRule]]
Canonizers = Sequence[Canonizer] | None
ZeroParams = str | Sequence[str] | None


class LayerMapComposite(Composite):
    """Rules by the types of modules.

    Args:
        layer_map: pairs of a type, or several, and a rule; the first that fits is taken.
        canonizers: see `Composite`.

    Example:
        >>> from torch import nn
        >>> from pyfast_xai.compat.zennit.composites import LayerMapComposite
        >>> from pyfast_xai.compat.zennit.rules import Epsilon
        >>> len(LayerMapComposite([(nn.Linear, Epsilon())]).layer_map)
        1
    """

    def __init__(self, layer_map: LayerMap, canonizers: Canonizers = None) -> None:
        self.layer_map = layer_map
        super().__init__(module_map=self.mapping, canonizers=canonizers)

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> LayerRule | None:
        """Returns the rule of a module."""
        return next((rule for types, rule in self.layer_map if isinstance(module, types)), None)


class SpecialFirstLayerMapComposite(LayerMapComposite):
    """Rules by the types of modules, with others for the first layer.

    Args:
        layer_map: see `LayerMapComposite`.
        first_map: the same for the first module that fits any of it.
        canonizers: see `Composite`.

    Example:
        >>> from torch import nn
        >>> from pyfast_xai.compat.zennit.composites import SpecialFirstLayerMapComposite
        >>> from pyfast_xai.compat.zennit.rules import Epsilon, Flat
        >>> composite = SpecialFirstLayerMapComposite([(nn.Linear, Epsilon())], [(nn.Linear, Flat())])
    """

    def __init__(self, layer_map: LayerMap, first_map: LayerMap, canonizers: Canonizers = None) -> None:
        self.first_map = first_map
        super().__init__(layer_map=layer_map, canonizers=canonizers)

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> LayerRule | None:
        """Returns the rule of a module."""
        if not ctx.get("first_layer_visited", False):
            for types, rule in self.first_map:
                if isinstance(module, types):
                    ctx["first_layer_visited"] = True
                    return rule
        return super().mapping(ctx, name, module)


class NameMapComposite(Composite):
    """Rules by the names of modules.

    Args:
        name_map: pairs of names and a rule; the first that fits is taken.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import NameMapComposite
        >>> from pyfast_xai.compat.zennit.rules import Epsilon
        >>> composite = NameMapComposite([(["fc"], Epsilon())])
    """

    def __init__(self, name_map: NameMap, canonizers: Canonizers = None) -> None:
        self.name_map = name_map
        super().__init__(module_map=self.mapping, canonizers=canonizers)

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> LayerRule | None:
        """Returns the rule of a module."""
        return next((rule for names, rule in self.name_map if name in names), None)


class MixedComposite(Composite):
    """Several composites, of which the first that has a rule for a module is taken.

    Args:
        composites: these.
        canonizers: see `Composite`; those of the composites are added.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonPlus, MixedComposite, NameMapComposite
        >>> from pyfast_xai.compat.zennit.rules import Pass
        >>> len(MixedComposite([NameMapComposite([(["act"], Pass())]), EpsilonPlus()]).composites)
        2
    """

    def __init__(self, composites: Sequence[Composite], canonizers: Canonizers = None) -> None:
        self.composites = composites
        every = [*(canonizers or ()), *(canonizer for composite in composites for canonizer in composite.canonizers)]
        super().__init__(module_map=self.mapping, canonizers=every)

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> LayerRule | None:
        """Returns the rule of a module."""
        rules = [
            composite.module_map(ctx.setdefault(composite, {}), name, module) for composite in self.composites
        ]  # all of them, as each knows what is first
        return next((rule for rule in rules if rule is not None), None)


class NameLayerMapComposite(MixedComposite):
    """Rules by the names and, where there is none, by the types of modules.

    Args:
        name_map: see `NameMapComposite`.
        layer_map: see `LayerMapComposite`.
        canonizers: see `Composite`.

    Example:
        >>> from torch import nn
        >>> from pyfast_xai.compat.zennit.composites import NameLayerMapComposite
        >>> from pyfast_xai.compat.zennit.rules import Epsilon, Flat
        >>> composite = NameLayerMapComposite([(["conv1"], Flat())], [(nn.Conv2d, Epsilon())])
    """

    def __init__(
        self, name_map: NameMap | None = None, layer_map: LayerMap | None = None, canonizers: Canonizers = None
    ) -> None:
        super().__init__([NameMapComposite(name_map or []), LayerMapComposite(layer_map or [])], canonizers)


COMPOSITES: dict[str, Callable[..., Composite]] = {}


def register_composite(name: str) -> Callable[[Any], Any]:
    """Returns a decorator that lists a composite in `COMPOSITES`.

    Args:
        name: its key.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import COMPOSITES
        >>> sorted(COMPOSITES)[:3]
        ['beta_smooth', 'deconvnet', 'epsilon_alpha2_beta1']
    """

    def listed(composite: Any) -> Any:
        COMPOSITES[name] = composite
        return composite

    return listed


def layer_map_base(stabilizer: Stabilizer = 1e-6) -> LayerMap:
    """Returns the rules of all composites of relevance: those for activations, sums, average pools and batch norms.

    Args:
        stabilizer: added to denominators.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import layer_map_base
        >>> len(layer_map_base())
        4
    """
    return [(Activation, Pass()), (Sum, Norm(stabilizer)), (AvgPool, Norm(stabilizer)), (BatchNorm, Pass())]


@register_composite("epsilon_gamma_box")
class EpsilonGammaBox(SpecialFirstLayerMapComposite):
    """Uses `ZBox` for the first convolution, `Gamma` for the others and `Epsilon` for linear layers.

    Args:
        low: the smallest value of a pixel.
        high: the largest.
        epsilon: epsilon of the linear layers.
        gamma: gamma of the convolutions.
        stabilizer: stabilizer of the other rules.
        layer_map: goes before the composite's own.
        first_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonGammaBox
        >>> composite = EpsilonGammaBox(low=-3.0, high=3.0)
    """

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        epsilon: Stabilizer = 1e-6,
        gamma: float = 0.25,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        first_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        layers = _layers(Gamma(gamma, stabilizer, zero_params), epsilon, stabilizer, zero_params)
        first: LayerMap = [(Convolution, ZBox(low, high, stabilizer, zero_params))]
        super().__init__([*(layer_map or []), *layers], [*(first_map or []), *first], canonizers)


@register_composite("epsilon_plus")
class EpsilonPlus(LayerMapComposite):
    """Uses `ZPlus` for convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.
        layer_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonPlus
        >>> composite = EpsilonPlus(epsilon=0.25)
    """

    def __init__(
        self,
        epsilon: Stabilizer = 1e-6,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        layers = _layers(ZPlus(stabilizer, zero_params), epsilon, stabilizer, zero_params)
        super().__init__([*(layer_map or []), *layers], canonizers)


@register_composite("epsilon_alpha2_beta1")
class EpsilonAlpha2Beta1(LayerMapComposite):
    """Uses `AlphaBeta(2, 1)` for convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.
        layer_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonAlpha2Beta1
        >>> composite = EpsilonAlpha2Beta1()
    """

    def __init__(
        self,
        epsilon: Stabilizer = 1e-6,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        layers = _layers(AlphaBeta(2, 1, stabilizer, zero_params), epsilon, stabilizer, zero_params)
        super().__init__([*(layer_map or []), *layers], canonizers)


@register_composite("epsilon_plus_flat")
class EpsilonPlusFlat(SpecialFirstLayerMapComposite):
    """Uses `Flat` for the first layer, `ZPlus` for other convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.
        layer_map: goes before the composite's own.
        first_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonPlusFlat
        >>> composite = EpsilonPlusFlat()
    """

    def __init__(
        self,
        epsilon: Stabilizer = 1e-6,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        first_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        layers = _layers(ZPlus(stabilizer, zero_params), epsilon, stabilizer, zero_params)
        first: LayerMap = [(Linear, Flat(stabilizer, zero_params))]
        super().__init__([*(layer_map or []), *layers], [*(first_map or []), *first], canonizers)


@register_composite("epsilon_alpha2_beta1_flat")
class EpsilonAlpha2Beta1Flat(SpecialFirstLayerMapComposite):
    """Uses `Flat` for the first layer, `AlphaBeta(2, 1)` for other convolutions and `Epsilon` for linear layers.

    Args:
        epsilon: epsilon of the linear layers.
        stabilizer: stabilizer of the other rules.
        layer_map: goes before the composite's own.
        first_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import EpsilonAlpha2Beta1Flat
        >>> composite = EpsilonAlpha2Beta1Flat()
    """

    def __init__(
        self,
        epsilon: Stabilizer = 1e-6,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        first_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        layers = _layers(AlphaBeta(2, 1, stabilizer, zero_params), epsilon, stabilizer, zero_params)
        first: LayerMap = [(Linear, Flat(stabilizer, zero_params))]
        super().__init__([*(layer_map or []), *layers], [*(first_map or []), *first], canonizers)


def _layers(convolution: LayerRule, epsilon: Stabilizer, stabilizer: Stabilizer, zero_params: ZeroParams) -> LayerMap:
    linear = Epsilon(epsilon, zero_params)
    return [*layer_map_base(stabilizer), (Convolution, convolution), (nn.Linear, linear)]


@register_composite("deconvnet")
class DeconvNet(LayerMapComposite):
    """Uses DeconvNet's rule for ReLU modules.

    Args:
        layer_map: goes before the composite's own.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import DeconvNet
        >>> composite = DeconvNet()
    """

    def __init__(self, layer_map: LayerMap | None = None, canonizers: Canonizers = None) -> None:
        super().__init__([*(layer_map or []), (torch.nn.ReLU, ReLUDeconvNet())], canonizers)


@register_composite("guided_backprop")
class GuidedBackprop(LayerMapComposite):
    """Uses guided backprop's rule for ReLU modules.

    Args:
        layer_map: goes before the composite's own.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import GuidedBackprop
        >>> composite = GuidedBackprop()
    """

    def __init__(self, layer_map: LayerMap | None = None, canonizers: Canonizers = None) -> None:
        super().__init__([*(layer_map or []), (torch.nn.ReLU, ReLUGuidedBackprop())], canonizers)


@register_composite("excitation_backprop")
class ExcitationBackprop(LayerMapComposite):
    """Uses `ZPlus` for all layers and `Norm` for sums and average pools.

    Args:
        stabilizer: added to denominators.
        layer_map: goes before the composite's own.
        zero_params: "bias" leaves biases out.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import ExcitationBackprop
        >>> composite = ExcitationBackprop()
    """

    def __init__(
        self,
        stabilizer: Stabilizer = 1e-6,
        layer_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        defaults: LayerMap = [
            (Sum, Norm(stabilizer)),
            (AvgPool, Norm(stabilizer)),
            (Linear, ZPlus(stabilizer, zero_params)),
        ]
        super().__init__([*(layer_map or []), *defaults], canonizers)


@register_composite("beta_smooth")
class BetaSmooth(LayerMapComposite):
    """Takes the derivative of softplus for that of ReLU modules.

    Args:
        beta_smooth: beta of the softplus.
        layer_map: goes before the composite's own.
        zero_params: accepted; the rule has no weights.
        canonizers: see `Composite`.

    Example:
        >>> from pyfast_xai.compat.zennit.composites import BetaSmooth
        >>> composite = BetaSmooth(beta_smooth=5.0)
    """

    def __init__(
        self,
        beta_smooth: float = 10.0,
        layer_map: LayerMap | None = None,
        zero_params: ZeroParams = None,
        canonizers: Canonizers = None,
    ) -> None:
        super().__init__([*(layer_map or []), (torch.nn.ReLU, ReLUBetaSmooth(beta_smooth))], canonizers)
