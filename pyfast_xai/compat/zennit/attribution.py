"""zennit's attributors: gradients, or relevance by a composite, and combinations of these."""

import abc
from collections.abc import Callable
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyfast_xai.compat.zennit.core import Composite, recorded, walked
from pyfast_xai.errors import InputError

__all__ = ["Gradient", "IntegratedGradients", "Occlusion", "SmoothGrad", "occlude_independent"]

Start = Tensor | Callable[[Tensor], Tensor]
Self = TypeVar("Self", bound="Attributor")


class Attributor(abc.ABC):
    """Base of the attributors, which also are contexts.

    Args:
        model: a module.
        composite: chooses the rules; None for the gradient.
        attr_output: what starts at the output: a tensor, or a function of the output; the output itself for None.
    """

    def __init__(self, model: nn.Module, composite: Composite | None = None, attr_output: Start | None = None) -> None:
        self.model, self.composite = model, composite
        self.attr_output_fn = _start(attr_output)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, input: Tensor, attr_output: Start | None = None) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution.

        Args:
            input: input of the model.
            attr_output: see `Attributor`; None for what the attributor was made with.

        Raises:
            InputError: a model that returns no tensor, or rules that do not fit.
        """
        return self.forward(input, self.attr_output_fn if attr_output is None else _start(attr_output))

    @property
    def inactive(self) -> Any:
        """Returns the composite's context of plain gradients."""
        if self.composite is None:
            raise InputError("composite must be given for inactive(), got None")
        return self.composite.inactive

    @abc.abstractmethod
    def forward(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution."""


def _start(attr_output: Start | None) -> Callable[[Tensor], Tensor]:
    if attr_output is None:
        return lambda output: output
    return attr_output if callable(attr_output) else lambda output: attr_output


class Gradient(Attributor):
    """The gradient of a start at the output, or its relevance by a composite.

    Args:
        model: a module.
        composite: chooses the rules; None for the gradient.
        attr_output: see `Attributor`.
        create_graph: must be False: there is no graph.
        retain_graph: accepted.

    Raises:
        InputError: `create_graph`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.attribution import Gradient
        >>> from pyfast_xai.compat.zennit.composites import EpsilonPlusFlat
        >>> with Gradient(demo.load(), EpsilonPlusFlat()) as attributor:
        ...     output, relevance = attributor(torch.rand(2, 3, 96, 96), torch.eye(10)[[3, 5]])
        >>> output.shape, relevance.shape
        (torch.Size([2, 10]), torch.Size([2, 3, 96, 96]))
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Start | None = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(model, composite, attr_output)
        if create_graph:
            raise InputError("create_graph must be False, as no graph is made, got True")
        self.create_graph, self.retain_graph = create_graph, retain_graph

    def grad(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and what arrives at the input."""
        recording = recorded(self.model, input.detach())
        above = attr_output_fn(recording.output).detach()
        return recording.output, walked(recording, self.model, self.composite, above)

    def forward(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution."""
        return self.grad(input, attr_output_fn)


class SmoothGrad(Gradient):
    """The mean over noisy inputs, of which the last has no noise (Smilkov et al., 2017).

    Noise is drawn from PyTorch's generator, as zennit draws it.

    Args:
        model: a module.
        composite: chooses the rules; None for the gradient.
        attr_output: see `Attributor`.
        create_graph: must be False.
        retain_graph: accepted.
        noise_level: standard deviation as a share of each input's range.
        n_iter: inputs to average over.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.attribution import SmoothGrad
        >>> SmoothGrad(demo.load(), n_iter=2)(torch.rand(2, 3, 96, 96))[1].shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Start | None = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
        noise_level: float = 0.1,
        n_iter: int = 20,
    ) -> None:
        super().__init__(model, composite, attr_output, create_graph, retain_graph)
        self.noise_level, self.n_iter = noise_level, n_iter

    def forward(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution."""
        low, high = input.detach().flatten(1).aminmax(dim=1)
        spread = self.noise_level * (high - low).view(-1, *[1] * (input.dim() - 1))
        total: Any = 0.0
        for _ in range(self.n_iter - 1):
            noisy = input.detach() + torch.randn_like(input) * spread
            total = total + self.grad(noisy, attr_output_fn)[1] / self.n_iter
        output, last = self.grad(input, attr_output_fn)
        return output, total + last / self.n_iter


class IntegratedGradients(Gradient):
    """The mean on the way from a baseline, times the difference from it (Sundararajan et al., 2017).

    Args:
        model: a module.
        composite: chooses the rules; None for the gradient.
        attr_output: see `Attributor`.
        create_graph: must be False.
        retain_graph: accepted.
        baseline_fn: makes the baseline of the input; zeros for None.
        n_iter: places on the way, of which the last is the input.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.attribution import IntegratedGradients
        >>> IntegratedGradients(demo.load(), n_iter=2)(torch.rand(2, 3, 96, 96))[1].shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Start | None = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
        baseline_fn: Callable[[Tensor], Tensor] | None = None,
        n_iter: int = 20,
    ) -> None:
        super().__init__(model, composite, attr_output, create_graph, retain_graph)
        self.baseline_fn, self.n_iter = baseline_fn or torch.zeros_like, n_iter

    def forward(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution."""
        input = input.detach()
        difference = input - self.baseline_fn(input)
        total: Any = 0.0
        for alpha in torch.linspace(1.0 / self.n_iter, 1.0, self.n_iter).tolist():
            output, gradient = self.grad(input - (1 - alpha) * difference, attr_output_fn)
            total = total + gradient / self.n_iter
        return output, total * difference


class Occlusion(Attributor):
    """The score with all but a window hidden, added up at the window.

    Args:
        model: a module.
        composite: accepted; there is no walk.
        attr_output: see `Attributor`.
        occlusion_fn: `occlusion_fn(input, mask)` hides what it will, the mask being True in the window; None for zeros
            outside it.
        window: size of the window: a number for all dimensions but the first, or one for each of the last.
        stride: stride of the window, see `window`.

    Raises:
        TypeError: a window or stride of another kind.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.attribution import Occlusion
        >>> Occlusion(demo.load(), window=(48, 48), stride=(48, 48))(torch.rand(2, 3, 96, 96))[1].shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Start | None = None,
        occlusion_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        window: int | tuple[int, ...] = 8,
        stride: int | tuple[int, ...] = 8,
    ) -> None:
        super().__init__(model, composite, attr_output)
        for name, size in (("window", window), ("stride", stride)):
            if not isinstance(size, int) and not (isinstance(size, tuple) and all(isinstance(n, int) for n in size)):
                raise WindowTypeError(f"{name} must be an int or a tuple of ints, got {size!r}")
        self.occlusion_fn, self.window, self.stride = occlusion_fn or occlude_independent, window, stride

    def forward(self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the output and the attribution."""
        window, stride = self._sizes(input)
        first = torch.zeros_like(input, dtype=torch.bool)
        first[tuple(slice(0, size) for size in window)] = True
        result = torch.zeros_like(input)
        with torch.no_grad():
            for offset in product(*(range(0, size, step) for size, step in zip(input.shape, stride, strict=True))):
                mask = first.roll(offset, tuple(range(input.dim())))
                output = self.model(self.occlusion_fn(input, mask))
                score = attr_output_fn(output).sum(tuple(range(1, output.dim())))
                result += mask * score.view(-1, *[1] * (input.dim() - 1))
            return self.model(input), result

    def _sizes(self, input: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        window, stride = (
            tuple(min(sizes, size) for size in input.shape[1:]) if isinstance(sizes, int) else sizes
            for sizes in (self.window, self.stride)
        )
        window = (*input.shape[: input.dim() - len(window)], *window)
        return window, (*window[: len(window) - len(stride)], *stride)


class WindowTypeError(InputError, TypeError):
    """A size that is no number; also what zennit raises there."""


def occlude_independent(
    input: Tensor, mask: Tensor, fill_fn: Callable[[Tensor], Tensor] = torch.zeros_like, invert: bool = False
) -> Tensor:
    """Returns the input with other numbers outside a mask.

    Args:
        input: a tensor.
        mask: bool, of its shape.
        fill_fn: makes the other numbers of the input.
        invert: hide what is inside.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.zennit.attribution import occlude_independent
        >>> occlude_independent(torch.ones(3), torch.tensor([True, False, True]))
        tensor([1., 0., 1.])
    """
    return torch.where(~mask if invert else mask, input, fill_fn(input))
