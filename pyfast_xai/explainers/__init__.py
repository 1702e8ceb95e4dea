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
from pyfast_xai.explainers.clear import CLEAR
from pyfast_xai.explainers.eigen_cam import EigenCAM
from pyfast_xai.explainers.fgvis import FGVis
from pyfast_xai.explainers.fixations import CNNFixations

METHODS: dict[str, type[Explainer]] = {
    explainer.method: explainer
    for explainer in (
        *(CNNFixations, EigenCAM, Saliency, DeconvNet, GuidedBackprop),
        *(InputXGradient, SmoothGrad, IntegratedGradients, FGVis, CLEAR),
    )
}

__all__ = [
    "CLEAR",
    "METHODS",
    "CNNFixations",
    "DeconvNet",
    "EigenCAM",
    "Explainer",
    "FGVis",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Saliency",
    "SmoothGrad",
]
