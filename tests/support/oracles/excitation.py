"""Excitation backprop as the paper writes it (Zhang et al., 2016): one image, one neuron at a time, in float64."""

import numpy as np


def convolve(x, weight, bias, stride, padding):
    """`[C, H, W]` by `[O, C, k, k]`."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    k = weight.shape[2]
    height, width = ((n - k) // stride + 1 for n in x.shape[1:])
    out = np.zeros((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = (weight * window).sum((1, 2, 3)) + bias
    return out


def convolution(p, x, weight, stride, padding):
    """The probability of `[O, h, w]` neurons, handed to their inputs `[C, H, W]`."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    shares, k = np.zeros_like(padded), weight.shape[2]
    for o in range(p.shape[0]):
        for i in range(p.shape[1]):
            for j in range(p.shape[2]):
                at = np.s_[:, i * stride : i * stride + k, j * stride : j * stride + k]
                excites = np.maximum(weight[o], 0) * np.maximum(padded[at], 0)
                if excites.sum() > 0:
                    shares[at] += p[o, i, j] * excites / excites.sum()
    return shares[:, padding : shares.shape[1] - padding, padding : shares.shape[2] - padding]


def linear(p, x, weight):
    """The probability of `[O]` neurons, handed to their inputs `[C]`."""
    shares = np.zeros_like(x)
    for o in range(len(p)):
        excites = np.maximum(weight[o], 0) * np.maximum(x, 0)
        if excites.sum() > 0:
            shares += p[o] * excites / excites.sum()
    return shares


def max_pool(p, x, side):
    """The probability of windows, handed to their winners."""
    shares = np.zeros_like(x)
    for c in range(p.shape[0]):
        for i in range(p.shape[1]):
            for j in range(p.shape[2]):
                window = x[c, i * side : (i + 1) * side, j * side : (j + 1) * side]
                y, z = np.unravel_index(window.argmax(), window.shape)
                shares[c, i * side + y, j * side + z] += p[c, i, j]
    return shares


def average(p, x):
    """The probability of averages `[C]` over all positions, handed to these by their activations."""
    shares = np.zeros_like(x)
    for c in range(len(p)):
        excites = np.maximum(x[c], 0)
        if excites.sum() > 0:
            shares[c] = p[c] * excites / excites.sum()
    return shares


def add(p, one, other):
    """The probability of sums, handed to both terms by what is positive of them."""
    one, other = np.maximum(one, 0), np.maximum(other, 0)
    total = np.where(one + other > 0, one + other, 1)
    return p * one / total, p * other / total
