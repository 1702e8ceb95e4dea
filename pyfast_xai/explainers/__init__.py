"""One file a paper or family; all are called alike and return an `Explanation`."""

from pyfast_xai.explainers.backprop import (
    DeconvNet,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from pyfast_xai.explainers.base import Explainer
from pyfast_xai.explainers.cam import CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM
from pyfast_xai.explainers.clear import CLEAR
from pyfast_xai.explainers.eigen_cam import EigenCAM
from pyfast_xai.explainers.excitation import ExcitationBackprop
from pyfast_xai.explainers.fgvis import FGVis
from pyfast_xai.explainers.fixations import CNNFixations
from pyfast_xai.explainers.lime import LIME
from pyfast_xai.explainers.meaningful_perturbation import MeaningfulPerturbation
from pyfast_xai.explainers.occlusion import Occlusion
from pyfast_xai.explainers.rise import RISE

METHODS: dict[str, type[Explainer]] = {
    explainer.method: explainer
    for explainer in (
        *(CNNFixations, EigenCAM, Saliency, DeconvNet, GuidedBackprop),
        *(InputXGradient, SmoothGrad, IntegratedGradients, FGVis, CLEAR),
        *(CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, ExcitationBackprop),
        *(Occlusion, RISE, LIME, MeaningfulPerturbation),
    )
}

__all__ = [
    "CAM",
    "CLEAR",
    "LIME",
    "METHODS",
    "RISE",
    "CNNFixations",
    "DeconvNet",
    "EigenCAM",
    "ExcitationBackprop",
    "Explainer",
    "FGVis",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "MeaningfulPerturbation",
    "Occlusion",
    "Saliency",
    "SmoothGrad",
]
