"""Class activation maps as torch-cam 0.5 calls them: the user runs the model, then asks the extractor.

The forward belongs to the user and cannot be recorded. What comes out of the target layers is seen by a forward hook on
each of these layers and no other, and gradients are taken by autograd from the scores down to these layers and no
further. The hooks hold the extractor weakly: they go with the `with` statement, with `remove_hooks()`, or with the
extractor itself.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.compat.recording import evaluating
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.cam_rules import smoothed_derivatives
from pyfast_xai.explainers.common.channel_masks import Masks, scores_behind
from pyfast_xai.explainers.common.layer_explainer import resized
from pyfast_xai.tape import record

logger = logging.getLogger("pyfast_xai")

Layer = nn.Module | str
OutputTarget = Callable[[Any], Tensor]


class InputTypeError(InputError, TypeError):
    """An argument of the wrong type; a TypeError as well, as torch-cam raises.

    Example:
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import GradCAM
        >>> GradCAM(demo.load(), 3)
        Traceback (most recent call last):
        pyfast_xai.compat.torchcam.extractors.InputTypeError: target_layer must be a module or its name, got int
    """


class NotForwardedError(InputError, AssertionError):
    """The model has not run since the extractor was made; an AssertionError as well, as torch-cam raises.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import GradCAM
        >>> GradCAM(demo.load(), "block", input_shape=(3, 96, 96))(3, torch.rand(1, 10))
        Traceback (most recent call last):
        pyfast_xai.compat.torchcam.extractors.NotForwardedError: the model must run before ...
    """


class Extractor:
    """Base of all extractors.

    Args:
        model: whose layers are watched.
        target_layer: a module, its name, or several; None for the last one that returns a map.
        input_shape: shape of the input of the model, without the batch, to find that one.
        enable_hooks: watch from the start.
        reshape_transform: lays activations and gradients out as `[N, C, ...]`.

    Attributes:
        target_names: names of the layers.
        hook_a: the last output of each layer, None before a forward.
        hook_handles: handles of the hooks that are on the layers.

    Raises:
        InputError: a layer that is not there, or none that returns a map.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import GradCAM
        >>> model = demo.load()
        >>> with GradCAM(model, "block", input_shape=(3, 96, 96)) as extractor:
        ...     scores = model(torch.rand(1, 3, 96, 96, requires_grad=True))
        ...     maps = extractor(3, scores)
        >>> [map.shape for map in maps]
        [torch.Size([1, 12, 12])]
    """

    _score_used = False  # whether the scores must be passed, with their graph
    _targets_supported = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if reshape_transform is not None and not callable(reshape_transform):
            raise InputTypeError(f"reshape_transform must be a function, got {type(reshape_transform).__name__}")
        if reshape_transform is not None and target_layer is None:
            raise InputError("target_layer must be given with a reshape_transform, got None")
        self.model = model
        self.submodule_dict = dict(model.named_modules())
        if target_layer is None:
            target_layer = _last_map(model, input_shape)
            logger.warning("target_layer was not given and is taken to be %r", target_layer)
        layers = target_layer if isinstance(target_layer, list) else [target_layer]
        self.target_names = [self._name(layer, "target_layer") for layer in layers]
        self._reshape_transform = reshape_transform
        self._hooks_enabled = enable_hooks
        self.reset_hooks()
        extractor = weakref.ref(self)
        self.hook_handles = [
            self.submodule_dict[name].register_forward_hook(_Watch(extractor, i))
            for i, name in enumerate(self.target_names)
        ]
        weakref.finalize(self, _remove, self.hook_handles)

    def _name(self, layer: Any, argument: str) -> str:
        if isinstance(layer, str):
            if layer not in self.submodule_dict:
                close = get_close_matches(layer, self.submodule_dict)
                hint = f" such as {', '.join(map(repr, close))}" if close else ""
                raise InputError(f"{argument} must name a module of the model{hint}, got {layer!r}")
            return layer
        if not isinstance(layer, nn.Module):
            raise InputTypeError(f"{argument} must be a module or its name, got {type(layer).__name__}")
        layer_name = next((name for name, module in self.submodule_dict.items() if module is layer), None)
        if layer_name is None:
            raise InputError(f"{argument} must be a module of the model, got a {type(layer).__name__} of another model")
        return layer_name

    def _see(self, layer: int, output: Any) -> Tensor | None:
        """Keeps the output of a layer; the following layers get a copy to write to."""
        if not self._hooks_enabled:
            return None
        if not isinstance(output, Tensor):
            name = self.target_names[layer]
            raise InputTypeError(f"target_layer must return a tensor, got {type(output).__name__} from {name!r}")
        self._hook_outputs[layer] = output
        self.hook_a[layer] = self._laid_out(output.detach())
        return output.clone()

    def _laid_out(self, activation: Tensor) -> Tensor:
        return activation if self._reshape_transform is None else self._reshape_transform(activation)

    def enable_hooks(self) -> None:
        """Records the outputs of the layers."""
        self._hooks_enabled = True

    def disable_hooks(self) -> None:
        """Stops recording; recorded outputs are kept."""
        self._hooks_enabled = False

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        before, self._hooks_enabled = self._hooks_enabled, False
        try:
            yield
        finally:
            self._hooks_enabled = before

    def reset_hooks(self) -> None:
        """Clears the recorded outputs."""
        self.hook_a: list[Tensor | None] = [None] * len(self.target_names)
        self._hook_outputs: list[Tensor | None] = [None] * len(self.target_names)

    def remove_hooks(self) -> None:
        """Removes the hooks from the model."""
        _remove(self.hook_handles)

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove_hooks()
        self.reset_hooks()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target_layer={self.target_names})"

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Returns the maps of the last forward.

        Args:
            class_idx: the class, or one an image.
            scores: the outputs of the model, with its graph, where gradients are needed: `[N, classes]`.
            normalized: bring each map to [0, 1].
            targets: instead of a class, a function of the output for an image that gives one number, or one an image.
            **kwargs: `retain_graph`, to ask again of the same scores; of Grad-CAM++ also `eps`.

        Returns:
            One `[N, ...]` a layer, of its size, on its device.

        Raises:
            InputError: a class, scores or targets that do not fit, or no forward yet.
            RuntimeError: scores that do not depend on a layer.
        """
        return self.compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Computes the maps, as a call does."""
        activations = self._check(class_idx, scores, targets)
        weights = self._weights(class_idx, scores, targets, activations, **kwargs)
        with torch.no_grad():
            cams = []
            for weight, activation in zip(weights, activations, strict=True):
                cam = (weight.view(*weight.shape, *[1] * (activation.dim() - weight.dim())) * activation).nansum(1)
                cam = self._rectified(cam)
                cams.append(normalized_maps(cam) if normalized else cam)
            return cams

    def _check(self, class_idx: Any, scores: Any, targets: Any) -> list[Tensor]:
        if (class_idx is None) == (targets is None):
            raise InputError("class_idx or targets must be given, exactly one of them")
        if targets is not None and not self._targets_supported:
            raise InputError(f"targets must be left out: {type(self).__name__} does not support others than classes")
        activations = [activation for activation in self.hook_a if activation is not None]
        if len(activations) < len(self.hook_a):
            raise NotForwardedError(
                "the model must run before maps are computed, got no forward since the extractor was made"
            )
        rows = len(activations[0])
        if class_idx is not None:
            chosen = class_idx if isinstance(class_idx, list) else [class_idx]
            if not all(isinstance(one, int) and one >= 0 for one in chosen):
                raise InputError(f"class_idx must be ints of at least 0, got {class_idx!r}")
            if isinstance(class_idx, list) and len(chosen) != rows:
                raise InputError(f"class_idx must be one for each of {rows} images, got {len(chosen)}")
        if self._score_used and scores is None:
            raise InputError("scores must be given to a method that uses gradients, got None")
        return activations

    def _weights(
        self, class_idx: Any, scores: Any, targets: Any, activations: list[Tensor], **kwargs: Any
    ) -> list[Tensor]:
        """Returns the weight of each channel, `[N, C]` or `[1, C]` a layer."""
        raise NotImplementedError

    def _rectified(self, maps: Tensor) -> Tensor:
        return maps

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Returns one map of those of several layers: the largest value at every place.

        Args:
            cams: `[N, ...]` each.
            target_shape: the size; None for the largest.

        Raises:
            InputError: no list of tensors, or an empty one.
        """
        if not isinstance(cams, list) or not all(isinstance(cam, Tensor) for cam in cams):
            raise InputTypeError(f"cams must be a list of tensors, got {type(cams).__name__}")
        if not cams:
            raise InputError("cams must hold at least one map, got none")
        if len(cams) == 1:
            return cams[0]
        size = target_shape or tuple(map(max, zip(*(cam.shape[1:] for cam in cams), strict=True)))
        mode = {3: "bilinear", 4: "trilinear"}[cams[0].dim()]
        return torch.stack([functional.interpolate(cam[:, None], size, mode=mode)[:, 0] for cam in cams]).amax(0)


