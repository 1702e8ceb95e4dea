"""Trains the all-convolutional network of CLEAR's appendix on MNIST: ``python examples/train_mnist_fcn.py``.

Reads an ``.npz`` with arrays ``x`` uint8 ``[N, 28, 28]`` and ``y`` ``[N]``. The last 2000 of them, in the order of a
fixed shuffle, are held out; ``split`` gives both parts.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 2000


def network() -> nn.Sequential:
    """Table 2 of the paper: four convolutions of 32 filters, a pool, one of 64, one of 10, and their average."""
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(4):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        channels = 32
    layers += [nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 10, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def split(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``[N, 1, 28, 28]`` in 0..1 with their digits: those to train on, and those held out."""
    with np.load(path) as arrays:
        images, digits = torch.from_numpy(arrays["x"])[:, None] / 255, torch.from_numpy(arrays["y"]).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    fit, held = order[:-HELD_OUT], order[-HELD_OUT:]
    return (images[fit], digits[fit]), (images[held], digits[held])


def train(images: Tensor, digits: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """Trains from scratch with AdamW and a one-cycle rate; digits are shifted by up to two pixels."""
    torch.manual_seed(seed)
    model = network().train().to(memory_format=torch.channels_last)
    steps = epochs * (len(digits) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    padded = functional.pad(images, (2, 2, 2, 2))
    for step in track(range(steps), "training"):
        if step % (len(digits) // 64) == 0:
            order = torch.randperm(len(digits))
        chosen = order[torch.arange(64) + 64 * (step % (len(digits) // 64))]
        down, right = torch.randint(0, 5, (2,)).tolist()
        batch = padded[chosen, :, down : down + 28, right : right + 28]
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), digits[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="an .npz with x and y")
    parser.add_argument("--out", type=Path, default=Path("mnist_fcn.safetensors"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    (images, digits), (held, labels) = split(given.data)
    began = time.perf_counter()
    model = train(images, digits, given.epochs, given.seed)
    with torch.inference_mode():
        share = (model(held).argmax(1) == labels).float().mean()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, given.out)
    print(f"{share:.2%} of {len(labels)} held-out digits, {time.perf_counter() - began:.0f} s. Weights: {given.out}")


if __name__ == "__main__":
    main()
