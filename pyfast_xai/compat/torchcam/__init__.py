"""Class activation maps as torch-cam 0.5 calls them: `torchcam.methods` and `torchcam.utils`; `metrics` as there."""

from pyfast_xai.compat.torchcam.extractors import (
    CAM,
    ISCAM,
    SSCAM,
    Extractor,
    FinerCAM,
    GradCAM,
    GradCAMpp,
    InputTypeError,
    LayerCAM,
    NotForwardedError,
    OutputTarget,
    RefineCAM,
    ScoreCAM,
    SmoothGradCAMpp,
    XGradCAM,
    overlay_mask,
)
from pyfast_xai.compat.torchcam.legrad import LeGrad

__all__ = [
    "CAM",
    "ISCAM",
    "SSCAM",
    "Extractor",
    "FinerCAM",
    "GradCAM",
    "GradCAMpp",
    "InputTypeError",
    "LayerCAM",
    "LeGrad",
    "NotForwardedError",
    "OutputTarget",
    "RefineCAM",
    "ScoreCAM",
    "SmoothGradCAMpp",
    "XGradCAM",
    "overlay_mask",
]
