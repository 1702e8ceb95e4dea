"""Max-pooling: the gradient goes to the element that won its window, known by one byte."""

import math
from typing import Any

from torch import Tensor

from pyfast_xai import ops
from pyfast_xai.rules.response.backward import Step
from pyfast_xai.rules.response.table import rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import Keep


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _geometry(kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> tuple[list[int], ...]:
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
