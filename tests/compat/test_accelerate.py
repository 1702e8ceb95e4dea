"""Drop-in classes on replays: what they return is what they return of a recorded model, up to rounding."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import compat
from pyfast_xai.compat import acceleration
from pyfast_xai.compat.captum import (
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
)
from pyfast_xai.compat.grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, GuidedBackpropReLUModel, RefineCAM
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.replay_trial import ReplayTrial

CALLS = 12


class Small(nn.Module):
    """Takes one tensor or two, and a number."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.rest = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, other=None, scale=1.0):
        x = functional.relu_(self.norm(self.conv(x)))
        x = functional.relu_(self.rest(x if other is None else x * (1 + other)))
        return self.fc(x.mean((2, 3))) * scale


@pytest.fixture
def model():
    return Small().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 12)


@pytest.fixture(autouse=True)
def _as_before():
    before = acceleration.accelerate._mode
    yield
    acceleration.accelerate._mode = before


@pytest.fixture
def replays(monkeypatch):
    """Replays count as faster, and this is how many calls they served."""
    served = []

    class Timed(ReplayTrial):
        def __init__(self, *args, **settings):
            clock = {"stopwatch": lambda device, threads: lambda: 1.0 + self.recorded, "share": 1e9}
            super().__init__(*args, **{**settings, **clock})

        recorded = True

        def _timed(self, run, device, **waits):
            self.recorded = True
            return super()._timed(run, device, **waits)

        def _replay(self, actual, run):
            before = self._replayed.replays
            result = super()._replay(actual, run)
            served.append(self._replayed.replays > before)
            self.recorded = False
            return result

    monkeypatch.setattr(acceleration, "ReplayTrial", Timed)
    return served


METHODS = {
    "saliency": lambda model: (Saliency(model), {}),
    "guided-backprop": lambda model: (GuidedBackprop(model), {}),
    "deconvolution": lambda model: (Deconvolution(model), {}),
    "input-x-gradient": lambda model: (InputXGradient(model), {}),
    "integrated-gradients": lambda model: (IntegratedGradients(model), {"n_steps": 4}),
    "integrated-gradients-in-parts": lambda model: (
        IntegratedGradients(model),
        {"n_steps": 6, "internal_batch_size": 4, "return_convergence_delta": True},
    ),
    "noise-tunnel": lambda model: (NoiseTunnel(Saliency(model)), {"nt_samples": 2, "stdevs": 0.1}),
    "grad-cam": lambda model: (LayerGradCam(model, model.rest), {}),
    "grad-cam-at-input": lambda model: (LayerGradCam(model, model.rest), {"attribute_to_layer_input": True}),
    "grad-cam-below-a-batch-norm": lambda model: (LayerGradCam(model, model.conv), {"attr_dim_summation": False}),
    "guided-grad-cam": lambda model: (GuidedGradCam(model, model.rest), {}),
}


def close(result, expected):
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_captums_classes_return_what_they_do_of_a_recorded_model(model, images, replays, name):
    (plain, settings), (tried, _) = METHODS[name](model), METHODS[name](copy.deepcopy(model))
    for call in range(CALLS):
        options = images * (1 + call / 8)
        torch.manual_seed(call)
        with compat.accelerate(False):
            expected = plain.attribute(options, target=[1, 3], **settings)
        torch.manual_seed(call)
        with compat.accelerate("auto"):
            close(tried.attribute(options, target=[1, 3], **settings), expected)
    assert any(replays)


def test_inputs_in_tuples_and_further_arguments(model, images, replays):
    plain, tried = Saliency(model), Saliency(model)
    other = torch.rand(2, 1, 12, 12)
    for _ in range(CALLS):
        for more in ((0.5,), (2.0,)):
            settings = {"target": 1, "additional_forward_args": more}
            with compat.accelerate(False):
                expected = plain.attribute((images, other), **settings)
            with compat.accelerate("auto"):
                result = tried.attribute((images, other), **settings)
            close(result, expected)
    assert any(replays)