class CAM(Extractor):
    """The channels of the last map, weighed as the last linear layer does (Zhou et al., 2016).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`; one only.
        fc_layer: the linear layer or 1x1 convolution, or its name; None for the only linear layer there is.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Raises:
        InputError: layers that are not there, or more than one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai.compat.torchcam import CAM
        >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        >>> model = nn.Sequential(*layers).eval()
        >>> with CAM(model, "1", "4", input_shape=(3, 32, 32)) as extractor:
        ...     scores = model(torch.rand(1, 3, 32, 32))
        ...     maps = extractor(3, scores)
        >>> [map.shape for map in maps]
        [torch.Size([1, 30, 30])]
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        fc_layer: Layer | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if isinstance(target_layer, list) and len(target_layer) > 1:
            raise InputError(f"target_layer must be one layer for CAM, got {len(target_layer)}")
        if fc_layer is None:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            if len(linear) != 1:
                raise InputError(f"fc_layer must be given for a model with {len(linear)} linear layers, got None")
            fc_layer = linear[0]
            logger.warning("fc_layer was not given and is taken to be %r", fc_layer)
        super().__init__(model, target_layer, input_shape, **kwargs)
        try:
            self._fc = self.submodule_dict[self._name(fc_layer, "fc_layer")]
        except InputError:
            self.remove_hooks()
            raise

    def _weights(
        self, class_idx: Any, scores: Any, targets: Any, activations: list[Tensor], **kwargs: Any
    ) -> list[Tensor]:
        weight = self._fc.get_parameter("weight").detach().flatten(1)
        chosen = class_idx if isinstance(class_idx, list) else [class_idx]
        if max(chosen) >= len(weight):
            raise InputError(f"class_idx must lie in [0, {len(weight)}), got {max(chosen)}")
        return [weight[chosen]]


class GradCAM(Extractor):
    """Channels weighed by their mean gradient (Selvaraju et al., 2017).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import GradCAM
        >>> model = demo.load()
        >>> with GradCAM(model, "block", input_shape=(3, 96, 96)) as extractor:
        ...     scores = model(torch.rand(1, 3, 96, 96, requires_grad=True))
        ...     maps = extractor(3, scores)
        >>> [map.shape for map in maps]
        [torch.Size([1, 12, 12])]
    """

    _score_used = True
    _targets_supported = True

    def _weights(
        self,
        class_idx: Any,
        scores: Any,
        targets: Any,
        activations: list[Tensor],
        retain_graph: bool = False,
        **kwargs: Any,
    ) -> list[Tensor]:
        total = scores_of(class_idx, scores, targets, len(activations[0])).sum()
        outputs = [output for output in self._hook_outputs if output is not None]
        try:
            gradients = torch.autograd.grad(total, outputs, retain_graph=retain_graph)
        except RuntimeError as error:
            raise RuntimeError(
                "target score is not connected to every target layer: the forward must run with gradients enabled, on "
                f"an input or parameters that require them ({error})"
            ) from error
        laid_out = [self._laid_out(gradient.detach()) for gradient in gradients]
        return [
            self._weigh(gradient, activation, **kwargs)
            for gradient, activation in zip(laid_out, activations, strict=True)
        ]

    def _weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        return gradient.flatten(2).mean(2)

    def _rectified(self, maps: Tensor) -> Tensor:
        return maps.clamp_min(0)


class GradCAMpp(GradCAM):
    """Channels weighed by positive gradients, positions by higher derivatives (Chattopadhay et al., 2018, Eq. 19).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import GradCAMpp
        >>> model = demo.load()
        >>> with GradCAMpp(model, "block", input_shape=(3, 96, 96)) as extractor:
        ...     scores = model(torch.rand(1, 3, 96, 96, requires_grad=True))
        ...     maps = extractor(3, scores)
        >>> [map.shape for map in maps]
        [torch.Size([1, 12, 12])]
    """

    def _weigh(self, gradient: Tensor, activation: Tensor, eps: float = 1e-8) -> Tensor:
        positive = gradient.flatten(2).clamp_min(0)
        below = 2 * positive**2 + activation.flatten(2).sum(2, keepdim=True) * positive**3
        return torch.where(positive > 0, positive**3 / (below + eps), 0).sum(2)


class XGradCAM(GradCAM):
    """Channels weighed by the gradient where they are active (Fu et al., 2020).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import XGradCAM
        >>> model = demo.load()
        >>> with XGradCAM(model, "block") as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def _weigh(self, gradient: Tensor, activation: Tensor, eps: float = 1e-8) -> Tensor:
        return (gradient * activation).flatten(2).sum(2) / (activation.flatten(2).sum(2) + eps)


