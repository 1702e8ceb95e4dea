"""The checks of the arguments of every op, in one place for all backends.

Each op has one function here, with the name of the op and the arguments of its schema. The Python kernels and the fakes
call it, and `csrc/generate.py` translates it to C++, so that conditions and messages are written only once. The
functions may therefore use little Python: the functions of `arguments.py`, and messages that name the argument, the
expected value and the actual one.

Integers are exact on both sides, so a product of sizes cannot wrap around. Values of tensors are checked where reading
them does not wait for a device; there, the kernels assert or leave out what lies outside.
"""

from torch import Tensor

from pyfast_xai.kernels.arguments import (
    Location,
    Rectify,
    Solver,
    dense,
    device,
    dtype,
    floating,
    inside,
    outlier,
    pixels_follow,
    product,
    refuse,
    row_major,
    same_strides,
    shape,
    strides,
    tap_outside,
    taps_inside,
    wide,
    windows_reach,
)


def _floating(tensor: Tensor, name: str) -> None:
    if not floating(tensor):
        refuse(f"{name} must be float16, bfloat16, float32 or float64, got {dtype(tensor)}")


def _dtype(tensor: Tensor, name: str, expected: str) -> None:
    if dtype(tensor) != expected:
        refuse(f"{name} must be {expected}, got {dtype(tensor)}")


def _device(tensor: Tensor, name: str, model: Tensor, model_name: str) -> None:
    if device(tensor) != device(model):
        refuse(f"{name} must be on {device(model)} as {model_name} is, got {device(tensor)}")


def _like(tensor: Tensor, name: str, model: Tensor, model_name: str) -> None:
    _device(tensor, name, model, model_name)
    if dtype(tensor) != dtype(model):
        refuse(f"{name} must be {dtype(model)} as {model_name} is, got {dtype(tensor)}")
    if shape(tensor) != shape(model):
        refuse(f"{name} must have shape {shape(model)} as {model_name} has, got {shape(tensor)}")
    if not same_strides(tensor, model):
        refuse(f"{name} must have strides {strides(model)} as {model_name} has, got {strides(tensor)}")


def _size(number: int, name: str) -> None:
    if number < 0:
        refuse(f"{name} must not be negative, got {number}")


def _numbers(values: list[int], name: str, count: int, lowest: int) -> None:
    """Refuse what is no list of `count` numbers in `[lowest, 2**31)`, whose products with one another fit 63 bits."""
    if len(values) != count:
        refuse(f"{name} must be {count} numbers of at least {lowest} and less than 2**31, got {values}")
    for value in values:
        if value < lowest or value >= 2**31:
            refuse(f"{name} must be {count} numbers of at least {lowest} and less than 2**31, got {values}")


def _points(points: Tensor, size: int) -> None:
    _dtype(points, "points", "int64")
    if len(shape(points)) != 1:
        refuse(f"points must have shape [P], got {shape(points)}")
    if size >= 2**63:
        refuse("points must lie among fewer than 2**63 places, got sizes whose product is larger")


def _points_inside(points: Tensor, size: int) -> None:
    _points(points, size)
    if not inside(points, 0, size):
        refuse(f"points must lie in [0, {size}), got {outlier(points, 0, size)}")


def _points_inside_or_absent(points: Tensor, size: int) -> None:
    _points(points, size)
    if not inside(points, -1, size):
        refuse(f"points must lie in [0, {size}) or be -1, got {outlier(points, -1, size)}")


def _negative(negative: Tensor, points: Tensor) -> None:
    _dtype(negative, "negative", "bool")
    _device(negative, "negative", points, "points")
    if shape(negative) != shape(points):
        refuse(f"negative must have shape {shape(points)} as points have, got {shape(negative)}")


def _capacity(capacity: int) -> None:
    if capacity < 0 or capacity >= 2**60:
        refuse(f"capacity must be at least 0 and less than 2**60, got {capacity}")


def capacity_suffices(capacity: int, count: int) -> None:
    """Check that a result with `capacity` entries has room for `count` points."""
    if count > capacity:
        refuse(f"capacity must be at least {count}, the points found, got {capacity}")


