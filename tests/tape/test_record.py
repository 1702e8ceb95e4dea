import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyfast_xai.errors import InputError
from pyfast_xai.tape import aliasing, record, replay


class Reads:
    """A reading that understands everything and keeps nothing."""

    def handles(self, op):
        return True

    def save(self, node, keep, args, kwargs):
        pass

    def run(self, node, keep, args, kwargs):
        return node.op(*args, **kwargs)


class Call(nn.Module):
    """A model made of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def names(tape):
    return [node.name for node in tape]


def same_as_model(model, *inputs):
    """The tape's result, its replay on these inputs and on others are what the model computes, bit for bit."""
    tape = record(model, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(tape.result, model(*[x.clone() for x in inputs]), rtol=0, atol=0)
        others = [torch.randn_like(x) for x in inputs]
        torch.testing.assert_close(replay(tape, *others), model(*[x.clone() for x in others]), rtol=0, atol=0)
    torch.testing.assert_close(replay(tape, *inputs), tape.result, rtol=0, atol=0)
    return tape


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


def test_every_spelling_of_relu_is_one_op(images):
    relu = nn.ReLU()

    def forward(self, x):
        x = self.conv(x)
        x = F.relu(x)
        x = x.relu()
        x = torch.relu(x)
        x = relu(relu(x))
        x = F.relu(x, inplace=True)
        x.relu_()
        return F.relu_(x)

    tape = same_as_model(Call(forward), images)
    assert sum(node.op._schema.name.rstrip("_") == "aten::relu" for node in tape) == 8


def test_composite_ops_arrive_whole_without_a_reading(images):
    tape = record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), images)
    assert names(tape) == ["0.conv2d", "1.flatten", "2.linear"]


def test_ops_a_reading_does_not_understand_are_taken_apart(images):
    class OnlyConvolution(Reads):
        def handles(self, op):
            return op._schema.name == "aten::convolution"

    tape = record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images, policy=OnlyConvolution())
    assert names(tape) == ["0.convolution", "1.view"]


def test_control_flow_in_python_is_followed(images):
    def forward(self, x):
        for i in range(3):
            x = self.conv(x)[:, :3] if i % 2 == 0 else -x
        return x

    tape = same_as_model(Call(forward), images)
    assert names(tape) == ["conv.conv2d", "slice", "neg", "conv.conv2d_1", "slice_1"]


def test_residual_written_in_place(images):
    def forward(self, x):
        identity = x
        out = self.conv(x)[:, :3].contiguous()
        out += identity
        return F.relu_(out)

    same_as_model(Call(forward), images)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x[:, :2].mul_(3),
        lambda x: x.view(-1).add_(1),
        lambda x: x.transpose(1, 2)[:, 1].zero_(),
        lambda x: x[..., ::2].copy_(x[..., 1::2]),
        lambda x: x.flatten(2)[:, :, 3].fill_(7.0),
        lambda x: x[:, 0].relu_(),
        lambda x: x.detach().mul_(2),
        lambda x: x.data.mul_(2),
    ],
)
def test_a_write_to_a_view_changes_the_whole(images, write):
    def forward(self, x):
        x = self.conv(x)
        before = x.permute(0, 2, 3, 1)
        write(x)
        # Read through the tensor itself and through a view made before the write.
        return x * 2, before + 1

    tape = same_as_model(Call(forward), images)
    assert any(node.op in (aliasing.scatter_view, aliasing.regenerate_view) for node in tape)


def test_a_constant_buffer_filled_with_activations(images):
    def forward(self, x):
        buffer = torch.full((2, 6, 8, 8), 0.5)
        buffer[:, :3] = x
        buffer[:, 4] += x[:, 0]
        return buffer.sum(1) + buffer[:, 5]

    same_as_model(Call(forward), images)


def test_what_a_reading_keeps_survives_a_later_write(images):
    saved = []

    class KeepsInput(Reads):
        def save(self, node, keep, args, kwargs):
            keep("input", args[0])
            saved.append((node, args[0].clone()))

    def forward(self, x):
        x = self.conv(x)
        y = x.sigmoid()
        x.relu_()
        x[:, 1:2].add_(y[:, :1])
        return x + y

    record(Call(forward), images, policy=KeepsInput())
    assert len(saved) > 4
    for node, value in saved:
        torch.testing.assert_close(node.saved["input"].tensor, value, rtol=0, atol=0)


