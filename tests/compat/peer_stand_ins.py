"""A pytest plugin that puts our classes in the place of a peer's, before its own tests import them.

`PEER_STAND_INS` names the peer. The peer is installed: what is not replaced is its own.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
importlib.import_module("conftest")  # torchvision beside a CPU build of torch


def replace(package, ours, places):
    """Our classes under the names and in the modules of a package, and at its top where they are there, too."""
    top = importlib.import_module(package)
    for name, module in places.items():
        actual = getattr(ours, name)
        setattr(importlib.import_module(module), name, actual)
        if hasattr(top, name):
            setattr(top, name, actual)


def captum():
    from pyfast_xai.compat import captum as ours

    core = "captum.attr._core"
    places = {
        "Saliency": f"{core}.saliency",
        "GuidedBackprop": f"{core}.guided_backprop_deconvnet",
        "Deconvolution": f"{core}.guided_backprop_deconvnet",
        "GuidedGradCam": f"{core}.guided_grad_cam",
        "LayerGradCam": f"{core}.layer.grad_cam",
        "Occlusion": f"{core}.occlusion",
        "InputXGradient": f"{core}.input_x_gradient",
        "IntegratedGradients": f"{core}.integrated_gradients",
        "NoiseTunnel": f"{core}.noise_tunnel",
    }
    replace("captum.attr", ours, places)


def grad_cam():
    from pyfast_xai.compat import grad_cam as ours

    utils = "pytorch_grad_cam.utils"
    places = {
        "GradCAM": "pytorch_grad_cam.grad_cam",
        "GradCAMPlusPlus": "pytorch_grad_cam.grad_cam_plusplus",
        "EigenCAM": "pytorch_grad_cam.eigen_cam",
        "GuidedBackpropReLUModel": "pytorch_grad_cam.guided_backprop",
        "get_2d_projection": f"{utils}.svd_on_activations",
        "ClassifierOutputTarget": f"{utils}.model_targets",
        "FasterRCNNBoxScoreTarget": f"{utils}.model_targets",
        "show_cam_on_image": f"{utils}.image",
        "preprocess_image": f"{utils}.image",
    }
    replace("pytorch_grad_cam", ours, places)
    # Networks as they are made: shapes are all that is asked of them, and nothing is downloaded.
    models = importlib.import_module("torchvision.models")
    for name in ("resnet18", "vgg11"):
        made = getattr(models, name)
        setattr(models, name, lambda made=made, **settings: made(weights=None))


def torchcam():
    from pyfast_xai.compat import torchcam as ours

    for module in ("methods", "metrics", "utils"):
        top = importlib.import_module(f"torchcam.{module}")
        theirs = {name: getattr(top, name) for name in ours.__all__ if hasattr(top, name)}
        places = {name: one.__module__ for name, one in theirs.items() if hasattr(one, "__module__")}
        replace(f"torchcam.{module}", ours, places)
    importlib.import_module("torchcam.methods.core")._CAM = type("_CAM", (ours.Extractor,), {})


def zennit():
    """Rules that are put on a module: its forward is recorded, its backward is a walk."""
    from pyfast_xai.compat.recording import record_call
    from pyfast_xai.rules.gradient import DECONVNET, GUIDED

    class Walk(torch.autograd.Function):
        @staticmethod
        def forward(context, options, module, table):
            context.recording = record_call(module, (options,), overlay=table)
            return context.recording.output

        @staticmethod
        def backward(context, gradient):
            result = context.recording.gradients(lambda out: out * gradient, [context.recording.inputs[0]])
            return result[0], None, None

    def rule(table):
        class Rule:
            def register(self, module):
                recording = False

                def instead(module, options, output):
                    nonlocal recording
                    if recording:
                        return None
                    recording = True
                    try:
                        return Walk.apply(options[0], module, table)
                    finally:
                        recording = False

                return module.register_forward_hook(instead)

        return Rule

    rules = importlib.import_module("zennit.rules")
    for name, table in (("ReLUDeconvNet", DECONVNET), ("ReLUGuidedBackprop", GUIDED)):
        actual = rule(table)
        actual.__name__ = name
        setattr(rules, name, actual)


PEERS = {"captum": captum, "grad-cam": grad_cam, "torchcam": torchcam, "zennit": zennit}
PEERS[os.environ["PEER_STAND_INS"]]()
