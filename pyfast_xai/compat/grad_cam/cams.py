"""The class activation maps of one gradient or one activation, as pytorch-grad-cam calls them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.acceleration import Replaying
from pyfast_xai.compat.grad_cam.pictures import scaled
from pyfast_xai.compat.grad_cam.projection import (
    Sign,
    check_sign,
    project,
    project_by_kernel,
    with_larger_peak_positive,
)
from pyfast_xai.compat.grad_cam.rows import rows_of
from pyfast_xai.compat.grad_cam.targets import ClassifierOutputTarget
from pyfast_xai.compat.recording import Recording, evaluating, read_call
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.cam_rules import RULES, Rule, activation_share, unusual_share
from pyfast_xai.explainers.common.kernel_component import Kernel

Targets = Sequence[Callable[[Any], Tensor]] | None


class BaseCAM(Replaying):
    """Maps of one or several layers, at the size of the images and from 0 to just below 1.

    A subclass says what each channel weighs.

    Args:
        model: any; it is put in evaluation mode for the length of a call.
        target_layers: modules of it; of several the mean is taken.
        reshape_transform: lays an activation out as `[N, C, h, w]`.
        compute_input_gradient: accepted; nothing here asks for it.
        uses_gradients: without, the forward stops at the layers.
        tta_transforms: for `aug_smooth`, objects with `augment_image` and `deaugment_mask`; None for mirrored and for
            three brightnesses.
        detach: maps cannot be differentiated, so True.
        sign: sign of principal components, for `EigenCAM` and `eigen_smooth`: "fixed", or "lapack" for whichever the
            SVD of NumPy gives, as in pytorch-grad-cam.

    Raises:
        InputError: a setting that does not exist, or no layer.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import BaseCAM
        >>> class MeanGradient(BaseCAM):
        ...     def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
        ...         return grads.mean((2, 3))
        >>> model = demo.load()
        >>> MeanGradient(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Iterable[Any] | None = None,
        detach: bool = True,
        *,
        sign: Sign = "fixed",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.target_layers = list(target_layers)
        if not self.target_layers or not all(isinstance(layer, nn.Module) for layer in self.target_layers):
            raise InputError(f"target_layers must be a list of modules, got {target_layers!r}")
        if not detach:
            raise InputError("detach must be True: maps are made without autograd and cannot be differentiated")
        self.model = model
        self.reshape_transform = reshape_transform
        self.compute_input_gradient, self.uses_gradients = compute_input_gradient, uses_gradients
        self.tta_transforms = _TRANSFORMS if tta_transforms is None else list(tta_transforms)
        self.sign = check_sign(sign)
        self.outputs: Any = None

    def __call__(
        self, input_tensor: Tensor, targets: Targets = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> np.ndarray:
        """Explains a batch of images.

        Args:
            input_tensor: `[N, C, H, W]` or `[N, C, D, H, W]`, as the model takes them.
            targets: one an image, called with its output; None for the largest output of each. Of a dict, or an object
                of Transformers, the output is the entry "logits" or "out".
            aug_smooth: the mean over altered copies.
            eigen_smooth: the first principal component of the weighed activations instead of their sum.

        Returns:
            Float32 `[N, H, W]` or `[N, D, H, W]`.

        Raises:
            InputError: images, targets or layers that do not fit.
            UnsupportedOpError: an op above a layer cannot be differentiated.
        """
        return self.maps(input_tensor, targets, aug_smooth, eigen_smooth).cpu().numpy()

    def maps(
        self, input_tensor: Tensor, targets: Targets = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> Tensor:
        """Returns the maps of a call as a tensor on the device of the model."""
        if input_tensor.dim() not in (4, 5):
            raise InputError(f"input_tensor must be [N, C, H, W] or [N, C, D, H, W], got {list(input_tensor.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            if not aug_smooth:
                return self._maps(input_tensor, targets, eigen_smooth)
            flips = []
            for transform in self.tta_transforms:
                flipped = self._maps(transform.augment_image(input_tensor), targets, eigen_smooth)
                flips.append(transform.deaugment_mask(flipped[:, None])[:, 0])
            return torch.stack(flips).mean(0)

    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
    ) -> Tensor:
        """Returns the weight of each channel, `[N, C]`, or of each position of it, `[N, C, ...]`.

        Args:
            input_tensor: the images.
            target_layer: the layer.
            targets: one an image.
            activations: `[N, C, ...]`, at least float32.
            grads: likewise.
        """
        raise NotImplementedError("get_cam_weights must be implemented by a subclass")

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
        eigen_smooth: bool = False,
    ) -> Tensor:
        """Returns the signed map of a layer, `[N, ...]`; see `get_cam_weights`."""
        # Methods without gradients are given none.
        weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        weighed = activations * weights.view(*weights.shape, *[1] * (activations.dim() - weights.dim()))
        summed = weighed.sum(1)
        # A smoothed map points where the map points that it smooths.
        return project(weighed, self.sign, summed) if eigen_smooth else summed

    def _maps(self, images: Tensor, targets: Targets, eigen_smooth: bool) -> Tensor:
        parameter = next(self.model.parameters(), None)
        images = images.detach() if parameter is None else images.detach().to(parameter.device)

        def read(recording: Recording) -> tuple[Any, Targets, list[Tensor], list[Tensor | None]]:
            self.outputs = recording.output
            chosen = self._targets(targets) if self.uses_gradients else targets
            activations = [self._laid_out(_one_or_dict(recording, i)) for i in range(len(self.target_layers))]
            grads: list[Tensor | None] = [None] * len(activations)
            if self.uses_gradients:
                grads = self._gradients(recording, chosen)
            return self.outputs, chosen, activations, grads

        with evaluating(self.model):
            self.outputs, targets, activations, grads = read_call(
                *(self.model, (images,), read, self._replays),
                layers=self.target_layers,
                to_inputs=False,
                stop=not self.uses_gradients,
            )
        size = images.shape[2:]
        heatmaps = []
        for layer, activation, grad in zip(self.target_layers, activations, grads, strict=True):
            signed = self.get_cam_image(images, layer, targets, activation, grad, eigen_smooth)
            heatmaps.append(scaled(signed.clamp_min(0), size))
        return self.fused(heatmaps)

    def fused(self, maps: list[Tensor]) -> Tensor:
        """Returns one map of those of several layers, `[N, *size]` each and from 0 to just below 1: their mean."""
        return scaled(torch.stack(maps).clamp_min(0).mean(0))

    def _targets(self, targets: Targets) -> Targets:
        if targets is None:
            rows = rows_of(self.outputs)
            if not isinstance(rows, Tensor) or rows.dim() != 2:
                received = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise InputError(f"targets must be given for a model that returns {received}, not [N, classes]")
            return [ClassifierOutputTarget(int(best)) for best in rows.argmax(-1)]
        if len(targets) != len(rows_of(self.outputs)):
            raise InputError(f"targets must be one for each of {len(rows_of(self.outputs))} images, got {len(targets)}")
        return targets

    def _gradients(self, recording: Recording, targets: Targets) -> list[Tensor | None]:
        assert targets is not None
        if any(len(layer) > 1 for layer in recording.layers):
            raise InputError("target_layers must return one tensor each for a method that uses gradients")

        def score(output: Any) -> Tensor:
            return torch.cat([target(row).flatten() for target, row in zip(targets, rows_of(output), strict=True)])

        gradients = recording.gradients(score, [values[0] for values in recording.layers])
        return [self._laid_out(gradient) for gradient in gradients]

    def _laid_out(self, activation: Any) -> Tensor:
        if self.reshape_transform is not None:
            activation = self.reshape_transform(activation)
        if not isinstance(activation, Tensor) or activation.dim() not in (4, 5):
            received = list(activation.shape) if isinstance(activation, Tensor) else type(activation).__name__
            raise InputError(f"target_layers must return maps [N, C, ...], or need a reshape_transform, got {received}")
        return activation.to(torch.promote_types(activation.dtype, torch.float32))

    def __enter__(self) -> "BaseCAM":
        return self

    def __exit__(self, *exc: object) -> None:
        """Releases nothing; exceptions propagate."""


class GradCAM(BaseCAM):
    """Channels weighed by their mean gradient (Selvaraju et al., 2017).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputTarget, GradCAM
        >>> model = demo.load()
        >>> targets = [ClassifierOutputTarget(3), ClassifierOutputTarget(7)]
        >>> GradCAM(model, [model.block])(torch.rand(2, 3, 96, 96), targets).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        *,
        sign: Sign = "fixed",
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, sign=sign)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        assert grads is not None
        return grads.flatten(2).mean(2)


class _ByRule(GradCAM):
    """Base of methods that differ from Grad-CAM in one rule of `explainers.common.cam_rules`."""

    rule: Rule

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        assert grads is not None
        weights = self.rule.weights(grads.movedim(1, -1)[None], activations.movedim(1, -1))[0]
        return weights.movedim(-1, 1)


class GradCAMPlusPlus(_ByRule):
    """Channels weighed by positive gradients, positions by higher derivatives (Chattopadhay et al., 2018).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import GradCAMPlusPlus
        >>> model = demo.load()
        >>> GradCAMPlusPlus(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["grad-cam++"]


class HiResCAM(_ByRule):
    """The gradient times the activation (Draelos and Carin, 2020).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import HiResCAM
        >>> model = demo.load()
        >>> HiResCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["hires-cam"]


class LayerCAM(_ByRule):
    """Every position weighed by its own positive gradient (Jiang et al., 2021); layers are averaged.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import LayerCAM
        >>> model = demo.load()
        >>> LayerCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["layer-cam"]


class XGradCAM(_ByRule):
    """Channels weighed by the gradient where they are active (Fu et al., 2020), with 1e-7 below.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import XGradCAM
        >>> model = demo.load()
        >>> XGradCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = Rule(functools.partial(activation_share, epsilon=1e-7))


class GradCAMElementWise(_ByRule):
    """The positive part of gradient times activation, before channels are summed.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import GradCAMElementWise
        >>> model = demo.load()
        >>> GradCAMElementWise(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["grad-cam-elementwise"]


class EigenGradCAM(_ByRule):
    """The first principal component of gradient times activation, which rises with their sum over channels.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import EigenGradCAM
        >>> model = demo.load()
        >>> EigenGradCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["eigen-grad-cam"]

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
        eigen_smooth: bool = False,
    ) -> Tensor:
        return super().get_cam_image(input_tensor, target_layer, targets, activations, grads, True)


class SegEigenCAM(EigenGradCAM):
    """The first principal component of the activation times the size of its gradient (Chung and Ying, 2025).

    The map is turned so that its largest value is the larger (Eq. 13); `sign` has no effect.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import SegEigenCAM
        >>> model = demo.load()
        >>> SegEigenCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    rule = RULES["seg-eigen-cam"]

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
        eigen_smooth: bool = False,
    ) -> Tensor:
        return with_larger_peak_positive(
            super().get_cam_image(input_tensor, target_layer, targets, activations, grads, eigen_smooth)
        )


class RandomCAM(GradCAM):
    """Channels weighed at random between -1 and 1 by NumPy's random numbers, for comparison.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import RandomCAM
        >>> model = demo.load()
        >>> RandomCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        return torch.from_numpy(np.random.uniform(-1, 1, size=tuple(activations.shape[:2]))).to(activations)


class EigenCAM(BaseCAM):
    """The activations on their first principal direction (Muhammad and Yeasin, 2020), centred; knows no target.

    The forward stops at the layers, so `outputs` is None.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: "fixed" makes maps rise with the strength of the activation; "lapack" leaves the sign to NumPy's SVD.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import EigenCAM
        >>> model = demo.load()
        >>> EigenCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        *,
        sign: Sign = "fixed",
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False, sign=sign)

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
        eigen_smooth: bool = False,
    ) -> Tensor:
        return project(activations, self.sign)


class FEM(BaseCAM):
    """Channels weighed by how often they are unusually strong; knows no target.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        k: from how many standard deviations over the mean a position counts.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import FEM
        >>> model = demo.load()
        >>> FEM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        k: float = 2,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        self.k = k

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        above, _ = unusual_share(activations.movedim(1, -1), self.k)
        return above.to(activations.dtype).flatten(1, -2).mean(1)


class KPCA_CAM(BaseCAM):  # noqa: N801
    """The first kernel principal component of the activations, with the sign of scikit-learn; knows no target.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        kernel: "sigmoid", "rbf", "poly", "cosine" or "linear".
        gamma: gamma of the kernel; None for one divided by the number of channels.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import KPCA_CAM
        >>> model = demo.load()
        >>> KPCA_CAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        kernel: Kernel = "sigmoid",
        gamma: float | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        self.kernel, self.gamma = kernel, gamma

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor | None,
        eigen_smooth: bool = False,
    ) -> Tensor:
        return project_by_kernel(activations, self.kernel, self.gamma)


def _one_or_dict(recording: Recording, layer: int) -> Any:
    tensors, names = recording.activations[layer], recording.names[layer]
    if names is not None:
        return dict(zip(names, tensors, strict=True))
    return tensors[0] if len(tensors) == 1 else tensors


class _Altered:
    """An image mirrored or brighter, and its map turned back."""

    def __init__(self, mirrored: bool, factor: float) -> None:
        self._mirrored, self._factor = mirrored, factor

    def augment_image(self, image: Tensor) -> Tensor:
        return (image.flip(3) if self._mirrored else image) * self._factor

    def deaugment_mask(self, mask: Tensor) -> Tensor:
        return mask.flip(3) if self._mirrored else mask


_TRANSFORMS = [_Altered(mirrored, factor) for mirrored in (False, True) for factor in (0.9, 1, 1.1)]
