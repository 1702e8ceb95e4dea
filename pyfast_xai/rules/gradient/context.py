"""The context of a gradient rule: one operation, the gradients of its results, and those still on their way."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import address


def has_gradient(value: Value) -> bool:
    """Returns whether a value can have a gradient: it holds real or complex numbers."""
    return value.dtype.is_floating_point or value.dtype.is_complex


class BackwardContext:
    """An operation of a backward pass: the gradients of its results, and where they go.

    Every gradient has one dimension more than its value, in front: the targets, `[K, *shape]`.

    Attributes:
        node: the operation.
        grads: gradient of each result, None where nothing arrived.
        grad: the first of them (most ops have one result).
    """

    __slots__ = ("_pending", "grad", "grads", "node")

    def __init__(self, pending: "Pending", node: Node, grads: list[Tensor | None], first: Tensor) -> None:
        self.node = node
        self.grads = grads
        self.grad = first
        self._pending = pending

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor that was saved under this name."""
        return self.node.saved[name].tensor

    def replace(self, grad: Tensor) -> None:
        """Replaces the gradient of the first result."""
        self.grads[next(i for i, entry in enumerate(self.grads) if entry is self.grad)] = grad
        self.grad = grad

    @property
    def owns_memory(self) -> bool:
        """Returns whether `grad` may be overwritten: nothing else reads its memory."""
        return self._pending.owns_memory(self.grad)

    def scaled(self, factor: Tensor) -> Tensor:
        """Returns `grad` times a factor, in the memory of `grad` where nothing else reads it."""
        return self.grad.mul_(factor) if self.owns_memory else self.grad * factor

    def wants(self, argument: Any) -> bool:
        """Returns whether the gradient of an argument is needed."""
        return isinstance(argument, Value) and argument in self._pending.needed

    def propagate(self, argument: Any, grad: Tensor) -> None:
        """Adds to the gradient of an argument; a constant has none.

        A gradient of a broadcast argument is summed, one in another dtype converted. Of a complex gradient, a real
        argument gets the real part, as by autograd's convention.
        """
        if not self.wants(argument):
            return
        if tuple(grad.shape)[1:] != argument.shape:  # slicing a `torch.Size` takes five times as long
            grad = _sum_to(grad, argument.shape)
        if grad.is_complex() and not argument.dtype.is_complex:
            grad = grad.real
        if grad.dtype != argument.dtype or grad.device != argument.device:
            grad = grad.to(argument.device, argument.dtype)
        self._pending.add(argument, _channels_last_as(argument, grad))

    def propagate_part(self, argument: Any, part: Callable[[Tensor], Tensor], grad: Tensor) -> None:
        """Adds to a part of the gradient of an argument: the view that `part` takes of it, `[K, *shape]`."""
        if self.wants(argument):
            self._pending.add_part(argument, part, grad)


def stacked(grads: Sequence[Tensor]) -> Tensor:
    """Returns the gradients of the targets as one tensor `[K, ...]`; that of a single target is not copied."""
    return grads[0][None] if len(grads) == 1 else torch.stack(list(grads))


def _channels_last_as(value: Value, grad: Tensor) -> Tensor:
    """Returns a gradient `[K, N, C, H, W]` with its channels last in memory where the value has them there.

    Kernels that read both are many times slower where one map is in one order and the other in another. In float64 it
    stays as it is: results keep the order in which autograd's kernels compute.
    """
    if len(value.shape) != 4 or value.stride[1] != 1 or grad.stride(2) == 1 or grad.dtype == torch.float64:
        return grad
    _, channels, height, width = value.shape
    if channels == 1 or height * width == 1 or value.stride[2:] != (width * channels, channels):
        return grad
    maps = grad.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return maps.unflatten(0, grad.shape[:2])


def _sum_to(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    lead = grad.dim() - 1 - len(shape)
    dims = [*range(1, 1 + lead)]
    dims += [1 + lead + i for i, n in enumerate(shape) if n == 1 and grad.shape[1 + lead + i] != 1]
    if dims:
        grad = grad.sum(dims, keepdim=True)
    return grad.reshape(grad.shape[0], *shape)


def _overlaps(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 0 in strides and any(n > 1 and not stride for n, stride in zip(tensor.shape, strides, strict=True))


class Pending:
    """Gradients that wait for their operation, and the number of holders of each memory."""

    def __init__(self, needed: set[Value]) -> None:
        self.needed = needed
        self._grads: dict[Value, tuple[Tensor, int]] = {}  # with the address of the memory
        self._holders: dict[int, int] = {}
        self._borrowed: list[Tensor] = []

    def add_borrowed(self, value: Value, grad: Tensor) -> None:
        """Adds a gradient of the caller, which is never overwritten."""
        self._borrowed.append(grad)
        self._hold(address(grad))
        self.add(value, grad)

    def add(self, value: Value, grad: Tensor) -> None:
        if value in self._grads:
            before = self.pop(value)
            assert before is not None
            # In the order of arrival, as autograd sums them.
            grad = before.add_(grad) if self._may_add(before, grad) else before + grad
        storage = address(grad)
        self._grads[value] = grad, storage
        self._hold(storage)

    def add_part(self, value: Value, part: Callable[[Tensor], Tensor], grad: Tensor) -> None:
        whole = self.pop(value)
        if whole is None:
            whole = grad.new_zeros(len(grad), *value.shape)
        elif not self._may_add(whole, grad):
            whole = whole.clone()
        # Several parts of a whole, as queries, keys and values often are, come to one tensor and no sum of it.
        part(whole).add_(grad)
        self.add(value, whole)

    def _may_add(self, before: Tensor, grad: Tensor) -> bool:
        return self.owns_memory(before) and address(before) != address(grad)

    def pop(self, value: Value | None) -> Tensor | None:
        entry = None if value is None else self._grads.pop(value, None)
        if entry is None:
            return None
        grad, storage = entry
        holders = self._holders.pop(storage) - 1
        if holders:  # otherwise the address may be used for another tensor
            self._holders[storage] = holders
        return grad

    def owns_memory(self, grad: Tensor) -> bool:
        return address(grad) not in self._holders and not _overlaps(grad) and not grad.is_inference()

    def _hold(self, storage: int) -> None:
        self._holders[storage] = self._holders.get(storage, 0) + 1
