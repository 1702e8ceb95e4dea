"""CLEAR as the paper writes it (Kumar, Wong and Taylor, 2017, Eqs. 1 to 6): one class of one image at a time."""

import torch
from torch.nn import functional


def unpool(signal, x, kernel, nearest):
    """The inverse of a 2x2 max-pool of x: by switches, or spread over the window."""
    if nearest:
        return signal.repeat_interleave(kernel, 1).repeat_interleave(kernel, 2)
    out = torch.zeros_like(x)
    for c in range(x.shape[0]):
        for i in range(signal.shape[1]):
            for j in range(signal.shape[2]):
                window = x[c, i * kernel : (i + 1) * kernel, j * kernel : (j + 1) * kernel]
                at = int(window.flatten().argmax())
                out[c, i * kernel + at // kernel, j * kernel + at % kernel] += signal[c, i, j]
    return out


def respond(layers, image, index, variant, nearest, take=lambda actual: actual):
    """R(x|c) of one class, `[C, H, W]`; `layers` are (name, weight, bias) up to the class maps.

    `take` is what is projected of the map of the class.
    """
    recorded, x = [], image
    for name, weight, bias in layers:
        recorded.append(x)
        if name == "conv":
            x = functional.conv2d(x[None], weight, bias, padding=weight.shape[-1] // 2)[0]
        elif name == "relu":
            x = x.clamp(min=0)
        else:
            x = functional.max_pool2d(x[None], 2)[0]
    signal = torch.zeros_like(x)
    signal[index] = take(x[index])
    for (name, weight, _), below in zip(reversed(layers), reversed(recorded), strict=True):
        if name == "conv":
            signal = functional.conv_transpose2d(signal[None], weight, padding=weight.shape[-1] // 2)[0]
        elif name == "pool":
            signal = unpool(signal, below, 2, nearest)
        elif variant != "linear":
            signal = signal.clamp(min=0)
            if variant == "guided":
                signal = signal * (below > 0)
    return signal
