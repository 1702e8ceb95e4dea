"""Class activation maps with the signatures of pytorch-grad-cam 1.5.7 (`pytorch_grad_cam` and its `utils`)."""

from pyfast_xai.compat.grad_cam.cams import BaseCAM, EigenCAM, GradCAM, GradCAMPlusPlus
from pyfast_xai.compat.grad_cam.guided_backprop import GuidedBackpropReLUModel
from pyfast_xai.compat.grad_cam.pictures import deprocess_image, preprocess_image, scale_cam_image, show_cam_on_image
from pyfast_xai.compat.grad_cam.projection import get_2d_projection
from pyfast_xai.compat.grad_cam.reshape_transforms import (
    fasterrcnn_reshape_transform,
    swinT_reshape_transform,
    vit_reshape_transform,
)
from pyfast_xai.compat.grad_cam.targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    FasterRCNNBoxScoreTarget,
    FinerWeightedTarget,
    RawScoresOutputTarget,
    SemanticSegmentationTarget,
    SoftmaxOutputTarget,
)

__all__ = [
    "BaseCAM",
    "BinaryClassifierOutputTarget",
    "ClassifierOutputReST",
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "EigenCAM",
    "FasterRCNNBoxScoreTarget",
    "FinerWeightedTarget",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackpropReLUModel",
    "RawScoresOutputTarget",
    "SemanticSegmentationTarget",
    "SoftmaxOutputTarget",
    "deprocess_image",
    "fasterrcnn_reshape_transform",
    "get_2d_projection",
    "preprocess_image",
    "scale_cam_image",
    "show_cam_on_image",
    "swinT_reshape_transform",
    "vit_reshape_transform",
]
