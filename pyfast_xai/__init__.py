"""Fast visual explanations of convolutional networks on PyTorch.

from pyfast_xai import CNNFixations, GuidedBackprop

explanation = CNNFixations(model)(images)
explanation.boxes()
explanation.plot()
GuidedBackprop(model)(images).attribution
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name lives; imported when it is first asked for.
_PUBLIC = {
    "BackendError": "pyfast_xai.errors",
    "CAM": "pyfast_xai.explainers",
    "CLEAR": "pyfast_xai.explainers",
    "CNNFixations": "pyfast_xai.explainers",
    "DeconvNet": "pyfast_xai.explainers",
    "EigenCAM": "pyfast_xai.explainers",
    "ExcitationBackprop": "pyfast_xai.explainers",
    "Explainer": "pyfast_xai.explainers",
    "Explanation": "pyfast_xai.explanation",
    "FGVis": "pyfast_xai.explainers",
    "GradCAM": "pyfast_xai.explainers",
    "GradCAMPlusPlus": "pyfast_xai.explainers",
    "GuidedBackprop": "pyfast_xai.explainers",
    "GuidedGradCAM": "pyfast_xai.explainers",
    "InputError": "pyfast_xai.errors",
    "InputXGradient": "pyfast_xai.explainers",
    "IntegratedGradients": "pyfast_xai.explainers",
    "LIME": "pyfast_xai.explainers",
    "MeaningfulPerturbation": "pyfast_xai.explainers",
    "Occlusion": "pyfast_xai.explainers",
    "RISE": "pyfast_xai.explainers",
    "Saliency": "pyfast_xai.explainers",
    "SmoothGrad": "pyfast_xai.explainers",
    "UnsupportedOpError": "pyfast_xai.errors",
    "backend": "pyfast_xai.ops",
    "keep_freed_memory": "pyfast_xai.memory",
    "record": "pyfast_xai.tape",
    "replay": "pyfast_xai.tape",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyfast_xai' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
