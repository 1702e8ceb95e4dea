"""Response: a gradient-shaped tensor walks from an output back to the image.

The plain gradient is the base table. Each method is a small table laid over it.
"""

from pyfast_xai.rules.response import arithmetic, excitation, layers, pools, shapes
from pyfast_xai.rules.response.backward import Response, walk
from pyfast_xai.rules.response.excitation import EXCITATION, Contrastive, last_weighted
from pyfast_xai.rules.response.pools import NEAREST
from pyfast_xai.rules.response.rectifiers import DECONVNET, GUIDED, LINEAR, rectifies
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import GRADIENT, Rule, Table, rule

__all__ = [
    "DECONVNET",
    "EXCITATION",
    "GRADIENT",
    "GUIDED",
    "LINEAR",
    "NEAREST",
    "Contrastive",
    "Response",
    "Rule",
    "Step",
    "Table",
    "arithmetic",
    "excitation",
    "last_weighted",
    "layers",
    "pools",
    "rectifies",
    "rule",
    "shapes",
    "walk",
]
