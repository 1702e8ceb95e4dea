"""CLEAR (Kumar, Wong and Taylor, 2017)."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import metrics, render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import CLEAR
from pyfast_xai.explainers.clear import ClassExplanation
from pyfast_xai.images import Preprocess, load_image
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome

# The appendix, Tables 2 to 4: filters of the convolutions between max-pools, 3 x 3 unless a side is given.
MNIST = ((32, 32, 32, 32), (64, (1, 10)))
SVHN = ((32, 32, 32), (64, 64, 64), (128, (1, 128), (1, 10)))
DOGS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512), (512, (1, 512), (1, 10)))

# Table 1, accuracy in percent: whole image, strong features only, all but these.
TABLE_1 = {"mnist": (99.26, 79.89, 43.45), "svhn": (92.60, 69.12, 54.46)}
HELD_OUT = 2000
Stages = Sequence[Sequence[int | tuple[int, int]]]
Pictures = tuple[Tensor, Tensor]
"""Images `[N, C, H, W]` in 0..1, and their classes, int64 `[N]`."""


def all_convolutional(stages: Stages, channels: int) -> nn.Sequential:
    """Builds a network of the paper's appendix: its last convolution has a filter a class, whose means are the outputs.

    Args:
        stages: filters of the convolutions between max-pools; a pair gives the side of the kernel first.
        channels: number of channels of the images.
    """
    layers: list[nn.Module] = []
    for number, stage in enumerate(stages):
        if number:
            layers.append(nn.MaxPool2d(2))
        for entry in stage:
            side, filters = entry if isinstance(entry, tuple) else (3, entry)
            layers += [nn.Conv2d(channels, filters, side, padding=side // 2), nn.ReLU()]
            channels = filters
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            # The default shrinks the signal layer by layer, and the first epoch goes into growing it again.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    # "Linearly connected to the softmax": no rectifier after the last.
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(model: nn.Sequential, images: Tensor, labels: Tensor, epochs: int, data: Data) -> nn.Sequential:
    """Trains with AdamW and a one-cycle rate; images are shifted by up to two pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        model.train().to(data.device)
        batches = len(labels) // 64
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
        padded = functional.pad(images, (2, 2, 2, 2)).contiguous(memory_format=torch.channels_last)
        height, width = images.shape[2:]
        for step in range(epochs * batches):
            if step % batches == 0:
                order = torch.randperm(len(labels))
            chosen = order[64 * (step % batches) :][:64]
            down, right = torch.randint(0, 5, (2,)).tolist()
            batch = padded[chosen, :, down : down + height, right : right + width].to(data.device)
            optimizer.zero_grad()
            functional.cross_entropy(model(batch), labels[chosen].to(data.device)).backward()
            optimizer.step()
            schedule.step()
            data.advance(f"training, epoch {step // batches + 1} of {epochs}", 64)
    return model.eval()


def _idx(folder: Path, name: str) -> Tensor:
    """Returns one of MNIST's files, whose header ends with its shape in big-endian integers."""
    import numpy as np

    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise InputError(f"data must hold MNIST's {name}, got {str(folder)!r} without it")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def _mnist(data: Data) -> tuple[Pictures, Pictures, list[str]]:
    """Returns the digits to train on, those held out, and the deviations from the paper."""
    import numpy as np

    folder = data.root / "mnist"
    if folder.is_dir():
        files = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
        fit, held = ((_idx(folder, x)[:, None] / 255, _idx(folder, y).long()) for x, y in files)
        return fit, held, []
    small = data.root / "small" / "mnist_test.npz"
    path = small if small.is_file() else data.folder_of("mnist.npz", "MNIST, as a folder mnist of its four files or")
    with np.load(path) as arrays:
        images, digits = torch.from_numpy(arrays["x"])[:, None] / 255, torch.from_numpy(arrays["y"]).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    first, last = order[:-HELD_OUT], order[-HELD_OUT:]
    notes = [f"Trained on {len(first)} digits of {path.name}; the {HELD_OUT} held out are measured."]
    return (images[first], digits[first]), (images[last], digits[last]), notes


def _svhn(data: Data) -> tuple[Pictures, Pictures, list[str]]:
    from scipy.io import loadmat

    parts = []
    for name in ("svhn/train_32x32.mat", "svhn/test_32x32.mat"):
        arrays = loadmat(data.folder_of(name, "SVHN's cropped digits"))
        images = torch.from_numpy(arrays["X"]).permute(3, 2, 0, 1).float() / 255
        # A zero is called ten there.
        parts.append((images, torch.from_numpy(arrays["y"]).long().flatten() % 10))
    return parts[0], parts[1], []


def _dogs(data: Data) -> tuple[Pictures, Pictures, list[str]]:
    """Returns the first ten breeds, by their lists."""
    from scipy.io import loadmat

    preprocess = Preprocess(size=128, crop="squash", mean=(0, 0, 0), std=(1, 1, 1))
    parts = []
    for name in ("train_list.mat", "test_list.mat"):
        lists = loadmat(data.folder_of(f"StanfordDogs/{name}", "Stanford Dogs"))
        files = [str(entry[0][0]) for entry in lists["file_list"]]
        labels = torch.from_numpy(lists["labels"]).long().flatten() - 1
        chosen = (labels < 10).nonzero().flatten().tolist()
        images = []
        for row in chosen:
            images.append(preprocess(load_image(data.root / "StanfordDogs" / "Images" / files[row]))[0])
            data.advance(f"reading {name}", 1)
        parts.append((torch.stack(images), labels[chosen]))
    return parts[0], parts[1], ["Images are squashed to 128 x 128; the paper does not say their size."]


