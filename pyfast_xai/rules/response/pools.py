"""Max-pooling: the gradient goes to the element that won its window, known by one byte.

`NEAREST` is a table to be laid over it that looks at no window: the signal is spread over the map by nearest
upsampling, the unpooling of implementations of CLEAR and DeconvNet without switches.
"""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional

from pyfast_xai import ops
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import Table, rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import Keep

NEAREST: Table = {}

_Geometry = tuple[list[int], list[int], list[int], list[int]]  # kernel, stride, padding, dilation


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _geometry(kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> _Geometry:
    kernel = _pair(kernel_size)
    return kernel, _pair(stride) if stride not in (None, []) else kernel, _pair(padding), _pair(dilation)


def _with_offsets(
    node: Node,
    keep: Keep,
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


def _no_byte(node: Node) -> bool:
    """Windows whose taps a byte cannot tell apart, and images without a batch."""
    return math.prod(_pair(node.args[1])) > 256 or len(node.args[0].shape) != 4


@rule("max_pool2d", runs=_with_offsets, unless=_no_byte)
def _max_pool(
    step: Step,
    self: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> None:
    geometry = _geometry(kernel_size, stride, padding, dilation)
    step.send(self, ops.max_pool_backward(step.grad, step.tensor("offsets"), self.shape[2:], *geometry))


@rule("max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", table=NEAREST)
def _spread(step: Step, self: Value, *geometry: Any, **more: Any) -> None:
    # Targets and images are one batch; of an image without a batch, the targets are.
    grad = functional.interpolate(step.grad.flatten(0, -4), size=self.shape[-2:], mode="nearest")
    step.send(self, grad.unflatten(0, step.grad.shape[:-3]))
