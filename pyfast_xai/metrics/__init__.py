"""Measures of explanations, in batches and on the device of the input.

Localisation, faithfulness, robustness, complexity, axioms and sanity checks, one file a family.

What has a value for each image is a function; what has one for a data set only is a class with `update` and `compute`.
"""

from pyfast_xai.metrics.adversarial import (
    AdversarialEvidence,
    adversarial_evidence,
    adversarial_stability,
    deepfool,
    fgsm,
)
from pyfast_xai.metrics.arcc import Arcc, arcc
from pyfast_xai.metrics.average_gain import average_gain
from pyfast_xai.metrics.axioms import completeness, input_invariance, non_sensitivity
from pyfast_xai.metrics.complexity import complexity, effective_complexity, sparseness
from pyfast_xai.metrics.correlations import (
    faithfulness_correlation,
    faithfulness_estimate,
    monotonicity,
    monotonicity_correlation,
    mu_fidelity,
    sensitivity_n,
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
from pyfast_xai.metrics.flipping import Regions, irof, pixel_flipping, region_perturbation, selectivity
from pyfast_xai.metrics.imputation import noisy_linear_imputation
from pyfast_xai.metrics.infidelity import infidelity
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
from pyfast_xai.metrics.masks import (
    attribution_localization,
    mask_auc,
    relevance_mass,
    relevance_rank,
    top_k_intersection,
)
from pyfast_xai.metrics.randomization import (
    Randomization,
    class_sensitivity,
    efficient_parameter_randomization,
    parameter_randomization,
    random_logit,
    smooth_parameter_randomization,
)
from pyfast_xai.metrics.robustness import (
    average_sensitivity,
    consistency,
    continuity,
    local_lipschitz,
    max_sensitivity,
    relative_stability,
    sufficiency,
)
from pyfast_xai.metrics.similarity import correlation, cosine_similarity, rank_correlation, ssim

__all__ = [
    "AdversarialEvidence",
    "Arcc",
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
    "Regions",
    "Road",
    "SingleProposal",
    "StrongFeatures",
    "adversarial_evidence",
    "adversarial_stability",
    "arcc",
    "attribution_localization",
    "auc",
    "average_gain",
    "average_sensitivity",
    "box_correct",
    "class_sensitivity",
    "color_swap",
    "completeness",
    "complexity",
    "consistency",
    "continuity",
    "correlation",
    "cosine_similarity",
    "deepfool",
    "deletion",
    "drop_increase",
    "effective_complexity",
    "efficient_parameter_randomization",
    "faithfulness_correlation",
    "faithfulness_estimate",
    "fgsm",
    "infidelity",
    "input_invariance",
    "insertion",
    "iou",
    "irof",
    "local_lipschitz",
    "localization_error",
    "mask_auc",
    "max_sensitivity",
    "monotonicity",
    "monotonicity_correlation",
    "mu_fidelity",
    "noisy_linear_imputation",
    "non_sensitivity",
    "parameter_randomization",
    "pixel_flipping",
    "pointing_hit",
    "random_logit",
    "rank_correlation",
    "region_perturbation",
    "relative_stability",
    "relevance_mass",
    "relevance_rank",
    "road",
    "selectivity",
    "sensitivity_n",
    "smooth_parameter_randomization",
    "sparseness",
    "ssim",
    "strong_features",
    "sufficiency",
    "top_k_intersection",
]
