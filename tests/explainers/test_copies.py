"""Explainers travel to other processes: they are copied and pickled, before and after they are used."""

import copy
import pickle

import pytest
import torch
from regions import quarters
from torch import nn

from pyfast_xai.explainers import METHODS
from pyfast_xai.serve import Explained

FAST = {
    **{"rise": {"n_masks": 4}, "lime": {"n_samples": 8}, "smoothgrad": {"n_samples": 2}, "fgvis": {"n_iterations": 2}},
    **{"meaningful-perturbation": {"n_iterations": 2}, "integrated-gradients": {"n_steps": 2}},
    "feature-permutation": {"references": torch.linspace(-1, 1, 1728).view(1, 3, 24, 24)},
    **{"kernel-shap": {"feature_mask": 3, "n_samples": 20}, "shapley-value-sampling": {"feature_mask": 3}},
    **{"blur-ig": {"n_steps": 2}, "guided-ig": {"n_steps": 2}, "xrai": {"n_steps": 1, "regions": quarters}},
    **{"hsic": {"n_samples": 8}, "sobol": {"feature_mask": 2}},
    "extremal-perturbation": {"n_iterations": 2, "sigma": 6.0, "step": 3},
    **{"ss-cam": {"n_samples": 2}, "is-cam": {"n_steps": 2}},
    **{"smooth-grad-cam++": {"n_samples": 2}, "sess": {"n_scales": 2}},
}


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


def made(name):
    torch.manual_seed(0)
    if METHODS[name].needs_attention:
        return METHODS[name](Transformer().eval())
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return METHODS[name](nn.Sequential(*layers).eval(), **FAST.get(name, {}))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_detections])
def test_a_copy_explains_as_the_explainer_does(name, accelerated, copied):
    explainer, images = made(name), torch.randn(1, 3, 24, 24)
    if accelerated:
        explainer.accelerate()
    unused = copied(explainer)
    expected = [explainer(images, 1).heatmap for _ in range(2)]
    for other in (unused, copied(explainer)):
        assert other.model is not explainer.model
        explanations = [other(images, 1).heatmap for _ in range(2)]
        # The first call may be a recording, which rounds otherwise than the replays behind it.
        assert torch.equal(explanations[1], expected[1])
        assert accelerated or torch.equal(explanations[0], expected[0])
    explained = copied(Explained(explainer.model, explainer))
    explained(images, 1)
    logits, explanation = explained(images, 1)
    assert torch.equal(explanation.heatmap, expected[1])
    torch.testing.assert_close(logits, explainer.model(images), rtol=1e-4, atol=1e-5)
