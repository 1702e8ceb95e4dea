"""How the cost of an explanation grows with image size, batch, depth, classes and points.

Random weights: the cost does not depend on what a network has learnt, but for how many points are traced, and those are
given where they are the axis. The unit is the model's forward on the same images, as in `test_cost.py`.
"""

import statistics
import warnings

import pytest
import torch
from loop_fixations import read_layers, trace_map
from turns import beside_forward, quotients, take_turns

import pyfast_xai
from pyfast_xai import CLEAR, CNNFixations, EigenCAM, GradCAM, GuidedBackprop
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import Points

models = pytest.importorskip("torchvision.models")

METHODS = {"eigen-cam": EigenCAM, "grad-cam": GradCAM, "fixations": CNNFixations, "guided-backprop": GuidedBackprop}
# Each axis: the network, the batch and the size of its images at each value.
AXES = {
    "size": [(size, "resnet18", 2, size) for size in (96, 160, 224, 320, 448, 640)],
    "batch": [(batch, "resnet18", batch, 224) for batch in (1, 2, 4, 8, 16, 32)],
    "depth": [(depth, f"resnet{depth}", 2, 224) for depth in (18, 34, 50, 101, 152)],
}
CASES = [(axis, *case) for axis, cases in AXES.items() for case in cases]
CLASSES = (1, 2, 5, 10, 20, 50, 100)
POINTS = (10, 100, 1000, 10_000)  # of an image
TRACED, TRACED_BATCH = "vgg16", 2


def build(name, batch, size):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.get_model(name, weights=None).eval()
    return model, torch.randn(batch, 3, size, size)


@pytest.fixture(scope="module")
def built(request):
    return build(*request.param)


def common(axis, value, name, images, method, backend=None):
    backend = backend or pyfast_xai.ops.report()[0].backend
    row = {"axis": axis, "value": value, "network": name, "batch": len(images)}
    return row | {"method": method, "backend": backend}


@pytest.mark.parametrize(
    ("axis", "value", "name", "built"),
    [(axis, value, name, (name, batch, size)) for axis, value, name, batch, size in CASES],
    ids=[f"{axis} {value}" for axis, value, *_ in CASES],
    indirect=["built"],
)
@pytest.mark.parametrize("method", METHODS)
def test_growth(benchmark, growth_rows, request, axis, value, name, built, method):
    model, images = built
    rounds = request.config.getoption("--rounds")
    cost = beside_forward(benchmark, model, images, METHODS[method](model, accelerate=False), rounds)
    growth_rows.append(common(axis, value, name, images, method) | cost)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("method", ["clear", "guided-backprop"])
def test_classes(benchmark, growth_rows, request, method, classes):
    """As many classes compete in CLEAR; so many targets an image in guided backprop."""
    name = "resnet18"
    model, images = build(name, 2, 224)
    if method == "clear":
        explain = CLEAR(model, candidates=classes)
    else:
        guided, target = GuidedBackprop(model), torch.arange(classes).repeat(len(images), 1)
        explain = lambda x: guided(x, target)  # noqa: E731
    rounds = min(5, request.config.getoption("--rounds"))
    cost = beside_forward(benchmark, model, images, explain, rounds)
    growth_rows.append(common("classes", classes, name, images, method) | cost)


@pytest.mark.parametrize("each", POINTS)
def test_points(benchmark, growth_rows, request, each):
    """CNN-Fixations' trace alone, from so many points of the last feature map, beside the loop over them."""
    model, images = build(TRACED, TRACED_BATCH, 224)
    explainer = CNNFixations(model)
    tape = explainer.record(images, policy=evidence.policy)
    start, pixels = tape.find("features"), tape.inputs[0]
    size, (channels, height, width) = start.numel // len(images), start.shape[1:]
    index = torch.cat([n * size + torch.randperm(size)[:each] for n in range(len(images))]).sort().values
    layers = [read_layers(model, image) for image in images]
    points = [
        {(i // (height * width), i // width % height, i % width) for i in (index[index // size == n] % size).tolist()}
        for n in range(len(images))
    ]
    assert max(c for item in points for c, _, _ in item) < channels

    def forward():
        with torch.inference_mode():
            model(images)

    def loop():
        return [trace_map(model, read, item) for read, item in zip(layers, points, strict=True)]

    def trace():
        return evidence.walk(tape, {start: Points(index)}, pixels, explainer.options).index

    expected = {(n, *pixel) for n, item in enumerate(loop()) for pixel in item}
    area, (_, colours, _, side) = images.shape[2] * images.shape[3], images.shape
    result = {(i // (colours * area), i % area // side, i % side) for i in trace().tolist()}
    # Float32 sums in another order may turn a near tie.
    assert len(expected & result) >= 0.98 * len(expected | result)

    rounds = min(5, request.config.getoption("--rounds"))
    backend = pyfast_xai.ops.report()[0].backend
    seconds = take_turns(benchmark, {"forward": forward, "NumPy loop": loop, backend: trace}, rounds, settled=1)
    for who in ("NumPy loop", backend):
        cost = quotients(seconds[who], seconds["forward"])
        growth_rows.append(
            common("points", each, TRACED, images, "fixations, the trace", who)
            | {"forward_ms": 1e3 * statistics.median(seconds["forward"])}
            | {"explain_ms": 1e3 * statistics.median(seconds[who]), "rounds": rounds}
            | {"forwards": cost.median, "low": cost.low, "high": cost.high}
        )
