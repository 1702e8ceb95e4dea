"""Metrics as their papers write them, one image and one step at a time, in NumPy and float64."""

import itertools
import math

import numpy as np
import torch
from scipy.stats import pearsonr


def ask(model, image, target):
    """The output of the model for a class."""
    with torch.no_grad():
        return float(model(torch.from_numpy(image)[None])[0, target])


def gini(attribution):
    sizes = np.sort(np.abs(attribution).ravel())
    total = sum((2 * (i + 1) - len(sizes) - 1) * size for i, size in enumerate(sizes))
    return total / (len(sizes) * sizes.sum())


def entropy(attribution):
    shares = np.abs(attribution).ravel() / np.abs(attribution).sum()
    return -sum(share * math.log(share) for share in shares if share > 0)


def without(image, features, filler):
    """The image with some features, indices into its map (or into all of its numbers), replaced."""
    changed = image.copy()
    wide, other = changed.reshape(len(image), -1), np.broadcast_to(filler, image.shape).reshape(len(image), -1)
    for feature in features:
        wide[:, feature] = other[:, feature]
    return changed


def of_subsets(model, image, attribution, target, subsets, filler, measure=pearsonr):
    before, flat = ask(model, image, target), attribution.ravel()
    drops = [before - ask(model, without(image, subset, filler), target) for subset in subsets]
    return measure([flat[list(subset)].sum() for subset in subsets], drops)[0]


def grid_subsets(cells, shape, grid):
    """The pixels of subsets of the cells of a grid."""
    cell = [(y * grid // shape[0]) * grid + x * grid // shape[1] for y in range(shape[0]) for x in range(shape[1])]
    return [[pixel for pixel, item in enumerate(cell) if item in chosen] for chosen in cells]


def estimate(model, image, attribution, target, step, filler):
    order = np.argsort(-attribution.ravel(), kind="stable")
    groups = [order[i : i + step] for i in range(0, len(order), step)]
    return of_subsets(model, image, attribution, target, groups, filler)


def monotone_share(model, image, attribution, target, step, filler):
    """Features come back into the baseline, the least important first."""
    order = np.argsort(np.abs(attribution).ravel(), kind="stable")
    scores = [ask(model, without(image, order[i:], filler), target) for i in range(0, len(order), step)]
    scores.append(ask(model, image, target))
    return np.mean([after >= before for before, after in itertools.pairwise(scores)])


def patch_features(shape, patch):
    """The pixels of each patch of a grid in the middle of the image."""
    counts = [math.ceil(side / patch) for side in shape]
    pads = [(count * patch - side) // 2 for side, count in zip(shape, counts, strict=True)]
    result = [[] for _ in range(counts[0] * counts[1])]
    for y in range(shape[0]):
        for x in range(shape[1]):
            result[(y + pads[0]) // patch * counts[1] + (x + pads[1]) // patch].append(y * shape[1] + x)
    return result


def flipped(model, image, groups, order, target, filler):
    """Scores before and after each of the groups is removed for good."""
    scores, gone = [ask(model, image, target)], []
    for group in order:
        gone += list(groups[group])
        scores.append(ask(model, without(image, gone, filler), target))
    return np.array(scores)


def irof(model, image, attribution, target, segments, filler):
    groups = [np.flatnonzero(segments.ravel() == label) for label in range(segments.max() + 1)]
    groups = [group for group in groups if len(group)]
    means = [attribution.ravel()[group].mean() for group in groups]
    scores = flipped(model, image, groups, np.argsort(-np.array(means), kind="stable"), target, filler)
    ratio = scores / scores[0]
    return 1 - ((ratio[1:] + ratio[:-1]) / 2).mean()


def infidelity(model, image, attribution, target, changes, normalize):
    before = ask(model, image, target)
    message = np.array([(change * attribution).sum() for change in changes])
    done = np.array([before - ask(model, image - change, target) for change in changes])
    factor = (message * done).mean() / (message * message).mean() if normalize else 1.0
    return ((factor * message - done) ** 2).mean()


def unequal(model, image, attribution, target, groups, filler, threshold):
    before, flat = ask(model, image, target), np.abs(attribution).ravel()
    count = 0
    for group in groups:
        change = abs(ask(model, without(image, group, filler), target) - before)
        count += (change < threshold) != (flat[group].sum() < threshold)
    return count


def histogram_entropy(values, bins):
    counts = np.histogram(values, bins=bins)[0]
    shares = counts[counts > 0] / counts.sum()
    return -(shares * np.log(shares)).sum()
