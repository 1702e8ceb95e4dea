"""Missing pixels as what their neighbourhood lets one expect: a sparse linear system for each image.

The systems are those of electric networks: pixels are joined to their eight neighbours, and known ones are held at
their values. Conjugate gradients spread what is known a pixel a step, so they are preconditioned on coarser and coarser
grids, which carry it across large holes at once. The number of steps then hardly depends on the size of the holes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError

CACHED = 1 << 18  # numbers of images solved for at once on a CPU
COARSEST = 8  # pixels of the shorter side: grids of so few are not made coarser


def noisy_linear_imputation(
    images: Tensor, missing: Tensor, *, noise: float = 0.01, seed: int = 0, tolerance: float = 3e-6
) -> Tensor:
    """Returns the missing pixels as the weighted mean of their eight neighbours, and noise (Rong et al., 2022).

    Direct neighbours weigh 1/6, diagonal ones 1/12, those outside of the image nothing. Missing neighbours are unknowns
    themselves: one sparse system an image, solved for all at once by conjugate gradients.

    Args:
        images: `[N, C, H, W]`.
        missing: pixels to replace, bool `[N, H, W]`; not all of an image.
        noise: standard deviation of what is added, in units of the images.
        seed: seed of that noise, which is the same for every image.
        tolerance: tolerance of the residual, as a share of the largest magnitude in the image. Values are then right to
            about ten times as much, which is little beside the noise.

    Raises:
        InputError: a mask of another size or dtype, or an image without a remaining pixel.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> images, missing = torch.ones(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> missing[0, 2:5, 2:5] = True
        >>> filled = metrics.noisy_linear_imputation(images, missing, noise=0.0)
        >>> torch.allclose(filled, images, atol=1e-4)
        True
    """
    if missing.dtype != torch.bool or missing.shape != (len(images), *images.shape[2:]):
        expected, received = [len(images), *images.shape[2:]], list(missing.shape)
        raise InputError(f"missing must be a bool mask {expected}, got {received} of {missing.dtype}")
    if bool(missing.flatten(1).all(1).any()):
        raise InputError("missing must leave a pixel of each image, got an image without any")
    values = images.detach()
    values = values if values.dtype == torch.float64 else values.float()
    known = torch.where(missing[:, None], 0, values)
    # On a CPU, in groups whose buffers stay in the cache and need no new pages at every step.
    group = max(1, CACHED // values[0].numel()) if values.device.type == "cpu" else len(values)
    parts = zip(known.split(group), missing[:, None].to(values).split(group), strict=True)
    unknown = torch.cat([_solve(*part, tolerance) for part in parts])
    if noise:
        generator = torch.Generator().manual_seed(seed)
        unknown = unknown + noise * torch.randn(1, *images.shape[1:], generator=generator).to(values)
    return torch.where(missing[:, None], unknown, known).to(images.dtype)


def _solve(known: Tensor, missing: Tensor, tolerance: float) -> Tensor:
    """Solves `d u - neighbours(u) = neighbours(known)` for the missing pixels of u `[N, C, H, W]`; 0 elsewhere.

    The matrix is symmetric and positive definite; its diagonal d is the weights that lie inside of the image.
    """
    grids = _grids(missing)
    close = tolerance * known.abs().amax((1, 2, 3), keepdim=True)
    residual = missing * _neighbours(known)
    solution = torch.zeros_like(known)
    direction = _preconditioned(residual, grids)
    product = (residual * direction).sum((1, 2, 3), keepdim=True)
    # Exact after as many steps as there are unknowns; about twenty are needed.
    for _ in range(missing[0].numel()):
        # An image that is done stays as it is, so that no result depends on the others of the batch.
        active = residual.abs().amax((1, 2, 3), keepdim=True) > close
        if not bool(active.any()):
            break
        applied = (grids[0].diagonal * direction).sub_(_neighbours(direction)).mul_(missing)
        bend = (direction * applied).sum((1, 2, 3), keepdim=True)
        length = torch.where(active, product / torch.where(active, bend, 1), 0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, applied, value=-1)
        scaled = _preconditioned(residual, grids)
        previous, product = product, (residual * scaled).sum((1, 2, 3), keepdim=True)
        direction.mul_(torch.where(active, product / torch.where(active, previous, 1), 0)).add_(scaled)
    return solution


class _Grid:
    """The pixels of an image, or squares of 2, 4, 8 ... pixels a side.

    Args:
        missing: 1 for the unknowns, else 0, `[N, 1, h, w]`. Of squares, those that miss all of their pixels.
    """

    def __init__(self, missing: Tensor) -> None:
        self.missing = missing
        self.diagonal = _neighbours(torch.ones_like(missing[:1]))
        self._rest = 1 - 0.75 * self.diagonal

    def smooth(self, values: Tensor) -> Tensor:
        """Returns `u - 3/4 (d u - neighbours(u))`: constants stay, and steps between squares become slopes."""
        return _neighbours(values).mul_(0.75).addcmul_(self._rest, values)


def _grids(missing: Tensor) -> list[_Grid]:
    """Returns the finer to coarser, as long as there are unknowns."""
    grids = [_Grid(missing)]
    while min(missing.shape[2:]) > COARSEST:
        missing = -functional.max_pool2d(-missing, 2, ceil_mode=True)
        if not bool(missing.any()):
            break
        grids.append(_Grid(missing))
    return grids


def _preconditioned(residual: Tensor, grids: list[_Grid]) -> Tensor:
    """Returns a solution, roughly: that of every grid by its diagonal, all added up (Bramble, Pasciak and Xu, 1990).

    A coarser grid gets the sums over its squares of the smoothed residual, and what comes back is smoothed likewise:
    the one is the transpose of the other, so the whole is symmetric and positive definite.
    """
    grid, coarser = grids[0], grids[1:]
    solution = residual / grid.diagonal
    if coarser:
        height, width = residual.shape[2:]
        smooth = functional.pad(grid.smooth(residual), (0, width % 2, 0, height % 2))
        rows = smooth[..., ::2, :] + smooth[..., 1::2, :]
        squares = (rows[..., ::2] + rows[..., 1::2]).mul_(coarser[0].missing)
        back = _preconditioned(squares, coarser)
        pixels = back[..., :, None, :, None].expand(*back.shape[:3], 2, back.shape[3], 2)
        pixels = pixels.flatten(4).flatten(2, 3)[..., :height, :width]
        solution.addcmul_(grid.missing, grid.smooth(pixels))
    return solution


def _neighbours(values: Tensor) -> Tensor:
    """Returns the sum of the eight neighbours, 1/6 for the direct and 1/12 for the diagonal ones, zero outside."""
    framed = functional.pad(values, (1, 1, 1, 1))
    rows = (framed[..., :-2] + framed[..., 2:]).add_(framed[..., 1:-1], alpha=2)
    # The sum with weights 1, 2, 1 both ways counts the pixel itself four times.
    return (rows[..., :-2, :] + rows[..., 2:, :]).add_(rows[..., 1:-1, :], alpha=2).sub_(values, alpha=4).div_(12)
