"""torch-cam's extractors here and there; and where it is wrong."""

import copy
import gc
import itertools
import logging

import numpy as np
import pytest
import torch
from case_ids import case_id
from PIL import Image
from torch import nn

from pyfast_xai.compat import torchcam as ours
from pyfast_xai.errors import InputError

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchcam.methods")


def ask(kind, model, images, layers, class_idx, normalized=True, **settings):
    with kind(model, layers, **settings) as extractor:
        scores = model(images)
        return extractor(class_idx, scores, normalized)


def same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert not one.requires_grad
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", ["relu2", ["relu1", "relu2"]], ids=case_id)
@pytest.mark.parametrize("class_idx", [2, [1, 4, 0]], ids=case_id)
@pytest.mark.parametrize("normalized", [False, True])
def test_grad_cam(layers, class_idx, normalized, theirs, build, unchanged):
    model, images = build("Plain"), torch.randn(3, 3, 10, 8, dtype=DOUBLE)
    with unchanged(model, images):
        actual = ask(ours.GradCAM, model, images, layers, class_idx, normalized)
    same(actual, ask(theirs.GradCAM, model, images, layers, class_idx, normalized))


@pytest.mark.parametrize("class_idx", [2, [1, 4, 0]], ids=case_id)
@pytest.mark.parametrize("normalized", [False, True])
def test_cam(class_idx, normalized, theirs, build, unchanged):
    model, images = build("Plain"), torch.randn(3, 3, 10, 8, dtype=DOUBLE)
    for fc_layer in ("fc", model.fc, None):
        with unchanged(model, images), torch.no_grad():
            actual = ask(ours.CAM, model, images, model.relu2, class_idx, normalized, fc_layer=fc_layer)
        with torch.no_grad():
            same(actual, ask(theirs.CAM, model, images, "relu2", class_idx, normalized, fc_layer="fc"))


def test_grad_cam_plus_plus_is_the_paper_s(theirs, build):
    """There the division is done on a copy, and the weights are sums of g^2 max(g, 0)."""
    model, images = build("Plain"), torch.randn(2, 3, 10, 8, dtype=DOUBLE)
    actual = ask(ours.GradCAMpp, model, images, "relu2", 2, False)[0]

    activation = model.relu2(model.conv2(model.pool(model.relu1(model.conv1(images))))).detach().requires_grad_()
    gradient = torch.autograd.grad(model.fc(activation.mean((2, 3)))[:, 2].sum(), activation)[0]
    expected, undivided = torch.zeros_like(actual), torch.zeros_like(actual)
    for n, k in itertools.product(range(2), range(8)):
        total, weight, wrong = activation[n, k].sum(), 0.0, 0.0
        for g in gradient[n, k].flatten():
            if g > 0:
                weight += g * g / (2 * g * g + total * g**3 + 1e-8) * g
                wrong += g**3
        expected[n] += weight * activation[n, k].detach()
        undivided[n] += wrong * activation[n, k].detach()
    torch.testing.assert_close(actual, expected.clamp_min(0).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(ask(theirs.GradCAMpp, model, images, "relu2", 2, False)[0], undivided.detach())


def test_a_layer_that_is_overwritten_counts_as_it_was(build):
    plain, inplace = build("Plain"), build("Plain", inplace=True)
    inplace.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 10, 8, dtype=DOUBLE)
    for kind in (ours.GradCAM, ours.GradCAMpp):
        same(*(ask(kind, model, images, "conv2", 1) for model in (plain, inplace)))


def test_volumes_and_tokens(theirs, build):
    model, volume = build("Volume"), torch.randn(2, 1, 4, 5, 6, dtype=DOUBLE)
    same(ask(ours.GradCAM, model, volume, "relu", 1), ask(theirs.GradCAM, model, volume, "relu", 1))

    def transform(tensor):
        return tensor.mT.unflatten(2, (3, 4))

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.norm(x).exp().mean(1))

    model, tokens = Tokens().double(), torch.randn(2, 12, 6, dtype=DOUBLE)
    settings = {"reshape_transform": transform}
    same(
        ask(ours.GradCAM, model, tokens, "norm", 1, **settings),
        ask(theirs.GradCAM, model, tokens, "norm", 1, **settings),
    )


def test_targets_and_asking_again(theirs, build):
    model, images = build("Plain"), torch.randn(3, 3, 10, 8, dtype=DOUBLE)
    chosen = [lambda row: row[1], lambda row: row[2:].logsumexp(0), lambda row: row[0]]
    result = []
    for library in (ours, theirs):
        with library.GradCAM(model, "relu2") as extractor:
            scores = model(images)
            result.append(extractor(scores=scores, targets=chosen, retain_graph=True))
            repeated = extractor(scores=scores, targets=lambda row: row.sum())
            result[-1] += repeated
    same(*result)


def test_fuse_cams(theirs):
    for maps in ([torch.rand(2, 3, 4), torch.rand(2, 6, 5)], [torch.rand(2, 3, 4, 5), torch.rand(2, 6, 2, 5)]):
        for size in (None, tuple(n + 2 for n in maps[0].shape[1:])):
            torch.testing.assert_close(
                ours.Extractor.fuse_cams(maps, size), theirs.GradCAM.fuse_cams([item.clone() for item in maps], size)
            )


