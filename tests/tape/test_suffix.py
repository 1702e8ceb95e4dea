"""The suffix of a tape with other numbers in the place of a value, beside the model itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.tape import record
from pyfast_xai.tape.suffix import VALUE, KeepSuffix, replay_suffix, suffix_nodes


class Net(nn.Module):
    """A skip that joins from below, in-place operations, a view that is written to, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.above, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        skip = self.stem(x)
        return self.from_layer(self.layer(skip.relu()), skip)

    def from_layer(self, layer, skip):
        y = functional.relu_(self.above(layer))
        y = skip.add_(y)  # writes to what joins
        y[:, 0] *= 2
        y = torch.cat([y, layer], 1)
        return {"logits": self.fc(y.mean((2, 3))), "skip": skip * 1, "images": 3}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_model(net, rows):
    images = torch.randn(rows, 3, 8, 6)
    ahead = record(net, images)
    value = ahead.find("layer")
    name = ahead.producer(value).name
    tape = record(net, images, policy=KeepSuffix(name))
    maker = next(node for node in tape if node.name == name)
    with torch.no_grad():
        skip = net.stem(images)
        assert torch.equal(maker.saved[VALUE].tensor, net.layer(skip.relu()))
        for seed in range(3):
            other = torch.randn(rows, 4, 8, 6, generator=torch.Generator().manual_seed(seed))
            expected = net.from_layer(other.clone(), skip.clone())
            result = replay_suffix(tape, maker.outputs[0], other.clone())
            assert result["images"] == 3
            torch.testing.assert_close(result["logits"], expected["logits"])
            torch.testing.assert_close(result["skip"], expected["skip"])


def test_only_what_depends_is_run(net):
    tape = record(net, torch.randn(1, 3, 8, 6), policy=KeepSuffix("layer.conv2d"))
    names = [node.name for node in suffix_nodes(tape, tape.find("layer"))]
    assert "stem.conv2d" not in names
    assert "relu" not in names
    assert {"above.conv2d", "cat", "fc.linear"} <= set(names)


def test_gradients_pass(net):
    images = torch.randn(2, 3, 8, 6)
    tape = record(net, images, policy=KeepSuffix("layer.conv2d"))
    value = tape.find("layer")
    other = torch.randn(2, 4, 8, 6, requires_grad=True)
    with torch.enable_grad():
        result = replay_suffix(tape, value, other * 1)["logits"].sum()
        expected = net.from_layer(other * 1, net.stem(images).detach())["logits"].sum()
        torch.testing.assert_close(*(torch.autograd.grad(item, other)[0] for item in (result, expected)))


def test_the_input_itself_is_a_value(net):
    images, other = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 8, 6)
    tape = record(net, images, policy=KeepSuffix(""))
    with torch.no_grad():
        torch.testing.assert_close(replay_suffix(tape, tape.inputs[0], other)["logits"], net(other)["logits"])


class Draws(nn.Module):
    def forward(self, x):
        return functional.dropout(x * 2, 0.5, training=True).sum((1, 2, 3))


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        x = x * 2
        self.last.copy_(x.mean((0, 2, 3)))
        return x.sum((1, 2, 3))


class Decides(nn.Module):
    def forward(self, x):
        x = x * 2
        return x.sum((1, 2, 3)) if x.mean().item() > 0 else x.mean((1, 2, 3))


class HandsOut(nn.Module):
    def forward(self, x):
        x = x * 2
        return x.sum((1, 2, 3)) * float(x.detach().numpy().max())


REFUSED = [(Draws, "draws random numbers"), (Decides, "takes a decision"), (HandsOut, "hands data to other code")]


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_what_cannot_be_replayed_is_refused(kind, reason):
    model, images = kind().eval(), torch.randn(2, 3, 4, 4)
    tape = record(model, images, policy=KeepSuffix("mul"))
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=f"model must be replayable above the layer, got one in which .*{reason}"):
        replay_suffix(tape, tape.find("mul"), images)
    assert torch.equal(state, torch.get_rng_state())


class DrawsBelow(nn.Module):
    def forward(self, x):
        x = functional.dropout(x, 0.5, training=True) * 2
        return (x + torch.randn_like(x)).sum((1, 2, 3))


def test_what_was_drawn_elsewhere_stays_as_it_was():
    model, images = DrawsBelow().eval(), torch.randn(2, 3, 4, 4)
    tape = record(model, images, policy=KeepSuffix("mul"))
    value = tape.find("mul")
    recorded = tape.producer(value).saved[VALUE].tensor
    torch.testing.assert_close(replay_suffix(tape, value, recorded.clone()), tape.result)
    other = torch.randn(2, 3, 4, 4)
    expected = tape.result + (other - recorded).sum((1, 2, 3))
    torch.testing.assert_close(replay_suffix(tape, value, other), expected, rtol=1e-5, atol=1e-5)


def test_what_the_model_writes_to_is_left_alone():
    model, images = Writes().eval(), torch.randn(2, 3, 4, 4)
    tape = record(model, images, policy=KeepSuffix("mul"))
    other = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(replay_suffix(tape, tape.find("mul"), other), other.sum((1, 2, 3)))
    assert not model.last.any()


def test_a_replacement_must_fit(net):
    tape = record(net, torch.randn(2, 3, 8, 6), policy=KeepSuffix("layer.conv2d"))
    with pytest.raises(InputError, match=r"replacement must be \[2, 4, 8, 6\] torch.float32, got \[3, 4, 8, 6\]"):
        replay_suffix(tape, tape.find("layer"), torch.zeros(3, 4, 8, 6))


class Fills(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        room = x.repeat(1, 2, 1, 1)
        room[:, :4] = self.layer(x)
        return room.sum((1, 2, 3))


def test_a_part_of_a_tensor_from_below_is_filled_or_refused():
    model, images = Fills().eval(), torch.randn(2, 3, 4, 4)
    tape = record(model, images, policy=KeepSuffix("layer.conv2d"))
    with pytest.raises(UnsupportedOpError, match="cannot be replayed"):
        replay_suffix(tape, tape.find("layer"), torch.randn(2, 4, 4, 4))
