"""Argument checks of the Python kernels: one sentence naming the argument, what was expected and what came."""

import math

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


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in whichever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def _like(tensor: Tensor, name: str, model: Tensor, model_name: str) -> None:
    """Check that two tensors agree in shape, dtype and memory order."""
    _require(tensor.dtype == model.dtype, f"{name} must be {model.dtype} as {model_name} is, got {tensor.dtype}")
    _require(
        tensor.shape == model.shape,
        f"{name} must have shape {_shape(model)} as {model_name} has, got {_shape(tensor)}",
    )
    _require(
        all(size <= 1 or a == b for size, a, b in zip(model.shape, tensor.stride(), model.stride(), strict=True))
        or not model.numel(),
        f"{name} must have strides {list(model.stride())} as {model_name} has, got {list(tensor.stride())}",
    )


def points_within(points: Tensor, size: int, *, absent: bool = False) -> None:
    """Check a list of flat indices: int64 `[P]`, each in `[0, size)`, or -1 where `absent` is True.

    The values of points on a device are asserted there, as torch asserts its own indices: reading them would wait.
    """
    _require(points.dtype == torch.int64, f"points must be int64, got {points.dtype}")
    _require(points.dim() == 1, f"points must have shape [P], got {_shape(points)}")
    _require(size >= 0, f"size must not be negative, got {size}")
    least, expected = (-1, f"[0, {size}) or be -1") if absent else (0, f"[0, {size})")
    if points.device.type != "cpu":
        torch._assert_async(((points >= least) & (points < size)).all(), f"points must lie in {expected}")
    elif points.numel():
        low, high = (int(bound) for bound in torch.aminmax(points))
        _require(low >= least and high < size, f"points must lie in {expected}, got {low if low < least else high}")


def _capacity(capacity: int | None) -> None:
    _require(capacity is None or capacity >= 0, f"capacity must not be negative, got {capacity}")


def points_union(points: Tensor, size: int, capacity: int | None) -> None:
    """Check the arguments of `points_union`."""
    points_within(points, size, absent=True)
    _capacity(capacity)


def holds(capacity: int, found: Tensor) -> None:
    """Check that a result with `capacity` entries has room for as many points as a tensor `[]` says were found."""
    if found.device.type != "cpu":
        torch._assert_async(found <= capacity, f"capacity must be at least the number of points found, got {capacity}")
    else:
        _require(int(found) <= capacity, f"capacity must be at least {int(found)}, the points found, got {capacity}")


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
    points_within(points, size, absent=True)
    _negative(negative, points)
    _require(
        not points.numel() or input.numel() > 0, f"input must not be empty where there are points, got {_shape(input)}"
    )


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None,
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
    points_within(points, input.shape[0] * weight_positive.shape[0], absent=True)
    _negative(negative, points)
    _capacity(capacity)


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


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> None:
    """Check the arguments of `relu_forward`."""
    _float(input, "input")
    _require(_dense(input), f"input must be dense, got shape {_shape(input)} with strides {list(input.stride())}")
    _require(upper > 0, f"upper must be positive, got {upper}")
    _require(bound is not None or not clamp, "bound must be a tensor where clamp is true, got None")
    if bound is not None:
        _like(bound, "bound", input, "input")
    _like(out, "out", input, "input")


