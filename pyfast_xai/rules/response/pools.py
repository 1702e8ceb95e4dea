"""Max-pooling: the gradient goes to the element that won its window, known by one byte."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.response.backward import Step
from pyfast_xai.rules.response.table import rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import Keep

aten = torch.ops.aten


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _geometry(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], ...]:
    kernel = _pair(kernel_size)
    return kernel, _pair(stride) if stride not in (None, []) else kernel, _pair(padding), _pair(dilation)


def _origins(size: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: Any) -> list[Tensor]:
    """The first row and the first column of each window, in front of the edge where there is padding."""
    rows = torch.arange(size[0], device=device)[:, None] * stride[0] - padding[0]
    return [rows, torch.arange(size[1], device=device) * stride[1] - padding[1]]


def _with_offsets(
    node: Node,
    keep: Keep,
    self: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    kernel, stride, padding, dilation = _geometry(kernel_size, stride, padding, dilation)
    outputs, offsets = [], []
    # Image by image: the int64 indices of a whole batch are larger than its activations.
    for image in self.split(1):
        output, index = aten.max_pool2d_with_indices(image, kernel, stride, padding, dilation, ceil_mode)
        rows, columns = _origins(output.shape[2:], stride, padding, self.device)
        row = (index // self.shape[3] - rows) // dilation[0]
        column = (index % self.shape[3] - columns) // dilation[1]
        offsets.append((row * kernel[1] + column).to(torch.uint8))
        outputs.append(output)
    keep("offsets", torch.cat(offsets))
    return torch.cat(outputs)


def _many(node: Node) -> bool:
    return math.prod(_pair(node.args[1])) > 256 or len(node.args[0].shape) != 4


@rule("max_pool2d", runs=_with_offsets, unless=_many)
def _max_pool(
    step: Step,
    self: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> None:
    kernel, stride, padding, dilation = _geometry(kernel_size, stride, padding, dilation)
    offsets = step.tensor("offsets")
    rows, columns = _origins(offsets.shape[2:], stride, padding, offsets.device)
    results = []
    shape = (1, *self.shape[1:])
    for n, own in enumerate(offsets.split(1)):
        window = own.long()
        row = window // kernel[1] * dilation[0] + rows
        index = row * self.shape[3] + window % kernel[1] * dilation[1] + columns
        for k in range(len(step.grad)):
            grad = step.grad[k, n : n + 1]
            results.append(
                aten.max_pool2d_with_indices_backward(
                    grad, grad.new_empty(()).expand(shape), kernel, stride, padding, dilation, ceil_mode, index
                )
            )
    step.send(self, torch.cat(results).view(self.shape[0], -1, *self.shape[1:]).transpose(0, 1))
