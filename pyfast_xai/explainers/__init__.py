"""One file a paper or family; all are called alike and return an `Explanation`."""

from pyfast_xai.explainers.ablation_cam import AblationCAM, ShapleyCAM
from pyfast_xai.explainers.activation_cams import FEM, KPCACAM, RandomCAM
from pyfast_xai.explainers.attention import AttentionRelevance, AttentionRollout, LeGrad
from pyfast_xai.explainers.backprop import (
    DeconvNet,
    GuidedBackprop,
    InputXGradient,
    Saliency,
    SmoothGrad,
)
from pyfast_xai.explainers.cam import (
    CAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    GuidedGradCAM,
    HiResCAM,
    LayerCAM,
    RefineCAM,
    SegEigenCAM,
    XGradCAM,
)
from pyfast_xai.explainers.clear import CLEAR
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.consensus import Consensus
from pyfast_xai.explainers.crp import CRP
from pyfast_xai.explainers.deep_lift import DeepLift, DeepLiftShap, GradientShap
from pyfast_xai.explainers.detection_target import DetectionTarget
from pyfast_xai.explainers.dff import DeepFeatureFactorization
from pyfast_xai.explainers.drise import DRISE
from pyfast_xai.explainers.eigen_cam import EigenCAM
from pyfast_xai.explainers.excitation import ExcitationBackprop
from pyfast_xai.explainers.extremal_perturbation import ExtremalPerturbation
from pyfast_xai.explainers.feature_ablation import FeatureAblation, FeaturePermutation
from pyfast_xai.explainers.fgvis import FGVis
from pyfast_xai.explainers.finer_cam import FinerCAM
from pyfast_xai.explainers.fixations import CNNFixations
from pyfast_xai.explainers.forgrad import FORGrad
from pyfast_xai.explainers.full_grad import FullGrad
from pyfast_xai.explainers.hsic import HSIC
from pyfast_xai.explainers.lime import LIME
from pyfast_xai.explainers.lrp import LRP
from pyfast_xai.explainers.meaningful_perturbation import MeaningfulPerturbation
from pyfast_xai.explainers.occlusion import Occlusion
from pyfast_xai.explainers.path_methods import BlurIG, GuidedIG, IntegratedGradients
from pyfast_xai.explainers.relevance_maximization import RelMax
from pyfast_xai.explainers.rise import RISE
from pyfast_xai.explainers.score_cam import ISCAM, SSCAM, ScoreCAM
from pyfast_xai.explainers.sess import SESS
from pyfast_xai.explainers.shapley import KernelShap, ShapleyValues, ShapleyValueSampling
from pyfast_xai.explainers.smooth_grad_cam import SmoothGradCAMPlusPlus
from pyfast_xai.explainers.sobol import Sobol
from pyfast_xai.explainers.xrai import XRAI

METHODS: dict[str, type[Explainer]] = {
    explainer.method: explainer
    for explainer in (
        *(CNNFixations, EigenCAM, Saliency, DeconvNet, GuidedBackprop),
        *(InputXGradient, SmoothGrad, IntegratedGradients, FGVis, CLEAR),
        *(CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, ExcitationBackprop, Consensus),
        *(HiResCAM, LayerCAM, XGradCAM, GradCAMElementWise, EigenGradCAM, SegEigenCAM, FullGrad),
        *(ScoreCAM, SSCAM, ISCAM, AblationCAM, ShapleyCAM, DeepFeatureFactorization),
        *(AttentionRollout, AttentionRelevance, LeGrad),
        *(SmoothGradCAMPlusPlus, FinerCAM, RefineCAM, FEM, KPCACAM, RandomCAM, SESS),
        *(BlurIG, GuidedIG, XRAI, FORGrad),
        *(LRP, CRP, DeepLift, DeepLiftShap, GradientShap),
        *(Occlusion, RISE, DRISE, LIME, MeaningfulPerturbation),
        *(FeatureAblation, FeaturePermutation, KernelShap, ShapleyValueSampling, ShapleyValues, HSIC, Sobol),
        ExtremalPerturbation,
    )
}

__all__ = [
    "CAM",
    "CLEAR",
    "CRP",
    "DRISE",
    "FEM",
    "HSIC",
    "ISCAM",
    "KPCACAM",
    "LIME",
    "LRP",
    "METHODS",
    "RISE",
    "SESS",
    "SSCAM",
    "XRAI",
    "AblationCAM",
    "AttentionRelevance",
    "AttentionRollout",
    "BlurIG",
    "CNNFixations",
    "Consensus",
    "DeconvNet",
    "DeepFeatureFactorization",
    "DeepLift",
    "DeepLiftShap",
    "DetectionTarget",
    "EigenCAM",
    "EigenGradCAM",
    "ExcitationBackprop",
    "Explainer",
    "ExtremalPerturbation",
    "FGVis",
    "FORGrad",
    "FeatureAblation",
    "FeaturePermutation",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCAM",
    "GuidedIG",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerCAM",
    "LeGrad",
    "MeaningfulPerturbation",
    "Occlusion",
    "RandomCAM",
    "RefineCAM",
    "RelMax",
    "Saliency",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "ShapleyValueSampling",
    "ShapleyValues",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "Sobol",
    "XGradCAM",
]
