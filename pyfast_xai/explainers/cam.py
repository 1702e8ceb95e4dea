"""Class activation maps: the channels of a layer, weighed by what they mean for a class.

One file for the family, which differs in the weights only: those of the last linear layer (CAM), the mean gradient
(Grad-CAM), or a mean that counts positions by how much they matter (Grad-CAM++).
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import REDUCTIONS, Reduction
from pyfast_xai.explainers.base import logits_of, one_of
from pyfast_xai.explainers.layers import (
    LayerExplainer,
    LayerRecorder,
    Recorded,
    last_sensitive,
    rows,
    wide,
)
from pyfast_xai.explainers.pooled_tail import PooledTail, pooled_tail
from pyfast_xai.explainers.seeds import Goal, seeds_for
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import GUIDED, Response, rectifies, walk
from pyfast_xai.tape import Tape

logger = logging.getLogger("pyfast_xai")


class CAM(LayerExplainer):
    """Class activation maps of networks that end in an average over positions and a linear layer (Zhou et al., 2016).

    With `A [C, h, w]` the last map and w the weights of the last layer, the map of class c is `sum_k w_ck A_k`
    (Eq. 2); its mean and the bias are the score of the class. A convolution whose maps of classes are averaged
    (SqueezeNet, all-convolutional networks) has that map already. The average and the layer are found on the record
    of a forward, whatever the modules are called.

    Args:
        model: in evaluation mode; a classifier.
        tokens: grid `(h, w)` of a network that averages tokens; None for a square one.
        threshold: share of its range at which `Explanation.boxes` cuts the map (20 % in the paper).
        labels: names of the classes.
    """

    method = "cam"
    paper = "Learning deep features for discriminative localization (Zhou et al., 2016)"

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: tuple[int, int] | None = None,
        threshold: float = 0.2,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, tokens=tokens, threshold=threshold, labels=labels)
        self._record = LayerRecorder(self, {}, lambda tape: [_tail(tape).source])

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the largest output, an int, N ints or `[N, K]` ints (a row for each); a floating-point
                tensor `[N, classes]` that weighs classes; or a function of the output that gives one number an
                image, whose gradient does.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with `map`, the signed map at the resolution of the layer, and `heatmap`, its positive part.

        Raises:
            InputError: images or a target that do not fit, or a model that ends otherwise.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            recorded = self._record(images, args, kwargs)
            tail = _tail(recorded.tape)
            scores, _ = logits_of(recorded.tape)
            seeds = seeds_for(recorded.tape, target)
            if list(seeds.grads) != [scores]:
                raise InputError("target must be a function of the class scores alone, got one of other outputs")
            weights = seeds.grads[scores]
            if tail.weight is not None:
                weights = wide(weights) @ wide(tail.weight.detach())
            activation = recorded.activations[0].movedim(tail.channels, -1)
            if activation.dim() == 3:
                activation = self.grid(activation, images.shape[2:], tail.pool.name)
            maps = rows(_weighed(weights, activation))
            return self.explanation(images, seeds, [maps], self.heat([maps], images.shape[2:]))


def _tail(tape: Tape) -> PooledTail:
    tail = pooled_tail(tape)
    if tail is None:
        maker = tape.producer(logits_of(tape)[0])
        raise InputError(
            "model must end in an average over positions with at most one linear layer behind it for class activation "
            f"maps (grad-cam needs no such end), got one whose scores come from {maker.name if maker else 'nowhere'!r}"
        )
    return tail


class GradCAM(LayerExplainer):
    """Grad-CAM: channels weighed by their mean gradient (Selvaraju et al., 2017).

    With y the score of the class and A the activation of the layer, `w_k = mean_p dy/dA_kp` (Eq. 1) and the map is
    `sum_k w_k A_k`; the heat map is its positive part (Eq. 2), upsampled bilinearly.

    It costs little more than a forward: nothing is kept of what lies below the layer, and no gradient goes there.

    Args:
        model: in evaluation mode; any network, with a function as target for others than classifiers.
        layer: path of a module or name of an operation; several give the mean of their heat maps; "auto" takes the
            last spatial map before pooling or flattening that is not a map of classes, and where one token is read in
            the end, the tokens that go into the last block with attention.
        tokens: grid `(h, w)` of token activations `[N, T, C]`; None for a square one. Leading extra tokens (class
            token, registers) are dropped.
        channels: "first", "last", or "auto" to tell by the shape of the input.
        threshold: share of its range at which `Explanation.boxes` cuts the map (15 % in the paper).
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "grad-cam"
    paper = "Grad-CAM: visual explanations from deep networks via gradient-based localization (Selvaraju et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] = "auto",
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, layer=layer, tokens=tokens, channels=channels, threshold=threshold, labels=labels)
        self._record = LayerRecorder(self, {}, self.values)

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the largest output, an int, N ints or `[N, K]` ints (a row for each, in one pass); a
                floating-point tensor of the shape of the output as the gradient to start from; or a function of
                what the model returned that gives one number an image.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with `map`, the signed map at the resolution of the layer (None of several layers), and
            `heatmap`, its positive part.

        Raises:
            InputError: images, a layer or a target that do not fit.
            UnsupportedOpError: an op behind the layer that cannot be differentiated.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            recorded, seeds, gradients = self._record.gradients(
                images, target, args, kwargs, reading=lambda tape, seeds: Response(), key=tuple(self.layers)
            )
            maps = self._maps(recorded, gradients, images.shape[2:])
            return self.explanation(images, seeds, maps, self.heat(maps, images.shape[2:]))

    def automatic(self, tape: Tape) -> str:
        return last_sensitive(tape)

    def weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        """How much each channel counts.

        Args:
            gradient: of the score, `[K, N, h, w, C]`.
            activation: `[N, h, w, C]`.

        Returns:
            Weights `[K, N, C]`.
        """
        return gradient.mean((2, 3))

    def _maps(self, recorded: Recorded, gradients: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """The signed maps `[N * K, h, w]` of each layer."""
        maps = []
        for name, gradient, activation in zip(self.names(recorded.tape), gradients, recorded.activations, strict=True):
            cells = wide(self.grid(activation, size, name))
            arrived = wide(self.grid(gradient.flatten(0, 1), size, name)).unflatten(0, gradient.shape[:2])
            maps.append(rows(_weighed(self.weigh(arrived, cells), cells)))
        return maps


class GradCAMPlusPlus(GradCAM):
    """Grad-CAM++: channels weighed by positive gradients, positions by higher derivatives (Chattopadhay et al., 2018).

    With g the gradient dy/dA_k, which stands for the derivatives of exp(y) up to a factor:

        alpha_kp = g_p^2 / (2 g_p^2 + (sum_q A_kq) g_p^3 + epsilon)  (Eq. 19)
        w_k = sum_p alpha_kp max(g_p, 0)

    and the map is `sum_k w_k A_k`. These are the numbers of pytorch-grad-cam.

    Args:
        model: in evaluation mode.
        layer: see `GradCAM`.
        epsilon: 0 for the paper's formula, with 0/0 = 0. The default is pytorch-grad-cam's, which dominates the sum
            where gradients are under a thousandth, as they are on most networks that average their last map: there the
            weights tend to the sum of the cubes of positive gradients.
        tokens: see `GradCAM`.
        channels: see `GradCAM`.
        threshold: share of its range at which `Explanation.boxes` cuts the map.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "grad-cam++"
    paper = "Grad-CAM++: generalized gradient-based visual explanations (Chattopadhay et al., 2018)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] = "auto",
        epsilon: float = 1e-6,
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, layer=layer, tokens=tokens, channels=channels, threshold=threshold, labels=labels)
        if not epsilon >= 0:
            raise InputError(f"epsilon must not be negative, got {epsilon}")
        self.epsilon = epsilon

    def weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        sums = activation.sum((1, 2))[:, None, None]
        positive = gradient.clamp_min(0)
        if self.epsilon == 0:
            # A square cancels, so that none is too small to be a number.
            below = 2 + sums * positive
            return torch.where(below == 0, 0, positive / below).sum((2, 3))
        below = 2 * positive**2 + sums * positive**3 + self.epsilon
        return torch.where(below == 0, 0, positive**3 / below).sum((2, 3))


class GuidedGradCAM(GradCAM):
    """Guided backprop where Grad-CAM looks: fine as the one, class-specific as the other (Selvaraju et al., 2017).

    The attribution is that of guided backprop times the heat map of Grad-CAM at the resolution of the image. Both are
    read from one forward pass.

    Args:
        model: in evaluation mode.
        layer: of Grad-CAM, see there.
        interpolation: how its map is brought to the size of the image: "bilinear" as in the paper, or "nearest" as in
            Captum.
        reduction: how the heat map is made of the channels, see `Saliency`.
        tokens: see `GradCAM`.
        channels: see `GradCAM`.
        threshold: share of its range at which `Explanation.boxes` cuts the heat map.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "guided-grad-cam"
    paper = "Grad-CAM: visual explanations from deep networks via gradient-based localization (Selvaraju et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] = "auto",
        interpolation: Literal["bilinear", "nearest"] = "bilinear",
        reduction: Reduction = "max",
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, layer=layer, tokens=tokens, channels=channels, threshold=threshold, labels=labels)
        self.interpolation = one_of("interpolation", interpolation, ("bilinear", "nearest"))
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        # What the rectifiers of both readings keep is the same.
        self._record = LayerRecorder(self, GUIDED, self.values, everything=True)
        self._said = False

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: see `GradCAM`.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with `attribution`, signed, `[N, C, H, W]`, and `map`, that of Grad-CAM.

        Raises:
            InputError: images, a layer or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            recorded = self._record(images, args, kwargs)
            tape = recorded.tape
            if not self._said and not any(map(rectifies, tape)):
                self._said = True
                logger.warning("%s found no rectifier in the model: guided backprop is its plain gradient", self.method)
            seeds = seeds_for(tape, target)
            maps = self._maps(recorded, recorded.gradients(seeds.grads, Response()), images.shape[2:])
            where = self.heat(maps, images.shape[2:], self.interpolation)
            guided = rows(walk(recorded.reading, tape, seeds.grads, [tape.inputs[0]])[0])
            attribution = guided * where[:, None].to(guided.dtype)
            found = self.explanation(images, seeds, maps, REDUCTIONS[self.reduction](wide(attribution)))
            found.attribution = attribution
            return found


def _weighed(weights: Tensor, activation: Tensor) -> Tensor:
    """Maps `[K, N, h, w]` of weights `[K, N, C]` and an activation `[N, h, w, C]`."""
    return torch.einsum("knc,nhwc->knhw", wide(weights), wide(activation))
