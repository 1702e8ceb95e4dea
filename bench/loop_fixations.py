"""CNN-Fixations point by point, as its public ports trace it: the loop that the compiled walk is compared with.

For torchvision's AlexNet and VGG: `features` (convolution, ReLU, max-pool), `avgpool` of its own size, `classifier`.
"""

import numpy as np
import torch
from torch import Tensor, nn


def read_layers(model: nn.Module, image: Tensor) -> dict[nn.Module, np.ndarray]:
    """What every layer read, without the batch; for the model itself what it returned."""
    read: dict[nn.Module, np.ndarray] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: read.__setitem__(module, args[0][0].clone().numpy()))
        for layer in [*model.features, *model.classifier]
    ]
    try:
        with torch.inference_mode():
            read[model] = model(image[None])[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _window(layer: nn.Module, size: tuple[int, int], y: int, x: int) -> tuple[int, int, int, int, int, int]:
    """Rows and columns of the input under an output position, and the first tap inside the kernel."""
    kernel, stride, padding = (v if isinstance(v, tuple) else (v, v) for v in _geometry(layer))
    top, left = y * stride[0] - padding[0], x * stride[1] - padding[1]
    rows = max(top, 0), min(top + kernel[0], size[0])
    columns = max(left, 0), min(left + kernel[1], size[1])
    return *rows, *columns, rows[0] - top, columns[0] - left


def _geometry(layer: nn.Module) -> tuple:
    return layer.kernel_size, layer.stride, layer.padding


def loop_fixations(model: nn.Module, image: Tensor) -> set[tuple[int, int]]:
    """Pixels (y, x) that the predicted class is traced to, by the default rules.

    Args:
        model: torchvision's AlexNet or VGG in evaluation mode.
        image: `[3, H, W]`.
    """
    read = read_layers(model, image)
    return trace_map(model, read, trace_classifier(model, read))


def trace_classifier(model: nn.Module, read: dict[nn.Module, np.ndarray]) -> set[tuple[int, int, int]]:
    """Points (c, y, x) of the last feature map that the predicted class is traced to."""
    neurons = {int(read[model].argmax())}
    linear = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    for layer in reversed(linear[1:]):
        weight = layer.weight.detach().numpy()
        neurons = {int(j) for k in neurons for j in np.nonzero(read[layer] * weight[k] > 0)[0]}
    weight = linear[0].weight.detach().numpy()
    flat = {int((read[linear[0]] * weight[k]).argmax()) for k in neurons}
    side = round((read[linear[0]].size / weight_channels(model)) ** 0.5)
    return {(j // side**2, j // side % side, j % side) for j in flat}


def trace_map(
    model: nn.Module, read: dict[nn.Module, np.ndarray], points: set[tuple[int, int, int]]
) -> set[tuple[int, int]]:
    """Pixels (y, x) that points (c, y, x) of the last feature map are traced to."""
    for layer in reversed(model.features):
        if isinstance(layer, nn.ReLU):
            continue
        below = read[layer]
        traced = set()
        for c, y, x in points:
            top, bottom, left, right, dy, dx = _window(layer, below.shape[1:], y, x)
            if isinstance(layer, nn.Conv2d):
                kernel = layer.weight.detach().numpy()[c, :, dy : dy + bottom - top, dx : dx + right - left]
                c = int((below[:, top:bottom, left:right] * kernel).sum((1, 2)).argmax())
            actual = below[c, top:bottom, left:right]
            row, column = np.unravel_index(actual.argmax(), actual.shape)
            traced.add((c, top + int(row), left + int(column)))
        points = traced
    return {(y, x) for _, y, x in points}


def weight_channels(model: nn.Module) -> int:
    """Channels of the last convolution."""
    return next(layer.out_channels for layer in reversed(model.features) if isinstance(layer, nn.Conv2d))
