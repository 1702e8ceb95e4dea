"""Score-CAM and Ablation-CAM as pytorch-grad-cam calls them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.cams import BaseCAM, Targets
from pyfast_xai.compat.grad_cam.projection import project
from pyfast_xai.compat.grad_cam.rows import rows_of
from pyfast_xai.compat.recording import evaluating
from pyfast_xai.compat.replayed import Replayed, may_replay
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.channel_ablation import scores_without_channels, share_lost
from pyfast_xai.explainers.common.channel_masks import scores_behind, stretched
from pyfast_xai.explainers.common.layer_explainer import resized
from pyfast_xai.tape import Tape, Value, record
from pyfast_xai.tape.isolation import isolated
from pyfast_xai.tape.module_hooks import modules_of, unwrap
from pyfast_xai.tape.suffix import KeepSuffix


class ScoreCAM(BaseCAM):
    """Channels weighed by the softmax of the scores that are left behind them as masks (Wang et al., 2020).

    Masks are resized with aligned corners, and made as they are needed; `batch_size` of them go through the model at
    once.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.

    Attributes:
        batch_size: 16.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ScoreCAM
        >>> model = demo.load()
        >>> ScoreCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    batch_size = 16

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        if input_tensor.dim() != 4:
            raise InputError(f"input_tensor must be [N, C, H, W] for Score-CAM, got {list(input_tensor.shape)}")
        chosen = targets or self._targets_of(input_tensor)
        assert chosen is not None
        maps, size = activations.flatten(0, 1)[:, None], input_tensor.shape[2:]

        def masks(part: Tensor) -> Tensor:
            return stretched(resized(maps[part], size, align_corners=True), 1e-8)

        outputs = _Outputs(unwrap(self.model), -(-len(maps) // self.batch_size))

        def score(changed: Tensor, rows: Tensor) -> Tensor:
            with isolated():
                answers = outputs(changed)
            pairs = zip(rows.tolist(), rows_of(answers), strict=True)
            return torch.stack([chosen[row](output).float().reshape(()) for row, output in pairs])

        places = torch.arange(len(maps), device=maps.device)
        with evaluating(self.model):
            scores = scores_behind([masks], input_tensor, places, activations.shape[1], self.batch_size, score)
        return scores.view(activations.shape[:2]).softmax(1)

    def _targets_of(self, images: Tensor) -> Targets:
        with evaluating(self.model), isolated():
            self.outputs = unwrap(self.model)(images.clone())
        return self._targets(None)


class _Outputs:
    """The outputs of a model for one batch of changed images after the other, by a replay where that pays.

    Args:
        model: the model.
        batches: how many batches will come.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self._model, self._batches = model, batches
        self._shape: torch.Size | None = None
        self._replayed: Replayed | None = None

    def __call__(self, images: Tensor) -> Any:
        """Returns what the model returns for images `[M, C, H, W]`."""
        if self._shape is None and may_replay(self._model):
            self._shape = images.shape
            tape = record(self._model, images)
            recorded = None if tape.not_replayable is not None or tape.writes else tape
            self._replayed = Replayed.of(self._model, recorded, images, [None] * (self._batches - 1))
            return tape.result
        if self._replayed is not None and images.shape == self._shape:
            return self._replayed(images, [None])
        return self._model(images)


class AblationLayer(nn.Module):
    """Tells how the channels of a layer lie for `AblationCAM`; the model is run without it.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import AblationLayer
        >>> AblationLayer().activations_to_be_ablated(np.ones((3, 2, 2)))
        array([0, 1, 2], dtype=int32)
    """

    channel_dim = 1

    def objectiveness_mask_from_svd(self, activations: np.ndarray, threshold: float = 0.01) -> np.ndarray:
        """Returns where the first principal component of `[C, h, w]` is further from zero than a share of it."""
        magnitude = project(torch.from_numpy(np.array(activations))[None])[0].abs().numpy()
        magnitude = magnitude - magnitude.min()
        return magnitude / magnitude.max() > threshold

    def activations_to_be_ablated(self, activations: np.ndarray, ratio_channels_to_ablate: float = 1.0) -> np.ndarray:
        """Returns which channels of `[C, h, w]` are taken out: those that lie most in the principal component.

        Args:
            activations: activations of an image.
            ratio_channels_to_ablate: which share of them.
        """
        count = len(activations)
        if ratio_channels_to_ablate == 1.0:
            return np.arange(count, dtype=np.int32)
        mask = self.objectiveness_mask_from_svd(activations)
        sizes = np.abs(activations) - np.abs(activations).min((1, 2), keepdims=True)
        sizes = sizes / np.maximum(sizes.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
        shares = (mask * sizes).sum((1, 2)) / np.maximum(sizes.sum((1, 2)), np.finfo(np.float32).tiny)
        return np.argsort(shares)[::-1][: int(count * ratio_channels_to_ablate)].astype(np.int32)


class AblationLayerVit(AblationLayer):
    """The same for tokens `[N, T, C]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import AblationLayerVit
        >>> AblationLayerVit().activations_to_be_ablated(np.ones((3, 2, 2)))
        array([0, 1, 2], dtype=int32)
    """

    channel_dim = 2


class AblationCAM(BaseCAM):
    """Channels weighed by what the target loses when they are set to zero (Desai and Ramaswamy, 2020).

    The model stays as it is: what lies above the layer is run again, or known by algebra where a linear layer follows.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        ablation_layer: `AblationLayer()` for maps, `AblationLayerVit()` for tokens.
        batch_size: rows that go through what lies above the layer at once.
        ratio_channels_to_ablate: which share of the channels is taken out; the others weigh nothing.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import AblationCAM
        >>> model = demo.load()
        >>> AblationCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        ablation_layer: nn.Module | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        if ablation_layer is not None and not isinstance(ablation_layer, AblationLayer):
            raise InputError(f"ablation_layer must be an AblationLayer, got {type(ablation_layer).__name__}")
        self.ablation_layer = AblationLayer() if ablation_layer is None else ablation_layer
        self.batch_size, self.ratio_channels_to_ablate = batch_size, ratio_channels_to_ablate

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        count, dim = len(input_tensor), self.ablation_layer.channel_dim

        def record_copies(copies: int) -> tuple[Tape, Value]:
            with evaluating(self.model):
                return record_from(
                    self.model, input_tensor.repeat(copies, *[1] * (input_tensor.dim() - 1)), target_layer
                )

        recorded = record_copies(1)
        self.outputs = recorded[0].result
        chosen = self._targets(targets)
        assert chosen is not None

        def read(result: Any, rows: Tensor) -> Tensor:
            pairs = zip(rows.tolist(), rows_of(result), strict=True)
            return torch.stack([chosen[row](output).float().reshape(()) for row, output in pairs])

        with torch.inference_mode():
            before, after = scores_without_channels(recorded, record_copies, count, dim, self.batch_size, read)
            weights = share_lost(before, after).T
        weights = weights.clone()
        if self.ratio_channels_to_ablate != 1.0:
            for row, maps in zip(weights, activations.cpu().numpy(), strict=True):
                ablated = self.ablation_layer.activations_to_be_ablated(maps, self.ratio_channels_to_ablate)
                row[np.setdiff1d(np.arange(len(maps)), ablated)] = 0
        return weights


def record_from(model: nn.Module, images: Tensor, layer: nn.Module) -> tuple[Tape, Value]:
    """Returns a recording from which what depends on a module's last result can be replayed, and that result on it.

    Raises:
        InputError: a module that did not run, or returns the images themselves.
    """
    model = unwrap(model)
    path = modules_of(model)[unwrap(layer)]
    ahead = record(model, images[:1])
    if path not in ahead.modules:
        raise InputError(f"target_layers must run in the forward pass, got {type(layer).__name__}, which did not")
    value = ahead.modules[path][-1][0]
    producer = ahead.producer(value)
    if producer is None:
        raise InputError("target_layers must compute something, got one that returns the images")
    tape = record(model, images, policy=KeepSuffix(producer.name, producer.outputs.index(value)))
    return tape, tape.modules[path][-1][0]
