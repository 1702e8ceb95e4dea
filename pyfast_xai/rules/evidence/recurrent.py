"""LSTM units: the gates as fully connected layers onto what they read (CNN-Fixations, section III-D)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.evidence.backward import TraceContext, rule
from pyfast_xai.rules.evidence.layers import contributions
from pyfast_xai.rules.evidence.points import Points, ravel, union, unravel
from pyfast_xai.tape import Value


def _through_gates(ctx: TraceContext, points: Points, read: Tensor, weight: Tensor) -> Points:
    """Returns positive contributions of `read` [N, I] to any of the four gates of units given as points on [N, H]."""
    hidden = weight.shape[0] // 4
    row, unit = unravel(points.index, (len(read), hidden))
    gates = [points.to(row * 4 * hidden + gate * hidden + unit).index for gate in range(4)]
    negative = None if points.negative is None else points.negative.repeat(4)
    return contributions(ctx, read, weight, torch.cat(gates), negative)


def _results(ctx: TraceContext, *numbers: int) -> Points | None:
    """Returns the points on any of several results that hold the same units."""
    parts = [points for i in numbers if (points := ctx.results[i]) is not None]
    value = ctx.node.outputs[numbers[0]]
    return union(parts, value.numel) if parts and value is not None else None


@rule("lstm_cell", saves=["input", "hx"], weighted=True)
def lstm_cell(ctx: TraceContext, input: Any, hx: list[Any], w_ih: Tensor, w_hh: Tensor, *biases: Any) -> None:
    """Traces the new state (h or c) to the previous m and to the input; the memory path c is not traced."""
    points = _results(ctx, 0, 1)
    assert points is not None
    ctx.propagate(input, _through_gates(ctx, points, ctx.tensor("input"), w_ih))
    ctx.propagate(hx[0], _through_gates(ctx, points, ctx.tensor("hx.0"), w_hh))


@rule("lstm", saves=["input", "hx"], weighted=True)
def lstm(
    ctx: TraceContext,
    input: Any,
    hx: list[Any],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """Traces an LSTM over a sequence: recomputes its hidden states and goes from the last step to the first."""
    sequence = ctx.tensor("input")
    sequence = sequence.transpose(0, 1) if batch_first else sequence  # [T, N, I]
    initial, memory = ctx.tensor("hx.0"), ctx.tensor("hx.1")
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    if each > 4 or (each == 3 and not has_biases):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for an LSTM with projections, {ctx.node.name!r}")
    steps, batch = sequence.shape[:2]

    read, states = [sequence], []  # what each layer reads; its hidden states by direction
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = params[number * each : (number + 1) * each]
            outs.append(_unroll(read[-1], initial[number], memory[number], weights, has_biases, direction == 1))
        states.append(outs)
        read.append(torch.cat(outs, -1))

    hidden = read[-1].shape[-1] // directions
    # Points on each layer's states, by direction and time.
    on: list[list[list[list[Points]]]] = [
        [[[] for _ in range(steps)] for _ in range(directions)] for _ in range(num_layers)
    ]
    output, state = ctx.node.outputs[:2]
    assert output is not None
    assert state is not None
    if ctx.results[0] is not None:
        first, second, unit = unravel(ctx.results[0].index, output.shape)
        time, row = (second, first) if batch_first else (first, second)
        for direction in range(directions):
            for t in range(steps):
                mask = (time == t) & (torch.div(unit, hidden, rounding_mode="floor") == direction)
                index = row * hidden + unit % hidden
                on[-1][direction][t].append(ctx.results[0].to(index, mask))
    final = _results(ctx, 1, 2)
    if final is not None:
        cell, row, unit = unravel(final.index, state.shape)
        for layer in range(num_layers):
            for direction in range(directions):
                last = 0 if direction else steps - 1
                mask = cell == layer * directions + direction
                on[layer][direction][last].append(final.to(row * hidden + unit, mask))

    for layer in reversed(range(num_layers)):
        below = read[layer]
        reached: list[list[Points]] = [[] for _ in range(steps)]  # on what this layer reads, by time
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh = params[number * each : number * each + 2]
            order = range(steps) if direction else range(steps - 1, -1, -1)
            for t in order:
                if not any(len(part) for part in on[layer][direction][t]):
                    continue
                points = union(on[layer][direction][t], batch * hidden)
                reached[t].append(_through_gates(ctx, points, below[t], w_ih))
                before = t + 1 if direction else t - 1
                if 0 <= before < steps:
                    previous = states[layer][direction][before]
                    on[layer][direction][before].append(_through_gates(ctx, points, previous, w_hh))
                else:
                    start = _through_gates(ctx, points, initial[number], w_hh)
                    ctx.propagate(hx[0], start.to(start.index + number * batch * hidden))
        for t, parts in enumerate(reached):
            if parts:
                _propagate_below(ctx, input, parts, t, layer, on, below, hidden, batch_first)


def _propagate_below(
    ctx: TraceContext,
    input: Any,
    parts: list[Points],
    t: int,
    layer: int,
    on: list[list[list[list[Points]]]],
    below: Tensor,
    hidden: int,
    batch_first: bool,
) -> None:
    """Passes points on what a layer read at time t to the layer below, or to the input of the whole LSTM."""
    _, batch, width = below.shape
    points = union(parts, batch * width)
    row, unit = unravel(points.index, (batch, width))
    if layer:
        for direction, at in enumerate(on[layer - 1]):
            mask = torch.div(unit, hidden, rounding_mode="floor") == direction
            at[t].append(points.to(row * hidden + unit % hidden, mask))
    elif isinstance(input, Value):
        time = torch.full_like(row, t)
        ctx.propagate(input, points.to(ravel([row, time, unit] if batch_first else [time, row, unit], input.shape)))


def _unroll(sequence: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], has_biases: bool, backward: bool) -> Tensor:
    """Returns the hidden states `[T, N, H]` of one direction of one layer."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if has_biases else (None, None)
    states: list[Tensor] = []
    for x in reversed(sequence) if backward else sequence:
        gates = functional.linear(x, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states[::-1] if backward else states)
