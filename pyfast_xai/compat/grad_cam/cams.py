"""Grad-CAM, Grad-CAM++ and Eigen-CAM as pytorch-grad-cam calls them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.pictures import scaled
from pyfast_xai.compat.grad_cam.projection import Sign, check_sign, project
from pyfast_xai.compat.grad_cam.targets import ClassifierOutputTarget
from pyfast_xai.compat.recording import Recording, evaluating, record_call
from pyfast_xai.errors import InputError

Targets = Sequence[Callable[[Any], Tensor]] | None


class BaseCAM:
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
        sign: of principal components, for `EigenCAM` and `eigen_smooth`: "fixed", or "lapack" for whichever the SVD of
            NumPy gives, as in pytorch-grad-cam.

    Raises:
        InputError: a setting that does not exist, or no layer.
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
        """Explain a batch of images.

        Args:
            input_tensor: `[N, C, H, W]` or `[N, C, D, H, W]`, as the model takes them.
            targets: one an image, called with its output; None for the largest output of each.
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
        """As a call, but a tensor on the device of the model."""
        if input_tensor.dim() not in (4, 5):
            raise InputError(f"input_tensor must be [N, C, H, W] or [N, C, D, H, W], got {list(input_tensor.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            if not aug_smooth:
                return self._maps(input_tensor, targets, eigen_smooth)
            found = []
            for transform in self.tta_transforms:
                own = self._maps(transform.augment_image(input_tensor), targets, eigen_smooth)
                found.append(transform.deaugment_mask(own[:, None])[:, 0])
            return torch.stack(found).mean(0)

    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Targets,
        activations: Tensor,
        grads: Tensor,
    ) -> Tensor:
        """What each channel weighs, `[N, C]`.

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
        """The signed map of a layer, `[N, ...]`; see `get_cam_weights`."""
        assert grads is not None
        weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        weighed = activations * weights.view(*weights.shape, *[1] * (activations.dim() - 2))
        summed = weighed.sum(1)
        # A smoothed map points where the map points that it smooths.
        return project(weighed, self.sign, summed) if eigen_smooth else summed

    def _maps(self, images: Tensor, targets: Targets, eigen_smooth: bool) -> Tensor:
        parameter = next(self.model.parameters(), None)
        images = images.detach() if parameter is None else images.detach().to(parameter.device)
        with evaluating(self.model):
            recording = record_call(
                self.model, (images,), layers=self.target_layers, everything=False, stop=not self.uses_gradients
            )
        self.outputs = recording.output
        targets = self._targets(targets) if self.uses_gradients else targets
        activations = [self._laid_out(_one_or_dict(recording, i)) for i in range(len(self.target_layers))]
        grads = self._gradients(recording, targets) if self.uses_gradients else [None] * len(activations)
        size = images.shape[2:]
        found = []
        for layer, activation, grad in zip(self.target_layers, activations, grads, strict=True):
            signed = self.get_cam_image(images, layer, targets, activation, grad, eigen_smooth)
            found.append(scaled(signed.clamp_min(0), size))
        return scaled(torch.stack(found).clamp_min(0).mean(0))

    def _targets(self, targets: Targets) -> Targets:
        if targets is None:
            if not isinstance(self.outputs, Tensor):
                raise InputError(f"targets must be given for a model that returns {type(self.outputs).__name__}")
            return [ClassifierOutputTarget(int(best)) for best in self.outputs.argmax(-1).flatten()]
        if len(targets) != len(self.outputs):
            raise InputError(f"targets must be one for each of {len(self.outputs)} images, got {len(targets)}")
        return targets

    def _gradients(self, recording: Recording, targets: Targets) -> list[Tensor | None]:
        assert targets is not None
        if any(len(layer) > 1 for layer in recording.layers):
            raise InputError("target_layers must return one tensor each for a method that uses gradients")

        def score(output: Any) -> Tensor:
            return torch.cat([target(own).flatten() for target, own in zip(targets, output, strict=True)])

        found = recording.gradients(score, [values[0] for values in recording.layers])
        return [self._laid_out(gradient) for gradient in found]

    def _laid_out(self, activation: Any) -> Tensor:
        if self.reshape_transform is not None:
            activation = self.reshape_transform(activation)
        if not isinstance(activation, Tensor) or activation.dim() not in (4, 5):
            came = list(activation.shape) if isinstance(activation, Tensor) else type(activation).__name__
            raise InputError(f"target_layers must return maps [N, C, ...], or need a reshape_transform, got {came}")
        return activation.to(torch.promote_types(activation.dtype, torch.float32))

    def __enter__(self) -> "BaseCAM":
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is left to release; exceptions go on."""


class GradCAM(BaseCAM):
    """Channels weighed by their mean gradient (Selvaraju et al., 2017).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.
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
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor
    ) -> Tensor:
        return grads.flatten(2).mean(2)


class GradCAMPlusPlus(GradCAM):
    """Channels weighed by positive gradients, positions by higher derivatives (Chattopadhay et al., 2018).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: see `BaseCAM`.
    """

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor
    ) -> Tensor:
        positive = grads.flatten(2).clamp_min(0)
        sums = activations.flatten(2).sum(2, keepdim=True)
        below = 2 * positive**2 + sums * positive**3 + 1e-6
        return (positive**3 / below).sum(2)


class EigenCAM(BaseCAM):
    """The activations on their first principal direction (Muhammad and Yeasin, 2020), centred; knows no target.

    The forward stops at the layers, so `outputs` is None.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        sign: "fixed" makes maps rise with the strength of the activation; "lapack" leaves the sign to NumPy's SVD.
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
