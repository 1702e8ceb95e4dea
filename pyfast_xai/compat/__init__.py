"""Classes of Captum, pytorch-grad-cam and torch-cam over the readings of this library: change the import, that is all.

from pyfast_xai.compat.captum import GuidedBackprop      # was: from captum.attr import GuidedBackprop
from pyfast_xai.compat.grad_cam import GradCAM           # was: from pytorch_grad_cam import GradCAM
from pyfast_xai.compat.torchcam import GradCAM           # was: from torchcam.methods import GradCAM

Where a result differs from the peer's, docs/migration says why.
"""