class LayerCAM(GradCAM):
    """Every position weighed by its own positive gradient (Jiang et al., 2021).

    Maps of several layers are fused by their largest value, each lifted by tanh(2 M) before (Eq. 9).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import LayerCAM
        >>> model = demo.load()
        >>> with LayerCAM(model, "block") as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def _weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        return gradient.clamp_min(0)

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        several = isinstance(cams, list) and len(cams) > 1 and all(isinstance(cam, Tensor) for cam in cams)
        return super().fuse_cams([torch.tanh(2 * cam) for cam in cams] if several else cams, target_shape)


class _SeesInput(Extractor):
    """Base of extractors that run the model again on what it was given."""

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, input_shape, **kwargs)
        self._input: Tensor | None = None
        self.hook_handles.append(model.register_forward_pre_hook(_WatchInput(weakref.ref(self))))

    def _see_input(self, input: Tensor) -> None:
        if self._hooks_enabled:
            self._input = input.detach().clone()

    def _last_input(self) -> Tensor:
        if self._input is None:
            raise NotForwardedError(
                "the model must run before maps are computed, got no forward since its input is recorded"
            )
        return self._input


class _WatchInput:
    """A forward pre-hook that does not keep its extractor alive."""

    def __init__(self, extractor: "weakref.ref[_SeesInput]") -> None:
        self._extractor = extractor

    def __call__(self, module: nn.Module, args: Any) -> None:
        extractor = self._extractor()
        if extractor is not None:
            extractor._see_input(args[0])


class SmoothGradCAMpp(GradCAM, _SeesInput):
    """Grad-CAM++ with derivatives averaged over noisy copies of the input (Omeiza et al., 2019).

    The numbers are torch-cam's: noise of PyTorch's generator in units of the input, the activation of the input
    without noise, and the positive gradient of the last copy.

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        num_samples: noisy copies.
        std: standard deviation of the noise.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import SmoothGradCAMpp
        >>> model = demo.load()
        >>> with SmoothGradCAMpp(model, "block") as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    _score_used = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        num_samples: int = 4,
        std: float = 0.3,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, input_shape, **kwargs)
        self.num_samples, self.std = num_samples, std

    def _see_input(self, input: Tensor) -> None:
        if not self._repeating:
            super()._see_input(input)

    _repeating = False

    def _weights(
        self,
        class_idx: Any,
        scores: Any,
        targets: Any,
        activations: list[Tensor],
        retain_graph: bool = False,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> list[Tensor]:
        images, clean = self._last_input(), [activation.clone() for activation in activations]
        squares, cubes = ([torch.zeros_like(activation) for activation in clean] for _ in range(2))
        self._repeating = True
        try:
            for _ in range(self.num_samples):
                noisy = images + torch.distributions.Normal(0, self.std).sample(images.shape).to(images.device)
                with torch.enable_grad():
                    answers = self.model(noisy.requires_grad_())
                    total = scores_of(class_idx, answers, targets, len(images)).sum()
                    outputs = [output for output in self._hook_outputs if output is not None]
                    gradients = [self._laid_out(gradient) for gradient in torch.autograd.grad(total, outputs)]
                for square, cube, gradient in zip(squares, cubes, gradients, strict=True):
                    square += gradient**2 / self.num_samples
                    cube += gradient**3 / self.num_samples
        finally:
            self._repeating = False
        self.hook_a = [*clean]
        weights = []
        for square, cube, gradient, activation in zip(squares, cubes, gradients, clean, strict=True):
            space = tuple(range(2, gradient.dim()))
            over = (cube * activation).sum(space, keepdim=True)
            weights.append(smoothed_derivatives(square, over, gradient, space, eps))
        return weights


class ScoreCAM(_SeesInput):
    """Channels weighed by the softmax of the scores behind them as masks (Wang et al., 2020).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        batch_size: masked inputs that go through the model at once.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import ScoreCAM
        >>> model = demo.load()
        >>> with ScoreCAM(model, "block") as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    _targets_supported = True

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, input_shape, **kwargs)
        self.bs = batch_size

    def _weights(
        self, class_idx: Any, scores: Any, targets: Any, activations: list[Tensor], **kwargs: Any
    ) -> list[Tensor]:
        images = self._last_input()
        with torch.no_grad(), self._hooks_off(), evaluating(self.model):
            return [
                self._of_layer(_normalized_channels(activation), images, class_idx, targets)
                for activation in activations
            ]

    def _of_layer(self, maps: Tensor, images: Tensor, class_idx: Any, targets: Any) -> Tensor:
        flat = maps.flatten(0, 1)[:, None]

        def score(changed: Tensor, rows: Tensor) -> Tensor:
            return self._target_scores(changed, rows, class_idx, targets)

        places = torch.arange(len(flat), device=flat.device)
        scores = scores_behind(self._masks(maps, flat, images), images, places, maps.shape[1], self.bs, score)
        # What the input itself scores would be taken off all channels alike, and the softmax does not see it.
        return scores.view(maps.shape[:2]).softmax(1)

    def _masks(self, maps: Tensor, flat: Tensor, images: Tensor) -> Iterator[Masks]:
        """Yields, for each sample, what gives the masks `[M, 1, ...]` of some channels."""
        yield lambda part: resized(flat[part], images.shape[2:])

    def _target_scores(self, changed: Tensor, rows: Tensor, class_idx: Any, targets: Any) -> Tensor:
        chosen = rows.tolist()
        picked = [class_idx[row] for row in chosen] if isinstance(class_idx, list) else class_idx
        functions = [targets[row] for row in chosen] if isinstance(targets, list) else targets
        return scores_of(picked, self.model(changed), functions, len(rows)).flatten()

    def _rectified(self, maps: Tensor) -> Tensor:
        return maps.clamp_min(0)


class SSCAM(ScoreCAM):
    """Score-CAM with scores averaged over noisy masks (Wang et al., 2020).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        batch_size: see `ScoreCAM`.
        num_samples: noisy copies of each mask.
        std: standard deviation of the noise, of PyTorch's generator.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import SSCAM
        >>> model = demo.load()
        >>> with SSCAM(model, "block", num_samples=2) as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        batch_size: int = 32,
        num_samples: int = 35,
        std: float = 2.0,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)
        self.num_samples, self.std = num_samples, std

    def _masks(self, maps: Tensor, flat: Tensor, images: Tensor) -> Iterator[Masks]:
        whole = (*maps.shape[:2], *images.shape[2:])
        for _ in range(self.num_samples):
            # All of it is drawn at once, as there, where it is the noise that a seed stands for.
            noise = torch.distributions.Normal(0, self.std).sample(torch.Size(whole)).to(flat).flatten(0, 1)[:, None]
            yield functools.partial(_noisy, flat, images.shape[2:], noise)