def points_union(points: Tensor, size: int, capacity: int | None = None) -> None:
    """Check the arguments of `points_union`."""
    _size(size, "size")
    _points_inside_or_absent(points, size)
    if capacity is not None:
        _capacity(capacity)


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> None:
    """Check the arguments of `point_density`."""
    _size(images, "images")
    _size(height, "height")
    _size(width, "width")
    if not sigma > 0.0:
        refuse(f"sigma must be positive, got {sigma:g}")
    if images * height * width >= 2**61:
        refuse(f"images must have fewer than 2**61 pixels in all, got {images} of {height} x {width}")
    _points_inside(points, images * height * width)


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
    _floating(input, "input")
    if len(shape(input)) < 3 or len(shape(input)) > 5:
        refuse(f"input must have shape [N, C, *spatial] with 1 to 3 spatial dimensions, got {shape(input)}")
    rank = len(shape(input)) - 2
    _dtype(weight, "weight", dtype(input))
    _device(weight, "weight", input, "input")
    if len(shape(weight)) != rank + 2:
        refuse(f"weight must have shape [O, C / groups, *kernel] with {rank} kernel dimensions, got {shape(weight)}")
    if groups < 1:
        refuse(f"groups must be positive, got {groups}")
    if shape(weight)[1] * groups != shape(input)[1] or shape(weight)[0] % groups != 0:
        refuse(
            f"weight must have shape [O, {shape(input)[1]} / {groups}, *kernel] with O a multiple of {groups},"
            f" got {shape(weight)}"
        )
    for size in shape(weight):
        if size >= 2**31:
            refuse(f"weight must have sizes of less than 2**31, got {shape(weight)}")
    _numbers(output_size, "output_size", rank, 0)
    _numbers(stride, "stride", rank, 1)
    _numbers(padding, "padding", rank, 0)
    _numbers(dilation, "dilation", rank, 1)
    if location < 0 or location >= len(Location):
        refuse(f"location must be in [0, {len(Location)}), got {location}")
    _device(points, "points", input, "input")
    _points_inside_or_absent(points, shape(input)[0] * shape(weight)[0] * product(output_size))
    if negative is not None:
        _negative(negative, points)
    if (product(shape(input)) == 0 or product(shape(weight)) == 0) and shape(points)[0] > 0:
        refuse(
            f"input and weight must not be empty where there are points, got shapes {shape(input)} and {shape(weight)}"
        )


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None = None,
) -> None:
    """Check the arguments of `linear_trace`."""
    _floating(input, "input")
    if len(shape(input)) != 2:
        refuse(f"input must have shape [R, I], got {shape(input)}")
    words = (shape(input)[1] + 63) // 64
    _dtype(weight_positive, "weight_positive", "int64")
    _device(weight_positive, "weight_positive", input, "input")
    if len(shape(weight_positive)) != 2 or shape(weight_positive)[1] != words:
        refuse(f"weight_positive must have shape [O, {words}], one word for 64 inputs, got {shape(weight_positive)}")
    _dtype(weight_negative, "weight_negative", "int64")
    _device(weight_negative, "weight_negative", input, "input")
    if shape(weight_negative) != shape(weight_positive):
        refuse(
            f"weight_negative must have shape {shape(weight_positive)} as weight_positive has,"
            f" got {shape(weight_negative)}"
        )
    _device(points, "points", input, "input")
    _points_inside_or_absent(points, shape(input)[0] * shape(weight_positive)[0])
    if negative is not None:
        _negative(negative, points)
    if capacity is not None:
        _capacity(capacity)


def sign_bits(weight: Tensor) -> None:
    """Check the argument of `sign_bits`."""
    _floating(weight, "weight")
    if len(shape(weight)) != 2:
        refuse(f"weight must have shape [O, I], got {shape(weight)}")


