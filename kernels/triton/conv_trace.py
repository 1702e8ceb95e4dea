"""Triton twin of `conv_trace`: one program a point, its lanes over channels, and over taps where channels are few."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Location
from pyfast_xai.kernels.triton.accumulate import accumulator

PRODUCT, CENTER, ACTIVATION, SAME = (tl.constexpr(int(location)) for location in Location)
# Elements of a block: four a lane of the single warp, whose reductions are shuffles alone.
LANES = 128


@triton.jit
def _beats(value, best):
    # NaN counts as the largest and the first of equals stays, as in torch.argmax.
    return (value > best) | ((value != value) & (best == best))


@triton.jit
def _first_largest(value, index):
    """Returns the index of the largest element of a block, the least index among equals."""
    is_nan = value != value
    largest = tl.max(tl.where(is_nan, float("-inf"), value), 0)
    wins = tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, is_nan, value == largest)
    return tl.min(tl.where(wins, index, 0x7FFFFFFFFFFFFFFF), 0)


@triton.jit
def _place_of(tap, z0, y0, x0, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    z = z0 + tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
    y = y0 + tap // KERNEL[2] % KERNEL[1] * DILATION[1]
    x = x0 + tap % KERNEL[2] * DILATION[2]
    return z, y, x


@triton.jit
def _inside(z, y, x, depth, height, width):
    return (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)


# Every layer has its own sizes; only those that say how wide a load can be are specialised: strides and channels.
@triton.jit(
    do_not_specialize=[
        *("channels", "depth", "height", "width", "filters", "out_depth", "out_height", "out_width", "group_filters"),
    ]
)
def _conv_trace_kernel(
    input_ptr,  # [N, channels, depth, height, width]
    weight_ptr,  # [filters, group_channels, taps]
    points_ptr,  # [P]
    negative_ptr,  # [P], read with SIGNED
    out_ptr,  # [P]
    channels,
    depth,
    height,
    width,
    filters,
    out_depth,
    out_height,
    out_width,
    group_channels,
    group_filters,
    stride_n,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    weight_stride_o,
    weight_stride_c,
    weight_stride_t,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LOCATION: tl.constexpr,
    SIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    program = tl.program_id(0).to(tl.int64)
    flat = tl.load(points_ptr + program)
    if flat < 0:
        tl.store(out_ptr + program, flat)
        return
    at_x = flat % out_width
    flat = flat // out_width
    at_y = flat % out_height
    flat = flat // out_height
    at_z = flat % out_depth
    flat = flat // out_depth
    o = flat % filters
    n = flat // filters
    first = o // group_filters * group_channels
    z0 = at_z * STRIDE[0] - PADDING[0]
    y0 = at_y * STRIDE[1] - PADDING[1]
    x0 = at_x * STRIDE[2] - PADDING[2]
    p_field = input_ptr + n * stride_n + first * stride_c
    p_filter = weight_ptr + o * weight_stride_o
    sign = tl.full([], 1, ACC)
    if SIGNED:
        sign = tl.where(tl.load(negative_ptr + program) != 0, -sign, sign)

    # The strongest channel so far of every lane. A sum of minus infinity does not beat the start, which is its lane's
    # first channel.
    best = tl.full([BLOCK_C], float("-inf"), ACC)
    best_channel = tl.arange(0, BLOCK_C).to(tl.int64)
    for c0 in range(0, group_channels, BLOCK_C):
        o_channel = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
        m_channel = o_channel < group_channels
        products = tl.zeros([BLOCK_C, BLOCK_T], ACC)
        for t0 in range(0, TAPS, BLOCK_T):
            o_tap = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
            z, y, x = _place_of(o_tap, z0, y0, x0, KERNEL, DILATION)
            m_tap = (o_tap < TAPS) & _inside(z, y, x, depth, height, width)
            m_product = m_channel[:, None] & m_tap[None, :]  # [BLOCK_C, BLOCK_T]
            o_place = z * stride_z + y * stride_y + x * stride_x
            p_value = p_field + o_channel[:, None] * stride_c + o_place[None, :]
            p_weight = p_filter + o_channel[:, None] * weight_stride_c + o_tap[None, :] * weight_stride_t
            value = tl.load(p_value, mask=m_product, other=0).to(ACC)
            weight = tl.load(p_weight, mask=m_product, other=0).to(ACC)
            products += value * weight
        total = tl.where(m_channel, sign * tl.sum(products, 1), float("-inf"))
        stronger = _beats(total, best)
        best = tl.where(stronger, total, best)
        best_channel = tl.where(stronger, o_channel, best_channel)
    channel = _first_largest(best, best_channel)

    if LOCATION == CENTER:
        z = z0 + DILATION[0] * (KERNEL[0] // 2)
        y = y0 + DILATION[1] * (KERNEL[1] // 2)
        x = x0 + DILATION[2] * (KERNEL[2] // 2)
    elif LOCATION == SAME:
        z = at_z * STRIDE[0]
        y = at_y * STRIDE[1]
        x = at_x * STRIDE[2]
    else:
        best_value = tl.full([BLOCK_T], float("-inf"), ACC)
        best_tap = tl.full([BLOCK_T], TAPS, tl.int64)  # none yet
        for t0 in range(0, TAPS, BLOCK_T):
            o_tap = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
            z, y, x = _place_of(o_tap, z0, y0, x0, KERNEL, DILATION)
            m_tap = (o_tap < TAPS) & _inside(z, y, x, depth, height, width)
            p_value = p_field + channel * stride_c + z * stride_z + y * stride_y + x * stride_x
            value = tl.load(p_value, mask=m_tap, other=0).to(ACC)
            if LOCATION == PRODUCT:
                p_weight = p_filter + channel * weight_stride_c + o_tap * weight_stride_t
                value = sign * (value * tl.load(p_weight, mask=m_tap, other=0).to(ACC))
            stronger = m_tap & (_beats(value, best_value) | (best_tap == TAPS))
            best_value = tl.where(stronger, value, best_value)
            best_tap = tl.where(stronger, o_tap, best_tap)
        tap = _first_largest(best_value, best_tap)
        # A window of padding alone is read at its start.
        z, y, x = _place_of(tl.where(tap < TAPS, tap, 0), z0, y0, x0, KERNEL, DILATION)
    z = tl.minimum(tl.maximum(z, 0), depth - 1)
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    tl.store(out_ptr + program, (((n * channels + first + channel) * depth + z) * height + y) * width + x)


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
) -> Tensor:
    """Returns each point's strongest input channel in its receptive field, and a place there; see `ops.conv_trace`."""
    checks.conv_trace(input, weight, points, negative, output_size, stride, padding, dilation, groups, location)
    out = torch.empty_like(points, memory_format=torch.contiguous_format)
    if not len(points):
        return out
    missing = 5 - input.dim()
    field = input.detach().reshape(*input.shape[:2], *[1] * missing, *input.shape[2:])
    filters = weight.detach().flatten(2)  # a view in both memory formats
    _, group_channels, taps = filters.shape
    block_c = min(triton.next_power_of_2(group_channels), LANES)
    with torch.cuda.device_of(input):
        _conv_trace_kernel[(len(points),)](
            field,
            filters,
            points.contiguous(),
            points if negative is None else negative.contiguous(),
            out,
            *field.shape[1:],
            len(weight),
            *[1] * missing,
            *output_size,
            group_channels,
            len(weight) // groups,
            *field.stride(),
            *filters.stride(),
            KERNEL=(*[1] * missing, *weight.shape[2:]),
            STRIDE=(*[1] * missing, *stride),
            PADDING=(*[0] * missing, *padding),
            DILATION=(*[1] * missing, *dilation),
            LOCATION=location,
            SIGNED=negative is not None,
            ACC=accumulator(input.dtype),
            BLOCK_C=block_c,
            BLOCK_T=min(triton.next_power_of_2(taps), LANES // block_c),
            num_warps=1,
        )
    return out
