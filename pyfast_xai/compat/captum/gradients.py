"""Saliency, guided backprop, deconvolution, input x gradient: one walk, another table of rectifiers."""

import logging
from typing import Any

from torch import Tensor, nn

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.arguments import Inputs, Target, as_tuple, like, refuse
from pyfast_xai.compat.captum.attribution import GradientAttribution, input_gradients
from pyfast_xai.compat.recording import Recording
from pyfast_xai.rules.gradient import DECONVNET, GUIDED, rectifies

logger = logging.getLogger("pyfast_xai")


class Saliency(GradientAttribution):
    """Gradient of the output with respect to the inputs (Simonyan et al., 2014).

    Args:
        forward_func: a module or a function.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Saliency
        >>> Saliency(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(
        self, inputs: Inputs, target: Target = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            target: which output of each row: None, an int, a tuple, N ints in a list or tensor, or N tuples.
            abs: the magnitude.
            additional_forward_args: further arguments of the forward function.

        Returns:
            Of the shape and dtype of the inputs, in a tuple if they are.

        Raises:
            InputError: inputs or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        gradients = self._gradients(as_tuple(inputs), target, additional_forward_args)
        return like(inputs, [gradient.abs() for gradient in gradients] if abs else gradients)


class InputXGradient(GradientAttribution):
    """Gradient times input (Shrikumar et al., 2016).

    Args:
        forward_func: a module or a function.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import InputXGradient
        >>> InputXGradient(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    _multiply_by_inputs = True

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Any:
        """Attributes the output to the inputs; see `Saliency.attribute`."""
        tensors = as_tuple(inputs)
        gradients = self._gradients(tensors, target, additional_forward_args)
        return like(inputs, [gradient * tensor.detach() for gradient, tensor in zip(gradients, tensors, strict=True)])


class _ModifiedRectifier(GradientAttribution):
    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            refuse(f"model must be a torch.nn.Module, got {type(model).__name__}")
        super().__init__(model)
        self.model: Forward = model
        self._reported = False

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Any:
        """Attributes the output to the inputs; see `Saliency.attribute`."""
        tensors = as_tuple(inputs)

        def read(recording: Recording) -> list[Tensor]:
            if not self._reported and not any(map(rectifies, recording.tape)):
                self._reported = True
                logger.warning("%s found no rectifier in the model: this is its plain gradient", type(self).__name__)
            return input_gradients(recording, tensors, target)

        return like(inputs, self._read(tensors, additional_forward_args, read))


class GuidedBackprop(_ModifiedRectifier):
    """Gradient that is negative neither above nor below any rectifier (Springenberg et al., 2015).

    Every rectifier is found, modules and functions alike.

    Args:
        model: a module.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import GuidedBackprop
        >>> GuidedBackprop(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    overlay = GUIDED


class Deconvolution(_ModifiedRectifier):
    """The signal projected down through rectifiers that see only the signal (Zeiler and Fergus, 2014).

    Args:
        model: a module.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Deconvolution
        >>> Deconvolution(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    overlay = DECONVNET
