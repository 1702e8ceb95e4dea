"""CNN-Fixations written slowly: one image, float64, a loop for every sum and a set of tuples for every set of points.

Each function computes an activation (the forward is PyTorch's) and says how one point on it is traced back: a point
is the coordinates of a neuron and whether it is there for being low (below a negative scale). The rules are those of
the paper (Algorithms 1 and 2, sections III-A to III-D); where its text is silent, those of the authors' code.
"""

import itertools
import math

import numpy as np
import torch
from torch.nn import functional


class Activation:
    """Values `[C, *spatial]`, `[D]` or `[T, D]` of one image.

    Attributes:
        back: for (coordinates, negative) a list of (activation, coordinates, negative); None at the image.
    """

    def __init__(self, value, back=None):
        self.value = np.asarray(value, dtype=np.float64)
        self.back = back


def trace(activation, points, to):
    """All points on `to` that points (coordinates) on `activation` lead to: coordinates, without the sign."""
    open_, recorded, result = [(activation, tuple(point), False) for point in points], set(), set()
    while open_:
        at, point, negative = open_.pop()
        if (id(at), point, negative) in recorded:
            continue
        recorded.add((id(at), point, negative))
        if at is to:
            result.add(point)
        elif at.back is not None:
            open_.extend(at.back(point, negative))
    return result


def first_largest(candidates, negative):
    """Position of the largest number (the least, for a negative point), the first of equals."""
    best = 0
    for i, number in enumerate(candidates):
        if number < candidates[best] if negative else number > candidates[best]:
            best = i
    return best


def array(tensor):
    return tensor.detach().double().numpy()


def run(function, *values, **settings):
    """A PyTorch function on the values of one image."""
    with torch.no_grad():
        return function(*[torch.from_numpy(v)[None] for v in values], **settings)[0].numpy()


def expand(number, rank):
    return list(number) if isinstance(number, (tuple, list)) else [number] * rank


