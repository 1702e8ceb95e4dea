"""What a replay of a function depends on besides the numbers it is given."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def signature(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Shapes, memory formats, dtypes, devices and autocast; other arguments as they show themselves."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    )
    kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)
    )
    return described, structure, autocast
