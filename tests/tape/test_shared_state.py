"""What a forward writes to in place is put back, wherever it lies, and what the tape holds of it is what was used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyfast_xai import Saliency
from pyfast_xai.errors import InputError
from pyfast_xai.tape import record, replay


class Call(nn.Module):
    """A model made of one function."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


def test_chunks_of_one_tensor_are_put_back(images):
    def forward(self, a, b):
        a.mul_(2)
        b[:, 0] = a[:, 0]
        a.view(-1)[:5] = 7
        return a + b

    whole = torch.randn(4, 3, 8, 8)
    before, version = whole.clone(), whole._version
    first, second = whole.chunk(2)
    result = record(Call(forward), first, second).result
    assert torch.equal(whole, before)
    assert whole._version == version
    assert torch.equal(result, forward(None, first.clone(), second.clone()))


def test_parameters_that_are_views_of_one_flat_tensor_are_put_back(images):
    flat = torch.randn(30)
    before = flat.clone()
    model = Call(lambda self, x: x * self.a.sum() + self.b.sum())
    model.a, model.b = nn.Parameter(flat[:10]), nn.Parameter(flat[10:20])

    def forward(self, x):
        with torch.no_grad():
            self.a.mul_(2)
            self.b[2:5].add_(1)
            self.b.data[:3].zero_()
            self.a.view(2, 5).T[1:3].neg_()
        return x * self.a.sum() + self.b.sum()

    model.function = forward
    tape = record(model, images)
    assert torch.equal(flat, before)
    assert tape.writes
    assert torch.equal(tape.result, forward(model, images).detach())


