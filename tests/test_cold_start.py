"""What a first explanation imports: no compiler, and nothing that it does not need."""

import json
import subprocess
import sys

import pytest

from pyfast_xai.ops.registry import OPS

COMPILERS = ("numba", "triton", "torch._dynamo", "torch._inductor")
OPTIONAL = ("matplotlib", "torchvision", "pandas", "pyarrow", "skimage", "sklearn", "scipy", "PIL", "typer", "rich")
HEAVY = (*COMPILERS, *OPTIONAL, "sympy")

SMALL_NETWORK = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
).eval()
images = torch.rand(2, 3, 8, 8)
"""


def imported(code, *names):
    """Those of some modules that a program imports in a process of its own, beyond what `import torch` brings."""
    look = f"print(sorted(set({names!r}) & (set(sys.modules) - before)))"
    program = ["import sys, torch", "before = set(sys.modules)", code, look]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace("'", '"'))


def test_what_is_looked_for_would_be_found():
    assert imported("import sympy, PIL.Image", *HEAVY) == ["PIL", "sympy"]


@pytest.mark.parametrize(
    "code",
    [
        "import pyfast_xai",
        "from pyfast_xai import *",
        "from pyfast_xai import ops; ops.report()",
        "from pyfast_xai import metrics",
    ],
)
def test_imports(code):
    assert imported(code, *HEAVY) == []


@pytest.mark.skipif(any(op.served("cpu")[0] != "cpp" for op in OPS.values()), reason="some op has no binary here")
@pytest.mark.parametrize(
    "explain",
    [
        "EigenCAM(model)(images)",
        "GradCAM(model)(images)",
        "CNNFixations(model)(images).boxes()",
        "Saliency(model)(images)",
        "GuidedBackprop(model)(images, [[0, 1], [2, 3]])",
        "CLEAR(model, candidates=3)(images)",
        "FGVis(model, n_iterations=2, progress=False)(images)",
    ],
)
def test_an_explanation_with_a_binary(explain):
    assert imported(f"{SMALL_NETWORK}\nimport pyfast_xai\npyfast_xai.{explain}", *HEAVY) == []
