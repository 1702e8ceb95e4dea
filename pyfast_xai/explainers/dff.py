"""Deep feature factorization (Collins, Achanta and Süsstrunk, 2018): the parts that an activation is made of."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.activation_reader import ActivationReader
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.layer_search import last_features
from pyfast_xai.explainers.common.nonnegative_factors import nonnegative_factors
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explainers.common.tensors import at_least_float32, outside_inference_mode
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.tape import Tape, Value


@dataclass(eq=False, repr=False)
class FactorExplanation(Explanation):
    """The factors of some images.

    `heatmap` and `signed_map` are those of the requested factor.

    Attributes:
        factors: where each factor is, not negative, `[N, K, h, w]`, those of the largest size first.
        concepts: what each is made of, `[N, K, C]` in the channels of the layer.
    """

    factors: Tensor | None = None
    concepts: Tensor | None = None

    def composite(self, images: Tensor | None = None, alpha: float = 0.5) -> Tensor:
        """Returns all factors of each image in one picture, float32 `[N, 3, H, W]` in 0..1.

        The colour of a pixel is that of the factor that is strongest there, each as a share of its largest value, and
        the brightness is that share; factors have the colours of `render.CLASS_COLORS` in turn. The images are grey,
        and show where no factor is.

        Args:
            images: `[N, C, H', W']` to draw on; None for those that were explained.
            alpha: how far they are darkened under the factors.

        Example:
            >>> import torch
            >>> from pyfast_xai import DeepFeatureFactorization, demo
            >>> DeepFeatureFactorization(demo.load(), n_factors=3)(torch.rand(2, 3, 96, 96)).composite().shape
            torch.Size([2, 3, 96, 96])
        """
        assert self.factors is not None
        ground = self._ground(images)
        tiny = torch.finfo(self.factors.dtype).tiny
        shares = self.factors / self.factors.amax((2, 3), keepdim=True).clamp_min(tiny)
        shares = functional.interpolate(shares, size=ground.shape[2:], mode="bilinear", align_corners=False)
        best, winner = shares.max(1)
        colors = {i: render.CLASS_COLORS[i % len(render.CLASS_COLORS)] for i in range(shares.shape[1])}
        return render.overlay_dominance(ground, winner, best, [colors] * len(best), alpha=alpha, saturated=0.0)


class Factors(NamedTuple):
    """The factors of activations.

    Attributes:
        maps: where each is, not negative, `[N, K, h, w]`.
        concepts: what it is made of, `[N, K, C]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import DeepFeatureFactorization, demo
        >>> factors = DeepFeatureFactorization(demo.load()).factorize(torch.rand(1, 8, 6, 6), n_factors=2)
        >>> factors.maps.shape, factors.concepts.shape
        (torch.Size([1, 2, 6, 6]), torch.Size([1, 2, 8]))
    """

    maps: Tensor
    concepts: Tensor


class DeepFeatureFactorization(LayerExplainer):
    """Deep feature factorization: the activation as a sum of few parts, each in its places (Collins et al., 2018).

    The activations of an image, a row a channel, `A [C, h w]`, are the product of two matrices that are not negative,
    `A ~ W H`: a column of W says of which channels a factor is made, the row of H where it is. Factors are in the order
    of their size, `|W_k| |H_k|`. The forward stops at the layer; a target is accepted, so that explainers can be
    swapped, and ignored.

    Args:
        model: in evaluation mode.
        layer: a module, its path or the name of an operation; "auto" takes the last map of features before they are
            pooled.
        n_factors: number of factors.
        factor: whose heat map it is, 1 for the largest.
        together: factorize the activations of all images at once, as the paper does, so that they share their factors:
            then a row depends on the other images of the call.
        n_iterations: number of iterations of the coordinate descent, at most.
        seed: seed of its start; the process's own random numbers are not touched.
        **settings: those of `LayerExplainer`.

    An explanation is a `FactorExplanation`: `factors` and `concepts` are all of them, and `composite()` draws them
    into one picture an image.

    Raises:
        InputError: a setting that does not exist, or several layers.

    Example:
        >>> import torch
        >>> from pyfast_xai import DeepFeatureFactorization, demo
        >>> explanation = DeepFeatureFactorization(demo.load(), layer="block", n_factors=3)(torch.rand(2, 3, 96, 96))
        >>> explanation.heatmap.shape, explanation.factors.shape, explanation.concepts.shape
        (torch.Size([2, 96, 96]), torch.Size([2, 3, 12, 12]), torch.Size([2, 3, 80]))
    """

    method = "dff"
    ranks = (3, 4, 5)
    paper = "Deep feature factorization for concept discovery (Collins, Achanta and Süsstrunk, 2018)"
    default_box_rule = Mass()

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName = "auto",
        n_factors: int = 5,
        factor: int = 1,
        together: bool = False,
        n_iterations: int = 200,
        seed: int = 0,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        if len(self.layers) > 1:
            raise InputError(f"layer must be one for {self.method}, got {len(self.layers)}")
        self.n_factors = at_least(1, "n_factors", n_factors)
        self.n_iterations = at_least(1, "n_iterations", n_iterations)
        if not 1 <= factor <= n_factors:
            raise InputError(f"factor must lie in 1 to {n_factors}, got {factor}")
        self.factor, self.together, self.seed = factor, together, seed
        self._read = ActivationReader(self)

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        return [last_features(tape)]

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        read = self._read(images, args, kwargs, run_whole_model=self._runs_whole_model)
        ((place, activation),) = read.layers
        cells = self.grid(outside_inference_mode(activation), images.shape[2:], place.name, place.layout)
        factors, concepts = self.factorize(cells.movedim(-1, 1))
        chosen = factors[:, self.factor - 1].contiguous()
        return FactorExplanation(
            **self._fields(images, self._read.outputs(read.tape, len(images))),
            heatmap=self.heat([chosen], images.shape[2:]).float(),
            signed_map=chosen,
            factors=factors,
            concepts=concepts,
        )

    def factorize(self, activation: Tensor, n_factors: int | None = None) -> Factors:
        """Returns the factors of activations `[N, C, h, w]`, those of the largest size first.

        Where a channel is negative somewhere its least value is taken off first, and put back to the concepts.

        Args:
            activation: any float dtype.
            n_factors: number of factors; None for the explainer's own number.

        Raises:
            InputError: activations that are not finite.
        """
        activation = at_least_float32(activation)
        if not bool(activation.isfinite().all()):
            raise InputError("activations must be finite for factors, got NaN or infinity")
        images, channels, *grid = activation.shape
        cells = activation.transpose(0, 1).flatten(1)[None] if self.together else activation.flatten(2)
        least = cells.amin(2, keepdim=True).clamp_max(0)
        count = self.n_factors if n_factors is None else n_factors
        left, right = nonnegative_factors(cells - least, count, n_iterations=self.n_iterations, seed=self.seed)
        size = left.square().sum(1) * right.square().sum(2)  # [R, K]
        order = size.argsort(dim=1, descending=True, stable=True)
        right = right.gather(1, order[..., None].expand_as(right))
        concepts = (left + least).mT.gather(1, order[..., None].expand(-1, -1, channels))
        if self.together:
            maps = right[0].view(count, images, *grid).transpose(0, 1).contiguous()
            return Factors(maps, concepts.expand(images, -1, -1).contiguous())
        return Factors(right.view(images, count, *grid), concepts)
