"""Trains the all-convolutional network of CLEAR's appendix on MNIST: ``python examples/train_mnist_fcn.py DATA``.

DATA is a folder with MNIST's four IDX files, packed or not, or an ``.npz`` with arrays ``x`` uint8 ``[N, 28, 28]`` and
``y`` ``[N]``, of which the last 2000 of a fixed shuffle are held out.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 2000
Digits = tuple[Tensor, Tensor]
"""Images ``[N, 1, 28, 28]`` in 0..1 and what they show ``[N]``."""


def network() -> nn.Sequential:
    """Table 2 of the paper: four convolutions of 32 filters, a pool, one of 64, one of 10, and their average."""
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(4):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        channels = 32
    layers += [nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 10, 1)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            # The default shrinks the signal layer by layer, and the first epoch goes into growing it again.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def idx(folder: Path, name: str) -> Tensor:
    """One of MNIST's files, whose header ends with its shape in big-endian integers."""
    path = next(p for p in (folder / name, folder / f"{name}.gz") if p.exists())
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def split(path: Path) -> tuple[Digits, Digits]:
    """The digits to train on, and those held out."""
    if path.is_dir():
        parts = [(idx(path, f"{p}-images-idx3-ubyte"), idx(path, f"{p}-labels-idx1-ubyte")) for p in ("train", "t10k")]
        fit, held = ((images[:, None] / 255, digits.long()) for images, digits in parts)
        return fit, held
    with np.load(path) as arrays:
        images, digits = torch.from_numpy(arrays["x"])[:, None] / 255, torch.from_numpy(arrays["y"]).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    first, last = order[:-HELD_OUT], order[-HELD_OUT:]
    return (images[first], digits[first]), (images[last], digits[last])


def train(images: Tensor, digits: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """Trains from scratch with AdamW and a one-cycle rate; digits are shifted by up to two pixels."""
    torch.manual_seed(seed)
    model = network().train().to(memory_format=torch.channels_last)
    batches = len(digits) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    padded = functional.pad(images, (2, 2, 2, 2))
    for step in track(range(epochs * batches), "training"):
        if step % batches == 0:
            order = torch.randperm(len(digits))
        chosen = order[64 * (step % batches) :][:64]
        down, right = torch.randint(0, 5, (2,)).tolist()
        batch = padded[chosen, :, down : down + 28, right : right + 28]
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), digits[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder of IDX files, or an .npz with x and y")
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