class ISCAM(ScoreCAM):
    """Score-CAM with scores averaged over growing shares of the mask (Naidu et al., 2020).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        batch_size: see `ScoreCAM`.
        num_samples: shares; as there they add up, the last of ten being 5.5.
        input_shape: see `Extractor`.
        **kwargs: see `Extractor`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import ISCAM
        >>> model = demo.load()
        >>> with ISCAM(model, "block", num_samples=2) as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        batch_size: int = 32,
        num_samples: int = 10,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, target_layer, batch_size, input_shape, **kwargs)
        self.num_samples = num_samples

    def _masks(self, maps: Tensor, flat: Tensor, images: Tensor) -> Iterator[Masks]:
        share = 0.0
        for step in range(1, self.num_samples + 1):
            share += step / self.num_samples
            yield functools.partial(_partial, flat, images.shape[2:], share)


def _noisy(maps: Tensor, size: Sequence[int], noise: Tensor, part: Tensor) -> Tensor:
    return resized(maps[part], size) + noise[part]


def _partial(maps: Tensor, size: Sequence[int], share: float, part: Tensor) -> Tensor:
    return share * resized(maps[part], size)


def _normalized_channels(maps: Tensor) -> Tensor:
    """Returns `[N, C, ...]` with each channel from 0 to just below 1."""
    return normalized_maps(maps.flatten(0, 1)).view_as(maps)


class _Wrapper:
    """Base of what is made of another extractor; it is watched, switched and released through this."""

    def __init__(self, base_cam: Extractor) -> None:
        self.base_cam = base_cam

    @property
    def model(self) -> nn.Module:
        """Returns the model that is watched."""
        return self.base_cam.model

    @property
    def target_names(self) -> list[str]:
        """Names of the layers."""
        return self.base_cam.target_names

    def enable_hooks(self) -> None:
        """See `Extractor`."""
        self.base_cam.enable_hooks()

    def disable_hooks(self) -> None:
        """See `Extractor`."""
        self.base_cam.disable_hooks()

    def reset_hooks(self) -> None:
        """See `Extractor`."""
        self.base_cam.reset_hooks()

    def remove_hooks(self) -> None:
        """See `Extractor`."""
        self.base_cam.remove_hooks()

    def _hooks_off(self) -> Any:
        return self.base_cam._hooks_off()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.base_cam.__exit__(*exc)


class RefineCAM(_Wrapper):
    """The product of the maps of several layers (2026).

    Args:
        model: whose layers are watched.
        target_layer: two layers or more.
        input_shape: see `Extractor`.
        base_method: the extractor whose maps are multiplied.
        **base_kwargs: its settings.

    Raises:
        InputError: fewer layers, or no extractor.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import RefineCAM
        >>> model = demo.load()
        >>> with RefineCAM(model, ["block", "block"]) as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: list[Layer],
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[Extractor] = GradCAMpp,
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(target_layer, list) or len(target_layer) < 2:
            raise InputError(f"target_layer must be a list of two layers or more for RefineCAM, got {target_layer!r}")
        if not isinstance(base_method, type) or not issubclass(base_method, Extractor):
            raise InputTypeError(f"base_method must be an extractor class, got {base_method!r}")
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Returns the product, in a list; `target_shape` is its size, see `Extractor` for the rest."""
        cams = self.base_cam(class_idx, scores, True, targets=targets, **kwargs)
        return [self.fuse_cams(cams, target_shape, normalized)]

    compute_cams = __call__

    @staticmethod
    def fuse_cams(cams: list[Tensor], target_shape: tuple[int, ...] | None = None, normalized: bool = True) -> Tensor:
        """Returns the product of maps `[N, ...]`, each brought to [0, 1] and to one size.

        Raises:
            InputError: no list of tensors, or an empty one.
        """
        if not isinstance(cams, list) or not all(isinstance(cam, Tensor) for cam in cams):
            raise InputTypeError(f"cams must be a list of tensors, got {type(cams).__name__}")
        if not cams:
            raise InputError("cams must hold at least one map, got none")
        size = target_shape or tuple(map(max, zip(*(cam.shape[1:] for cam in cams), strict=True)))
        product = torch.stack([resized(normalized_maps(cam)[:, None], size)[:, 0] for cam in cams]).prod(0)
        return normalized_maps(product) if normalized else product


class FinerCAM(_Wrapper):
    """Maps of what tells a class from those whose scores are nearest: the maps of `y_c - gamma mean_d y_d` (2025).

    Args:
        model: whose layers are watched.
        target_layer: see `Extractor`.
        input_shape: see `Extractor`.
        base_method: `GradCAM`, `GradCAMpp` or `LayerCAM`.
        gamma: how much of the others is taken off.
        num_references: how many classes are compared with, where they are not named.
        **base_kwargs: settings of `base_method`.

    Raises:
        InputError: a setting out of range.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import FinerCAM
        >>> model = demo.load()
        >>> with FinerCAM(model, "block") as extractor:
        ...     maps = extractor(0, model(torch.rand(2, 3, 96, 96, requires_grad=True)))
        >>> len(maps)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[GradCAM] = GradCAM,
        gamma: float = 0.6,
        num_references: int = 3,
        **base_kwargs: Any,
    ) -> None:
        if base_method not in (GradCAM, GradCAMpp, LayerCAM):
            raise InputTypeError(f"base_method must be GradCAM, GradCAMpp or LayerCAM, got {base_method!r}")
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
            raise InputTypeError(f"gamma must be a number, got {gamma!r}")
        if not 0 <= gamma < float("inf"):
            raise InputError(f"gamma must be finite and not negative, got {gamma}")
        if isinstance(num_references, bool) or not isinstance(num_references, int):
            raise InputTypeError(f"num_references must be an int, got {num_references!r}")
        if num_references < 1:
            raise InputError(f"num_references must be at least 1, got {num_references}")
        self.gamma, self.num_references = float(gamma), num_references
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int],
        scores: Tensor | None = None,
        comparison_idx: int | list[int] | list[list[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Returns the maps of the last forward.

        Args:
            class_idx: the class, or one an image.
            scores: the outputs of the model, with its graph, `[N, classes]`.
            comparison_idx: classes to compare with: one or several for all images, or as many for each.
            normalized: bring each map to [0, 1].
            **kwargs: see `Extractor`.

        Raises:
            InputError: classes or scores that do not fit.
        """
        if kwargs.get("targets") is not None:
            raise InputError("targets must be left out: FinerCAM compares classes")
        if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 2:
            received = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise (InputError if scores is None or isinstance(scores, Tensor) else InputTypeError)(
                f"scores must be a tensor [N, classes] of two classes or more, got {received}"
            )
        rows, classes = scores.shape
        chosen = class_idx if isinstance(class_idx, list) else [class_idx] * rows
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in chosen):
            raise InputTypeError(f"class_idx must be ints, got {class_idx!r}")
        if len(chosen) != rows or not all(0 <= one < classes for one in chosen):
            raise InputError(f"class_idx must be one of {classes} classes for each of {rows} images, got {class_idx!r}")
        target = torch.tensor(chosen, device=scores.device)[:, None]
        others = self._others(comparison_idx, scores.detach(), target)
        contrast = scores.gather(1, target) - self.gamma * scores.gather(1, others).mean(1, keepdim=True)
        # The only column of scores that the extractor sees.
        return self.base_cam([0] * rows, contrast, normalized, **kwargs)

    compute_cams = __call__

    def _others(self, comparison_idx: Any, scores: Tensor, target: Tensor) -> Tensor:
        rows, classes = scores.shape
        if comparison_idx is None:
            distance = (scores - scores.gather(1, target)).abs().scatter(1, target, float("inf"))
            return distance.topk(min(self.num_references, classes - 1), largest=False).indices
        listed = comparison_idx if isinstance(comparison_idx, list) else [comparison_idx]
        nested = listed if listed and all(isinstance(row, list) for row in listed) else [listed] * rows
        if not all(isinstance(one, int) and not isinstance(one, bool) for row in nested for one in row):
            raise InputTypeError(f"comparison_idx must hold ints, got {comparison_idx!r}")
        fits = len(nested) == rows and len({len(row) for row in nested}) == 1 and all(nested)
        if not fits or not all(0 <= one < classes for row in nested for one in row):
            raise InputError(
                f"comparison_idx must be as many of {classes} classes for each image, got {comparison_idx!r}"
            )
        if any(len({*row, c}) != len(row) + 1 for row, c in zip(nested, target[:, 0].tolist(), strict=True)):
            raise InputError(
                f"comparison_idx must hold other classes than the target, each once, got {comparison_idx!r}"
            )
        return torch.tensor(nested, device=scores.device)

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Returns the maps fused as by the compared extractor."""
        return self.base_cam.fuse_cams(cams, target_shape)


def scores_of(class_idx: Any, scores: Any, targets: Any, rows: int) -> Tensor:
    """Returns one number an image, `[N]`."""
    if targets is None:
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            received = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputTypeError(f"scores must be a tensor [N, classes] for a class, got {received}")
        chosen = class_idx if isinstance(class_idx, list) else [class_idx] * len(scores)
        if max(chosen) >= scores.shape[1]:
            raise InputError(f"class_idx must lie in [0, {scores.shape[1]}), got {max(chosen)}")
        return scores.gather(1, torch.tensor(chosen, device=scores.device)[:, None])
    if not isinstance(scores, (Tensor, list)) or (isinstance(scores, Tensor) and scores.dim() == 0):
        raise InputTypeError(f"scores must be a tensor [N, ...] or a list of one an image, got {type(scores).__name__}")
    functions = targets if isinstance(targets, list) else [targets] * len(scores)
    if not all(callable(function) for function in functions):
        raise InputTypeError("targets must be a function or a list of functions")
    if not len(functions) == len(scores) == rows:
        raise InputError(f"targets must be one for each of {rows} images, got {len(functions)}")
    results = [function(row) for function, row in zip(functions, scores, strict=True)]
    if not all(isinstance(result, Tensor) and result.numel() == 1 for result in results):
        raise InputError("targets must return a scalar tensor each")
    return torch.stack([result.reshape(()) for result in results])


class _Watch:
    """A forward hook that does not keep its extractor alive."""

    def __init__(self, extractor: "weakref.ref[Extractor]", layer: int) -> None:
        self._extractor, self._layer = extractor, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        extractor = self._extractor()
        return None if extractor is None else extractor._see(self._layer, output)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def normalized_maps(maps: Tensor) -> Tensor:
    space = tuple(range(1, maps.dim()))
    maps = maps - maps.amin(space, keepdim=True)
    return maps / (maps.amax(space, keepdim=True) + 1e-8)


def _last_map(model: nn.Module, input_shape: Sequence[int]) -> str:
    """Returns the last module that returns a map of more than one position."""
    like = next(model.parameters(), torch.zeros(()))
    with evaluating(model):
        tape = record(model, torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    for name, calls in reversed(tape.modules.items()):
        shape = calls[-1][0].shape
        if name and len(shape) == len(input_shape) + 1 and any(size != 1 for size in shape[2:]):
            return name
    raise InputError("target_layer must be named for a model in which no module returns a map, got None")


def overlay_mask(img: Any, mask: Any, colormap: Any = "jet", alpha: float = 0.7) -> Any:
    """Returns a map in colours over a picture; needs matplotlib for the colours.

    Args:
        img: PIL picture, RGB or grey.
        mask: PIL picture, grey; it is squared, as there.
        colormap: a colour map of matplotlib, or its name.
        alpha: share of the picture, in [0, 1).

    Returns:
        PIL picture, RGB.

    Raises:
        InputError: others than such pictures, or a share out of range.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai.compat.torchcam import overlay_mask
        >>> overlay_mask(Image.new("RGB", (32, 24)), Image.new("F", (8, 6), 0.5)).size
        (32, 24)
    """
    from matplotlib import colormaps
    from PIL import Image

    if not isinstance(img, Image.Image) or not isinstance(mask, Image.Image):
        raise InputTypeError("img and mask arguments need to be PIL.Image")
    if not isinstance(alpha, float) or alpha < 0 or alpha >= 1:
        raise InputError(f"alpha argument is expected to be of type float between 0 and 1, got {alpha!r}")
    if len(img.getbands()) not in (1, 3):
        raise InputError(f"img argument needs to be a grayscale or RGB image, got {img.mode}")
    heat = mask.resize(img.size, resample=Image.Resampling.BICUBIC)
    colours = colormaps.get_cmap(colormap)(np.asarray(heat) ** 2, bytes=True)[:, :, :3]
    picture = np.asarray(img)
    if picture.ndim == 2:
        picture = picture[..., None].repeat(3, 2)
    return Image.fromarray((alpha * picture + (1 - alpha) * colours).astype(np.uint8))
