"""zennit's canonizers, which have nothing to do here: no module is rewritten.

A composite with any of them takes a batch norm as part of the layer before it, and shares sums of branches by the rule
of `Sum`; without one it leaves both as zennit does.
"""

from collections.abc import Sequence
from typing import Any


class Canonizer:
    """Stands for what makes a network fit for rules.

    Example:
        >>> from pyfast_xai.compat.zennit.canonizers import Canonizer
        >>> from pyfast_xai.compat.zennit.composites import EpsilonPlus
        >>> EpsilonPlus(canonizers=[Canonizer()]).folds
        True
    """

    def copy(self) -> "Canonizer":
        """Returns the canonizer itself, which keeps nothing of a model."""
        return self


class MergeBatchNorm(Canonizer):
    """Stands for batch norms as parts of the layers before them.

    Example:
        >>> from pyfast_xai.compat.zennit.canonizers import MergeBatchNorm
        >>> canonizer = MergeBatchNorm()
    """


class SequentialMergeBatchNorm(MergeBatchNorm):
    """Stands for batch norms as parts of the layers before them.

    Example:
        >>> from pyfast_xai.compat.zennit.canonizers import SequentialMergeBatchNorm
        >>> canonizer = SequentialMergeBatchNorm()
    """


class NamedMergeBatchNorm(MergeBatchNorm):
    """Stands for batch norms as parts of the layers before them.

    Args:
        name_map: accepted; what is before a batch norm is known from the forward pass.

    Example:
        >>> from pyfast_xai.compat.zennit.canonizers import NamedMergeBatchNorm
        >>> canonizer = NamedMergeBatchNorm([(["conv1"], "bn1")])
    """

    def __init__(self, name_map: Any) -> None:
        self.name_map = name_map


class CompositeCanonizer(Canonizer):
    """Stands for several canonizers.

    Args:
        canonizers: these.

    Example:
        >>> from pyfast_xai.compat.zennit.canonizers import CompositeCanonizer, MergeBatchNorm
        >>> len(CompositeCanonizer([MergeBatchNorm()]).canonizers)
        1
    """

    def __init__(self, canonizers: Sequence[Canonizer]) -> None:
        self.canonizers = list(canonizers)
