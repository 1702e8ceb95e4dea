"""A pytest plugin that puts our classes in the place of a peer's, before its own tests import them.

`PEER_STAND_INS` names the peer. The peer is installed: what is not replaced is its own. A test that runs longer than
`PEER_TEST_SECONDS` fails, so that one slow test does not keep the others from their results.
"""

import contextlib
import copy
import functools
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
importlib.import_module("conftest")  # torchvision beside a CPU build of torch

SECONDS = float(os.environ["PEER_TEST_SECONDS"])


def _too_slow(signum, frame):
    raise TimeoutError(f"the test ran for longer than {SECONDS:g} seconds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    previous = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def replace(package, *ours):
    """Puts our classes and functions in the place of those of a package, wherever a module of it holds them."""
    names = {
        name: value
        for part in ours
        for name, value in vars(part).items()
        if not name.startswith("_")
        and name != "LayerAttribution"  # a base of classes of Captum's own tests
        and getattr(value, "__module__", "").startswith("pyfast_xai.compat.")
    }
    for part in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        with contextlib.suppress(ImportError):  # needs what is not installed
            importlib.import_module(part.name)
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")]
    replaced = {
        id(value): names[name]
        for module in modules
        for name, value in vars(module).items()
        if name in names and getattr(value, "__module__", "") == module.__name__
    }
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def captum():
    from pyfast_xai.compat import captum as ours

    parts = ("lrp_rules", "metrics", "visualization")
    replace("captum", ours, *(importlib.import_module(f"{ours.__name__}.{name}") for name in parts))


def grad_cam():
    from pyfast_xai.compat import grad_cam as ours

    metrics = [
        importlib.import_module(f"{ours.__name__}.metrics.{name}") for name in ("arcc", "cam_mult_image", "road")
    ]
    replace("pytorch_grad_cam", ours, importlib.import_module(f"{ours.__name__}.metrics"), *metrics)
    # Random weights: the tests compare shapes and results with each other, and nothing is downloaded.
    models = importlib.import_module("torchvision.models")
    models.resnet18 = _copies(models.resnet18)
    models.vgg11 = _copies(models.vgg11, _narrow_classifier)


def _copies(build, change=lambda network: None):
    """A function that builds a network once, with random weights, and returns a fresh copy of it at each call."""

    @functools.cache
    def network():
        built = build(weights=None)
        change(built)
        return built

    @functools.wraps(build)
    def copied(*, weights=None, pretrained=False):
        return copy.deepcopy(network())

    return copied


def _narrow_classifier(vgg):
    """Replaces 4096 hidden units by 256: reading 120 million weights takes most of a test of Score-CAM.

    The tests explain layers of `vgg.features` and one of 1000 classes, which stay.
    """
    linear = importlib.import_module("torch").nn.Linear
    vgg.classifier[0], vgg.classifier[3], vgg.classifier[6] = linear(25088, 256), linear(256, 256), linear(256, 1000)


def torchcam():
    from pyfast_xai.compat import torchcam as ours

    replace("torchcam", ours, importlib.import_module(f"{ours.__name__}.metrics"))
    importlib.import_module("torchcam.methods.core")._CAM = type("_CAM", (ours.Extractor,), {})


def zennit():
    """Rules can be put on a module, as there: its forward is recorded, its backward is a walk by the rule."""
    from pyfast_xai.compat import zennit as package
    from pyfast_xai.rules.relevance import LayerRule

    parts = {name: importlib.import_module(f"{package.__name__}.{name}") for name in package.__all__}
    replace("zennit", *parts.values())
    importlib.import_module("zennit.composites").COMPOSITES.update(parts["composites"].COMPOSITES)

    def register(rule, module):
        composite = parts["core"].Composite(lambda ctx, name, part: rule)
        recording = False

        def instead(module, inputs, output):
            nonlocal recording
            if recording:
                return None
            recording = True
            try:
                return parts["core"].Modified(module, composite)(*inputs)
            finally:
                recording = False

        return module.register_forward_hook(instead)

    LayerRule.register = register


PEERS = {"captum": captum, "grad-cam": grad_cam, "torchcam": torchcam, "zennit": zennit}
PEERS[os.environ["PEER_STAND_INS"]]()
