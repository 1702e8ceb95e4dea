"""A pytest plugin that puts our classes in the place of a peer's, before its own tests import them.

`PEER_STAND_INS` names the peer. The peer is installed: what is not replaced is its own.
"""

import contextlib
import importlib
import os
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
importlib.import_module("conftest")  # torchvision beside a CPU build of torch


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
    # Networks as they are made: shapes are all that is asked of them, and nothing is downloaded.
    models = importlib.import_module("torchvision.models")
    for name in ("resnet18", "vgg11"):
        made = getattr(models, name)
        setattr(models, name, lambda made=made, **settings: made(weights=None))


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
