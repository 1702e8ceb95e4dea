"""Replays around a changed box against the model itself, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai.acceleration.local_replay import Box, LocalReplay
from pyfast_xai.acceleration.packed_replay import NotReplayedError, PackedReplay
from pyfast_xai.tape import record

DOUBLE = torch.float64
SIZE = (40, 36)


class Residual(nn.Module):
    """A residual block with a stride, as ResNets have it, with rectifiers in place."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=2)
        self.beside = nn.Conv2d(channels, 8, 1, stride)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner = self.second(functional.relu_(self.norm(self.first(maps))))
        inner += self.beside(maps)
        return functional.relu_(inner)


class Dense(nn.Module):
    """A block that hands on its input beside its result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm2d(channels), nn.GELU(), nn.Conv2d(channels, 4, (3, 5), padding=(1, 2)))
        self.register_buffer("places", torch.randn(*SIZE))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([maps, self.inner(maps) * self.places + 0.5], 1)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)]


NETWORKS = {
    "residual": lambda: [nn.Conv2d(3, 6, 7, 2, 3), nn.ReLU(True), nn.MaxPool2d(3, 2, 1), Residual(6, 1), *head(8)],
    "strides": lambda: [Residual(3, 1), Residual(8, 2), nn.MaxPool2d(2), *head(8)],
    "dense": lambda: [Dense(3), nn.Hardtanh(-1, 1, inplace=True), Dense(7), nn.Conv2d(11, 8, 1), *head(8)],
}
BOXES = [Box(0, 6, 0, 6), Box(34, 40, 30, 36), Box(11, 12, 0, 1), Box(17, 25, 5, 9), Box(0, 3, 20, 36)]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*NETWORKS[name]()).to(DOUBLE).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 1e-5)], ids=["double", "single"])
@torch.no_grad()
def test_outputs_are_those_of_the_model(name, channels_last, dtype, tolerance):
    model, images = network(name).to(dtype), torch.randn(3, 3, *SIZE, dtype=dtype)
    laid_out = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    replay = LocalReplay(record(model, laid_out), laid_out, BOXES * 8)
    whole = PackedReplay(record(model, laid_out), laid_out)
    untouched = model(images)
    for box in BOXES:
        changed = images.clone()
        box.of(changed).normal_()
        expected = model(changed)
        allowed = tolerance * float(expected.abs().max())
        assert (expected - untouched).abs().max() > 10 * allowed, "the box must matter"
        torch.testing.assert_close(replay(box, changed), expected, rtol=0, atol=allowed)
        torch.testing.assert_close(whole(changed), expected, rtol=0, atol=allowed)
    assert torch.equal(model(images), untouched)


@torch.no_grad()
def test_maps_are_cut_where_that_spares_most():
    """Around a small box little of the first layers runs; the head runs as a whole."""
    images = torch.randn(1, 3, *SIZE, dtype=DOUBLE)
    replay = LocalReplay(record(network("residual"), images), images, [Box(0, 6, 0, 6)] * 8)
    (plan,) = replay._plans.values()
    assert 0.3 < plan.saved < 1
    assert plan.cut >= 3


class Decides(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3)) if images[0, 0, 0, 0] > 0 else images.amax((1, 2, 3))


REFUSED = {
    "decisions": (Decides, torch.randn(2, 3, 8, 8), "cannot be repeated"),
    "no images": (lambda: nn.Linear(4, 2), torch.randn(2, 4), "a batch of images"),
    "half precision": (lambda: nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8).bfloat16(), "a batch of images"),
    "whole maps": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.randn(2, 3, 8, 8), "unchanged"),
    "large boxes": (lambda: nn.Conv2d(3, 4, 7, padding=3), torch.randn(2, 3, 8, 8), "unchanged"),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_what_cannot_be_replayed_is_refused(case):
    make, images, reason = REFUSED[case]
    model = make().to(images.dtype)
    with pytest.raises(NotReplayedError, match=reason):
        LocalReplay(record(model, images), images, [Box(2, 6, 2, 6)] * 8)