def _table(name: str, network: nn.Sequential, held: Pictures, fill: float, data: Data) -> list[list[str]]:
    images, labels = held[0][: data.count], held[1][: data.count]
    paper = TABLE_1[name]
    rows = [["paper", "-", "-", *(f"{figure:.2f}" for figure in paper)]]
    for variant in ("linear", "deconvnet", "guided"):
        explain = CLEAR(network, candidates=None, variant=variant)
        every = []
        for part in images.split(100):
            every.append(explain.responses(part.to(data.device), range(10)).cpu())
            data.advance(f"{name}, {variant}", len(part))
        responses = torch.cat(every)[torch.arange(len(labels)), labels]
        for threshold in (0.1, 0.2, 0.3):
            for dilation in (0, 1):
                correct = metrics.strong_features(
                    network, images.to(data.device), responses.to(data.device), labels,
                    threshold=threshold, dilation=dilation, fill=fill,
                )  # fmt: skip
                shares = [f"{100 * float(part.float().mean()):.2f}" for part in correct]
                rows.append([variant, f"{threshold:.1f}", str(dilation), *shares])
    return rows


HEADS = ("variant", "threshold", "dilation", "whole image", "strong features only", "without them")
OPEN = "The paper does not say which response is strong, nor how far around it pixels are taken: six choices are shown."


def table_1_mnist(data: Data) -> Outcome:
    """Measures Table 1 on MNIST; trains the network of the appendix first, a few minutes on a CPU."""
    return _table_1("mnist", _mnist(data), MNIST, epochs=8, fill=0.0, data=data)


def table_1_svhn(data: Data) -> Outcome:
    """Measures Table 1 on SVHN; trains the network of the appendix first, hours on a CPU."""
    return _table_1("svhn", _svhn(data), SVHN, epochs=20, fill=0.5, data=data)


def _table_1(
    name: str, read: tuple[Pictures, Pictures, list[str]], stages: Stages, epochs: int, fill: float, data: Data
) -> Outcome:
    fit, held, deviations = read
    model = train(all_convolutional(stages, fit[0].shape[1]), *fit, epochs, data)
    rows = _table(name, model, held, fill, data)
    title = f"CLEAR, Table 1, {name.upper()}: accuracy, percent"
    return Outcome(title, HEADS, rows, [*deviations, OPEN], {"maps": _sheet(model, held, data)})


def dogs(data: Data) -> Outcome:
    """Measures section 4.1 on Stanford Dogs; trains the network of the appendix first, many hours on a CPU."""
    fit, held, deviations = _dogs(data)
    model = train(all_convolutional(DOGS, 3), *fit, 30, data)
    right = []
    for part, labels in zip(held[0].split(data.batch_size), held[1].split(data.batch_size), strict=True):
        with torch.no_grad():
            right.append(model(part.to(data.device)).argmax(1).cpu() == labels)
    share = f"{100 * float(torch.cat(right).float().mean()):.2f}"
    title = "CLEAR, section 4.1, ten breeds of Stanford Dogs: accuracy, percent"
    sheet = _sheet(model, held, data)
    return Outcome(title, ["paper", "whole image"], [["58.74", share]], deviations, {"maps": sheet})


def _sheet(model: nn.Module, held: Pictures, data: Data) -> Any:
    """Draws Figs. 3 and 4: images, binary heat maps and CLEAR maps."""
    images, labels = (tensor[:10].to(data.device) for tensor in held)
    explanation = CLEAR(model, candidates=None)(images, labels)
    assert isinstance(explanation, ClassExplanation)
    rows = [list(render.for_display(images)), list(explanation.binary()), list(explanation.overlay())]
    return render.montage(rows, labels=["image", "for its class and against", "dominant class"])


def maps(data: Data) -> Outcome:
    """Draws Figs. 3 to 6: CLEAR maps of photographs."""
    pictures = data.at_most(6).imagenet()
    shown = {}
    for loaded in data.networks(("vgg16",)):
        images = data.inputs(pictures, loaded.preprocess)
        explanation = CLEAR(loaded.model)(images)
        assert isinstance(explanation, ClassExplanation)
        ground = data.shown(pictures, loaded.preprocess)
        rows = [list(ground), list(explanation.binary()), list(explanation.overlay(ground))]
        labels = ["image", "for its class and against", "dominant class"]
        shown[loaded.name] = render.montage(rows, labels=labels, legends=[[], [], explanation.legends()])
    deviations = ["The paper shows ten classes of Stanford Dogs, by a network trained for these; here are ImageNet's."]
    return Outcome("CLEAR: which class every pixel speaks for", [], [], deviations, shown)


EXPERIMENTS: dict[str, Experiment] = {
    "table-1-mnist": table_1_mnist,
    "table-1-svhn": table_1_svhn,
    "dogs": dogs,
    "maps": maps,
}
