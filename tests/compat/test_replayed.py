"""Methods of many forwards replay a model within one call: the peers' numbers, with few runs of the model itself."""

import importlib
from typing import ClassVar

import pytest
import torch
from torch import nn

from pyfast_xai import compat
from pyfast_xai.acceleration.local_replay import LocalReplay
from pyfast_xai.acceleration.packed_replay import PackedReplay
from pyfast_xai.compat import captum as ours
from pyfast_xai.compat import grad_cam
from pyfast_xai.compat.captum import linear_models

pytestmark = pytest.mark.filterwarnings("ignore:You are providing multiple inputs:UserWarning")

SIDE = 48


class Counted(nn.Module):
    """A network that counts the images that it is run on."""

    runs: ClassVar[dict[str, int]] = {"model": 0}

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2))
        self.middle = nn.Conv2d(8, 12, 3, padding=1)
        self.above = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, 7))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Counted.runs["model"] += len(images)
        return self.above(self.middle(self.below(images)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    Counted.runs = {"model": 0}
    return Counted().eval()


@pytest.fixture
def theirs():
    return pytest.importorskip("captum.attr")


IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
CELLS = torch.arange(SIDE) // 12
GRID = (4 * CELLS[:, None] + CELLS)[None, None]
METHODS = {
    "FeatureAblation": {"feature_mask": GRID},
    "Occlusion": {"sliding_window_shapes": (3, 12, 12), "strides": (3, 12, 12), "perturbations_per_eval": 3},
    "ShapleyValueSampling": {"feature_mask": GRID, "n_samples": 1},
}
SAMPLED = {name: {"feature_mask": GRID, "n_samples": 40} for name in ("KernelShap", "Lime")}
ROWS = 16  # that a replay of 80 samples takes at once


def attributed(library, name, net, seed=0):
    torch.manual_seed(seed)
    settings = {**METHODS, **SAMPLED}[name]
    return method(library, name, net).attribute(IMAGES, target=[3, 5], **settings)


def method(library, name, net):
    """Least squares in place of the penalty of Lime, which leaves nothing of such small scores."""
    if name != "Lime":
        return getattr(library, name)(net)
    models = linear_models if library is ours else importlib.import_module("captum._utils.models.linear_model")
    made = models.LinearRegression() if library is ours else models.SkLearnLinearRegression()
    return library.Lime(net, made)


def same(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_the_model_itself_hardly_runs(name, net, theirs):
    expected = attributed(theirs, name, net)
    needed, net.runs["model"] = net.runs["model"], 0
    with compat.accelerate("auto"):
        actual = attributed(ours, name, net)
    assert needed > 5 * len(IMAGES)
    assert net.runs["model"] == 2 * len(IMAGES), "it is recorded, and runs beside the first replay"
    same(actual, expected)


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_run_together(name, net, theirs):
    expected, state = attributed(theirs, name, net), torch.get_rng_state()
    assert net.runs["model"] == 82
    net.runs["model"] = 0
    with compat.accelerate("auto"):
        actual = attributed(ours, name, net)
    assert torch.equal(torch.get_rng_state(), state), "as many random numbers are drawn"
    assert net.runs["model"] == len(IMAGES) + 2 * ROWS, "a batch is recorded, and runs beside the first replay"
    same(actual, expected)


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_those_of_a_recorded_model(name, net):
    actual = attributed(ours, name, net)
    with compat.accelerate(False):
        same(actual, attributed(ours, name, net), 1e-5)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_one_image(at_once, name, net, theirs):
    results = []
    for library in (theirs, ours):
        net.runs["model"] = 0
        torch.manual_seed(0)
        settings = {**SAMPLED[name], "n_samples": 60, "perturbations_per_eval": at_once}
        results.append(method(library, name, net).attribute(IMAGES[:1], target=3, **settings))
    assert net.runs["model"] < 40
    same(results[1], results[0])


def test_equal_samples_run_once(net, theirs):
    quarters = torch.arange(SIDE) // 24
    settings = {"feature_mask": (2 * quarters[:, None] + quarters)[None, None], "n_samples": 100, "target": [3, 5]}
    results = []
    for library in (theirs, ours):
        net.runs["model"] = 0
        torch.manual_seed(0)
        results.append(library.KernelShap(net).attribute(IMAGES, **settings))
    assert net.runs["model"] <= len(IMAGES) * 2**4, "no coalition runs twice"
    same(results[1], results[0])


class Centred(nn.Module):
    """A network whose rows depend on each other."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        outputs = self.net(images)
        return outputs - outputs.mean(0) / 2


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_a_model_whose_rows_depend_on_each_other(name, net, theirs):
    same(attributed(ours, name, Centred(net)), attributed(theirs, name, Centred(net)))
    assert net.runs["model"] == 2 * 82


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_images_of_a_model_whose_rows_depend_on_each_other(name, net, theirs):
    same(attributed(ours, name, Centred(net)), attributed(theirs, name, Centred(net)))


def test_samples_with_a_model_of_the_callers_own(net, theirs):
    model = importlib.import_module("captum._utils.models.linear_model").SkLearnLinearRegression
    results = []
    for library in (theirs, ours):
        net.runs["model"] = 0
        torch.manual_seed(0)
        results.append(library.Lime(net, model()).attribute(IMAGES, target=[3, 5], **SAMPLED["Lime"]))
    assert net.runs["model"] < 82
    same(results[1], results[0])


@pytest.mark.parametrize("name", [*METHODS, *SAMPLED])
def test_nothing_is_replayed_where_that_is_switched_off(name, net):
    with compat.accelerate(False):
        attributed(ours, name, net)
    assert net.runs["model"] > 5 * len(IMAGES)


@pytest.mark.parametrize("name", [*METHODS, *SAMPLED])
def test_forward_hooks_run(name, net):
    seen = []
    net.middle.register_forward_hook(lambda module, args, result: seen.extend(result))
    attributed(ours, name, net)
    assert len(seen) == net.runs["model"] > 5 * len(IMAGES)


@pytest.mark.parametrize("name", [*METHODS, *SAMPLED])
def test_a_replay_that_differs_is_not_used(name, net, theirs, monkeypatch):
    for kind in (LocalReplay, PackedReplay):
        true = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *args, true=true: 1.1 * true(self, *args))
    same(attributed(ours, name, net), attributed(theirs, name, net))


def test_score_cam_replays_all_but_the_first_batches(net):
    with compat.accelerate(False):
        expected = grad_cam.ScoreCAM(net, [net.middle])(IMAGES)
    cam = grad_cam.ScoreCAM(net, [net.middle])
    cam.batch_size = 2
    net.runs["model"] = 0
    with compat.accelerate("auto"):
        actual = cam(IMAGES)
    assert net.runs["model"] <= 5 * len(IMAGES)
    same(torch.from_numpy(actual), torch.from_numpy(expected))


@pytest.mark.parametrize("batch", [None, 4])
def test_integrated_gradients_of_a_layer_begin_at_the_layer(batch, net, theirs):
    settings = {"target": [3, 5], "n_steps": 20, "internal_batch_size": batch, "baselines": 0.5}
    expected = theirs.LayerIntegratedGradients(net, net.middle).attribute(IMAGES, **settings)
    net.runs["model"] = 0
    same(ours.LayerIntegratedGradients(net, net.middle).attribute(IMAGES, **settings), expected.detach())
    assert net.runs["model"] <= 5 * len(IMAGES)
