"""The density of points on images."""

from torch import Tensor, float32

from pyfast_xai.ops.registry import Op


def _fake(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    return points.new_empty((images, height, width), dtype=float32)


_op = Op("point_density(Tensor points, int images, int height, int width, float sigma) -> Tensor", _fake)


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    """Returns the heat map of a set of fixations: a sum of Gaussians of height one, one a point.

    Points that coincide count as often as they occur. Nothing lies beyond the border (no reflection).

    Args:
        points: flat row-major indices into `[images, height, width]`, int64 `[P]`.
        images: number of images.
        height: of the images, in pixels.
        width: of the images, in pixels.
        sigma: standard deviation of the Gaussian, in pixels, > 0.

    Returns:
        Density `[images, height, width]`, float32.

    Raises:
        RuntimeError: a point outside, or a sigma that is not positive.

    CNN-Fixations, section IV ("simple Gaussian blurring").

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> density = ops.point_density(torch.tensor([5]), images=1, height=3, width=4, sigma=1.0)
        >>> density.shape, density[0, 1, 1]
        (torch.Size([1, 3, 4]), tensor(1.))
    """
    return _op(points, images, height, width, sigma)
