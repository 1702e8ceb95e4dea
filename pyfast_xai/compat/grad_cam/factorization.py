"""Deep feature factorization as pytorch-grad-cam calls it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.pictures import create_labels_legend, scale_cam_image, show_factorization_on_image
from pyfast_xai.compat.recording import evaluating, record_call
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.nonnegative_factors import nonnegative_factors


def dff(activations: np.ndarray, n_components: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of activations of all images together, and where they are.

    The factors are those of scikit-learn's `NMF(init="random", random_state=0)` of the activations less the least of
    each channel; the activations are not written to.

    Args:
        activations: `[N, C, h, w]`; NaN counts as 0.
        n_components: number of components.

    Returns:
        Concepts `[C, K]` and maps `[N, K, h, w]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import dff
        >>> concepts, maps = dff(np.random.default_rng(0).random((2, 8, 6, 5)), n_components=3)
        >>> concepts.shape, maps.shape
        ((8, 3), (2, 3, 6, 5))
    """
    images, channels, height, width = activations.shape
    cells = torch.from_numpy(np.nan_to_num(activations.transpose(1, 0, 2, 3).reshape(channels, -1), posinf=None))
    least = cells.amin(1, keepdim=True)
    left, right = nonnegative_factors((cells - least)[None], n_components)
    maps = right[0].view(n_components, images, height, width).transpose(0, 1)
    return (left[0] + least).numpy(), maps.contiguous().numpy()


class DeepFeatureFactorization:
    """The parts that an activation is made of, and where they are (Collins et al., 2018).

    Args:
        model: any; it is put in evaluation mode for the length of a call.
        target_layer: a module of it.
        reshape_transform: lays an activation out as `[N, C, h, w]`.
        computation_on_concepts: what is to be computed of the concepts `[K, C]`, as the classifier.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import DeepFeatureFactorization
        >>> model = demo.load()
        >>> concepts, maps = DeepFeatureFactorization(model, model.block)(torch.rand(2, 3, 96, 96), n_components=3)
        >>> concepts.shape, [own.shape for own in maps]
        ((80, 3), [(3, 96, 96), (3, 96, 96)])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module,
        reshape_transform: Callable[..., Tensor] | None = None,
        computation_on_concepts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.target_layer = model, target_layer
        self.reshape_transform, self.computation_on_concepts = reshape_transform, computation_on_concepts

    def __call__(self, input_tensor: Tensor, n_components: int = 16) -> tuple[Any, ...]:
        """Factorizes the activations of a batch of images together.

        Args:
            input_tensor: `[N, C, H, W]`.
            n_components: how many factors.

        Returns:
            The concepts `[C, K]`; maps `[K, H, W]` from 0 to just below 1, one array an image; and what
            `computation_on_concepts` returned, where there is one.
        """
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
            recording = record_call(self.model, (input_tensor,), layers=[self.target_layer], to_inputs=False, stop=True)
        activation = recording.activations[0][0]
        if self.reshape_transform is not None:
            activation = self.reshape_transform(activation)
        concepts, maps = dff(activation.detach().cpu().numpy(), n_components)
        size = (input_tensor.shape[3], input_tensor.shape[2])
        scaled = [scale_cam_image(heatmaps, size) for heatmaps in maps]
        if self.computation_on_concepts is None:
            return concepts, scaled
        with torch.no_grad():
            outputs = self.computation_on_concepts(torch.from_numpy(np.float32(concepts.T)).to(input_tensor.device))
        return concepts, scaled, outputs.cpu().numpy()

    def __enter__(self) -> "DeepFeatureFactorization":
        return self

    def __exit__(self, *exc: object) -> None:
        """Releases nothing, for nothing is held; exceptions go on."""


def run_dff_on_image(
    model: nn.Module,
    target_layer: nn.Module,
    classifier: Callable[[Tensor], Tensor],
    img_pil: Any,
    img_tensor: Tensor,
    reshape_transform: Callable[..., Tensor] | None = None,
    n_components: int = 5,
    top_k: int = 2,
) -> np.ndarray:
    """Returns a picture beside its factors, with the classes of each.

    Args:
        model: with names of the classes in `model.config.id2label`.
        target_layer: a module of it.
        classifier: gives the classes of concepts `[K, C]`.
        img_pil: PIL picture, RGB.
        img_tensor: the same as the model takes it, `[C, H, W]`.
        reshape_transform: see `DeepFeatureFactorization`.
        n_components: how many factors.
        top_k: classes of each in the legend.

    Returns:
        uint8 `[H, 3 W, 3]`: the picture, its factors and the legend.

    Raises:
        InputError: a model without names of the classes.

    Example:
        >>> import types
        >>> import torch
        >>> from PIL import Image
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import run_dff_on_image
        >>> model = demo.load()
        >>> model.config = types.SimpleNamespace(id2label={i: f"digit {i}" for i in range(10)})
        >>> head = torch.nn.Linear(80, 10)
        >>> image = torch.rand(3, 96, 96)
        >>> run_dff_on_image(model, model.block, head, Image.new("RGB", (96, 96)), image, n_components=3).shape
        (96, 288, 3)
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names is None:
        raise InputError("model must have the names of its classes in config.id2label, got none")
    factorize = DeepFeatureFactorization(model, target_layer, reshape_transform, classifier)
    _, maps, outputs = factorize(img_tensor[None], n_components)
    labels = create_labels_legend(torch.from_numpy(outputs).softmax(-1).numpy(), names, top_k)
    picture = np.array(img_pil)
    shown = show_factorization_on_image(picture / 255, maps[0], image_weight=0.3, concept_labels=labels)
    return np.hstack((picture, shown))
