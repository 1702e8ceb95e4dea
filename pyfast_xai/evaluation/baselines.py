"""Baselines that any explainer must beat: maps that depend neither on the picture nor on the model."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Segment


class Centre(Explainer):
    """The middle of the picture: a pyramid whose box covers 80 % of each side."""

    method = "centre"
    paper = "the baseline of CNN-Fixations and of Choe et al., 2020"
    default_box_rule = Segment(0.2)

    def _explain(self, images: Tensor, target: Any, args: Any, kwargs: Any) -> Explanation:
        down, across = (
            (torch.arange(side, device=images.device) - (side - 1) / 2).abs() / (side / 2) for side in images.shape[2:]
        )
        heat = 1 - torch.maximum(down[:, None], across)
        return Explanation(
            *(self.method, heat.expand(len(images), -1, -1).clone()),
            images=images.detach().clone(),
            box_rule=self.box_rule,
        )


class Noise(Explainer):
    """Independent random numbers: what chance gives.

    Args:
        model: not looked at.
        seed: seed of the numbers, which are the same for every image.
    """

    method = "noise"
    paper = "what chance gives"

    def __init__(self, model: Any, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.seed = seed

    def _explain(self, images: Tensor, target: Any, args: Any, kwargs: Any) -> Explanation:
        drawn = torch.rand(images.shape[2:], generator=torch.Generator().manual_seed(self.seed)).to(images.device)
        return Explanation(self.method, drawn.expand(len(images), -1, -1).clone(), images=images.detach().clone())


BASELINES: dict[str, type[Explainer]] = {baseline.method: baseline for baseline in (Centre, Noise)}
