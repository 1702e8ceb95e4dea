"""The gradients of scores with respect to changed images, for methods that optimise a mask."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.output_gradients import output_gradients
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.targets import class_columns, logits_of, numbers_of, take_targets
from pyfast_xai.rules.gradient import GradientRules, backward_pass


def score_gradient(
    explainer: Explainer, changed: Tensor, rows: Tensor, targets: Tensor, scores: PerturbationScores
) -> Tensor:
    """Returns the gradient of the score of each changed image with respect to it, `[R, C, H, W]`.

    Args:
        explainer: records the model.
        changed: `[R, C, H, W]`; the model may write to them.
        rows: which of the images each is made of, int64 `[R]`.
        targets: which of its targets is meant, int64 `[R]`.
        scores: of the images.
    """
    policy = GradientRules(warned=explainer.warned)
    args, kwargs = scores.arguments(rows)
    tape = explainer.record(changed, *args, policy=policy, **kwargs)
    if scores.function is not None:
        function = take_targets(scores.function, len(scores.before), rows)

        def one_each(result: Any) -> Tensor:
            return of_target(numbers_of(function, result, len(rows)).view(len(rows), -1), targets)

        seeds = output_gradients(tape, one_each).grads
    else:
        value, logits = logits_of(tape)
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            score = of_target(scores.scores(class_columns(leaf), rows), targets).sum()
            (seed,) = torch.autograd.grad(score, leaf)
        seeds = {value: seed[None]}
    return backward_pass(policy, tape, seeds, [tape.inputs[0]])[0][0]


def of_target(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns, of scores `[R, K]`, the target's score of each row, `[R]`."""
    return scores.gather(1, targets[:, None])[:, 0]
