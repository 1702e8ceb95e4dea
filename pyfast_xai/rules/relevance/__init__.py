"""Relevance: the score of a class, shared among what it was made of, operation by operation (LRP).

A composite chooses a rule for each operation; a walk over the tape applies them.
"""

from pyfast_xai.rules.relevance.composite import (
    COMPOSITES,
    Composite,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    GammaAttention,
)
from pyfast_xai.rules.relevance.layer_rules import (
    AlphaBeta,
    Balance,
    Bilinear,
    Epsilon,
    Flat,
    Gamma,
    Gate,
    Gradient,
    LayerRule,
    Norm,
    Pass,
    Positive,
    Taylor,
    WSquare,
    ZBox,
    ZPlus,
)
from pyfast_xai.rules.relevance.policy import RelevanceRules

__all__ = [
    "COMPOSITES",
    "AlphaBeta",
    "Balance",
    "Bilinear",
    "Composite",
    "Epsilon",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "Flat",
    "Gamma",
    "GammaAttention",
    "Gate",
    "Gradient",
    "LayerRule",
    "Norm",
    "Pass",
    "Positive",
    "RelevanceRules",
    "Taylor",
    "WSquare",
    "ZBox",
    "ZPlus",
]
