"""Attribution methods with the signatures of Captum 0.9 (`captum.attr`)."""

from pyfast_xai.compat.captum import metrics, visualization
from pyfast_xai.compat.captum.deep_lift import (
    DeepLift,
    DeepLiftShap,
    GradientShap,
    LayerDeepLift,
    LayerDeepLiftShap,
)
from pyfast_xai.compat.captum.feature_ablation import (
    FeatureAblation,
    FeaturePermutation,
    LayerFeatureAblation,
    LayerFeaturePermutation,
    NeuronFeatureAblation,
)
from pyfast_xai.compat.captum.gradients import Deconvolution, GuidedBackprop, InputXGradient, Saliency
from pyfast_xai.compat.captum.integrated_gradients import IntegratedGradients
from pyfast_xai.compat.captum.layer_methods import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from pyfast_xai.compat.captum.layers import GuidedGradCam, LayerAttribution, LayerGradCam
from pyfast_xai.compat.captum.lime import KernelShap, Lime, LimeBase
from pyfast_xai.compat.captum.lrp import LRP, LayerLRP
from pyfast_xai.compat.captum.neurons import (
    NeuronConductance,
    NeuronDeconvolution,
    NeuronDeepLift,
    NeuronDeepLiftShap,
    NeuronGradient,
    NeuronGradientShap,
    NeuronGuidedBackprop,
    NeuronIntegratedGradients,
)
from pyfast_xai.compat.captum.noise_tunnel import NoiseTunnel
from pyfast_xai.compat.captum.occlusion import Occlusion
from pyfast_xai.compat.captum.shapley import ShapleyValues, ShapleyValueSampling

__all__ = [
    "LRP",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "LayerActivation",
    "LayerAttribution",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "Lime",
    "LimeBase",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NeuronFeatureAblation",
    "NeuronGradient",
    "NeuronGradientShap",
    "NeuronGuidedBackprop",
    "NeuronIntegratedGradients",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
    "metrics",
    "visualization",
]
