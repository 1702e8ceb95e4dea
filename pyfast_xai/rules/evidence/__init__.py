"""Evidence: sets of points walk from an output neuron back to the pixels that excite it (CNN-Fixations)."""

from pyfast_xai.rules.evidence import arithmetic, attention, indexing, layers, pools, recurrent
from pyfast_xai.rules.evidence.backward import Options, TraceContext, policy, rule, walk
from pyfast_xai.rules.evidence.points import Points

__all__ = [
    "Options",
    "Points",
    "TraceContext",
    "arithmetic",
    "attention",
    "indexing",
    "layers",
    "policy",
    "pools",
    "recurrent",
    "rule",
    "walk",
]
