"""What a network answers without a channel, by algebra and by replays, beside the network itself in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai.explainers.common.channel_ablation import linear_front, without_channels
from pyfast_xai.tape import record
from pyfast_xai.tape.suffix import KeepSuffix

DOUBLE = torch.float64


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.layer = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)

    def forward(self, x):
        x = functional.relu(self.conv1(x))
        return self.above(self.layer(x), x)


class Average(Stem):
    """Nothing but an average and a linear layer follows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def above(self, x, below):
        return self.fc(functional.adaptive_avg_pool2d(functional.relu(x), 1).flatten(1))


class Flattened(Stem):
    """A linear layer reads the flattened map, and more layers follow."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6 * 6, 7), nn.Linear(7, 5)

    def above(self, x, below):
        x = functional.max_pool2d(functional.relu(x), 2, ceil_mode=True)[:, :, :2]
        x = functional.adaptive_avg_pool2d(x, (3, 2)).flatten(1)
        return self.fc2(functional.relu_(self.fc1(x)))


class Skip(Stem):
    """A value from below the layer joins above it."""

    def __init__(self):
        super().__init__()
        self.up, self.last = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def above(self, x, below):
        x = functional.interpolate(functional.silu(self.up(x)), below.shape[2:], mode="nearest")
        return self.last(functional.relu_(x.add_(below))).mean((2, 3))


class Shifted(Stem):
    """Zeros do not stay zeros on the way to the linear layer."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.bn.running_mean.normal_()

    def above(self, x, below):
        return self.fc(functional.relu(self.bn(x)).mean((2, 3)))


class Padded(Stem):
    """The borders of an average count zeros, which mixes the numbers of channels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6 * 12, 5)

    def above(self, x, below):
        return self.fc(functional.avg_pool2d(x, 3, 1, 1).flatten(1))


KINDS = {kind.__name__.lower(): kind for kind in (Average, Flattened, Skip, Shifted, Padded)}


@pytest.fixture(params=KINDS)
def net(request):
    torch.manual_seed(0)
    return KINDS[request.param]().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def loop(net, images):
    """`[C, N, classes]`, a channel after the other."""
    with torch.no_grad():
        below = functional.relu(net.conv1(images))
        activation = net.layer(below)
        answers = []
        for k in range(6):
            without = activation.clone()
            without[:, k] = 0
            answers.append(net.above(without, below.clone()))
    return torch.stack(answers)


@pytest.mark.parametrize("copies", [1, 2, 4, 7])
def test_answers_are_those_of_the_network(net, images, copies):
    tape = record(net, images.repeat(copies, 1, 1, 1), policy=KeepSuffix("layer.conv2d"))
    value = tape.find("layer")
    results = list(without_channels(tape, value, 1, len(images), linear_front(tape, value, 1)))
    assert torch.cat([channels for channels, _ in results]).tolist() == list(range(6))
    answers = torch.cat([result.view(-1, len(images), 5) for _, result in results])
    torch.testing.assert_close(answers, loop(net, images), rtol=1e-10, atol=1e-12)


FRONTS = {"average": True, "flattened": True, "skip": False, "shifted": False, "padded": False}


@pytest.mark.parametrize("name", FRONTS)
def test_a_linear_layer_is_found_where_channels_stay_apart(name, images):
    torch.manual_seed(0)
    net = KINDS[name]().to(DOUBLE).eval()
    tape = record(net, images, policy=KeepSuffix("layer.conv2d"))
    assert (linear_front(tape, tape.find("layer"), 1) is not None) == FRONTS[name]


def test_behind_an_average_nothing_is_replayed(images):
    net = Average().to(DOUBLE).eval()
    tape = record(net, images, policy=KeepSuffix("layer.conv2d"))
    value = tape.find("layer")
    ((channels, answers),) = without_channels(tape, value, 1, len(images), linear_front(tape, value, 1))
    assert channels.tolist() == list(range(6))
    assert answers.shape == (18, 5)
