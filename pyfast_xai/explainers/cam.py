"""Class activation maps: the channels of a layer, weighed by what they mean for a class.

One file for the family, which differs in the weights only: those of the last linear layer (CAM), the mean gradient
(Grad-CAM), or a mean that counts positions by how much they matter (Grad-CAM++).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import REDUCTIONS, Reduction
from pyfast_xai.explainers.common.cam_rules import RULES, CamRule, Rule, grad_cam_plus_plus, weighted_sum
from pyfast_xai.explainers.common.classifier_head import PooledHead, classifier_head
from pyfast_xai.explainers.common.explainer import Settings, one_of
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.layer_explainer import FUSES, Fuse, LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.layer_recorder import LayerRecorder, Recorded
from pyfast_xai.explainers.common.layer_search import Place, behind_norm, pooled_place, sensitive_levels
from pyfast_xai.explainers.common.output_gradients import OutputGradients
from pyfast_xai.explainers.common.perturbation_explainer import positive
from pyfast_xai.explainers.common.targets import Goal, logits_of
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.rules.gradient import GUIDED, GradientRules, rectifies
from pyfast_xai.tape import Tape, Value


class CAM(LayerExplainer):
    """Class activation maps of networks that end in an average over positions and a linear layer (Zhou et al., 2016).

    With `A [C, h, w]` the last map and w the weights of the last layer, the map of class c is `sum_k w_ck A_k`
    (Eq. 2); its mean and the bias are the score of the class. A convolution whose maps of classes are averaged
    (SqueezeNet, all-convolutional networks) has that map already. The average and the layer are found on the record
    of a forward, independent of the names of modules.

    An explanation has `signed_map`, at the resolution of the layer, and `heatmap`, its positive part.

    Args:
        model: in evaluation mode; a classifier.
        tokens: grid `(h, w)` of a network that averages tokens; None for what it made them of.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import CAM
        >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        >>> explanation = CAM(nn.Sequential(*layers).eval())(torch.rand(2, 3, 32, 32), target=3)
        >>> explanation.heatmap.shape
        torch.Size([2, 32, 32])
    """

    method = "cam"
    ranks = (3, 4, 5)
    paper = "Learning deep features for discriminative localization (Zhou et al., 2016)"
    default_box_rule = Mass()

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: tuple[int, int] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, tokens=tokens, **settings)
        self._record = LayerRecorder(self, {}, self._averaged)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        key = (CAM._step, self.tokens, self.layout)
        _, seeds, maps = run_step(self, self._step, images, target, args, kwargs, key=key)
        return self.explanation(images, seeds, [maps], self.heat([maps], images.shape[2:]))

    def _step(self, start: Start, images: Tensor, args: Any, kwargs: Any) -> tuple[Tape, Tensor]:
        """Returns the tape and the maps `[N * K, h, w]`."""
        recorded = self._record(images, args, kwargs)
        head = _head(recorded.tape)
        scores, _ = logits_of(recorded.tape)
        seeds = start(recorded.tape)
        if list(seeds.grads) != [scores]:
            raise InputError("target must be a function of the class scores alone, got one of other outputs")
        weights = seeds.grads[scores].reshape(seeds.each, len(images), -1)
        if head.weight is not None:
            weights = at_least_float32(weights) @ at_least_float32(head.weight.detach())
        activation, layout = recorded.activations[0], recorded.places[0].layout
        if layout is None:
            activation = activation.movedim(head.channels, -1)
        if layout is not None or activation.dim() == 3:
            activation = self.grid(activation, images.shape[2:], head.pool.name, layout)
        return recorded.tape, targets_to_rows(weighted_sum(at_least_float32(weights), at_least_float32(activation)))

    def _averaged(self, tape: Tape, ends: Collection[Value] | None) -> list[Place]:
        """Returns the place of the averaged map."""
        return [pooled_place(tape, _head(tape).source)]


def _head(tape: Tape) -> PooledHead:
    head = classifier_head(tape)
    if head is None:
        producer = tape.producer(logits_of(tape)[0])
        source = producer.name if producer else "nowhere"
        raise InputError(
            "model must end in an average over positions with at most one linear layer behind it for class activation "
            f"maps (grad-cam needs no such end), got one whose scores come from {source!r}"
        )
    return head


class GradCAMSettings(LayerSettings, total=False):
    """The keyword arguments of gradient CAMs but for `layer`, see `GradCAM`."""

    fuse: Fuse


class GradCAM(LayerExplainer):
    """Grad-CAM: channels weighed by their mean gradient (Selvaraju et al., 2017).

    With y the score of the class and A the activation of the layer, `w_k = mean_p dy/dA_kp` (Eq. 1) and the map is
    `sum_k w_k A_k`; the heat map is its positive part (Eq. 2), upsampled bilinearly.

    It costs little more than a forward: nothing is kept of what lies below the layer, and no gradient goes there. An
    explanation has `signed_map`, at the resolution of the layer (None of several layers), and `heatmap`, its positive
    part.

    Args:
        model: in evaluation mode; any network, with a function as target for others than classifiers.
        layer: a module, its path or the name of an operation; several are read from one backward pass;
            of a module that runs several times the last call is taken, "path@0" is the first; "auto" takes the last
            map of features on which the target depends at every position, and the last below it where no gradient
            arrives; of a detector all levels of its pyramid, the maps that enter its heads.
        fuse: what becomes of the heat maps of several layers, each scaled to a maximum of one: their "mean", the
            largest at every pixel ("max"), or their "product".
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo
        >>> explanation = GradCAM(demo.load(), layer="block")(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([2, 96, 96])
    """

    method = "grad-cam"
    ranks = (3, 4, 5)
    default_box_rule = Mass()
    paper = "Grad-CAM: visual explanations from deep networks via gradient-based localization (Selvaraju et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        fuse: Fuse = "mean",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.fuse = one_of("fuse", fuse, FUSES)
        self.rule: Rule = RULES.get(self.method, RULES["grad-cam"])
        self._record = LayerRecorder(self, {}, self.places)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        recorded, seeds, gradients = self._record.gradients(
            images, target, args, kwargs, policy=self._plain, key=tuple(self.layers), starts=self._starts
        )
        maps = self._maps(recorded, gradients, images.shape[2:])
        return self.explanation(images, seeds, maps, self.heat(maps, images.shape[2:]))

    def _plain(self, tape: Tape, seeds: OutputGradients) -> GradientRules:
        return GradientRules(warned=self.warned)

    def _starts(self, tape: Tape, seeds: OutputGradients) -> Mapping[Value, Tensor]:
        """Returns the gradients that the walk starts from."""
        return seeds.grads

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        return sensitive_levels(tape, ends)

    def weights(self, gradient: Tensor, activation: Tensor) -> Tensor:
        """Returns the weight of each channel.

        Args:
            gradient: gradient of the score, `[K, N, h, w, C]`.
            activation: `[N, h, w, C]`.

        Returns:
            Weights `[K, N, C]`, or `[K, N, h, w, C]` for each position.
        """
        return self.rule.weights(gradient, activation)

    def _maps(self, recorded: Recorded, gradients: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Returns the signed maps `[N * K, h, w]` of each layer."""
        maps = []
        for place, gradient, activation in zip(recorded.places, gradients, recorded.activations, strict=True):
            cells = at_least_float32(self.grid(activation, size, place.name, place.layout))
            gradient_cells = at_least_float32(self.grid(gradient.flatten(0, 1), size, place.name, place.layout))
            gradient_cells = gradient_cells.unflatten(0, gradient.shape[:2])
            maps.append(targets_to_rows(self.rule.map(gradient_cells, cells)))
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
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAMPlusPlus, demo
        >>> explanation = GradCAMPlusPlus(demo.load())(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([2, 96, 96])
    """

    method = "grad-cam++"
    paper = "Grad-CAM++: generalized gradient-based visual explanations (Chattopadhay et al., 2018)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        epsilon: float = 1e-6,
        **settings: Unpack[GradCAMSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        if not epsilon >= 0:
            raise InputError(f"epsilon must not be negative, got {epsilon}")
        self.epsilon = epsilon
        self.rule = grad_cam_plus_plus(epsilon)


class HiResCAM(GradCAM):
    """HiResCAM: the gradient times the activation at every position (Draelos and Carin, 2020).

    The map is `sum_k g_k A_k` (Eq. 5). Where an average over positions and a linear layer follow it equals Grad-CAM;
    elsewhere it shows what the score is made of to first order, where Grad-CAM shows the mean. The gradient through a
    layer norm is orthogonal to what the norm reads, so that this map would be zero there: in transformers "auto" takes
    what the norm makes of the tokens.

    All settings are those of `GradCAM`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import HiResCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> HiResCAM(net, layer="1")(torch.randn(2, 3, 8, 8), target=3).signed_map.shape
        torch.Size([2, 6, 6])
    """

    method = "hires-cam"
    paper = "Use HiResCAM instead of Grad-CAM for faithful explanations of CNNs (Draelos and Carin, 2020)"

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        return [behind_norm(tape, name) for name in super().automatic(tape, ends)]


class LayerCAM(GradCAM):
    """LayerCAM: every position weighed by its own positive gradient (Jiang et al., 2021).

    The map is `sum_k max(g_k, 0) A_k` (Eq. 6 and 7), which keeps its sense at shallow layers. All layers are read from
    one forward and one walk; of several the heat map is the largest of `tanh(gamma M / max M)` at every pixel (Eq. 9).

    Args:
        model: in evaluation mode.
        layer: see `GradCAM`.
        fuse: see `GradCAM`.
        gamma: lifts the maps of several layers, so that small values count; None leaves them alone.
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import LayerCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> LayerCAM(net, layer=["0", "1"])(torch.randn(2, 3, 8, 8)).heatmap.shape
        torch.Size([2, 8, 8])
    """

    method = "layer-cam"
    paper = "LayerCAM: exploring hierarchical class activation maps for localization (Jiang et al., 2021)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        fuse: Fuse = "max",
        gamma: float | None = 2.0,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, fuse=fuse, **settings)
        self.gamma = None if gamma is None else positive("gamma", gamma)


class XGradCAM(GradCAM):
    """XGrad-CAM: channels weighed by the gradient where they are active (Fu et al., 2020).

    `w_k = sum_p g_kp A_kp / sum_p A_kp` (Eq. 8) and the map is `sum_k w_k A_k`. A channel whose activations add up to
    zero weighs nothing. Where an average and a linear layer follow it equals Grad-CAM.

    All settings are those of `GradCAM`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import XGradCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> XGradCAM(net, layer="1")(torch.randn(2, 3, 8, 8), target=[0, 4]).target.tolist()
        [0, 4]
    """

    method = "xgrad-cam"
    paper = "Axiom-based Grad-CAM: towards accurate visualization and explanation of CNNs (Fu et al., 2020)"


class GradCAMElementWise(GradCAM):
    """Element-wise Grad-CAM: the positive part of gradient times activation, before channels are summed.

    The map is `sum_k max(g_k A_k, 0)`: what speaks against the class in one channel takes nothing from another.

    All settings are those of `GradCAM`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import GradCAMElementWise
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> bool((GradCAMElementWise(net, layer="1")(torch.randn(2, 3, 8, 8)).signed_map >= 0).all())
        True
    """

    method = "grad-cam-elementwise"
    paper = "PyTorch library for CAM methods (Gildenblat and contributors, 2021), which is where it comes from"


class EigenGradCAM(GradCAM):
    """Eigen-Grad-CAM: the first principal component of gradient times activation; Eigen-CAM that knows the class.

    The products `g_kp A_kp` of each image, a row a position, are centred over positions and projected on their first
    principal direction. Its sign, which is arbitrary, is the one that makes the map rise with the sum of the products
    over channels, the map of `HiResCAM`.

    All settings are those of `GradCAM`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import EigenGradCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> EigenGradCAM(net, layer="1")(torch.randn(2, 3, 8, 8)).signed_map.shape
        torch.Size([2, 6, 6])
    """

    method = "eigen-grad-cam"
    paper = "Eigen-CAM: class activation map using principal components (Muhammad and Yeasin, 2020), on products"


class SegEigenCAM(GradCAM):
    """Seg-Eigen-CAM: the first principal component of the activation times the size of its gradient (2025).

    The products `|g_kp| A_kp` (Eq. 10) are centred over positions and projected on their first principal direction
    (Eq. 11 and 12). Its sign is the one that makes the map rise with the sum of the products over channels; the paper
    (Eq. 13) takes the one whose largest value is the larger, which an outlier decides.

    All settings are those of `GradCAM`; segmentation networks need a function as target.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import SegEigenCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        >>> SegEigenCAM(net, layer="1")(torch.randn(2, 3, 8, 8), lambda y: y[:, 1].sum((1, 2))).signed_map.shape
        torch.Size([2, 8, 8])
    """

    method = "seg-eigen-cam"
    paper = "Seg-Eigen-CAM: eigen-value-based visual explanations for segmentation models (Chung and Ying, 2025)"


class RefineCAM(GradCAM):
    """RefineCAM: the product of the heat maps of several layers, which keeps where all of them agree (2026).

    Each map is brought to the size of the images and scaled to a maximum of one. All are read from one forward and one
    walk. Of a single layer it is the map of `base`.

    Args:
        model: in evaluation mode.
        layer: two layers or more, see `GradCAM`.
        base: the method of the maps that are multiplied, a name of the table of rules such as "grad-cam++".
        fuse: see `GradCAM`.
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import RefineCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> RefineCAM(net, layer=["0", "1"])(torch.randn(2, 3, 8, 8)).heatmap.shape
        torch.Size([2, 8, 8])
    """

    method = "refine-cam"
    paper = "How to evaluate and refine your CAM (2026)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        base: CamRule = "grad-cam++",
        fuse: Fuse = "product",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, fuse=fuse, **settings)
        self.rule = RULES[one_of("base", base, RULES)]


class GuidedGradCAM(GradCAM):
    """Guided backprop where Grad-CAM looks: fine as the one, class-specific as the other (Selvaraju et al., 2017).

    The attribution is that of guided backprop times the heat map of Grad-CAM at the resolution of the image. Both are
    read from one forward pass. An explanation has `attribution`, signed, `[N, C, H, W]`, and the `signed_map` of
    Grad-CAM.

    Args:
        model: in evaluation mode.
        layer: of Grad-CAM, see there.
        interpolation: how its map is brought to the size of the image: "bilinear" as in the paper, or "nearest" as in
            Captum.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import GuidedGradCAM, demo
        >>> explanation = GuidedGradCAM(demo.load())(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "guided-grad-cam"
    paper = "Grad-CAM: visual explanations from deep networks via gradient-based localization (Selvaraju et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        interpolation: Literal["bilinear", "nearest"] = "bilinear",
        reduction: Reduction = "max",
        **settings: Unpack[GradCAMSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.interpolation = one_of("interpolation", interpolation, ("bilinear", "nearest"))
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        # What the rectifiers of both readings keep is the same.
        self._record = LayerRecorder(self, GUIDED, self.places, to_inputs=True)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        recorded, seeds, gradients = self._record.gradients(
            images, target, args, kwargs, policy=self._plain, key=tuple(self.layers)
        )
        if not any(map(rectifies, recorded.tape)):
            self.warn("the model has no rectifier, so that guided backprop is its plain gradient")
        maps = self._maps(recorded, gradients, images.shape[2:])
        heatmap = self.heat(maps, images.shape[2:], self.interpolation)
        assert recorded.input_gradient is not None
        guided = targets_to_rows(recorded.input_gradient)
        attribution = guided * heatmap[:, None].to(guided.dtype)
        explanation = self.explanation(images, seeds, maps, REDUCTIONS[self.reduction](at_least_float32(attribution)))
        explanation.attribution = attribution
        return explanation
