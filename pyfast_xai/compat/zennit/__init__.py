"""zennit's rules, composites and attributors (zennit 0.5) on the recorded operations of a model.

from pyfast_xai.compat.zennit.attribution import Gradient      # was: from zennit.attribution import Gradient
from pyfast_xai.compat.zennit.composites import EpsilonPlus    # was: from zennit.composites import EpsilonPlus
"""

from pyfast_xai.compat.zennit import attribution, canonizers, composites, core, layer, rules, torchvision, types

__all__ = ["attribution", "canonizers", "composites", "core", "layer", "rules", "torchvision", "types"]
