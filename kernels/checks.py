"""Argument checks of the Python kernels: one sentence naming the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise RuntimeError(sentence)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _float(tensor: Tensor, name: str) -> None:
    _require(tensor.dtype in FLOATS, f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def points_within(points: Tensor, size: int) -> None:
    """Check a list of flat indices: int64 `[P]`, each in `[0, size)`."""
    _require(points.dtype == torch.int64, f"points must be int64, got {points.dtype}")
    _require(points.dim() == 1, f"points must have shape [P], got {_shape(points)}")
    _require(size >= 0, f"size must not be negative, got {size}")
    if points.numel():
        low, high = (int(bound) for bound in torch.aminmax(points))
        _require(low >= 0 and high < size, f"points must lie in [0, {size}), got {low if low < 0 else high}")


def _negative(negative: Tensor | None, points: Tensor) -> None:
    if negative is not None:
        _require(negative.dtype == torch.bool, f"negative must be bool, got {negative.dtype}")
        _require(negative.shape == points.shape, f"negative must have shape {_shape(points)}, got {_shape(negative)}")


def conv_trace(
    input: Tensor,
    weight: Tensor,
    points: Tensor,
    negative: Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    location: int,
) -> None:
    """Check the arguments of `conv_trace`."""
    _float(input, "input")
    _require(
        3 <= input.dim() <= 5, f"input must have shape [N, C, *spatial] with 1 to 3 dimensions, got {_shape(input)}"
    )
    rank = input.dim() - 2
    _require(weight.dtype == input.dtype, f"weight must be {input.dtype} as the input, got {weight.dtype}")
    _require(groups > 0, f"groups must be positive, got {groups}")
    _require(
        weight.dim() == rank + 2
        and weight.shape[1] * groups == input.shape[1]
        and weight.shape[0] % groups == 0
        and weight[0].numel() > 0,
        f"weight must have shape [O, {input.shape[1]} / {groups}, *kernel] with {rank} kernel dimensions"
        f" and O a multiple of {groups}, got {_shape(weight)}",
    )
    for name, values, least in (
        ("output_size", output_size, 0),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _require(
            len(values) == rank and min(values) >= least,
            f"{name} must be {rank} numbers of at least {least}, got {list(values)}",
        )
    _require(0 <= location <= 3, f"location must be in [0, 4), got {location}")
    size = input.shape[0] * weight.shape[0]
    for extent in output_size:
        size *= extent
    points_within(points, size)
    _negative(negative, points)
    _require(
        not points.numel() or input.numel() > 0, f"input must not be empty where there are points, got {_shape(input)}"
    )


def linear_trace(
    input: Tensor, weight_positive: Tensor, weight_negative: Tensor, points: Tensor, negative: Tensor | None
) -> None:
    """Check the arguments of `linear_trace`."""
    _float(input, "input")
    _require(input.dim() == 2, f"input must have shape [R, I], got {_shape(input)}")
    words = (input.shape[1] + 63) // 64
    for name, bits in (("weight_positive", weight_positive), ("weight_negative", weight_negative)):
        _require(bits.dtype == torch.int64, f"{name} must be int64, got {bits.dtype}")
        _require(
            bits.dim() == 2 and bits.shape[1] == words and bits.shape[0] == weight_positive.shape[0],
            f"{name} must have shape [O, {words}], one word for 64 inputs, got {_shape(bits)}",
        )
    points_within(points, input.shape[0] * weight_positive.shape[0])
    _negative(negative, points)


def sign_bits(weight: Tensor) -> None:
    """Check the argument of `sign_bits`."""
    _float(weight, "weight")
    _require(weight.dim() == 2, f"weight must have shape [O, I], got {_shape(weight)}")


def leading_singular(matrices: Tensor, k: int, method: int, iterations: int) -> None:
    """Check the arguments of `leading_singular`."""
    _float(matrices, "matrices")
    _require(matrices.dim() == 3, f"matrices must have shape [B, M, N], got {_shape(matrices)}")
    small = min(matrices.shape[1:])
    _require(1 <= k <= small, f"k must lie in [1, {small}], got {k}")
    _require(0 <= method <= 2, f"method must be in [0, 3), got {method}")
    _require(iterations >= 0, f"iterations must not be negative, got {iterations}")


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> None:
    """Check the arguments of `point_density`."""
    for name, extent in (("images", images), ("height", height), ("width", width)):
        _require(extent >= 0, f"{name} must not be negative, got {extent}")
    _require(sigma > 0, f"sigma must be positive, got {sigma}")
    points_within(points, images * height * width)
