"""Activations of some layers, and the gradients that arrive there, seen by hooks: for classes built on it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ActivationsAndGradients:
    """Keeps what some layers return in a forward, and the gradients of a backward through it.

    The methods of this package do not use it. It is here for classes that do, and like the one it stands for it leaves
    hooks on the layers until `release`.

    Args:
        model: any.
        target_layers: modules of it.
        reshape_transform: lays activations and gradients out as `[N, C, ...]`.
        detach: keep copies on the CPU, without their graph; otherwise the tensors themselves, as they are.

    Attributes:
        activations: activations of each layer, in the order in which they ran.
        gradients: likewise, after a backward.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ActivationsAndGradients
        >>> model = demo.load()
        >>> watched = ActivationsAndGradients(model, [model.block], None)
        >>> scores = watched(torch.rand(2, 3, 96, 96))
        >>> len(watched.activations)
        1
        >>> watched.release()
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None,
        detach: bool = True,
    ) -> None:
        self.model, self.reshape_transform, self.detach = model, reshape_transform, detach
        self.activations: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.handles: list[RemovableHandle] = []
        for layer in target_layers:
            self.handles += [
                layer.register_forward_hook(self.save_activation),
                layer.register_forward_hook(self.save_gradient),
            ]

    def save_activation(self, module: nn.Module, input: Any, output: Any) -> None:
        """Keeps an activation, as a forward hook."""
        self.activations.append(self._stored(output))

    def save_gradient(self, module: nn.Module, input: Any, output: Any) -> None:
        """Waits for the gradient of an activation, as a forward hook."""
        if getattr(output, "requires_grad", False):
            output.register_hook(lambda gradient: self.gradients.insert(0, self._stored(gradient)))

    def _stored(self, tensor: Tensor) -> Tensor:
        if not self.detach:
            return tensor
        return (tensor if self.reshape_transform is None else self.reshape_transform(tensor)).detach().cpu()

    def __call__(self, x: Any) -> Any:
        """Returns the outputs of the model, and records its layers."""
        self.activations, self.gradients = [], []
        return self.model(x)

    def clear(self) -> None:
        """Clears the activations and gradients."""
        self.activations.clear()
        self.gradients.clear()

    def release(self) -> None:
        """Clears the activations and gradients, and removes the hooks."""
        self.clear()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
