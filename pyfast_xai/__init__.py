"""Fast visual explanations of CNNs and vision transformers on PyTorch.

from pyfast_xai import CNNFixations, GuidedBackprop, load_image, load_model

net = load_model("torchvision/resnet50", "DEFAULT")
image, _ = net.preprocess(load_image("cat.jpg"))
explanation = CNNFixations(net.model, labels=net.labels)(image[None])
explanation.boxes()
explanation.plot()
GuidedBackprop(net.model)(image[None], target="tabby").attribution
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time names are imported when they are first used
    from pyfast_xai.errors import BackendError as BackendError
    from pyfast_xai.errors import InputError as InputError
    from pyfast_xai.errors import PyFastXaiError as PyFastXaiError
    from pyfast_xai.errors import UnsupportedOpError as UnsupportedOpError
    from pyfast_xai.explainers import CAM as CAM
    from pyfast_xai.explainers import CLEAR as CLEAR
    from pyfast_xai.explainers import CRP as CRP
    from pyfast_xai.explainers import DRISE as DRISE
    from pyfast_xai.explainers import FEM as FEM
    from pyfast_xai.explainers import HSIC as HSIC
    from pyfast_xai.explainers import ISCAM as ISCAM
    from pyfast_xai.explainers import KPCACAM as KPCACAM
    from pyfast_xai.explainers import LIME as LIME
    from pyfast_xai.explainers import LRP as LRP
    from pyfast_xai.explainers import METHODS as METHODS
    from pyfast_xai.explainers import RISE as RISE
    from pyfast_xai.explainers import SESS as SESS
    from pyfast_xai.explainers import SSCAM as SSCAM
    from pyfast_xai.explainers import XRAI as XRAI
    from pyfast_xai.explainers import AblationCAM as AblationCAM
    from pyfast_xai.explainers import AttentionRelevance as AttentionRelevance
    from pyfast_xai.explainers import AttentionRollout as AttentionRollout
    from pyfast_xai.explainers import BlurIG as BlurIG
    from pyfast_xai.explainers import CNNFixations as CNNFixations
    from pyfast_xai.explainers import Consensus as Consensus
    from pyfast_xai.explainers import DeconvNet as DeconvNet
    from pyfast_xai.explainers import DeepFeatureFactorization as DeepFeatureFactorization
    from pyfast_xai.explainers import DeepLift as DeepLift
    from pyfast_xai.explainers import DeepLiftShap as DeepLiftShap
    from pyfast_xai.explainers import DetectionTarget as DetectionTarget
    from pyfast_xai.explainers import EigenCAM as EigenCAM
    from pyfast_xai.explainers import EigenGradCAM as EigenGradCAM
    from pyfast_xai.explainers import ExcitationBackprop as ExcitationBackprop
    from pyfast_xai.explainers import Explainer as Explainer
    from pyfast_xai.explainers import ExtremalPerturbation as ExtremalPerturbation
    from pyfast_xai.explainers import FeatureAblation as FeatureAblation
    from pyfast_xai.explainers import FeaturePermutation as FeaturePermutation
    from pyfast_xai.explainers import FGVis as FGVis
    from pyfast_xai.explainers import FinerCAM as FinerCAM
    from pyfast_xai.explainers import FORGrad as FORGrad
    from pyfast_xai.explainers import FullGrad as FullGrad
    from pyfast_xai.explainers import GradCAM as GradCAM
    from pyfast_xai.explainers import GradCAMElementWise as GradCAMElementWise
    from pyfast_xai.explainers import GradCAMPlusPlus as GradCAMPlusPlus
    from pyfast_xai.explainers import GradientShap as GradientShap
    from pyfast_xai.explainers import GuidedBackprop as GuidedBackprop
    from pyfast_xai.explainers import GuidedGradCAM as GuidedGradCAM
    from pyfast_xai.explainers import GuidedIG as GuidedIG
    from pyfast_xai.explainers import HiResCAM as HiResCAM
    from pyfast_xai.explainers import InputXGradient as InputXGradient
    from pyfast_xai.explainers import IntegratedGradients as IntegratedGradients
    from pyfast_xai.explainers import KernelShap as KernelShap
    from pyfast_xai.explainers import LayerCAM as LayerCAM
    from pyfast_xai.explainers import LeGrad as LeGrad
    from pyfast_xai.explainers import MeaningfulPerturbation as MeaningfulPerturbation
    from pyfast_xai.explainers import Occlusion as Occlusion
    from pyfast_xai.explainers import RandomCAM as RandomCAM
    from pyfast_xai.explainers import RefineCAM as RefineCAM
    from pyfast_xai.explainers import RelMax as RelMax
    from pyfast_xai.explainers import Saliency as Saliency
    from pyfast_xai.explainers import ScoreCAM as ScoreCAM
    from pyfast_xai.explainers import SegEigenCAM as SegEigenCAM
    from pyfast_xai.explainers import ShapleyCAM as ShapleyCAM
    from pyfast_xai.explainers import ShapleyValues as ShapleyValues
    from pyfast_xai.explainers import ShapleyValueSampling as ShapleyValueSampling
    from pyfast_xai.explainers import SmoothGrad as SmoothGrad
    from pyfast_xai.explainers import SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus
    from pyfast_xai.explainers import Sobol as Sobol
    from pyfast_xai.explainers import XGradCAM as XGradCAM
    from pyfast_xai.explanation import Explanation as Explanation
    from pyfast_xai.images import Preprocess as Preprocess
    from pyfast_xai.images import load_image as load_image
    from pyfast_xai.layer_list import layers as layers
    from pyfast_xai.memory import keep_freed_memory as keep_freed_memory
    from pyfast_xai.models import load_model as load_model
    from pyfast_xai.ops import backend as backend
    from pyfast_xai.rules.relevance import Composite as Composite
    from pyfast_xai.segmentation import SegmentationClassifier as SegmentationClassifier
    from pyfast_xai.tape import record as record
    from pyfast_xai.tape import replay as replay
    from pyfast_xai.zero_shot import ZeroShotClassifier as ZeroShotClassifier

__version__ = "0.1.0"

# The module of each public name.
_PUBLIC = {
    "BackendError": "pyfast_xai.errors",
    "CAM": "pyfast_xai.explainers",
    "CLEAR": "pyfast_xai.explainers",
    "CRP": "pyfast_xai.explainers",
    "Composite": "pyfast_xai.rules.relevance",
    "BlurIG": "pyfast_xai.explainers",
    "CNNFixations": "pyfast_xai.explainers",
    "Consensus": "pyfast_xai.explainers",
    "DeconvNet": "pyfast_xai.explainers",
    "DRISE": "pyfast_xai.explainers",
    "DeepLift": "pyfast_xai.explainers",
    "DeepLiftShap": "pyfast_xai.explainers",
    "DetectionTarget": "pyfast_xai.explainers",
    "EigenCAM": "pyfast_xai.explainers",
    "ExcitationBackprop": "pyfast_xai.explainers",
    "Explainer": "pyfast_xai.explainers",
    "Explanation": "pyfast_xai.explanation",
    "FGVis": "pyfast_xai.explainers",
    "FORGrad": "pyfast_xai.explainers",
    "AttentionRelevance": "pyfast_xai.explainers",
    "AttentionRollout": "pyfast_xai.explainers",
    "FullGrad": "pyfast_xai.explainers",
    "GradCAM": "pyfast_xai.explainers",
    "GradCAMPlusPlus": "pyfast_xai.explainers",
    "GradientShap": "pyfast_xai.explainers",
    "GuidedBackprop": "pyfast_xai.explainers",
    "GuidedGradCAM": "pyfast_xai.explainers",
    "InputError": "pyfast_xai.errors",
    "InputXGradient": "pyfast_xai.explainers",
    "IntegratedGradients": "pyfast_xai.explainers",
    "LIME": "pyfast_xai.explainers",
    "ExtremalPerturbation": "pyfast_xai.explainers",
    "Sobol": "pyfast_xai.explainers",
    "HSIC": "pyfast_xai.explainers",
    "ShapleyValues": "pyfast_xai.explainers",
    "ShapleyValueSampling": "pyfast_xai.explainers",
    "KernelShap": "pyfast_xai.explainers",
    "FeaturePermutation": "pyfast_xai.explainers",
    "FeatureAblation": "pyfast_xai.explainers",
    "LRP": "pyfast_xai.explainers",
    "METHODS": "pyfast_xai.explainers",
    "MeaningfulPerturbation": "pyfast_xai.explainers",
    "Occlusion": "pyfast_xai.explainers",
    "Preprocess": "pyfast_xai.images",
    "PyFastXaiError": "pyfast_xai.errors",
    "RISE": "pyfast_xai.explainers",
    "GuidedIG": "pyfast_xai.explainers",
    "HiResCAM": "pyfast_xai.explainers",
    "LayerCAM": "pyfast_xai.explainers",
    "LeGrad": "pyfast_xai.explainers",
    "XGradCAM": "pyfast_xai.explainers",
    "XRAI": "pyfast_xai.explainers",
    "GradCAMElementWise": "pyfast_xai.explainers",
    "EigenGradCAM": "pyfast_xai.explainers",
    "SegEigenCAM": "pyfast_xai.explainers",
    "ScoreCAM": "pyfast_xai.explainers",
    "SSCAM": "pyfast_xai.explainers",
    "ISCAM": "pyfast_xai.explainers",
    "AblationCAM": "pyfast_xai.explainers",
    "ShapleyCAM": "pyfast_xai.explainers",
    "DeepFeatureFactorization": "pyfast_xai.explainers",
    "FinerCAM": "pyfast_xai.explainers",
    "SmoothGradCAMPlusPlus": "pyfast_xai.explainers",
    "FEM": "pyfast_xai.explainers",
    "KPCACAM": "pyfast_xai.explainers",
    "RandomCAM": "pyfast_xai.explainers",
    "SESS": "pyfast_xai.explainers",
    "RefineCAM": "pyfast_xai.explainers",
    "RelMax": "pyfast_xai.explainers",
    "Saliency": "pyfast_xai.explainers",
    "SmoothGrad": "pyfast_xai.explainers",
    "UnsupportedOpError": "pyfast_xai.errors",
    "SegmentationClassifier": "pyfast_xai.segmentation",
    "ZeroShotClassifier": "pyfast_xai.zero_shot",
    "backend": "pyfast_xai.ops",
    "keep_freed_memory": "pyfast_xai.memory",
    "layers": "pyfast_xai.layer_list",
    "load_image": "pyfast_xai.images",
    "load_model": "pyfast_xai.models",
    "record": "pyfast_xai.tape",
    "replay": "pyfast_xai.tape",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        by_lower = {public.lower(): public for public in _PUBLIC}
        close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)]
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'pyfast_xai' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
