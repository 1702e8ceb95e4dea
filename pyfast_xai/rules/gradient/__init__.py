"""Dense readings: a gradient is propagated from an output back to the image.

The plain gradient is the base table. Each method is a small table laid over it.
"""

from pyfast_xai.rules.gradient import arithmetic, excitation, layers, norms, pools, saturating, shapes
from pyfast_xai.rules.gradient.backward import GradientRules, backward_pass
from pyfast_xai.rules.gradient.context import BackwardContext, has_gradient
from pyfast_xai.rules.gradient.excitation import EXCITATION, Contrastive, last_weighted
from pyfast_xai.rules.gradient.pools import NEAREST
from pyfast_xai.rules.gradient.rectifiers import DECONVNET, GUIDED, LINEAR, rectifies
from pyfast_xai.rules.gradient.table import GRADIENT, Rule, Table, rule

__all__ = [
    "DECONVNET",
    "EXCITATION",
    "GRADIENT",
    "GUIDED",
    "LINEAR",
    "NEAREST",
    "BackwardContext",
    "Contrastive",
    "GradientRules",
    "Rule",
    "Table",
    "arithmetic",
    "backward_pass",
    "excitation",
    "has_gradient",
    "last_weighted",
    "layers",
    "norms",
    "pools",
    "rectifies",
    "rule",
    "saturating",
    "shapes",
]
