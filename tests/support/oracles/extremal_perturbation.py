"""Extremal perturbation as TorchRay does it, one image at a time, with autograd, in float64."""

import math

import torch


def smooth(image, sigma):
    """A Gaussian of four deviations along both sides, with zeros around the image `[C, H, W]`."""
    if sigma == 0:
        return image
    for dim in (1, 2):
        side, reach = image.shape[dim], math.ceil(4 * sigma)
        weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)]
        matrix = torch.zeros(side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(max(0, i - reach), min(side, i + reach + 1)):
                matrix[i, j] = weights[j - i + reach] / sum(weights)
        image = torch.tensordot(image, matrix, ([dim], [1])).movedim(-1, dim)
    return image


def mask_of(grid, size, step, sigma):
    """The mask and the mask with its margins: a loop over the bells that reach each cell."""
    padding, radius = 1 + math.ceil(2 * sigma / step), 1 + math.ceil(sigma / step)
    out = [step * (math.ceil(side / step) + 2 * padding - 2 * radius - 1) + 1 for side in size]
    y, x = torch.meshgrid(*(torch.arange(side) for side in out), indexing="ij")
    values = []
    for ky in range(2 * radius + 1):
        for kx in range(2 * radius + 1):
            i, j = y // step + ky - padding, x // step + kx - padding
            inside = (i >= 0) & (i < grid.shape[0]) & (j >= 0) & (j < grid.shape[1])
            value = grid[i.clamp(0, grid.shape[0] - 1), j.clamp(0, grid.shape[1] - 1)] * inside
            far = ((y - sigma - step * i) ** 2 + (x - sigma - step * j) ** 2).double().sqrt() / sigma
            values.append(value * torch.exp(-2 * (far - 0.5).clamp(min=0) ** 2))
    values = torch.stack(values)
    whole = (values * torch.softmax(20 * values, 0)).sum(0).clamp(0, 1)
    margin = round(sigma)
    return whole[margin : margin + size[0], margin : margin + size[1]], whole


def between(pyramid, mask):
    """The level of each pixel, interpolated."""
    place = mask * (len(pyramid) - 1)
    level = place.detach().floor().long()
    part = place - level
    shown = torch.zeros_like(pyramid[0])
    for k in range(len(pyramid)):
        following = pyramid[min(k + 1, len(pyramid) - 1)]
        shown = shown + (level == k) * ((1 - part) * pyramid[k] + part * following)
    return shown


def optimise(model, image, target, area, iterations, step, sigma, blur, levels, deletes, flip=True, lr=0.01):
    """The region of the last iteration."""
    size = image.shape[1:]
    pyramid = [smooth(image, (1 - i / (levels - 1)) * blur) for i in range(levels)]
    grid = torch.ones(*(math.ceil(side / step) for side in size), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.SGD([grid], lr=lr, momentum=0.9, dampening=0.9)
    weight = 300
    for t in range(iterations):
        mask, whole = mask_of(grid, size, step, sigma)
        shown = between(pyramid, 1 - mask if deletes else mask)
        score = model((shown.flip(2) if flip and t % 2 == 0 else shown)[None])[0, target]
        wanted = torch.ones(whole.numel(), dtype=torch.float64)
        wanted[: int(whole.numel() * (1 - area))] = 0
        energy = (-score if deletes else score) - weight * ((whole.flatten().sort()[0] - wanted) ** 2).mean()
        descent.zero_grad()
        (-energy).backward()
        descent.step()
        grid.data = grid.data.clamp(0, 1)
        weight *= 1.0035
    return mask.detach()
