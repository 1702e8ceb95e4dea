"""Class activation maps of activations alone: FEM, KPCA-CAM, and random weights to compare with. They know no class."""

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.activation_reader import ActivationReader
from pyfast_xai.explainers.common.cam_rules import unusual_share
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.kernel_component import KERNELS, Kernel, first_kernel_component
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.perturbation_explainer import positive
from pyfast_xai.explainers.common.principal_component import rising
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explainers.common.tensors import at_least_float32, outside_inference_mode
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass


class _ActivationCAM(LayerExplainer):
    """Base of maps that are made of an activation alone: the forward stops at the layer, a target is ignored."""

    ranks = (3, 4, 5)
    default_box_rule = Mass()

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self._read = ActivationReader(self)

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        maps = []
        read = self._read(images, args, kwargs, run_whole_model=self._runs_whole_model)
        for place, activation in read.layers:
            cells = self.grid(outside_inference_mode(activation), images.shape[2:], place.name, place.layout)
            maps.append(self._map(at_least_float32(cells)))
        return Explanation(
            **self._fields(images, self._read.outputs(read.tape, len(images))),
            heatmap=self.heat(maps, images.shape[2:]).float(),
            signed_map=maps[0] if len(maps) == 1 else None,
        )

    @abc.abstractmethod
    def _map(self, cells: Tensor) -> Tensor:
        """Returns the signed map `[N, h, w]` of an activation `[N, h, w, C]`."""


class FEM(_ActivationCAM):
    """FEM: where channels are unusually strong, each as much as it is on average (Fuad et al., 2020).

    A channel marks the positions where it exceeds its mean m_k by k standard deviations s_k, and the map is
    `sum_k m_k [A_kp > m_k + k s_k]`. A target is accepted and ignored.

    Args:
        model: in evaluation mode.
        layer: a module, its path or the name of an operation; several give the mean of their heat maps; "auto" takes
            the last map of features before they are pooled, of a detector all levels of its pyramid.
        k: from how many standard deviations over the mean a position counts.
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from pyfast_xai import FEM, demo
        >>> FEM(demo.load(), layer="block")(torch.rand(2, 3, 96, 96)).signed_map.shape
        torch.Size([2, 12, 12])
    """

    method = "fem"
    paper = "Features understanding in 3D CNNs for actions recognition in video (Fuad et al., 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        k: float = 2.0,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.k = positive("k", k)

    def _map(self, cells: Tensor) -> Tensor:
        positions = math.prod(cells.shape[1:-1])
        if positions - 1 <= self.k**2:  # one number among so many is no further from their mean
            self.warn(
                "the map is zero: none of %d positions can exceed a mean by %g standard deviations; "
                "take a larger layer or a smaller k",
                positions,
                self.k,
            )
        above, mean = unusual_share(cells, self.k)
        return (above * mean).sum(-1)


class KPCACAM(_ActivationCAM):
    """KPCA-CAM: activations on their first kernel principal component (Karmani et al., 2024).

    The activations, a row a position, are centred and projected by the kernel; the sign is the one that makes the map
    rise with the strength of the activation, as that of `EigenCAM`. A target is accepted and ignored.

    Args:
        model: in evaluation mode.
        layer: see `FEM`.
        kernel: "sigmoid", "rbf", "poly", "cosine" or "linear".
        gamma: gamma of the kernel; None for one divided by the number of channels.
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import KPCACAM, demo
        >>> KPCACAM(demo.load(), layer="block", kernel="rbf")(torch.rand(2, 3, 96, 96)).signed_map.shape
        torch.Size([2, 12, 12])
    """

    method = "kpca-cam"
    paper = "KPCA-CAM: visual explainability of deep computer vision models using kernel PCA (Karmani et al., 2024)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        kernel: Kernel = "sigmoid",
        gamma: float | None = None,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.kernel: Kernel = one_of("kernel", kernel, KERNELS)
        self.width = None if gamma is None else positive("gamma", gamma)

    def _map(self, cells: Tensor) -> Tensor:
        rows = cells.flatten(1, -2)
        maps = first_kernel_component(rows, self.kernel, self.width).to(cells.dtype)
        return rising(maps, rows.square().sum(2)).view(cells.shape[:-1])


class RandomCAM(_ActivationCAM):
    """Channels weighed at random between -1 and 1: a baseline that knows nothing of the network.

    All images have the same weights. A target is accepted and ignored.

    Args:
        model: in evaluation mode.
        layer: see `FEM`.
        seed: seed of the weights; the process's own random numbers are not touched.
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import RandomCAM, demo
        >>> RandomCAM(demo.load(), layer="block", seed=1)(torch.rand(2, 3, 96, 96)).signed_map.shape
        torch.Size([2, 12, 12])
    """

    method = "random-cam"
    paper = "PyTorch library for CAM methods (Gildenblat and contributors, 2021), which is where it comes from"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        seed: int = 0,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.seed = seed

    def _map(self, cells: Tensor) -> Tensor:
        drawn = torch.rand(cells.shape[-1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return cells @ (2 * drawn - 1).to(cells)