def test_nothing_is_copied_where_nothing_is_overwritten(images):
    pointers = []

    class KeepsInput(Reads):
        def save(self, node, keep, args, kwargs):
            keep("input", args[0])
            pointers.append((node, args[0].data_ptr()))

    record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), images, policy=KeepsInput())
    assert all(node.saved["input"].tensor.data_ptr() == pointer for node, pointer in pointers)


def test_channels_last(images):
    tape = record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images.contiguous(memory_format=torch.channels_last))
    value = tape.find("1")
    assert value.shape == (2, 4, 6, 6)
    assert value.stride[1] == 1
    torch.testing.assert_close(replay(tape, images), tape.result, rtol=0, atol=0)


def test_several_inputs_and_outputs(images):
    def forward(self, first, second, *, scale):
        a, b = torch.chunk(self.conv(first), 2, 1)
        return {"sum": a + b, "rest": [second * scale, "text", 3]}

    model = Call(forward)
    tape = record(model, images, images + 1, scale=2.0)
    assert len(tape.inputs) == 2
    assert tape.outputs["sum"] is tape.find("add")
    assert tape.result["rest"][1:] == ["text", 3]
    repeated = replay(tape, images * 2, images)
    torch.testing.assert_close(repeated["sum"], sum(torch.chunk(model.conv(images * 2), 2, 1)).detach())
    torch.testing.assert_close(repeated["rest"][0], images * 2)


def test_max_with_indices_and_unused_results(images):
    same_as_model(Call(lambda self, x: torch.max(self.conv(x), 1)[0]), images)


def test_constants_are_not_on_the_tape(images):
    def forward(self, x):
        grid = torch.arange(8.0).view(1, 1, 8, 1).expand(2, 1, 8, 8)
        return self.conv(x) * grid.cos()

    assert names(same_as_model(Call(forward), images)) == ["conv.conv2d", "mul"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_looked_through(images, wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert names(record(wrap(model), images)) == ["0.conv2d", "1.relu"]


def test_parts_that_were_compiled_run_as_written(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    model[1].compile(backend="eager")
    model[1](torch.randn(2, 4, 6, 6))
    assert names(record(model, images)) == ["0.conv2d", "1.0.relu", "1.1.conv2d"]


def test_scripted_model(images):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    assert [node.name.split(".")[-1] for node in record(model, images)] == ["conv2d", "relu"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_result_can_be_used_in_any_grad_mode(images, mode):
    with mode():
        result = record(nn.Conv2d(3, 4, 3), images).result
    assert not result.is_inference()
    (result * torch.ones(1, requires_grad=True)).sum().backward()


def test_the_forward_stops_at_a_module(images):
    ran = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Call(lambda self, x: ran.append(1) or x))
    tape = record(model, images, until="1")
    torch.testing.assert_close(tape.reached, model[:2](images).detach())
    assert ran == []
    assert tape.result is None


def test_the_forward_stops_at_an_operation(images):
    model = Call(lambda self, x: F.relu(F.relu(self.conv(x)) - 1) + 1)
    tape = record(model, images, until="relu_1")
    torch.testing.assert_close(tape.reached, F.relu(F.relu(model.conv(images)) - 1).detach())


def test_a_model_that_catches_every_exception_still_stops(images):
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x):
        try:
            return self.inner(x)
        except Exception:
            return x

    model = Call(forward)
    model.inner = inner
    assert record(model, images, until="inner.0").reached is not None


def test_the_last_call_of_a_reused_module_is_found(images):
    relu = nn.ReLU()
    model = Call(lambda self, x: self.relu(self.relu(x) - 1))
    model.relu = relu
    tape = record(model, images)
    assert len(tape.modules["relu"]) == 2
    assert tape.find("relu") is tape.outputs


def test_unknown_layer_names_the_close_ones(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(InputError, match=r"layer must name a module .* '1\.relu'.* got '1\.rleu'"):
        record(model, images, until="1.rleu")


def test_no_tensor_among_the_inputs():
    with pytest.raises(InputError, match="at least one tensor"):
        record(nn.Identity(), "text")


def test_replay_refuses_what_it_cannot_repeat(images):
    stopped = record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images, until="0")
    with pytest.raises(InputError, match="stopped early"):
        replay(stopped, images)
    decides = record(Call(lambda self, x: x if x.sum().item() > 0 else -x), images)
    with pytest.raises(InputError, match="decision"):
        replay(decides, images)
    draws = record(Call(lambda self, x: x + torch.rand_like(x)), images)
    with pytest.raises(InputError, match="random"):
        replay(draws, images)
    plain = record(nn.Conv2d(3, 4, 3), images)
    with pytest.raises(InputError, match="inputs must be as recorded"):
        replay(plain, images[:1])
    with pytest.raises(InputError, match="1 tensors"):
        replay(plain)


def test_dropout_outside_training_is_not_random(images):
    same_as_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).eval(), images)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_in_place_writes_in_training_only(images, training):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.ReLU()).train(training)
    tape = record(model, images)
    assert any(node.op is aliasing.scatter_view for node in tape) == training
    if not training:
        same_as_model(model, images)


