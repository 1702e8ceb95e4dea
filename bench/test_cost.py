"""What an explanation costs, as a multiple of the same model's own eager forward on the same images.

Forward and explanation take turns in one process; the figure is the median of their ratios. Random weights: the cost
does not depend on what a network has learnt, but for how many points are traced.
"""

import warnings
from functools import partial

import pytest
import torch
from loop_fixations import loop_fixations
from turns import beside_forward, rest

import pyfast_xai
from pyfast_xai import CLEAR, CNNFixations, EigenCAM, FGVis, GradCAM, GuidedBackprop, Saliency

torchvision = pytest.importorskip("torchvision")

METHODS = {
    "eigen-cam": EigenCAM,
    "fixations": CNNFixations,
    "fixations, paper": partial(CNNFixations, variant="paper"),
    "fixations, authors": partial(CNNFixations, variant="authors"),
    "grad-cam": GradCAM,
    "saliency": Saliency,
    "guided-backprop": GuidedBackprop,
    "clear, ten classes": partial(CLEAR, candidates=10),
    "fgvis, an iteration": lambda model, **settings: FGVis(
        model, n_iterations=ITERATIONS, patience=ITERATIONS, progress=False, **settings
    ),
}
VARIANTS = {"": False, ", accelerated": True}  # the setting `accelerate`
ITERATIONS = 5  # of FGVis; the pass that takes the bounds and the one that chooses the class are shared among them


@pytest.fixture(scope="module")
def network(request):
    name, batch = request.param
    torch.manual_seed(0)
    settings = {"init_weights": False} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **settings).eval()
    if name == "vit_b_16":  # whose head begins with zeros, on which no evidence comes in
        torch.nn.init.normal_(model.heads.head.weight)
    return name, model, torch.randn(batch, 3, 224, 224)


def compare(benchmark, rows, request, network, method, explain, backend, shares=1, before=None):
    """Time `explain` against the forward; `shares` is how many equal parts it is made of."""
    name, model, images = network
    row = {"network": name, "batch": len(images), "method": method, "backend": backend}
    row |= beside_forward(benchmark, model, images, explain, request.config.getoption("--rounds"), shares, before)
    benchmark.extra_info.update(row)
    rows.append(row)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_explainer(benchmark, rows, request, network, method, variant):
    backend = pyfast_xai.ops.report()[0].backend
    shares = ITERATIONS if method.startswith("fgvis") else 1
    explain = METHODS[method](network[1], accelerate=VARIANTS[variant])
    compare(benchmark, rows, request, network, method + variant, explain, backend, shares)


LAST = {
    "alexnet": lambda m: m.features[-2],
    "vgg16": lambda m: m.features[-2],
    "googlenet": lambda m: m.inception5b,
    "resnet50": lambda m: m.layer4[-1],
    "resnet101": lambda m: m.layer4[-1],
    "densenet121": lambda m: m.features[-1],
    "mobilenet_v2": lambda m: m.features[-1],
}


@pytest.mark.parametrize(("method", "name"), [("eigen-cam", "EigenCAM"), ("grad-cam", "GradCAM")])
def test_peer_cam(benchmark, rows, request, network, method, name):
    peer = pytest.importorskip("pytorch_grad_cam")
    if network[0] not in LAST:
        pytest.skip("the peer must be told how tokens lie")
    with getattr(peer, name)(network[1], [LAST[network[0]](network[1])]) as explain:
        project = lambda x: explain(x, targets=None)  # noqa: E731
        compare(benchmark, rows, request, network, method, project, "pytorch-grad-cam", before=rest)


PEERS = {"saliency": "Saliency", "guided-backprop": "GuidedBackprop"}


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_peer_backprop(benchmark, rows, request, network, method):
    attr = pytest.importorskip("captum.attr")
    if method == "guided-backprop" and network[0] in ("googlenet", "densenet121"):
        pytest.skip("Captum does not see the functional rectifiers of this network")
    peer = getattr(attr, PEERS[method])(network[1])
    settings = {"abs": False} if method == "saliency" else {}
    target = list(range(len(network[2])))
    compare(
        *(benchmark, rows, request, network, method),
        lambda x: peer.attribute(x.clone().requires_grad_(), target=target, **settings),
        "captum",
    )


def test_loop_fixations(benchmark, rows, request, network):
    """The same points, one by one in NumPy; one image, whose cost is that of every other."""
    name, model, images = network
    if name not in ("alexnet", "vgg16") or len(images) != 8:
        pytest.skip("the loop knows AlexNet and VGG, and takes one image whatever the batch")
    image = images[:1]
    expected = {tuple(point) for point in CNNFixations(model, radius_share=0)(image).points[0].tolist()}
    result = loop_fixations(model, image[0])
    # Float32 sums in another order may turn a near tie.
    assert len(expected & result) >= 0.98 * len(expected | result)
    single = (name, model, image)
    compare(benchmark, rows, request, single, "fixations", lambda x: loop_fixations(model, x[0]), "NumPy loop")
