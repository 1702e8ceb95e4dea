"""One node on the way back, and the gradients that are on their way."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyfast_xai.tape import Node, Value


class Step:
    """One node on the way back: the gradients of its results, and where they go.

    Every gradient has one dimension more than its value, in front: the targets, `[K, *shape]`.

    Attributes:
        node: the operation.
        grads: of each result, None where nothing arrived.
        grad: the first of them (most ops have one result).
    """

    def __init__(self, pending: "Pending", node: Node, grads: list[Tensor | None]) -> None:
        self.node = node
        self.grads = grads
        self.grad = next(grad for grad in grads if grad is not None)
        self._pending = pending

    def tensor(self, name: str) -> Tensor:
        """What was saved under this name."""
        return self.node.saved[name].tensor

    def replace(self, grad: Tensor) -> None:
        """Go on with another gradient of the first result."""
        self.grads[next(i for i, own in enumerate(self.grads) if own is self.grad)] = grad
        self.grad = grad

    @property
    def exclusive(self) -> bool:
        """Whether `grad` may be overwritten: nobody else reads its memory."""
        return self._pending.exclusive(self.grad)

    def wants(self, argument: Any) -> bool:
        """Whether the gradient of an argument is needed."""
        return isinstance(argument, Value) and argument in self._pending.needed

    def send(self, argument: Any, grad: Tensor) -> None:
        """Continue at an argument of the node; what reaches a constant ends there.

        A gradient of a broadcast argument is summed, one in another dtype converted.
        """
        if not self.wants(argument):
            return
        if grad.shape[1:] != argument.shape:
            grad = _sum_to(grad, argument.shape)
        if grad.dtype != argument.dtype or grad.device != argument.device:
            grad = grad.to(argument.device, argument.dtype)
        self._pending.add(argument, grad)

    def send_part(self, argument: Any, part: Callable[[Tensor], Tensor], grad: Tensor) -> None:
        """Continue at a part of an argument, the view that `part` takes of its gradient `[K, *shape]`."""
        if self.wants(argument):
            self._pending.add_part(argument, part, grad)


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
    """Gradients on their way, and who shares memory with whom."""

    def __init__(self, needed: set[Value]) -> None:
        self.needed = needed
        self._grads: dict[Value, Tensor] = {}
        self._holders: Counter[int] = Counter()
        self._lent: list[Tensor] = []

    def lend(self, value: Value, grad: Tensor) -> None:
        """Take a gradient that belongs to someone else and is never overwritten."""
        self._lent.append(grad)
        self._holders[grad.untyped_storage()._cdata] += 1
        self.add(value, grad)

    def add(self, value: Value, grad: Tensor) -> None:
        before = self._grads.get(value)
        if before is not None:
            # In the order of arrival, as autograd sums them.
            self._drop(before)
            grad = before.add_(grad) if self._may_add(before, grad) else before + grad
        self._grads[value] = grad
        self._holders[grad.untyped_storage()._cdata] += 1

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
        return self.exclusive(before) and before.untyped_storage()._cdata != grad.untyped_storage()._cdata

    def pop(self, value: Value | None) -> Tensor | None:
        grad = None if value is None else self._grads.pop(value, None)
        if grad is not None:
            self._drop(grad)
        return grad

    def exclusive(self, grad: Tensor) -> bool:
        return not self._holders[grad.untyped_storage()._cdata] and not _overlaps(grad) and not grad.is_inference()

    def _drop(self, grad: Tensor) -> None:
        storage = grad.untyped_storage()._cdata
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]  # the address may be used again
