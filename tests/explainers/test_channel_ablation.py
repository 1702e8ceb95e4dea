"""What a network answers without a channel, by algebra and by replays, beside the network itself in float64."""

import pytest
import torch
from ablation_networks import Average, Flattened, Padded, Shifted, Skip
from torch.nn import functional

from pyfast_xai.explainers.common.channel_ablation import linear_front, without_channels
from pyfast_xai.tape import record
from pyfast_xai.tape.suffix import KeepSuffix

DOUBLE = torch.float64


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
