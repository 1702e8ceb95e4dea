"""Class activation maps with the signatures of pytorch-grad-cam 1.5.7 (`pytorch_grad_cam` and its `utils`)."""

from pyfast_xai.compat.grad_cam.activations import ActivationsAndGradients
from pyfast_xai.compat.grad_cam.cams import (
    FEM,
    KPCA_CAM,
    BaseCAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    RandomCAM,
    SegEigenCAM,
    XGradCAM,
)
from pyfast_xai.compat.grad_cam.factorization import DeepFeatureFactorization, dff, run_dff_on_image
from pyfast_xai.compat.grad_cam.find_layers import (
    find_layer_predicate_recursive,
    find_layer_types_recursive,
    replace_all_layer_type_recursive,
    replace_layer_recursive,
)
from pyfast_xai.compat.grad_cam.full_grad import FullGrad
from pyfast_xai.compat.grad_cam.guided_backprop import GuidedBackpropReLUModel
from pyfast_xai.compat.grad_cam.meta import SESS, FinerCAM, RefineCAM, ShapleyCAM
from pyfast_xai.compat.grad_cam.perturbation import AblationCAM, AblationLayer, AblationLayerVit, ScoreCAM
from pyfast_xai.compat.grad_cam.pictures import (
    create_labels_legend,
    deprocess_image,
    preprocess_image,
    scale_accross_batch_and_channels,
    scale_cam_image,
    show_cam_on_image,
    show_factorization_on_image,
)
from pyfast_xai.compat.grad_cam.projection import (
    get_2d_projection,
    get_2d_projection_kernel,
    get_2d_projection_with_sign_correction,
)
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
    "FEM",
    "KPCA_CAM",
    "SESS",
    "AblationCAM",
    "AblationLayer",
    "AblationLayerVit",
    "ActivationsAndGradients",
    "BaseCAM",
    "BinaryClassifierOutputTarget",
    "ClassifierOutputReST",
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "DeepFeatureFactorization",
    "EigenCAM",
    "EigenGradCAM",
    "FasterRCNNBoxScoreTarget",
    "FinerCAM",
    "FinerWeightedTarget",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "GuidedBackpropReLUModel",
    "HiResCAM",
    "LayerCAM",
    "RandomCAM",
    "RawScoresOutputTarget",
    "RefineCAM",
    "ScoreCAM",
    "SegEigenCAM",
    "SemanticSegmentationTarget",
    "ShapleyCAM",
    "SoftmaxOutputTarget",
    "XGradCAM",
    "create_labels_legend",
    "deprocess_image",
    "dff",
    "fasterrcnn_reshape_transform",
    "find_layer_predicate_recursive",
    "find_layer_types_recursive",
    "get_2d_projection",
    "get_2d_projection_kernel",
    "get_2d_projection_with_sign_correction",
    "preprocess_image",
    "replace_all_layer_type_recursive",
    "replace_layer_recursive",
    "run_dff_on_image",
    "scale_accross_batch_and_channels",
    "scale_cam_image",
    "show_cam_on_image",
    "show_factorization_on_image",
    "swinT_reshape_transform",
    "vit_reshape_transform",
]
