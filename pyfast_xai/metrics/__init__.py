"""Measures of explanations: localisation, faithfulness and sanity checks, in batches and on the device of the input.

What has a value for each image is a function; what has one for a data set only is a class with `update` and `compute`.
"""

from pyfast_xai.metrics.adversarial import (
    AdversarialEvidence,
    adversarial_evidence,
    adversarial_stability,
    deepfool,
    fgsm,
)
from pyfast_xai.metrics.faithfulness import (
    ColorSwap,
    Curve,
    DropIncrease,
    Road,
    StrongFeatures,
    auc,
    color_swap,
    deletion,
    drop_increase,
    insertion,
    road,
    strong_features,
)
from pyfast_xai.metrics.imputation import noisy_linear_imputation
from pyfast_xai.metrics.localization import (
    LesionSensitivity,
    MaxBoxAcc,
    MaxBoxAccV2,
    PointingGame,
    PrecisionAtEER,
    PxAP,
    RecallPrecision,
    SingleProposal,
    box_correct,
    iou,
    localization_error,
    pointing_hit,
)
from pyfast_xai.metrics.randomization import Randomization, class_sensitivity, parameter_randomization
from pyfast_xai.metrics.robustness import max_sensitivity
from pyfast_xai.metrics.similarity import cosine_similarity, rank_correlation, ssim

__all__ = [
    "AdversarialEvidence",
    "ColorSwap",
    "Curve",
    "DropIncrease",
    "LesionSensitivity",
    "MaxBoxAcc",
    "MaxBoxAccV2",
    "PointingGame",
    "PrecisionAtEER",
    "PxAP",
    "Randomization",
    "RecallPrecision",
    "Road",
    "SingleProposal",
    "StrongFeatures",
    "adversarial_evidence",
    "adversarial_stability",
    "auc",
    "box_correct",
    "class_sensitivity",
    "color_swap",
    "cosine_similarity",
    "deepfool",
    "deletion",
    "drop_increase",
    "fgsm",
    "insertion",
    "iou",
    "localization_error",
    "max_sensitivity",
    "noisy_linear_imputation",
    "parameter_randomization",
    "pointing_hit",
    "rank_correlation",
    "road",
    "ssim",
    "strong_features",
]