def test_layers_are_found(theirs, build, caplog):
    with caplog.at_level(logging.WARNING, "pyfast_xai"), ours.GradCAM(build("Plain", torch.float32)) as extractor:
        assert extractor.target_names == ["relu2"]
        assert repr(extractor) == "GradCAM(target_layer=['relu2'])"
    assert "target_layer was not given and is taken to be 'relu2'" in caplog.text
    models = pytest.importorskip("torchvision.models")
    for name in ("resnet18", "mobilenet_v2", "densenet121"):
        model = models.get_model(name, weights=None).eval()
        with (
            ours.GradCAM(model, input_shape=(3, 64, 64)) as actual,
            theirs.GradCAM(model, input_shape=(3, 64, 64)) as peer,
        ):
            assert actual.target_names == peer.target_names


def handles(model):
    return [item for module in model.modules() for item in module._forward_hooks.values()]


def test_no_hook_is_left_behind(build, unchanged):
    model, images = build("Plain"), torch.randn(1, 3, 10, 8, dtype=DOUBLE)
    with unchanged(model):
        with pytest.raises(ZeroDivisionError), ours.GradCAM(model, "relu2"):
            raise ZeroDivisionError
        extractor = ours.GradCAM(model, "relu2")
        assert len(handles(model)) == 1
        model(images)
        del extractor  # without `with`, without `remove_hooks`
        gc.collect()
        assert not handles(model)
        with pytest.raises(InputError, match="fc_layer must name a module of the model such as 'fc'"):
            ours.CAM(model, "relu2", "fcc")
        extractor = ours.GradCAM(model, "relu2")
        extractor.remove_hooks()
        extractor.remove_hooks()
    with unchanged(model), ours.GradCAM(model, "relu2") as extractor, extractor._hooks_off():
        model(images)
        assert extractor.hook_a == [None]


def test_the_forward_of_the_user_is_what_it_would_be(build):
    model, images = build("Plain", inplace=True), torch.randn(2, 3, 10, 8, dtype=DOUBLE)
    expected = copy.deepcopy(model)(images)
    with ours.GradCAM(model, ["conv2", "relu1"]):
        scores = model(images)
    assert torch.equal(scores, expected)
    scores.sum().backward()
    assert model.conv1.weight.grad.isfinite().all()


BAD = {
    "no such layer": (
        lambda m: ours.GradCAM(m, "relu3"),
        r"target_layer must name a module of the model such as 'relu2'",
    ),
    "another model's": (lambda m: ours.GradCAM(m, nn.ReLU()), "target_layer must be a module of the model"),
    "a number": (lambda m: ours.GradCAM(m, 3), "target_layer must be a module or its name, got int"),
    "two for CAM": (lambda m: ours.CAM(m, ["relu1", "relu2"]), "target_layer must be one layer for CAM, got 2"),
    "no forward": (lambda m: ours.GradCAM(m, "relu2")(1, torch.zeros(1, 5)), "the model must run before maps"),
    "no class": (lambda m: ours.GradCAM(m, "relu2")(), "exactly one of them"),
    "a negative class": (lambda m: after(m)(-1, m(IMAGE)), "class_idx must be ints of at least 0"),
    "a class too many": (lambda m: after(m)(5, m(IMAGE)), r"class_idx must lie in \[0, 5\), got 5"),
    "classes of another batch": (lambda m: after(m)([1, 2], m(IMAGE)), "one for each of 1 images, got 2"),
    "no scores": (lambda m: after(m)(1), "scores must be given"),
    "targets for CAM": (lambda m: after(m, ours.CAM)(targets=len), "does not support others than classes"),
    "a target of many": (lambda m: after(m)(scores=m(IMAGE), targets=lambda row: row), "scalar tensor"),
    "no maps to fuse": (lambda m: ours.GradCAM.fuse_cams([]), "cams must hold at least one map"),
}
IMAGE = torch.ones(1, 3, 8, 8, dtype=DOUBLE)


def after(model, kind=ours.GradCAM):
    extractor = kind(model, "relu2")
    model(IMAGE)
    return extractor


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_sentence(case, build):
    call, message = BAD[case]
    model = build("Plain")
    with pytest.raises(InputError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_scores_without_a_graph_are_refused(build):
    model = build("Plain")
    with ours.GradCAM(model, "relu2") as extractor:
        with torch.no_grad():
            scores = model(IMAGE)
        with pytest.raises(RuntimeError, match="not connected to every target layer"):
            extractor(1, scores)


def test_overlay_mask():
    utils = pytest.importorskip("torchcam.utils")
    rng = np.random.default_rng(0)
    mask = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8))
    for shape in ((9, 7), (9, 7, 3)):
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for settings in ({}, {"alpha": 0.2}, {"colormap": "viridis"}):
            actual, expected = (
                np.asarray(f(picture, mask, **settings)) for f in (ours.overlay_mask, utils.overlay_mask)
            )
            assert abs(actual.astype(int) - expected.astype(int)).max() <= 1  # Pillow's own rounding there
    with pytest.raises(InputError, match="between 0 and 1"):
        ours.overlay_mask(picture, mask, alpha=1.0)
    with pytest.raises(TypeError, match=r"PIL\.Image"):
        ours.overlay_mask(np.zeros((3, 3)), mask)
