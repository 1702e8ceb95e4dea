"""The functions that `checks.py` may call. `csrc/arguments.h` defines the same functions for C++."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pyfast_xai.kernels.enums import Location, Rectify, Solver

__all__ = [
    "Location",
    "Rectify",
    "Solver",
    "dense",
    "device",
    "dtype",
    "floating",
    "inside",
    "outlier",
    "pixels_follow",
    "product",
    "refuse",
    "row_major",
    "same_strides",
    "shape",
    "strides",
    "tap_outside",
    "taps_inside",
    "wide",
    "windows_reach",
]


def refuse(sentence: str) -> NoReturn:
    """Raise the error that says what is wrong with the arguments.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(sentence)


def dtype(tensor: Tensor) -> str:
    """Return the name of the dtype, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def device(tensor: Tensor) -> str:
    """Return the name of the device, such as "cpu" or "cuda:0"."""
    return str(tensor.device)


def shape(tensor: Tensor) -> list[int]:
    """Return the sizes of the dimensions."""
    return list(tensor.shape)


def strides(tensor: Tensor) -> list[int]:
    """Return the steps in memory of the dimensions."""
    return list(tensor.stride())


def product(sizes: Sequence[int], first: int = 0) -> int:
    """Return the product of the entries from the `first` on."""
    return math.prod(sizes[first:])


def floating(tensor: Tensor) -> bool:
    """Return whether the ops take the dtype as numbers."""
    return tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide(tensor: Tensor) -> str:
    """Return the name of the dtype in which elements of the tensor are summed."""
    return "float64" if tensor.dtype == torch.float64 else "float32"


def dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory, in whichever order of the dimensions."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def row_major(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory in row-major order."""
    return tensor.is_contiguous()


def pixels_follow(tensor: Tensor) -> bool:
    """Return whether the elements of `[N, C, H, W]` fill their memory pixel by pixel, the channels innermost."""
    return not tensor.numel() or tensor.is_contiguous(memory_format=torch.channels_last)


def same_strides(tensor: Tensor, model: Tensor) -> bool:
    """Return whether two tensors of one shape lie in memory in one order."""
    pairs = zip(model.shape, tensor.stride(), model.stride(), strict=True)
    return not model.numel() or all(size <= 1 or step == expected for size, step, expected in pairs)


def _readable(tensor: Tensor) -> bool:
    """Return whether there are values that can be read without waiting for a device."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def inside(points: Tensor, lowest: int, size: int) -> bool:
    """Return whether all values lie in `[lowest, size)`.

    On a device this asserts asynchronously, as torch does for its own indices, and returns True, because reading the
    values would synchronise.
    """
    if is_fake(points) or points.device.type == "meta" or not points.numel():
        return True
    if not _readable(points):
        message = f"points must lie in [{lowest}, {size})"
        torch._assert_async(((points >= lowest) & (points < size)).all(), message)
        return True
    low, high = torch.aminmax(points)
    return lowest <= int(low) and int(high) < size


def outlier(points: Tensor, lowest: int, size: int) -> int:
    """Return the first value for which `inside` does not hold."""
    return int(points[(points < lowest) | (points >= size)][0])


def windows_reach(size: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Return whether every window along a dimension of `size` elements holds one of them at least."""
    if windows == 0:
        return True
    if size == 0 or (windows - 1) * stride - padding >= size or padding > (kernel - 1) * dilation:
        return False
    # Taps that are no farther apart than the elements reach do not step over all of them.
    if dilation <= size:
        return True
    in_padding = min(windows, -(-padding // stride))
    return all((window * stride - padding) % dilation < size for window in range(in_padding))


def _outside(
    offsets: Tensor, map: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    tap = offsets.long()  # of 256 taps, a byte cannot hold the number
    outside = tap >= kernel[0] * kernel[1]
    rows = torch.arange(offsets.shape[2])[:, None] * stride[0] - padding[0]
    columns = torch.arange(offsets.shape[3]) * stride[1] - padding[1]
    for d, coordinate in enumerate((rows + tap // kernel[1] * dilation[0], columns + tap % kernel[1] * dilation[1])):
        outside |= (coordinate < 0) | (coordinate >= map.shape[2 + d])
    return outside


def taps_inside(
    offsets: Tensor, map: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Return whether every window names one of its taps, and one that lies inside the map.

    On a device, where reading would wait, True is returned: the kernels there leave out or assert what lies outside.

    Args:
        offsets: uint8 `[N, C, H', W']`, the row-major number of a tap in each window.
        map: `[N, C, H, W]`, what the windows lie on.
        kernel: height and width of a window.
        stride: steps between windows.
        padding: around the map.
        dilation: between the taps of a window.
    """
    return not _readable(offsets) or not bool(_outside(offsets, map, kernel, stride, padding, dilation).any())


def tap_outside(
    offsets: Tensor, map: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> int:
    """Return the first offset, in row-major order, for which `taps_inside` does not hold."""
    return int(offsets[_outside(offsets, map, kernel, stride, padding, dilation)][0])
