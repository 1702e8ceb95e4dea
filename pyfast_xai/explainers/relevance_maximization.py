"""Relevance maximization (Achtibat et al., 2023): the images of a data set that a channel is most relevant for."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.crp import CRP

Pooling = Literal["sum", "max"]


class ReferenceImages(NamedTuple):
    """The images that represent each channel of a layer, the most relevant first.

    Attributes:
        image: their numbers in the order in which they came, from 0, int64 `[channels, n]`.
        relevance: relevance of the channel in each, `[channels, n]`.
        position: where it is the most relevant, in the rows, columns or tokens of the layer, int64
            `[channels, n, dimensions]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import CRP, RelMax, demo
        >>> relmax = RelMax(CRP(demo.load(), layer="block"), n_images=2)
        >>> relmax.update(torch.rand(3, 3, 96, 96))
        >>> relmax.compute().image.shape
        torch.Size([80, 2])
    """

    image: Tensor
    relevance: Tensor
    position: Tensor


class RelMax:
    """Relevance maximization: the images of a data set for which each channel of a layer is the most relevant (2023).

    What makes a channel respond the most (activation maximization) need not be what the model uses it for. Here the
    images of a channel are those where the most relevance of the target flows through it. They are chosen from what
    `update` sees, batch by batch, of which only the best `n_images` a channel are kept.

    Args:
        explain: a `CRP`, whose model, layer and composite are taken; its channels are not.
        n_images: number of images a channel.
        pooling: relevance of a channel in an image: "sum" over the positions, or the "max" of them.
        normalize: relevance of an image as shares of what all its channels have in magnitude, so that images with a
            large score do not win everywhere.

    Source: "From attribution maps to human-understandable explanations through concept relevance propagation"
    (Achtibat et al., 2023); numbers are those of `Maximization` in zennit-crp. Of equal relevance the first image wins.

    Raises:
        InputError: a setting that does not exist, or a layer that has other channels in another batch.

    Example:
        >>> import torch
        >>> from pyfast_xai import CRP, RelMax, demo
        >>> relmax = RelMax(CRP(demo.load(), layer="block"), n_images=4)
        >>> for images, labels in [(torch.rand(3, 3, 96, 96), [1, 2, 3]), (torch.rand(3, 3, 96, 96), [4, 5, 6])]:
        ...     relmax.update(images, labels)
        >>> image, relevance, position = relmax.compute()
        >>> image.shape, position.shape
        (torch.Size([80, 4]), torch.Size([80, 4, 2]))
    """

    def __init__(self, explain: CRP, *, n_images: int = 40, pooling: Pooling = "sum", normalize: bool = True) -> None:
        if not isinstance(explain, CRP):
            raise InputError(f"explain must be a CRP, got {type(explain).__name__}")
        self.explain, self.normalize = explain, normalize
        self.n_images = at_least(1, "n_images", n_images)
        self.pooling: Pooling = one_of("pooling", pooling, ("sum", "max"))
        self.n_seen = 0
        self._best: ReferenceImages | None = None

    def update(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> None:
        """Adds a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: as of an explainer: None for the predicted class of each image, its labels, or `[N, K]` classes, of
                which each counts by itself.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images or a target that do not fit.

        Example:
            >>> import torch
            >>> from pyfast_xai import CRP, RelMax, demo
            >>> relmax = RelMax(CRP(demo.load(), layer="block"))
            >>> relmax.update(torch.rand(2, 3, 96, 96), target=[3, 7])
            >>> relmax.n_seen
            2
        """
        relevance = self.explain.at_layer(images, target, *args, **kwargs)
        cells = relevance.flatten(2) if relevance.dim() > 2 else relevance[..., None]
        most, where = cells.max(2)  # [R, C]
        values = cells.sum(2) if self.pooling == "sum" else most
        if self.normalize:
            total = values.abs().sum(1, keepdim=True)
            values = torch.where(total > 0, values / total, 0)
        rows = torch.arange(len(values), device=values.device).div(len(values) // len(images), rounding_mode="floor")
        position = torch.stack(torch.unravel_index(where, relevance.shape[2:] or (1,)), -1)  # [R, C, dimensions]
        batch = ReferenceImages((rows + self.n_seen)[:, None].expand_as(values).T, values.T, position.transpose(0, 1))
        if self._best is not None:
            if len(self._best.image) != len(batch.image):
                before = len(self._best.image)
                raise InputError(f"the layer must have {before} channels as before, got {len(batch.image)}")
            batch = ReferenceImages(*(torch.cat(parts, 1) for parts in zip(self._best, batch, strict=True)))
        self.n_seen += len(images)
        order = batch.relevance.argsort(dim=1, descending=True, stable=True)[:, : self.n_images]
        picked = order[..., None].expand(-1, -1, batch.position.shape[2])
        self._best = ReferenceImages(
            batch.image.gather(1, order), batch.relevance.gather(1, order), batch.position.gather(1, picked)
        )

    def compute(self) -> ReferenceImages:
        """Returns the best images of each channel so far: `n_images`, or as many as there were.

        Raises:
            InputError: there was no image yet.

        Example:
            >>> import torch
            >>> from pyfast_xai import CRP, RelMax, demo
            >>> relmax = RelMax(CRP(demo.load(), layer="block"), n_images=1)
            >>> relmax.update(torch.rand(2, 3, 96, 96))
            >>> relmax.compute().relevance.shape
            torch.Size([80, 1])
        """
        if self._best is None:
            raise InputError("images must be one or more before the best of them are computed, got none")
        return self._best