class Slow:
    """The algorithm with its open points settled.

    Args:
        location: in the strongest channel: "product", "activation", "center" of the window, or "same".
        first_fc: "all" positive contributions of a flattened map (the paper) or the "argmax" (the authors).
        signed: a point on a negative activation is there for being low.
    """

    def __init__(self, location, first_fc, signed):
        self.location, self.first_fc, self.signed = location, first_fc, signed

    def _on(self, x, point):
        """A point on what a layer read."""
        return x, point, self.signed and bool(x.value[point] < 0)

    def image(self, x):
        return Activation(array(x))

    # Algorithm 1

    def fc(self, x, weight, bias=None):
        """From a neuron to every neuron that excites it; x is a vector."""
        weight = array(weight)

        def back(point, negative):
            reached = []
            for j in range(len(x.value)):
                contribution = x.value[j] * weight[point[0], j]
                if contribution < 0 if negative else contribution > 0:
                    reached.append(self._on(x, (j,)))
            return reached

        return Activation(weight @ x.value + (0 if bias is None else array(bias)), back)

    def fc_argmax(self, x, weight, bias=None):
        """From a neuron to the one that excites it most."""
        weight = array(weight)

        def back(point, negative):
            contributions = [x.value[j] * weight[point[0], j] for j in range(len(x.value))]
            return [self._on(x, (first_largest(contributions, negative),))]

        return Activation(weight @ x.value + (0 if bias is None else array(bias)), back)

    def fc_on_map(self, x, weight, bias=None):
        """The fully connected layer on a flattened map."""
        return (self.fc if self.first_fc == "all" else self.fc_argmax)(x, weight, bias)

    def fc_on_tokens(self, x, weight, bias=None):
        """x `[T, D]`: the same layer at every token, a 1x1 convolution."""
        weight = array(weight)

        def back(point, negative):
            t, o = point
            contributions = [x.value[t, j] * weight[o, j] for j in range(x.value.shape[1])]
            return [self._on(x, (t, first_largest(contributions, negative)))]

        return Activation(x.value @ weight.T + (0 if bias is None else array(bias)), back)

    # Algorithm 2

    def conv(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        rank = weight.dim() - 2
        forward = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        value = run(forward, x.value, weight=weight, bias=bias, stride=stride, padding=padding, dilation=dilation,
                    groups=groups)  # fmt: skip
        weight = array(weight)
        stride, padding, dilation = (expand(n, rank) for n in (stride, padding, dilation))
        kernel, spatial, per_group = weight.shape[2:], x.value.shape[1:], weight.shape[1]

        def back(point, negative):
            filter_, *at = point
            first = filter_ // (weight.shape[0] // groups) * per_group
            sums, products, fields = [], [], []
            for c in range(per_group):
                product, field = {}, {}
                for tap in itertools.product(*map(range, kernel)):
                    place = tuple(at[d] * stride[d] - padding[d] + tap[d] * dilation[d] for d in range(rank))
                    if all(0 <= place[d] < spatial[d] for d in range(rank)):
                        field[place] = x.value[(first + c, *place)]
                        product[place] = field[place] * weight[(filter_, c, *tap)]
                sums.append(sum(product.values()))
                products.append(product)
                fields.append(field)
            c = first_largest(sums, negative)
            if self.location == "product":
                place = list(products[c])[first_largest(list(products[c].values()), negative)]
            elif self.location == "activation":
                place = list(fields[c])[first_largest(list(fields[c].values()), False)]
            else:
                place = []
                for d in range(rank):
                    middle = dilation[d] * (kernel[d] // 2) - padding[d] if self.location == "center" else 0
                    place.append(min(max(at[d] * stride[d] + middle, 0), spatial[d] - 1))
            return [self._on(x, (first + c, *place))]

        return Activation(value, back)

    # Pooling

    def _windows(self, x, value, ranges, signed):
        def back(point, negative):
            places = [(point[0], *place) for place in itertools.product(*ranges(point[1:]))]
            return [(x, places[first_largest([x.value[p] for p in places], negative and signed)], negative)]

        return Activation(value, back)

    def _pool(self, x, value, kernel, stride, padding, dilation, signed):
        rank = x.value.ndim - 1
        kernel, padding, dilation = (expand(n, rank) for n in (kernel, padding, dilation))
        stride = kernel if stride is None else expand(stride, rank)

        def ranges(at):
            taps = [[at[d] * stride[d] - padding[d] + k * dilation[d] for k in range(kernel[d])] for d in range(rank)]
            return [[t for t in taps[d] if 0 <= t < x.value.shape[1 + d]] for d in range(rank)]

        return self._windows(x, value, ranges, signed)

    def max_pool(self, x, kernel, stride=None, padding=0, dilation=1, ceil_mode=False):
        forward = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.value.ndim - 2]
        value = run(forward, x.value, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
                    ceil_mode=ceil_mode)  # fmt: skip
        return self._pool(x, value, kernel, stride, padding, dilation, signed=False)

    def avg_pool(self, x, kernel, stride=None, padding=0, **settings):
        """The highest activation here too; a negative point asks for the lowest."""
        forward = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.value.ndim - 2]
        value = run(forward, x.value, kernel_size=kernel, stride=stride, padding=padding, **settings)
        return self._pool(x, value, kernel, stride, padding, 1, signed=True)

    def adaptive_pool(self, x, size, kind="avg"):
        rank = x.value.ndim - 1
        size = expand(size, rank)
        forward = getattr(functional, f"adaptive_{kind}_pool{rank}d")

        def ranges(at):
            edges = [(at[d] * n / size[d], (at[d] + 1) * n / size[d]) for d, n in enumerate(x.value.shape[1:])]
            return [range(math.floor(low), math.ceil(high)) for low, high in edges]

        value = run(forward, x.value, output_size=size if rank > 1 else size[0])
        return self._windows(x, value, ranges, signed=kind == "avg")

    def mean_of_tokens(self, x):
        """x `[T, D]`."""

        def back(point, negative):
            at = first_largest([x.value[t, point[0]] for t in range(len(x.value))], negative)
            return [(x, (at, point[0]), negative)]

        return Activation(x.value.mean(0), back)

    def class_scores(self, x):
        """The mean of a map of classes, from which the trace starts: a fully connected layer with equal weights."""

        def back(point, negative):
            places = itertools.product(*map(range, x.value.shape[1:]))
            return [(x, (point[0], *p), negative) for p in places if x.value[(point[0], *p)] > 0]

        return Activation(x.value.reshape(len(x.value), -1).mean(1), back)

    # Joints

    def add(self, skip, delta):
        """The larger contributor; a tie goes to the skip path."""

        def back(point, negative):
            a, b = skip.value[point], delta.value[point]
            takes_skip = a <= b if negative else a >= b
            return [(skip if takes_skip else delta, point, negative)]

        return Activation(skip.value + delta.value, back)

    def cat(self, parts, axis=0):
        def back(point, negative):
            at = point[axis]
            for part in parts:
                if at < part.value.shape[axis]:
                    return [(part, (*point[:axis], at, *point[axis + 1 :]), negative)]
                at -= part.value.shape[axis]
            raise AssertionError

        return Activation(np.concatenate([part.value for part in parts], axis), back)

    # One element for one element

    def same(self, x, function, sign=None):
        """A function of each element; below a negative `sign` (broadcast to x) high means low."""
        turned = np.zeros(x.value.shape, dtype=bool)
        if sign is not None:
            turned = np.broadcast_to(sign, x.value.shape) < 0
        return Activation(run(function, x.value), lambda p, negative: [(x, p, negative != bool(turned[p]))])

    def relu(self, x):
        return self.same(x, functional.relu)

    def norm(self, x, module):
        """Batch and group normalisation; the sign of the scale is that of each channel."""
        sign = array(module.weight).reshape(-1, *[1] * (x.value.ndim - 1))
        return self.same(x, module, sign)

    def layer_norm(self, x, module):
        return self.same(x, module, array(module.weight))

    def gate(self, x, gate):
        """Features `x` scaled by a gate (an array): the features are traced."""
        return Activation(x.value * gate, lambda p, negative: [(x, p, negative)])

    def plus(self, x, constant):
        return Activation(x.value + constant, lambda p, negative: [(x, p, negative)])

    def constant(self, value):
        return Activation(value)

    # Elements moved

    def move(self, x, function):
        """A NumPy function that moves elements; it is run on their numbers to see where each came from."""
        source = function(np.arange(1, x.value.size + 1).reshape(x.value.shape))

        def back(point, negative):
            number = int(source[point]) - 1
            if number < 0:  # filled in, comes from nowhere
                return []
            return [(x, tuple(map(int, np.unravel_index(number, x.value.shape))), negative)]

        return Activation(function(x.value), back)

    def flatten(self, x):
        return self.move(x, np.ravel)

    def interpolate(self, x, size, mode):
        """The source that lies nearest, which has the largest share."""

        def back(point, negative):
            at = [math.floor((p + 0.5) * n / s) for p, n, s in zip(point[1:], x.value.shape[1:], size, strict=True)]
            return [(x, (point[0], *at), negative)]

        return Activation(run(functional.interpolate, x.value, size=size, mode=mode), back)

    # Section III-D

    def gates(self, m, x, w_ih, w_hh, value):
        """m_t `value`: all gates of a unit as fully connected layers onto m_{t-1} and onto what the unit reads."""
        w_ih, w_hh = array(w_ih), array(w_hh)
        hidden = len(value)

        def back(point, negative):
            reached = []
            for read, weight in ((m, w_hh), (x, w_ih)):
                for gate in range(4):
                    for j in range(len(read.value)):
                        contribution = weight[gate * hidden + point[0], j] * read.value[j]
                        if contribution < 0 if negative else contribution > 0:
                            reached.append(self._on(read, (j,)))
            return reached

        return Activation(value, back)

    def lstm(self, sequence, w_ih, w_hh, b_ih, b_hh, m, backwards=False):
        """Activations m_t of one layer, from those it reads, one a step; `m` is the state before the first."""
        c, states = np.zeros(w_hh.shape[1]), []
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        for x in reversed(sequence) if backwards else sequence:
            z = array(w_ih) @ x.value + array(b_ih) + array(w_hh) @ m.value + array(b_hh)
            i, f, g, o = np.split(z, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            m = self.gates(m, x, w_ih, w_hh, sigmoid(o) * np.tanh(c))
            states.append(m)
        return states[::-1] if backwards else states

    # Attention (in no paper): the value token with the largest contribution

    def attention(self, q, k, v, mask=None):
        """Arrays q `[T, D]` and k `[S, D]`, activation v `[S, D]`."""
        scores = q @ k.T / math.sqrt(q.shape[1])
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)

        def back(point, negative):
            t, d = point
            contributions = [weights[t, s] * v.value[s, d] for s in range(len(v.value))]
            return [(v, (first_largest(contributions, negative), d), negative)]

        return Activation(weights @ v.value, back)


# Post-processing on the image


def keep_supported(points, size, radius, share):
    """Section IV-A: points (a list, with its duplicates) with more than `share` of all within `radius` diagonals."""
    reach = radius * math.hypot(*size)
    return [p for p in points if sum(math.dist(p, q) < reach for q in points) > share * len(points)]


def density(points, size, sigma):
    """A Gaussian of unit height at every point; sigma in pixels."""
    heat = np.zeros(size)
    for y, x in points:
        for row in range(size[0]):
            for column in range(size[1]):
                heat[row, column] += math.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * sigma**2))
    return heat
