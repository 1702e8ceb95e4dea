"""Layer-wise relevance propagation (Bach et al., 2015): the score of a class, shared among the pixels by rules."""

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import GradientShaped, Reduction
from pyfast_xai.explainers.common.explainer import Settings
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.output_gradients import OutputGradients
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.rules.gradient import backward_pass
from pyfast_xai.rules.relevance import COMPOSITES, Composite, RelevanceRules
from pyfast_xai.tape import Tape, Value
from pyfast_xai.tape.module_hooks import modules_of


class LRP(GradientShaped):
    """Shares the score of a class among the pixels, operation by operation (Bach et al., 2015; Montavon et al., 2019).

    The score is the relevance of the output; each operation hands its relevance to its inputs by a rule that a
    composite chooses. Sums of branches share by contributions, a batch norm is part of the convolution before it, and
    attention, softmax and layer norm follow AttnLRP (Achtibat et al., 2024); nothing of the model is rewritten. Without
    biases, and with rules that conserve, the attribution adds up to the score.

    Args:
        model: in evaluation mode.
        composite: a `Composite`, or the name of one: "epsilon", "epsilon-plus", "epsilon-plus-flat",
            "epsilon-alpha2-beta1", "epsilon-alpha2-beta1-flat" or, for transformers, "gamma-attention".
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`. A floating-point target is the relevance of the output to start from; of a
            function the start is its gradient times the output.

    Raises:
        InputError: a composite that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import LRP, demo
        >>> explanation = LRP(demo.load(), composite="epsilon-plus-flat")(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "lrp"
    paper = "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation (2015)"
    default_reduction = "sum"

    def __init__(
        self,
        model: nn.Module,
        *,
        composite: Composite | str = "epsilon-plus-flat",
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self.composite = composite_named(composite)
        self.folds = not self.composite.by_name  # a convolution that is folded has another name
        super().__init__(model, reduction=reduction, **settings)
        self.rules = RelevanceRules(self.warned)

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        is_start = isinstance(target, Tensor) and target.is_floating_point()
        _, seeds, relevance = run_step(
            self, self._share, images, target, is_start, args, kwargs, key=(LRP._share, self.composite)
        )
        return relevance, seeds

    def _share(self, start: Start, images: Tensor, is_start: bool, args: Any, kwargs: Any) -> tuple[Tape, Tensor]:
        tape = self.record(images, *args, policy=self.rules, **kwargs)
        seeds = start(tape).grads
        relevance = seeds if is_start else relevance_of_outputs(tape, seeds)
        modules = {path: module for module, path in modules_of(self.model).items()}
        policy = self.rules.by(self.composite, tape, modules)
        return tape, backward_pass(policy, tape, relevance, [tape.inputs[0]])[0]


def composite_named(composite: Composite | str) -> Composite:
    """Returns a composite, or that of a name.

    Raises:
        InputError: a name that does not exist, or something else.
    """
    if isinstance(composite, Composite):
        return composite
    if composite not in COMPOSITES:
        raise InputError(
            f"composite must be a Composite or one of {', '.join(map(repr, COMPOSITES))}, got {composite!r}"
        )
    return COMPOSITES[composite]()


def relevance_of_outputs(tape: Tape, gradients: dict[Value, Tensor]) -> dict[Value, Tensor]:
    """Returns gradients `[K, *shape]` of outputs times the outputs: the relevance that a score starts with."""
    values, numbers = pytree.tree_leaves(tape.outputs), pytree.tree_leaves(tape.result)
    recorded = {value: number for value, number in zip(values, numbers, strict=True) if isinstance(value, Value)}
    return {value: gradient * recorded[value] for value, gradient in gradients.items()}
