"""Pictures of gradients show something: on photographs a good part of the pixels changes."""

import pytest
import torch
from import_file import import_file
from PIL import Image
from torch.nn import functional

from pyfast_xai import GuidedBackprop, InputXGradient, Preprocess, Saliency, demo, load_image

METHODS = [Saliency, GuidedBackprop, InputXGradient]
# Shares of pixels; a change of a tenth of the range is seen.
ENOUGH, SEEN = 0.15, 0.1


def share(pictures, ground):
    return ((pictures - ground).abs().amax(1) > SEEN).float().mean((1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_seen_on_a_sample_photograph(method):
    data = pytest.importorskip("skimage.data")
    shown = Preprocess(96)(Image.fromarray(data.astronaut()))[1][None]
    explanation = method(demo.load())(shown)
    assert share(explanation.overlay(), shown).min() > ENOUGH
    assert share(explanation.rgb(), torch.full_like(shown, 0.5)).min() > ENOUGH


@pytest.fixture(scope="module")
def photographs(real_data):
    files = sorted((real_data / "coco_ccby").glob("*.jpg"))[:4]
    return torch.stack([Preprocess(224)(load_image(file))[1] for file in files])


@pytest.fixture(scope="module", params=["squeezenet1_1", "googlenet_abm_pruned_int8"])
def network(request, real_data):
    zoo = import_file(real_data / "models.py", "real_networks")
    model, meta = zoo.load(request.param)
    return model, lambda shown: zoo.preprocess(255 * shown, meta["prep"]), meta["size"]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_seen_on_photographs(network, photographs, method):
    model, prepare, size = network
    shown = functional.interpolate(photographs, (size, size), mode="bilinear")
    explanation = method(model)(prepare(shown))
    assert share(explanation.overlay(shown), shown).min() > ENOUGH
    assert share(explanation.rgb(), torch.full_like(shown, 0.5)).min() > ENOUGH
