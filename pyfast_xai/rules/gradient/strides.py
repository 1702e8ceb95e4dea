"""Memory layouts as PyTorch's kernels of backward passes expect them.

A dimension of size one may have any stride, as no element lies along it. Some kernels read the memory format of a
tensor off such strides all the same and then misread its elements.
"""

import functools

import torch
from torch import Tensor

_FORMATS = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}


def canonical(tensor: Tensor) -> Tensor:
    """Returns the same elements, in the same memory, with the strides that a new tensor of its memory format has.

    Only dimensions of size one have their strides changed. A tensor that is dense in no memory format of PyTorch is
    returned as it is.
    """
    if 1 not in tensor.shape or tensor.layout != torch.strided:
        return tensor
    for memory_format in (torch.contiguous_format, *_FORMATS.get(tensor.dim(), ())):
        if tensor.is_contiguous(memory_format=memory_format):
            strides = _strides(tensor.shape, memory_format)
            return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)
    return tensor


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=memory_format).stride()
