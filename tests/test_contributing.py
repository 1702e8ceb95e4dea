"""The worked examples of CONTRIBUTING.md do what it says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pyfast_xai import CNNFixations, Saliency
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import backward
from pyfast_xai.rules.gradient import GRADIENT, BackwardContext, rule
from pyfast_xai.rules.gradient.layers import conjugate
from pyfast_xai.tape import Value

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL)
NAMES = {
    "BackwardContext": BackwardContext,
    "TraceContext": evidence.TraceContext,
    "Value": Value,
    "conjugate": conjugate,
    "evidence": evidence,
    "rule": rule,
}


class Square(nn.Module):
    def forward(self, x):
        return x.square()


@pytest.fixture
def model():
    layers = [nn.Conv2d(3, 4, 3), Square(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(*layers).double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def gradient_of(model, images, target):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


@pytest.fixture
def run(monkeypatch):
    """Runs a block; the rules that it registers are gone afterwards."""
    monkeypatch.setitem(GRADIENT, "aten::square", GRADIENT.get("aten::square"))
    monkeypatch.setitem(backward._rules, "aten::square", backward._rules.get("aten::square"))

    def run(block):
        names = dict(NAMES)
        exec(BLOCKS[block], names)
        return names

    return run


def test_the_rule_of_a_gradient(run, model, images):
    run(0)
    assert GRADIENT["aten::square"].backward.__name__ == "_square"
    torch.testing.assert_close(Saliency(model)(images, 1).attribution, gradient_of(model, images, 1))


def test_the_rule_of_evidence(run, model, images):
    before = CNNFixations(model)(images).points
    run(1)
    assert backward._rules["aten::square"].trace.__name__ == "square"
    for points, expected in zip(CNNFixations(model)(images).points, before, strict=True):
        assert torch.equal(points, expected)


def test_the_explainer(run, model, images):
    explain = run(2)["SignedGradient"](model, power=2.0, batch_size=1)
    assert repr(explain) == "SignedGradient(Sequential, power=2.0, batch_size=1)"
    explanation = explain(images, 1)
    expected = gradient_of(model, images, 1).square() * images.sign()
    torch.testing.assert_close(explanation.attribution, expected)
