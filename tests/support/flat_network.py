"""A network of images `[N, 3, 16, 12]` and five classes whose head averages nothing, and gradients at its layers."""

import torch
from torch import nn


class Flat(nn.Module):
    """No average follows the layers, so that gradients differ from position to position."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 4, 3, 1, 1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(4 * 12, 5)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(self.relu3(self.conv3(x)).flatten(1))


def layer_gradients(model, layer, images, score):
    """Returns the activation of a layer and the gradient of `score(output)`, by autograd."""
    saved = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: saved.append(output))
    with torch.enable_grad():
        grad = torch.autograd.grad(score(model(images.clone().requires_grad_())).sum(), saved[0])[0]
    handle.remove()
    return saved[0].detach(), grad
