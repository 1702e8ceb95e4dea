"""Rows of a batch that go through a forward on their own are told from rows that depend on each other."""

import pytest
import torch
from torch import nn

from pyfast_xai.acceleration.row_independence import rows_are_independent
from pyfast_xai.tape import record

IMAGES = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
EACH = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def network():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(24, 5), nn.Softmax(1))
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2), head).eval()


APART = {
    "add a constant map": lambda x: x + EACH[:1],
    "view": lambda x: x.view(3, 4, 64).transpose(1, 2).mean((1, 2)),
    "join channels": lambda x: torch.cat([x, x.relu()], 1),
    "shuffle channels": lambda x: x.view(3, 2, 2, 8, 8).transpose(1, 2).reshape(3, 4, 8, 8),
    "halves": lambda x: torch.add(*x.chunk(2, 1)),
    "norm": lambda x: nn.functional.layer_norm(x, [8, 8]),
}
TOGETHER = {
    "mean of the batch": lambda x: x - x.mean(0, keepdim=True),
    "mean of all": lambda x: x / x.mean(),
    "largest of all": lambda x: x / x.amax((0, 1, 2, 3), keepdim=True),
    "softmax over the batch": lambda x: x.softmax(0),
    "a constant of each row": lambda x: x + EACH,
    "an order of rows": lambda x: x.flip(0),
    "rolled rows": lambda x: x.roll(1, 0),
    "rows as channels": lambda x: x.transpose(0, 1),
    "one matrix": lambda x: x.view(12, 64).mean(1),
    "rows as a map": lambda x: nn.functional.max_pool2d(x.view(3, 32, 8), 3, 1, 1),
    "batch norm in training": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "the first row alone": lambda x: x[:1],
    "rows sorted": lambda x: x.sort(0).values,
    "written rows": lambda x: x.clone().index_fill_(0, torch.tensor([0]), 1.0),
}


def test_rows_of_a_network_are_independent():
    with torch.no_grad():
        assert rows_are_independent(record(network(), IMAGES))


@pytest.mark.parametrize("name", APART)
def test_independent_rows(name):
    assert rows_are_independent(record(Function(APART[name]), IMAGES))


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_depend_on_each_other_or_on_their_place(name):
    assert not rows_are_independent(record(Function(TOGETHER[name]), IMAGES))
