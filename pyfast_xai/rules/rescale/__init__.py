"""DeepLIFT's rescale rule: what a difference from a baseline contributes to the difference of the score."""

from pyfast_xai.rules.rescale.policy import RescaleRules

__all__ = ["RescaleRules"]
