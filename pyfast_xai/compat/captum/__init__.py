"""Attribution methods with the signatures of Captum 0.9 (`captum.attr`)."""

from pyfast_xai.compat.captum.gradients import Deconvolution, GuidedBackprop, InputXGradient, Saliency
from pyfast_xai.compat.captum.integrated_gradients import IntegratedGradients
from pyfast_xai.compat.captum.layers import GuidedGradCam, LayerAttribution, LayerGradCam
from pyfast_xai.compat.captum.noise_tunnel import NoiseTunnel
from pyfast_xai.compat.captum.occlusion import Occlusion

__all__ = [
    "Deconvolution",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "LayerAttribution",
    "LayerGradCam",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
]
