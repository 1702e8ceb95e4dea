"""Image-text models as classifiers of images: a class for each text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.errors import InputError


class ZeroShotClassifier(nn.Module):
    """A classifier of images whose classes are texts, made of an image-text model such as CLIP or SigLIP.

    Its output is that of the model for these texts, `exp(logit_scale) cos(image, text) + logit_bias`, `[N, K]` (Radford
    et al., 2021; Zhai et al., 2023). Texts are encoded when it is made, and never again: what is explained is the image
    side alone, by every explainer and for every text at once.

    Args:
        model: with `get_image_features` and `get_text_features` (`CLIPModel`, `SiglipModel` and their kin of
            Transformers), or `encode_image` and `encode_text` (open_clip); in evaluation mode.
            It becomes a submodule and is not changed.
        texts: what the text side takes, K token sequences `[K, L]` of integers, or a dict of arguments as a tokenizer
            of Transformers returns them; or K features of texts, `[K, D]` floating-point.

    SigLIP's texts do not exclude each other: explain it with `outputs="independent logits"`.

    Raises:
        InputError: a model of another kind, or texts that do not fit it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import GradCAM, ZeroShotClassifier
        >>> class Clip(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.visual = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        ...         self.words, self.logit_scale = nn.EmbeddingBag(9, 8), nn.Parameter(torch.tensor(2.0))
        ...
        ...     def encode_image(self, images):
        ...         return self.visual(images)
        ...
        ...     def encode_text(self, tokens):
        ...         return self.words(tokens)
        >>> classifier = ZeroShotClassifier(Clip().eval(), torch.tensor([[1, 2], [3, 4]]))
        >>> GradCAM(classifier, labels=["a cat", "a dog"])(torch.rand(1, 3, 8, 8), "a dog").heatmap.shape
        torch.Size([1, 8, 8])
    """

    texts: Tensor

    def __init__(self, model: nn.Module, texts: Tensor | Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = _names(model)
        self.model = model
        self.training = model.training
        if isinstance(texts, Tensor) and texts.is_floating_point():
            features = texts
        else:
            encode = getattr(model, self._names[1])
            with torch.no_grad():
                features = _features(encode(**texts) if isinstance(texts, Mapping) else encode(texts))
        if features.dim() != 2:
            raise InputError(f"texts must give features [K, D], got {list(features.shape)}")
        self.register_buffer("texts", functional.normalize(features.detach(), dim=1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the similarities of images `[N, C, H, W]` and texts, `[N, K]`."""
        features = _features(getattr(self.model, self._names[0])(images))
        if features.shape[1] != self.texts.shape[1]:
            raise InputError(f"texts must have {features.shape[1]} features as images do, got {self.texts.shape[1]}")
        scale = torch.as_tensor(self.model.logit_scale).exp()
        logits = functional.linear(functional.normalize(features, dim=1), self.texts.to(features)) * scale
        bias = getattr(self.model, "logit_bias", None)
        return logits if bias is None else logits + bias


def _names(model: nn.Module) -> tuple[str, str]:
    """Returns the names of the methods that encode images and texts."""
    for names in (("get_image_features", "get_text_features"), ("encode_image", "encode_text")):
        if all(callable(getattr(model, name, None)) for name in names) and hasattr(model, "logit_scale"):
            return names
    raise InputError(
        "model must have get_image_features and get_text_features, or encode_image and encode_text, and a logit_scale, "
        f"got {type(model).__name__}"
    )


def _features(output: Any) -> Tensor:
    """Returns features, which some releases of Transformers return among other things."""
    return output if isinstance(output, Tensor) else output.pooler_output
