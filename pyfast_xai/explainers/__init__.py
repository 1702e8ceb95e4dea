"""One file a paper or family; all are called alike and return an `Explanation`."""

from pyfast_xai.explainers.base import Explainer
from pyfast_xai.explainers.eigen_cam import EigenCAM
from pyfast_xai.explainers.fixations import CNNFixations

METHODS: dict[str, type[Explainer]] = {explainer.method: explainer for explainer in (CNNFixations, EigenCAM)}

__all__ = ["METHODS", "CNNFixations", "EigenCAM", "Explainer"]
