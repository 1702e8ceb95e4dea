"""The tables and figures of the five papers as experiments: what `pyfast-xai reproduce` runs.

Each is a function of a folder of data sets that returns an `Outcome`, where the paper's figures stand beside those that
were measured.
"""

from pyfast_xai.reproduce import backprop, clear, comparison, eigen_cam, fgvis, fixations
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome

EXPERIMENTS: dict[str, dict[str, Experiment]] = {
    "fixations": fixations.EXPERIMENTS,
    "eigen-cam": eigen_cam.EXPERIMENTS,
    "fgvis": fgvis.EXPERIMENTS,
    "backprop": backprop.EXPERIMENTS,
    "clear": clear.EXPERIMENTS,
    "comparison": comparison.EXPERIMENTS,
}

__all__ = ["EXPERIMENTS", "Data", "Experiment", "Outcome"]
