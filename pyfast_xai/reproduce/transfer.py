"""Networks that are taught other classes: a new last layer on the features of a trained one."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.errors import InputError


def last_features(model: nn.Module, images: Tensor) -> tuple[Tensor, str]:
    """Returns what the last layer of a network reads, averaged over positions, `[N, D]`, and the layer's name.

    Args:
        model: in evaluation mode; its outputs are those of a linear layer or a 1 x 1 convolution.
        images: `[N, C, H, W]`.

    Raises:
        InputError: the outputs are not those of such a layer.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    read: list[Tensor] = []
    outputs: list[Tensor] = []
    if layers:
        name, layer = layers[-1]
        handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
        try:
            with torch.no_grad():
                outputs = [model(part) for part in images.split(16)]
        finally:
            handle.remove()
        features = torch.cat(read)
        features = features.flatten(2).mean(2) if features.dim() == 4 else features
        scores = functional.linear(features, layer.weight.detach().flatten(1), layer.bias)
        if scores.shape == torch.cat(outputs).shape and torch.allclose(
            scores, torch.cat(outputs), rtol=1e-3, atol=1e-3
        ):
            return features, name
    raise InputError(
        f"model must return the scores of a linear layer or a 1 x 1 convolution as they are, got {type(model).__name__}"
    )


def with_classes(model: nn.Module, name: str, features: Tensor, present: Tensor, penalty: float = 1e-3) -> nn.Module:
    """Returns a copy of a network whose last layer scores new classes, independent of each other.

    The layer is a logistic regression on the features, all else stays as it was trained.

    Args:
        model: in evaluation mode.
        name: name of its last layer.
        features: what that layer reads on the pictures to learn from, `[N, D]`.
        present: whether each class is in each picture, bool `[N, K]`.
        penalty: weight of the squared length of the weights, for features whose mean length is one.
    """
    length = features.norm(dim=1).mean()
    scaled, labels = (features / length).double(), present.double()
    with torch.enable_grad():
        weight = scaled.new_zeros(present.shape[1], features.shape[1], requires_grad=True)
        bias = scaled.new_zeros(present.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = functional.linear(scaled, weight, bias)
            total = functional.binary_cross_entropy_with_logits(logits, labels) + penalty * weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
    changed = copy.deepcopy(model)
    before = changed.get_submodule(name)
    kernel = (1,) if isinstance(before, nn.Conv2d) else ()
    # Nothing is drawn: the weights are known.
    layer = nn.utils.skip_init(type(before), features.shape[1], len(bias), *kernel).to(features)
    with torch.no_grad():
        layer.weight.copy_((weight / length).view_as(layer.weight))
        layer.bias.copy_(bias)
    parent, _, attribute = name.rpartition(".")
    setattr(changed.get_submodule(parent), attribute, layer)
    return changed.eval()