def relu_backward(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    """Check the arguments of `relu_backward`."""
    _float(grad, "grad")
    _require(grad.dim() > 0, f"grad must have shape [K, ...], got {_shape(grad)}")
    size = math.prod(grad.shape[1:])
    _require(
        _dense(grad) and (len(grad) <= 1 or grad.stride(0) == size or size == 0),
        f"grad must be dense with its first dimension outermost, got shape {_shape(grad)} with strides"
        f" {list(grad.stride())}",
    )
    _require(0 <= rule <= 2, f"rule must be in [0, 3), got {rule}")
    _require(
        negative_slope == 0 or rule == 0, f"negative_slope must be 0 unless rule is GRADIENT, got {negative_slope}"
    )
    if rule == 1:
        _require(bits is None, "bits must be None where rule is DECONVNET, got a tensor")
    else:
        _require(bits is not None, "bits must be a tensor unless rule is DECONVNET, got None")
    if bits is not None:
        _require(bits.dtype == torch.uint8, f"bits must be uint8, got {bits.dtype}")
        _require(
            bits.shape == ((size + 7) // 8,),
            f"bits must have shape [{(size + 7) // 8}], one bit for each of {size} elements, got {_shape(bits)}",
        )
    _like(out, "out", grad, "grad")


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Check the arguments of `response_argmax`."""
    _float(responses, "responses")
    _require(responses.dim() == 5, f"responses must have shape [K, N, C, H, W], got {_shape(responses)}")
    count, images, _, height, width = responses.shape
    wide = torch.float64 if responses.dtype == torch.float64 else torch.float32
    for name, tensor, dtype, shape in (
        ("classes", classes, torch.int64, [count, images]),
        ("best", best, wide, [images, height, width]),
        ("winner", winner, torch.int64, [images, height, width]),
    ):
        _require(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype}")
        _require(list(tensor.shape) == shape, f"{name} must have shape {shape}, got {_shape(tensor)}")
    for name, tensor in (("best", best), ("winner", winner)):
        _require(tensor.is_contiguous(), f"{name} must be contiguous, got strides {list(tensor.stride())}")


def max_pool(
    input: Tensor,
    input_name: str,
    output: Tensor,
    output_name: str,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Check the arguments of `max_pool_forward` and, with gradients in their place, of `max_pool_backward`."""
    _float(input, input_name)
    _require(input.dim() == 4, f"{input_name} must have shape [N, C, H, W], got {_shape(input)}")
    images, channels = input.shape[:2]
    _require(
        output.dim() == 4 and output.shape[:2] == input.shape[:2],
        f"{output_name} must have shape [{images}, {channels}, H', W'], got {_shape(output)}",
    )
    _require(output.dtype == input.dtype, f"{output_name} must be {input.dtype}, got {output.dtype}")
    for name, values, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _require(
            len(values) == 2 and min(values) >= least,
            f"{name} must be 2 numbers of at least {least}, got {list(values)}",
        )
    taps = math.prod(kernel)
    _require(taps <= 256, f"kernel must have at most 256 taps, which a byte can tell apart, got {taps}")
    _require(offsets.dtype == torch.uint8, f"offsets must be uint8, got {offsets.dtype}")
    _require(
        offsets.dim() == 4
        and offsets.shape[1:] == output.shape[1:]
        and len(output) % max(1, len(offsets)) == 0
        and (len(offsets) > 0 or not len(output)),
        f"offsets must have shape [N, {', '.join(map(str, output.shape[1:]))}], got {_shape(offsets)}",
    )


def winograd_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], lower: float, upper: float
) -> None:
    """Check the arguments of `winograd_conv2d`."""
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        _require(tensor.dtype == torch.float32, f"{name} must be float32, got {tensor.dtype}")
    _require(
        input.dim() == 4 and input.shape[1] % 16 == 0,
        f"input must have shape [N, I, H, W] with I a multiple of 16, got {_shape(input)}",
    )
    _require(
        input.is_contiguous(memory_format=torch.channels_last),
        "input must be channels_last, got another memory format",
    )
    channels = input.shape[1]
    _require(
        weight.dim() == 4 and (weight.shape[0], *weight.shape[2:]) == (36, channels, 16),
        f"weight must have shape [36, O / 16, {channels}, 16], got {_shape(weight)}",
    )
    _require(weight.is_contiguous(), "weight must be contiguous, got another memory order")
    filters = weight.shape[1] * 16
    _require(
        bias is None or list(bias.shape) == [filters],
        f"bias must have shape [{filters}], got {[] if bias is None else _shape(bias)}",
    )
    _require(len(padding) == 2 and min(padding) >= 0, f"padding must be 2 numbers of at least 0, got {list(padding)}")
    _require(
        all(input.shape[2 + d] + 2 * padding[d] > 2 for d in range(2)),
        f"input must be at least 3 x 3 with its padding, got {_shape(input)} padded by {list(padding)}",
    )
    _require(lower <= upper, f"lower must be at most upper, {upper}, got {lower}")