PLACES = {
    "attribute": lambda model, tensor: setattr(model, "kept", tensor),
    "list": lambda model, tensor: setattr(model, "kept", [tensor]),
    "dict": lambda model, tensor: setattr(model, "kept", {"a": (tensor, 1)}),
    "object": lambda model, tensor: setattr(model, "kept", type("Plain", (), {"tensor": tensor})()),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("raises", [False, True])
def test_tensors_in_plain_attributes_and_closures_are_put_back(images, place, raises):
    tensor = torch.ones(3)

    def forward(self, x):
        tensor.add_(1)
        tensor[1:].mul_(3)
        if raises:
            raise ZeroDivisionError
        return x * tensor[:, None, None]

    model = Call(forward)
    place(model, tensor)
    if raises:
        with pytest.raises(ZeroDivisionError):
            record(model, images)
    else:
        tape = record(model, images)
        assert torch.equal(tape.result, images * torch.tensor([2.0, 6.0, 6.0])[:, None, None])
        assert tape.not_replayable == "the model writes to its own state"
    assert tensor.tolist() == [1, 1, 1]


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_running_statistics_are_put_back(images, norm):
    flag = {"training": True} if norm is F.batch_norm else {"use_input_stats": True}
    model = Call(lambda self, x: norm(x, self.mean, self.var, **flag))
    model.register_buffer("mean", torch.zeros(3))
    model.register_buffer("var", torch.ones(3))
    tape = record(model, images)
    assert tape.writes
    assert model.mean.tolist() == [0, 0, 0]
    assert model.var.tolist() == [1, 1, 1]


def test_the_gradient_is_that_of_the_weights_that_were_used(images):
    """Not of what is there when it is taken."""

    def forward(self, x):
        y = x * self.scale
        self.scale.mul_(3)
        y = y + x.square() * self.scale
        with torch.no_grad():
            self.weight.mul_(0.5)
        return F.conv2d(y, self.weight).mean((2, 3))

    model = Call(forward)
    model.register_buffer("scale", torch.full((3, 1, 1), 2.0))
    model.weight = nn.Parameter(torch.randn(5, 3, 3, 3))
    model.eval()
    result = Saliency(model)(images, 1)
    leaf = images.clone().requires_grad_()
    output = F.conv2d(leaf * 2 + leaf.square() * 6, model.weight * 0.5).mean((2, 3))
    (expected,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    torch.testing.assert_close(result.attribution, expected)
    torch.testing.assert_close(result.score, output.softmax(1)[:, 1].detach())


def test_a_cache_that_is_written_in_place_and_its_key_stay_together(images):
    """A model that fills its own buffer, and remembers for what, must not believe that it is still filled."""

    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.zeros(16), persistent=False)
            self.size = None

        def forward(self, x):
            if self.size != x.shape[-1]:
                self.size = x.shape[-1]
                self.grid[: self.size] = torch.arange(self.size) + 1.0
            return x * self.grid[: self.size]

    model = Caches()
    expected = images * (torch.arange(8) + 1.0)
    for _ in range(2):
        assert torch.equal(record(model, images).result, expected)
    assert torch.equal(model(images), expected)
    assert torch.equal(record(model, images).result, expected)
    assert torch.equal(model(images), expected)


def test_a_graph_of_the_user_through_tensors_that_were_written_to_still_holds(images):
    def forward(self, x):
        self.scale.mul_(2)
        return (x.mul_(3) * self.scale).relu_()

    model = Call(forward)
    model.register_buffer("scale", torch.full((3, 1, 1), 2.0))
    leaf = images.clone().requires_grad_()
    inner = leaf * 1
    graph = (inner * model.scale).square().sum()
    record(model, inner)
    graph.backward()
    torch.testing.assert_close(leaf.grad, 8 * images)


def test_the_callers_containers_and_tensors_are_left_alone(images):
    def forward(self, batch, *, extra):
        batch["pixels"].add_(1)
        batch["more"] = extra.mul_(2)
        return batch["pixels"] + batch.pop("more")

    extra, batch = torch.ones(2, 3, 8, 8), {"pixels": images}
    before = images.clone()
    result = record(Call(forward), batch, extra=extra).result
    assert torch.equal(result, before + 1 + 2)
    assert list(batch) == ["pixels"]
    assert batch["pixels"] is images
    assert torch.equal(images, before)
    assert extra.eq(1).all()


def test_a_plain_forward_leaves_the_arguments_alone():
    images, mask = torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    before = images.clone()
    model = Call(lambda self, x, m: x.mul_(m.mul_(2))).eval()
    result = Saliency(model).forward(images, mask)
    assert torch.equal(result, before * 2)
    assert torch.equal(images, before)
    assert mask.eq(1).all()
    assert not result.is_inference()


def test_what_a_recording_returns_is_not_the_memory_of_the_model(images):
    model = Call(lambda self, x: (self.held, x, self.fill(x)))
    model.register_buffer("held", torch.ones(3))
    model.register_buffer("out", torch.zeros(2, 3, 8, 8))
    model.fill = lambda x: torch.mul(x, 2, out=model.out)
    held, same, filled = record(model, images).result
    for tensor in (held, same, filled):
        tensor.fill_(9)
    assert model.held.eq(1).all()
    assert model.out.eq(0).all()
    assert not images.eq(9).any()


def test_a_tensor_given_twice_is_two_inputs(images):
    tape = record(Call(lambda self, a, b: a.relu() * b), images, images)
    first, second = tape.inputs
    assert first is not second
    assert torch.equal(replay(tape, images, images + 1), images.relu() * (images + 1))


def test_a_template_that_the_model_holds_is_no_input(images):
    model = Call(lambda self, x: (x * self.template).mean((2, 3))).eval()
    model.register_buffer("template", images)
    result = Saliency(model)(images, 1).attribution
    assert torch.allclose(result[:, 1], images[:, 1] / 64)


@pytest.mark.parametrize("shape", ["expanded", "sliced", "transposed"])
def test_every_way_an_input_may_lie(shape):
    image = torch.randn(1, 3, 8, 8)
    images = {
        "expanded": image.expand(4, -1, -1, -1),
        "sliced": torch.randn(8, 3, 9, 20)[::2, :, 1:, ::2][..., :8],
        "transposed": torch.randn(4, 3, 8, 8).mT,
    }[shape]
    model = Call(lambda self, x: x.mul_(2).relu_().flatten(1) + 1)
    tape = record(model, images)
    expected = (images * 2).relu().flatten(1) + 1
    assert torch.equal(tape.result, expected)
    assert torch.equal(replay(tape, images), expected)


def test_a_model_whose_tensors_are_of_inference_mode_may_write_to_them(images):
    with torch.inference_mode():
        model = Call(lambda self, x: x * self.calls.add_(1))
        model.register_buffer("calls", torch.zeros(()))
        model.plain = torch.zeros(())
    assert torch.equal(record(model, images).result, images)
    assert model.calls == 0
    model = Call(lambda self, x: x * self.plain.add_(1))
    with torch.inference_mode():
        model.plain = torch.zeros(())
        assert torch.equal(record(model, images).result, images)
        assert model.plain == 0


def test_lazy_modules_must_have_run(images):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    with pytest.raises(InputError, match=r"model must have run .* got '0\.weight'"):
        record(model, images)
    model(images)
    torch.testing.assert_close(record(model, images).result, model(images).detach(), rtol=0, atol=0)