def test_a_tensor_that_comes_twice_has_both_gradients(replays):
    class Product(nn.Module):
        def forward(self, x, y):
            return (x * y.sin()).sum(1)

    x, method = torch.rand(2, 3), InputXGradient(Product())
    expected = method.attribute((x, x))
    with compat.accelerate("auto"):
        for _ in range(CALLS):
            close(method.attribute((x, x)), expected)
    assert any(replays)


CAMS = {
    "grad-cam": lambda model: GradCAM(model, [model.rest]),
    "two-layers": lambda model: GradCAMPlusPlus(model, [model.norm, model.rest]),
    "eigen-cam": lambda model: EigenCAM(model, [model.rest]),
    "refine-cam": lambda model: RefineCAM(model, [model.norm, model.rest]),
    "guided-backprop": lambda model: GuidedBackpropReLUModel(model),
}


@pytest.mark.parametrize("name", CAMS)
def test_classes_of_pytorch_grad_cam_return_what_they_do_of_a_recorded_model(model, images, replays, name):
    plain, tried = CAMS[name](model), CAMS[name](copy.deepcopy(model))
    for call in range(CALLS):
        options = images * (1 + call / 8)
        with compat.accelerate(False):
            expected = plain(options)
        with compat.accelerate("auto"):
            np.testing.assert_allclose(tried(options), expected, rtol=1e-3, atol=1e-3)
    assert any(replays)


def test_on_replays_from_the_first_call(model, images):
    method = Saliency(model)
    with compat.accelerate(False):
        expected = method.attribute(images, target=1)
    with compat.accelerate(True):
        for _ in range(3):
            close(method.attribute(images, target=1), expected)
    (kind,) = method._replays._kinds.values()
    assert kind._pinned.replays > 0


@pytest.mark.parametrize("mode", [True, "auto"], ids=["on", "auto"])
@pytest.mark.usefixtures("replays")
def test_hooks_of_the_user_run_in_every_call(model, images, mode):
    method, recorded = Saliency(model), []
    with compat.accelerate(mode):
        for _ in range(CALLS):
            method.attribute(images, target=1)
        model.norm.register_forward_hook(lambda *_: recorded.append(1))
        before = len(recorded)
        for _ in range(3):
            method.attribute(images, target=1)
    assert len(recorded) - before == 3


@pytest.mark.parametrize("mode", [True, "auto"], ids=["on", "auto"])
@pytest.mark.usefixtures("replays")
def test_no_attribution_is_of_the_model_as_it_was(model, images, mode):
    method = Saliency(model)
    with compat.accelerate(mode):
        for _ in range(CALLS):
            method.attribute(images, target=1)
        model.conv.weight.data.mul_(-1)
        close(method.attribute(images, target=1), Saliency(copy.deepcopy(model)).attribute(images, target=1))


def test_functions_are_recorded(model, images, replays):
    method = Saliency(lambda x: model(x))
    with compat.accelerate("auto"):
        for _ in range(CALLS):
            method.attribute(images, target=1)
    assert not replays


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_begin_anew(model, images, copied):
    method = Saliency(model)
    with compat.accelerate("auto"):
        for _ in range(5):
            method.attribute(images, target=1)
        other = copied(method)
        assert other.forward_func is not model
        assert torch.equal(
            other.attribute(images, target=1), Saliency(copy.deepcopy(model)).attribute(images, target=1)
        )


def test_the_environment_says_what_nobody_has_set(monkeypatch):
    monkeypatch.setattr(acceleration.accelerate, "_mode", None)
    monkeypatch.delenv("PYFAST_XAI_COMPAT_ACCELERATE", raising=False)
    assert acceleration.mode() == "auto"
    monkeypatch.setenv("PYFAST_XAI_COMPAT_ACCELERATE", "off")
    assert acceleration.mode() is False
    monkeypatch.setenv("PYFAST_XAI_COMPAT_ACCELERATE", "on")
    assert acceleration.mode() is True
    with compat.accelerate(False):
        assert acceleration.mode() is False
    monkeypatch.setenv("PYFAST_XAI_COMPAT_ACCELERATE", "yes")
    with pytest.raises(InputError, match="must be auto, on or off, got 'yes'"):
        acceleration.mode()
    with pytest.raises(InputError, match="mode must be one of True, False, 'auto', got 'on'"):
        compat.accelerate("on")