def test_replay_leaves_its_input_alone(images):
    model = Call(lambda self, x: x.mul_(2).relu_())
    tape = record(model, images)
    before = images.clone()
    replay(tape, images)
    assert torch.equal(images, before)


def test_activations_are_freed_while_the_forward_runs(images):
    alive = []

    def forward(self, x):
        for _ in range(4):
            x = self.conv(x)[:, :3]
            alive.append(weakref.ref(x))
        return x.sum()

    tape = record(Call(forward), images)
    assert len(tape.nodes) == 9
    assert not any(reference() is not None for reference in alive)


def test_a_tape_is_freed_without_the_garbage_collector(images):
    class KeepsInput(Reads):
        def save(self, node, keep, args, kwargs):
            keep("input", args[0])

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    gc.disable()
    try:
        for until in (None, "1"):
            tape = record(model, images, policy=KeepsInput(), until=until)
            saved = [weakref.ref(node.saved["input"].tensor) for node in tape.nodes[1:]]
            assert saved
            del tape
            assert all(reference() is None for reference in saved)
    finally:
        gc.enable()


def test_a_reading_may_do_an_op_itself_and_keep_of_the_result(images):
    class Doubles(Reads):
        def run(self, node, keep, args, kwargs):
            result = node.op(*args, **kwargs)
            if node.op._schema.name == "aten::relu_":
                keep("mask", result > 0)
                keep("result", result)
                return result.mul_(2)
            return result

    def forward(self, x):
        return self.conv(x).relu_().add_(1)

    model = Call(forward)
    tape = record(model, images, policy=Doubles())
    expected = 2 * model.conv(images).relu().detach()
    assert torch.equal(tape.result, expected + 1)
    relu = next(node for node in tape if node.name == "relu")
    assert torch.equal(relu.saved["mask"].tensor, expected > 0)
    assert torch.equal(relu.saved["result"].tensor, expected)  # copied before the addition wrote to it


def test_a_copy_of_a_tape_shares_no_value_with_it(images):
    model = Call(lambda self, x: (self.conv(x).relu_().flatten(1), x.chunk(2)))
    tape = record(model, images)
    copy = tape.copy()
    values = {id(value) for node in tape for value in (*node.inputs, *node.outputs)}
    assert values.isdisjoint(id(value) for node in copy for value in (*node.inputs, *node.outputs))
    assert [node.name for node in copy] == [node.name for node in tape]
    assert copy.result is None
    torch.testing.assert_close(replay(copy, images), tape.result, rtol=0, atol=0)


def test_no_operation_has_the_name_of_a_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return torch.relu(self.relu(x - 1) - 1)

    model, x = Both(), torch.randn(2, 3) * 4
    tape = record(model, x)
    assert [node.name for node in tape] == ["sub", "relu.relu", "sub_1", "relu_1"]
    torch.testing.assert_close(record(model, x, until="relu").reached, (x - 1).relu())
    torch.testing.assert_close(record(model, x, until="relu_1").reached, model(x))
    assert tape.find("relu") is tape.modules["relu"][0][0]
