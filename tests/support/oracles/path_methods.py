"""Blur IG (Xu et al., 2020) and guided IG (Kapishnikov et al., 2021): one image, one target, one place at a time."""

import math

import numpy as np
import torch
from scipy import ndimage


def gradient_of(model, target):
    """Returns a function that gives the gradient of a class at an array `[C, H, W]`, by autograd."""

    def gradient(array):
        leaf = torch.from_numpy(np.array(array))[None].requires_grad_()
        return torch.autograd.grad(model(leaf)[0, target], leaf)[0][0].numpy()

    return gradient


def blurred(image, sigma):
    """Returns `[C, H, W]` blurred by SciPy, with zeros beyond the edges."""
    return ndimage.gaussian_filter(image, (0, sigma, sigma), mode="constant")


def blur_ig(gradient, image, n_steps, max_sigma):
    """The integral over the scales, by the midpoint of each step."""
    total, width = np.zeros_like(image), max_sigma / n_steps
    for step in range(n_steps):
        difference = blurred(image, step * width) - blurred(image, (step + 1) * width)
        total += gradient(blurred(image, (step + 0.5) * width)) * difference
    return total


def guided_ig(gradient, image, baseline, n_steps, fraction, max_distance):
    """Algorithm 1 of the paper, with its band of anchors; every pixel in a loop."""
    start, end = baseline.ravel(), image.ravel()
    place, total = start.copy(), np.zeros(start.size)
    length = sum(abs(b - a) for a, b in zip(start, end, strict=True))
    for step in range(1, n_steps + 1):
        here = gradient(place.reshape(image.shape)).ravel()
        low, high = max(step / n_steps - max_distance, 0), min(step / n_steps + max_distance, 1)
        expected = length * (1 - step / n_steps)
        before = place.copy()
        for i in range(start.size):
            edge = start[i] + low * (end[i] - start[i])
            if abs(end[i] - place[i]) > abs(end[i] - edge):
                place[i] = edge
        while True:
            left = sum(abs(end[i] - place[i]) for i in range(start.size))
            if math.isclose(left, expected, rel_tol=1e-9, abs_tol=1e-9):
                break
            edges = start + high * (end - start)
            size = [math.inf if place[i] == edges[i] else abs(here[i]) for i in range(start.size)]
            threshold = sorted(size)[int(fraction * (start.size - 1))]
            chosen = [i for i in range(start.size) if size[i] <= threshold and size[i] < math.inf]
            reach = sum(abs(edges[i] - place[i]) for i in chosen)
            if left - expected <= reach:
                for i in chosen:
                    place[i] += (left - expected) / reach * (edges[i] - place[i])
                break
            for i in chosen:
                place[i] = edges[i]
        total += (place - before) * here
    return total.reshape(image.shape)
