"""Classes of Captum, pytorch-grad-cam, torch-cam and zennit over the readings of this library: change the import.

from pyfast_xai.compat.captum import GuidedBackprop      # was: from captum.attr import GuidedBackprop
from pyfast_xai.compat.grad_cam import GradCAM           # was: from pytorch_grad_cam import GradCAM
from pyfast_xai.compat.torchcam import GradCAM           # was: from torchcam.methods import GradCAM
from pyfast_xai.compat.zennit.composites import EpsilonPlus  # was: from zennit.composites import EpsilonPlus

Where a result differs from the peer's, docs/migration says why. Models are replayed where that is faster;
`accelerate(False)` has every call recorded.
"""

from pyfast_xai.compat.acceleration import accelerate

__all__ = ["accelerate"]
