"""XRAI (Kapishnikov et al., 2019): regions of an image, ranked by what they attribute."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import broadcast
from pyfast_xai.explainers.common.explainer import Settings, at_least
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explainers.path_methods import PathMethod
from pyfast_xai.explanation import Explanation

Regions = Callable[[Tensor], Tensor]

# The authors' scales and smallest segment of Felzenszwalb's method, on images from -1 to 1 at 224 x 224.
SCALES = (50, 100, 150, 250, 500, 1200)
SMALLEST = 150
SIDE = 224
AT_ONCE = 64  # regions that are floating-point numbers at a time


class XRAI(PathMethod):
    """Regions of the image, ranked by their mean attribution (Kapishnikov et al., 2019).

    Integrated gradients from a black and a white baseline are averaged, and of a pixel the largest of its channels
    counts. Of regions that overlap the one whose new pixels have the highest mean is added to the map, then the next;
    the map shows these means.

    Args:
        model: in evaluation mode.
        n_steps: places on the way from each baseline.
        baselines: numbers or tensors that broadcast to the images; None for the smallest and the largest value of each
            image.
        regions: a function that gives regions, bool `[M, H, W]`, which may overlap, for an image `[C, H, W]`; None for
            segments by Felzenszwalb's method at six scales, each widened, with scikit-image (the extra `lime`).
        dilation: by how many pixels the latter are widened.
        min_area: a region that would add fewer pixels is left out; pixels of none get the mean of them all.
        **settings: those of `Explainer`; see `PathMethod` for `batch_size`.

    An explanation has `signed_map`, the mean of every pixel's region `[N, H, W]`, signed; `heatmap`, its positive part;
    and `attribution`, the integrated gradients.

    Raises:
        InputError: regions or baselines that do not fit, or scikit-image is needed and not installed.

    Example:
        >>> import torch
        >>> from pyfast_xai import XRAI, demo
        >>> explanation = XRAI(demo.load(), n_steps=4)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape, explanation.attribution.shape
        (torch.Size([1, 96, 96]), torch.Size([1, 3, 96, 96]))
    """

    method = "xrai"
    paper = "XRAI: better attributions through regions (Kapishnikov et al., 2019)"
    ranks = (4,)

    def __init__(
        self,
        model: nn.Module,
        *,
        n_steps: int = 100,
        baselines: Sequence[float | Tensor] | None = None,
        regions: Regions | None = None,
        dilation: int = 5,
        min_area: int = 50,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        if baselines is not None and not len(baselines):
            raise InputError("baselines must be one or more, got none")
        self.n_steps, self.baselines, self.regions = at_least(1, "n_steps", n_steps), baselines, regions
        self.dilation, self.min_area = at_least(0, "dilation", dilation), at_least(1, "min_area", min_area)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        regions = [self._regions(image) for image in images]
        target, seeds = self._targets(images, target, args, kwargs)
        starts = [broadcast(baseline, images) for baseline in self._baselines(images)]
        parts = [self._integrated(images, start, self.n_steps, target, args, kwargs) for start in starts]
        attribution = targets_to_rows(torch.stack(parts).mean(0))
        pixels = at_least_float32(attribution).amax(1)
        ranked = [ranked_by_density(row, regions[n // seeds.each], self.min_area) for n, row in enumerate(pixels)]
        signed = torch.stack(ranked)
        return Explanation(
            **self._fields(images, seeds),
            heatmap=signed.clamp_min(0).float(),
            signed_map=signed,
            attribution=attribution,
        )

    def _baselines(self, images: Tensor) -> Sequence[float | Tensor]:
        if self.baselines is not None:
            return self.baselines
        return [extreme(images, (1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax)]

    def _regions(self, image: Tensor) -> Tensor:
        """Returns the regions of an image `[C, H, W]`, bool `[M, H, W]`."""
        regions = felzenszwalb_regions(image, self.dilation) if self.regions is None else self.regions(image)
        if not isinstance(regions, Tensor) or regions.dtype != torch.bool or regions.shape[1:] != image.shape[1:]:
            received = (
                f"{regions.dtype} {list(regions.shape)}" if isinstance(regions, Tensor) else type(regions).__name__
            )
            raise InputError(f"regions must return bool [M, {', '.join(map(str, image.shape[1:]))}], got {received}")
        return regions.to(image.device)


def ranked_by_density(attribution: Tensor, regions: Tensor, min_area: int) -> Tensor:
    """Returns a map in which every pixel has the mean attribution that its region added.

    Args:
        attribution: `[H, W]`.
        regions: bool `[M, H, W]`; each adds those of its pixels that no region before it has.
        min_area: a region that would add fewer pixels is left out.

    Example:
        >>> import torch
        >>> from pyfast_xai.explainers.xrai import ranked_by_density
        >>> regions = torch.tensor([[[True, True, False]], [[False, True, True]]])
        >>> ranked_by_density(torch.tensor([[4.0, 2.0, 6.0]]), regions, 1)
        tensor([[4., 4., 4.]])
    """
    values, flat = attribution.flatten().double(), regions.flatten(1)
    left = torch.ones_like(values, dtype=torch.bool)
    means = torch.zeros_like(values)
    areas = flat.sum(1)
    sums = torch.cat([part.double() @ values for part in flat.split(AT_ONCE)])
    while bool((areas >= min_area).any()):
        density = torch.where(areas >= min_area, sums / areas, -torch.inf)
        best = int(density.argmax())
        added = (flat[best] & left).nonzero()[:, 0]
        means[added] = density[best]
        left[added] = False
        # What the others would add is less by what was added.
        new_pixels = flat[:, added]
        areas, sums = areas - new_pixels.sum(1), sums - new_pixels.double() @ values[added]
    means = torch.where(left, values[left].mean().nan_to_num(), means)
    return means.view(attribution.shape).to(attribution.dtype)


def felzenszwalb_regions(image: Tensor, dilation: int) -> Tensor:
    """Returns the segments of an image `[C, H, W]` at all scales, each widened by some pixels, bool `[M, H, W]`.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage import segmentation, transform
    except ImportError as error:
        raise InputError(
            "regions need scikit-image (pip install scikit-image), or must be a function that gives them"
        ) from error
    pixels = image.permute(1, 2, 0).double().cpu().numpy()
    spread = pixels.max() - pixels.min()
    scaled = (pixels - pixels.min()) / (spread or 1.0) * 2 - 1
    resized = transform.resize(scaled, (SIDE, SIDE), order=3, mode="constant", preserve_range=True, anti_aliasing=True)
    regions = []
    for scale in SCALES:
        labels = segmentation.felzenszwalb(resized, scale=scale, sigma=0.8, min_size=SMALLEST, channel_axis=-1)
        small = torch.from_numpy(labels)[None, None].double()
        whole = functional.interpolate(small, image.shape[1:], mode="nearest-exact")[0]
        regions += [whole == label for label in whole.unique()]
    return dilated(torch.cat(regions), dilation)


def dilated(masks: Tensor, radius: int) -> Tensor:
    """Returns masks `[M, H, W]` widened by a disk, bool.

    Example:
        >>> import torch
        >>> from pyfast_xai.explainers.xrai import dilated
        >>> dilated(torch.eye(3, dtype=torch.bool)[None, 1:2], 1)
        tensor([[[True, True, True]]])
    """
    apart = torch.arange(-radius, radius + 1)
    disk = (apart[:, None].square() + apart.square() <= radius**2).float()
    parts = masks[:, None].split(AT_ONCE)
    reached = [functional.conv2d(part.float(), disk[None, None], padding=radius)[:, 0] > 0.5 for part in parts]
    return torch.cat(reached)
