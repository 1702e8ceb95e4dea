"""Trained networks on photographs, where a folder of them is at hand."""

import copy
import json

import numpy as np
import pytest
import torch
from import_file import import_file
from PIL import Image
from torch.nn import functional

from pyfast_xai import (
    CAM,
    CNNFixations,
    DeconvNet,
    EigenCAM,
    ExcitationBackprop,
    GradCAM,
    GuidedBackprop,
    Saliency,
    backend,
)
from pyfast_xai.rules.evidence.points import marking

COUNT = 24


@pytest.fixture(scope="module")
def zoo(real_data):
    return import_file(real_data / "models.py", "real_networks")


@pytest.fixture(scope="module", params=["googlenet_abm_pruned_int8", "squeezenet1_1", "mobilenet_v2_coral_int8"])
def case(request, zoo, real_data):
    """A network, its input and the boxes in pixels of the input."""
    model, meta = zoo.load(request.param)
    rows = json.loads((real_data / "imagenet" / "annotations.json").read_text())[:COUNT]
    side = meta["size"]
    pixels, boxes = [], []
    for row in rows:
        with Image.open(real_data / "imagenet" / row["file"]) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        pixels.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float())
        boxes.append(torch.tensor(row["boxes"]) * side / row["width"])
    return model, zoo.preprocess(torch.stack(pixels), meta["prep"]), boxes


def inside(point, boxes):
    y, x = point
    return bool(((boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])).any())


@pytest.mark.parametrize("method", ["gram", "subspace"])
def test_eigen_cam_equals_numpy_on_real_activations(case, method):
    model, images, _ = case
    explainer = EigenCAM(model, solver=method, power_iterations=20)
    maps = explainer(images[:8]).signed_map
    (name,) = explainer.names(explainer.record(images[:1]))
    activations = explainer.record(images[:8], until=name).reached
    for item, activation in zip(maps, activations, strict=True):
        matrix = activation.double().flatten(1).T.numpy()
        left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
        expected = (left[:, 0] * singular[0]).reshape(item.shape)
        expected = expected * np.sign(expected.sum())
        assert np.abs(item.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("method", [CNNFixations, EigenCAM, CAM, GradCAM, ExcitationBackprop])
def test_most_peaks_lie_on_the_object(case, method):
    model, images, boxes = case
    hits = [inside(peak, item) for peak, item in zip(method(model)(images).peak().tolist(), boxes, strict=True)]
    # 75 to 91 % on 600 pictures; four standard errors of a share of 24 pictures below the least.
    assert np.mean(hits) > 0.4


def test_backends_trace_the_same_points(case):
    model, images, _ = case
    explainer = CNNFixations(model, radius_share=0)
    by_backend = []
    for name in ("reference", "numba"):
        with backend(name):
            by_backend.append([{tuple(p) for p in item.tolist()} for item in explainer(images[:4]).points])
    by_backend.append([{tuple(p) for p in item.tolist()} for item in explainer(images[:4]).points])
    for first, *others in zip(*by_backend, strict=True):
        for other in others:
            # Sums in another order may turn a near tie.
            assert len(first & other) >= 0.95 * len(first | other)


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_absent_points_may_stay_in_the_lists(case, variant):
    """As on a device: nothing is left out, and there is room for all wherever branches meet."""
    model, images, _ = case
    explainer = CNNFixations(model, variant=variant)
    left_out = explainer(images[:4])
    with marking():
        marked = explainer(images[:4])
    assert any(len(item) for item in marked.points)
    assert [item.tolist() for item in marked.points] == [item.tolist() for item in left_out.points]
    assert torch.equal(marked.heatmap, left_out.heatmap)


def class_sensitivity(method, model, images):
    """Distance between the maps of two classes, each scaled to unit length (Nie et al., 2018, Fig. 7)."""
    both = method(model)(images, torch.tensor([[100, 700]] * len(images))).attribution
    first, second = functional.normalize(both.flatten(1), dim=1).view(len(images), 2, -1).unbind(1)
    return float((first - second).norm(dim=1).mean())


def test_of_three_only_saliency_is_sensitive_to_the_class(case):
    model, images, _ = case
    saliency, deconvnet, guided = (
        class_sensitivity(m, model, images[:8]) for m in (Saliency, DeconvNet, GuidedBackprop)
    )
    assert saliency > 1.5 * deconvnet
    assert saliency > 1.5 * guided


def randomized(model, names):
    """A copy in which the convolutions of these names are drawn anew, from weights of the same size."""
    copied = copy.deepcopy(model)
    for name in names:
        weight = copied.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(torch.randn_like(weight) * weight.std())
    return copied


def likeness(method, model, other, images):
    one, two = (method(m)(images, 100).attribution.flatten(1) for m in (model, other))
    return float(functional.cosine_similarity(one, two).mean())


def test_guided_backprop_hardly_sees_the_upper_weights(case):
    """Nie et al., section 4.3: it is the lower layers that make its picture, whatever is above."""
    model, images, _ = case
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    upper, lower = randomized(model, layers[-(len(layers) // 4) :]), randomized(model, layers[:2])
    above = likeness(GuidedBackprop, model, upper, images[:4])
    assert above > likeness(GuidedBackprop, model, lower, images[:4]) + 0.2
    assert above > likeness(Saliency, model, upper, images[:4]) + 0.2
