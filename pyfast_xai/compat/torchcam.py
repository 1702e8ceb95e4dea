"""Class activation maps as torch-cam 0.5 calls them: the user runs the model, then asks the extractor.

The forward belongs to the user and cannot be recorded. What comes out of the target layers is seen by a forward hook on
each of these layers and no other, and gradients are taken by autograd from the scores down to these layers and no
further. The hooks hold the extractor weakly: they go with the `with` statement, with `remove_hooks()`, or with the
extractor itself.
"""

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
from pyfast_xai.tape import record

logger = logging.getLogger("pyfast_xai")

Layer = nn.Module | str
OutputTarget = Callable[[Any], Tensor]


class InputTypeError(InputError, TypeError):
    """An argument of the wrong type; a TypeError as well, as torch-cam raises."""


class NotForwardedError(InputError, AssertionError):
    """The model has not run since the extractor was made; an AssertionError as well, as torch-cam raises."""


class Extractor:
    """Base of all extractors.

    Args:
        model: whose layers are watched.
        target_layer: a module, its name, or several; None for the last one that returns a map.
        input_shape: of what the model takes, without the batch, to find that one.
        enable_hooks: watch from the start.
        reshape_transform: lays activations and gradients out as `[N, C, ...]`.

    Attributes:
        target_names: of the layers.
        hook_a: what came out of each layer last, None before a forward.
        hook_handles: of the hooks that are on the layers.

    Raises:
        InputError: a layer that is not there, or none that returns a map.
    """

    _score_used = False  # whether the scores must be handed over, with their graph
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
        own = weakref.ref(self)
        self.hook_handles = [
            self.submodule_dict[name].register_forward_hook(_Watch(own, i)) for i, name in enumerate(self.target_names)
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
        found = next((name for name, module in self.submodule_dict.items() if module is layer), None)
        if found is None:
            raise InputError(f"{argument} must be a module of the model, got another {type(layer).__name__}")
        return found

    def _see(self, layer: int, output: Any) -> Tensor | None:
        """Keep what a layer returned; what follows gets a copy to write to."""
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
        """Watch what the layers return."""
        self._hooks_enabled = True

    def disable_hooks(self) -> None:
        """Stop watching; what was seen is kept."""
        self._hooks_enabled = False

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        before, self._hooks_enabled = self._hooks_enabled, False
        try:
            yield
        finally:
            self._hooks_enabled = before

    def reset_hooks(self) -> None:
        """Forget what was seen."""
        self.hook_a: list[Tensor | None] = [None] * len(self.target_names)
        self._hook_outputs: list[Tensor | None] = [None] * len(self.target_names)

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
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
        """The maps of the last forward.

        Args:
            class_idx: the class, or one an image.
            scores: what the model returned, with its graph, where gradients are needed: `[N, classes]`.
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
        """As a call."""
        activations = self._check(class_idx, scores, targets)
        weights = self._weights(class_idx, scores, targets, activations, **kwargs)
        with torch.no_grad():
            found = []
            for weight, activation in zip(weights, activations, strict=True):
                own = (weight.view(*weight.shape, *[1] * (activation.dim() - 2)) * activation).nansum(1)
                own = self._rectified(own)
                found.append(_normalized(own) if normalized else own)
            return found

    def _check(self, class_idx: Any, scores: Any, targets: Any) -> list[Tensor]:
        if (class_idx is None) == (targets is None):
            raise InputError("class_idx or targets must be given, exactly one of them")
        if targets is not None and not self._targets_supported:
            raise InputError(f"targets must be left out: {type(self).__name__} does not support others than classes")
        activations = [own for own in self.hook_a if own is not None]
        if len(activations) < len(self.hook_a):
            raise NotForwardedError(
                "the model must run before maps are asked for; it has not since the extractor was made"
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
        """What each channel weighs, `[N, C]` or `[1, C]` a layer."""
        raise NotImplementedError

    def _rectified(self, maps: Tensor) -> Tensor:
        return maps

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """One map of those of several layers: the largest value at every place.

        Args:
            cams: `[N, ...]` each.
            target_shape: the size; None for the largest.

        Raises:
            InputError: no list of tensors, or an empty one.
        """
        if not isinstance(cams, list) or not all(isinstance(own, Tensor) for own in cams):
            raise InputTypeError(f"cams must be a list of tensors, got {type(cams).__name__}")
        if not cams:
            raise InputError("cams must hold at least one map, got none")
        if len(cams) == 1:
            return cams[0]
        size = target_shape or tuple(map(max, zip(*(own.shape[1:] for own in cams), strict=True)))
        mode = {3: "bilinear", 4: "trilinear"}[cams[0].dim()]
        return torch.stack([functional.interpolate(own[:, None], size, mode=mode)[:, 0] for own in cams]).amax(0)


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
        total = _score(class_idx, scores, targets, len(activations[0])).sum()
        outputs = [own for own in self._hook_outputs if own is not None]
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
    """

    def _weigh(self, gradient: Tensor, activation: Tensor, eps: float = 1e-8) -> Tensor:
        positive = gradient.flatten(2).clamp_min(0)
        below = 2 * positive**2 + activation.flatten(2).sum(2, keepdim=True) * positive**3
        return torch.where(positive > 0, positive**3 / (below + eps), 0).sum(2)


def _score(class_idx: Any, scores: Any, targets: Any, rows: int) -> Tensor:
    """One number an image, `[N]`."""
    if targets is None:
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputTypeError(f"scores must be a tensor [N, classes] for a class, got {came}")
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
    found = [function(own) for function, own in zip(functions, scores, strict=True)]
    if not all(isinstance(own, Tensor) and own.numel() == 1 for own in found):
        raise InputError("targets must return a scalar tensor each")
    return torch.stack([own.reshape(()) for own in found])


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


def _normalized(maps: Tensor) -> Tensor:
    space = tuple(range(1, maps.dim()))
    maps = maps - maps.amin(space, keepdim=True)
    return maps / (maps.amax(space, keepdim=True) + 1e-8)


def _last_map(model: nn.Module, input_shape: Sequence[int]) -> str:
    """The last module that returns a map of more than one position."""
    like = next(model.parameters(), torch.zeros(()))
    with evaluating(model):
        tape = record(model, torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    for name, calls in reversed(tape.modules.items()):
        shape = calls[-1][0].shape
        if name and len(shape) == len(input_shape) + 1 and any(size != 1 for size in shape[2:]):
            return name
    raise InputError("target_layer must be named for a model in which no module returns a map, got None")


def overlay_mask(img: Any, mask: Any, colormap: Any = "jet", alpha: float = 0.7) -> Any:
    """A map in colours over a picture; needs matplotlib for the colours.

    Args:
        img: PIL picture, RGB or grey.
        mask: PIL picture, grey; it is squared, as there.
        colormap: a colour map of matplotlib, or its name.
        alpha: share of the picture, in [0, 1).

    Returns:
        PIL picture, RGB.

    Raises:
        InputError: others than such pictures, or a share out of range.
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
