"""What any explainer must beat: maps that look neither at the picture nor at the model."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.explainers.base import Explainer, Target
from pyfast_xai.explanation import Explanation


class Centre(Explainer):
    """The middle of the picture: a pyramid whose box at `threshold` covers 80 % of each side."""

    method = "centre"
    paper = "the baseline of CNN-Fixations and of Choe et al., 2020"

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> Explanation:
        """The same map for every image; the target is not looked at."""
        self.check(images)
        down, across = (
            (torch.arange(side, device=images.device) - (side - 1) / 2).abs() / (side / 2) for side in images.shape[2:]
        )
        heat = 1 - torch.maximum(down[:, None], across)
        return Explanation(self.method, heat.expand(len(images), -1, -1).clone(), images=images, threshold=0.2)


class Noise(Explainer):
    """Independent random numbers: what chance gives.

    Args:
        model: not looked at.
        seed: of the numbers, which are the same for every image.
    """

    method = "noise"
    paper = "what chance gives"

    def __init__(self, model: Any, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.seed = seed

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> Explanation:
        """The same map for every image; the target is not looked at."""
        self.check(images)
        drawn = torch.rand(images.shape[2:], generator=torch.Generator().manual_seed(self.seed)).to(images.device)
        return Explanation(self.method, drawn.expand(len(images), -1, -1).clone(), images=images)


BASELINES: dict[str, type[Explainer]] = {baseline.method: baseline for baseline in (Centre, Noise)}
