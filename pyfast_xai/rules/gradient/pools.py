"""Max-pooling: the gradient goes to the element that won its window, known by one byte.

`NEAREST` is a table to be laid over it that looks at no window: the signal is spread over the map by nearest
upsampling, the unpooling of implementations of CLEAR and DeconvNet without switches.
"""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional

from pyfast_xai import ops
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import NamedTable, rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import SaveTensor

NEAREST = NamedTable("NEAREST", __name__)

_Geometry = tuple[list[int], list[int], list[int], list[int]]  # kernel, stride, padding, dilation


def _geometry(kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> _Geometry:
    kernel = per_dimension(kernel_size, 2)
    stride = per_dimension(stride, 2) if stride not in (None, []) else kernel
    return kernel, stride, per_dimension(padding, 2), per_dimension(dilation, 2)


def _with_offsets(
    node: Node,
    keep: SaveTensor,
    self: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    output, offsets = ops.max_pool_forward(self, *_geometry(kernel_size, stride, padding, dilation), ceil_mode)
    keep("offsets", offsets)
    return output


def _without_byte_offsets(node: Node) -> bool:
    """Returns the windows whose taps a byte cannot tell apart, and images without a batch."""
    return math.prod(per_dimension(node.args[1], 2)) > 256 or len(node.args[0].shape) != 4


@rule("max_pool2d", runs=_with_offsets, unless=_without_byte_offsets)
def _max_pool(
    ctx: BackwardContext,
    self: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> None:
    geometry = _geometry(kernel_size, stride, padding, dilation)
    ctx.propagate(self, ops.max_pool_backward(ctx.grad, ctx.tensor("offsets"), self.shape[2:], *geometry))


@rule("max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", table=NEAREST)
def _spread(ctx: BackwardContext, self: Value, *geometry: Any, **more: Any) -> None:
    # Targets and images are one batch; of an image without a batch, the targets are.
    grad = functional.interpolate(ctx.grad.flatten(0, -4), size=self.shape[-2:], mode="nearest")
    ctx.propagate(self, grad.unflatten(0, ctx.grad.shape[:-3]))