def leading_singular(matrices: Tensor, k: int, solver: int, iterations: int, seed: int) -> None:
    """Check the arguments of `leading_singular`."""
    _floating(matrices, "matrices")
    if len(shape(matrices)) != 3:
        refuse(f"matrices must have shape [B, M, N], got {shape(matrices)}")
    if k < 1 or k > shape(matrices)[1] or k > shape(matrices)[2]:
        refuse(f"k must lie in [1, min(M, N)] for matrices of shape {shape(matrices)}, got {k}")
    if solver < 0 or solver >= len(Solver):
        refuse(f"solver must be in [0, {len(Solver)}), got {solver}")
    _size(iterations, "iterations")


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> None:
    """Check the arguments of `relu_forward`."""
    _floating(input, "input")
    if not dense(input):
        refuse(f"input must be dense, got shape {shape(input)} with strides {strides(input)}")
    if not upper > 0.0:
        refuse(f"upper must be positive, got {upper:g}")
    if bound is None and clamp:
        refuse("bound must be a tensor where clamp is true, got None")
    if bound is not None:
        _like(bound, "bound", input, "input")
    _like(out, "out", input, "input")


def relu_backward(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    """Check the arguments of `relu_backward`."""
    _floating(grad, "grad")
    if len(shape(grad)) == 0:
        refuse(f"grad must have shape [K, ...], got {shape(grad)}")
    size = product(shape(grad), 1)
    if not dense(grad) or (shape(grad)[0] > 1 and size > 0 and strides(grad)[0] != size):
        refuse(
            f"grad must be dense with its first dimension outermost, got shape {shape(grad)} with strides"
            f" {strides(grad)}"
        )
    if rule < 0 or rule >= len(Rectify):
        refuse(f"rule must be in [0, {len(Rectify)}), got {rule}")
    if negative_slope != 0.0 and rule != Rectify.GRADIENT:
        refuse(f"negative_slope must be 0 unless rule is GRADIENT, got {negative_slope:g}")
    if bits is not None:
        if rule == Rectify.DECONVNET:
            refuse("bits must be None where rule is DECONVNET, got a tensor")
        _dtype(bits, "bits", "uint8")
        _device(bits, "bits", grad, "grad")
        if len(shape(bits)) != 1 or shape(bits)[0] != (size + 7) // 8:
            refuse(f"bits must have shape [{(size + 7) // 8}], one bit for each of {size} elements, got {shape(bits)}")
    elif rule != Rectify.DECONVNET:
        refuse("bits must be a tensor unless rule is DECONVNET, got None")
    _like(out, "out", grad, "grad")


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Check the arguments of `response_argmax`."""
    _floating(responses, "responses")
    if len(shape(responses)) != 5:
        refuse(f"responses must have shape [K, N, C, H, W], got {shape(responses)}")
    _dtype(classes, "classes", "int64")
    _device(classes, "classes", responses, "responses")
    if len(shape(classes)) != 2 or shape(classes)[0] != shape(responses)[0] or shape(classes)[1] != shape(responses)[1]:
        refuse(f"classes must have shape [{shape(responses)[0]}, {shape(responses)[1]}], got {shape(classes)}")
    _dtype(best, "best", wide(responses))
    _map(best, "best", responses)
    _dtype(winner, "winner", "int64")
    _map(winner, "winner", responses)


def _map(tensor: Tensor, name: str, responses: Tensor) -> None:
    _device(tensor, name, responses, "responses")
    if (
        len(shape(tensor)) != 3
        or shape(tensor)[0] != shape(responses)[1]
        or shape(tensor)[1] != shape(responses)[3]
        or shape(tensor)[2] != shape(responses)[4]
    ):
        refuse(
            f"{name} must have shape [{shape(responses)[1]}, {shape(responses)[3]}, {shape(responses)[4]}],"
            f" got {shape(tensor)}"
        )
    if not row_major(tensor):
        refuse(f"{name} must be contiguous, got strides {strides(tensor)}")


def pool_geometry(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> None:
    """Check the windows of a pool, independent of the map."""
    _numbers(kernel, "kernel", 2, 1)
    _numbers(stride, "stride", 2, 1)
    _numbers(padding, "padding", 2, 0)
    _numbers(dilation, "dilation", 2, 1)
    if kernel[0] * kernel[1] > 256:
        refuse(f"kernel must have at most 256 taps, which a byte can tell apart, got {kernel[0] * kernel[1]}")


def _pool(
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
    """Check what the two directions of a pool share; backwards, gradients stand in the places of maps."""
    _floating(input, input_name)
    if len(shape(input)) != 4:
        refuse(f"{input_name} must have shape [N, C, H, W], got {shape(input)}")
    _dtype(output, output_name, dtype(input))
    _device(output, output_name, input, input_name)
    if len(shape(output)) != 4 or shape(output)[0] != shape(input)[0] or shape(output)[1] != shape(input)[1]:
        refuse(f"{output_name} must have shape [{shape(input)[0]}, {shape(input)[1]}, H', W'], got {shape(output)}")
    _dtype(offsets, "offsets", "uint8")
    _device(offsets, "offsets", input, input_name)
    pool_geometry(kernel, stride, padding, dilation)


def _windows(
    input: Tensor,
    output: Tensor,
    output_name: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    if product(shape(output)) > 0:
        for d in range(2):
            if not windows_reach(
                shape(input)[2 + d], shape(output)[2 + d], kernel[d], stride[d], padding[d], dilation[d]
            ):
                refuse(f"{output_name} must have windows inside the input, got {shape(output)} for {shape(input)}")


def max_pool_forward(
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output: Tensor,
    offsets: Tensor,
) -> None:
    """Check the arguments of `max_pool_forward`."""
    _pool(input, "input", output, "output", offsets, kernel, stride, padding, dilation)
    if shape(offsets) != shape(output):
        refuse(f"offsets must have shape {shape(output)} as output has, got {shape(offsets)}")
    _windows(input, output, "output", kernel, stride, padding, dilation)


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    """Check the arguments of `max_pool_backward`."""
    _pool(out, "out", grad, "grad", offsets, kernel, stride, padding, dilation)
    if (
        len(shape(offsets)) != 4
        or shape(offsets)[1] != shape(grad)[1]
        or shape(offsets)[2] != shape(grad)[2]
        or shape(offsets)[3] != shape(grad)[3]
        or (shape(grad)[0] > 0 and (shape(offsets)[0] == 0 or shape(grad)[0] % shape(offsets)[0] != 0))
    ):
        refuse(
            f"offsets must have shape [N, {shape(grad)[1]}, {shape(grad)[2]}, {shape(grad)[3]}] with N a divisor of"
            f" {shape(grad)[0]}, got {shape(offsets)}"
        )
    _windows(out, grad, "grad", kernel, stride, padding, dilation)
    if not taps_inside(offsets, out, kernel, stride, padding, dilation):
        refuse(
            f"offsets must name a tap of their window of {kernel} inside out of shape {shape(out)},"
            f" got {tap_outside(offsets, out, kernel, stride, padding, dilation)}"
        )


def winograd_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], lower: float, upper: float
) -> None:
    """Check the arguments of `winograd_conv2d`."""
    _dtype(input, "input", "float32")
    if len(shape(input)) != 4 or shape(input)[1] == 0 or shape(input)[1] % 16 != 0:
        refuse(f"input must have shape [N, I, H, W] with I a multiple of 16, got {shape(input)}")
    if not pixels_follow(input):
        refuse("input must be channels_last, got another memory format")
    _dtype(weight, "weight", "float32")
    _device(weight, "weight", input, "input")
    if (
        len(shape(weight)) != 4
        or shape(weight)[0] != 36
        or shape(weight)[1] == 0
        or shape(weight)[2] != shape(input)[1]
        or shape(weight)[3] != 16
    ):
        refuse(f"weight must have shape [36, O / 16, {shape(input)[1]}, 16], got {shape(weight)}")
    if not row_major(weight):
        refuse("weight must be contiguous, got another memory order")
    filters = shape(weight)[1] * 16
    if bias is not None:
        _dtype(bias, "bias", "float32")
        _device(bias, "bias", input, "input")
        if len(shape(bias)) != 1 or shape(bias)[0] != filters:
            refuse(f"bias must have shape [{filters}], got {shape(bias)}")
    _numbers(padding, "padding", 2, 0)
    height = shape(input)[2] + 2 * padding[0] - 2
    width = shape(input)[3] + 2 * padding[1] - 2
    if height < 1 or width < 1:
        refuse(f"input must be at least 3 x 3 with its padding, got {shape(input)} padded by {padding}")
    if shape(input)[0] * filters * height * width >= 2**61:
        refuse(f"input must have an output of fewer than 2**61 elements, got {shape(input)} padded by {padding}")
    if not lower <= upper:
        refuse(f"lower must be at most upper, {upper:g}, got {lower:g}")
