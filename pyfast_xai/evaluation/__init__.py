"""Measure explainers on annotated pictures: what `pyfast-xai evaluate` does, from Python."""

from pyfast_xai.evaluation.annotations import Annotation, read_annotations
from pyfast_xai.evaluation.baselines import BASELINES, Centre, Noise
from pyfast_xai.evaluation.evaluate import evaluate
from pyfast_xai.evaluation.metrics import METRICS, Metric, Part
from pyfast_xai.evaluation.result import Evaluation, Figure

__all__ = [
    "BASELINES",
    "METRICS",
    "Annotation",
    "Centre",
    "Evaluation",
    "Figure",
    "Metric",
    "Noise",
    "Part",
    "evaluate",
    "read_annotations",
]
