"""Explaining leaves no trace on the model, its input or the process, also when the model raises."""

import copy
import hashlib
import sys
import threading

import pytest
import torch
from case_ids import case_id
from quick_settings import QUICK
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as process_wide

from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.explainer import Explainer

every_method = pytest.mark.parametrize("method", METHODS)


def digest(tensor):
    """Every bit of a tensor and where it lies in memory."""
    with torch.inference_mode():
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        raw = whole.view(torch.uint8).numpy().tobytes()
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.data_ptr())
    return hashlib.sha256(raw).hexdigest(), geometry, tensor.requires_grad


HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]
PROCESS_HOOKS = [name for name, value in vars(process_wide).items() if name.startswith("_global") and "hooks" in name]


def photograph(model, *inputs):
    """All that an explainer could have changed."""
    result = {}
    for name, item in model.named_modules():
        result[name, "training"] = item.training
        result[name, "attributes"] = sorted(vars(item))
        result[name, "class"] = (type(item), item.forward)
        for hooks in HOOKS:
            result[name, hooks] = dict(getattr(item, hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        result[name] = (id(tensor), digest(tensor))
        result[name, "grad"] = None if tensor.grad is None else (id(tensor.grad), digest(tensor.grad))
        result[name, "autograd hooks"] = dict(tensor._backward_hooks or {})
    for hooks in PROCESS_HOOKS:
        value = getattr(process_wide, hooks)
        result[hooks] = dict(value) if hasattr(value, "keys") else value
    for i, tensor in enumerate(inputs):
        result["input", i] = digest(tensor)
    result["random numbers"] = torch.get_rng_state().tolist()
    result["fast path"] = torch.backends.mha.get_fastpath_enabled()
    backends = torch.backends.cuda
    result["attention"] = (
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    )
    result["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    result["dispatch modes"] = torch._C._len_torch_dispatch_stack()
    result["default dtype"] = torch.get_default_dtype()
    return result


def versions(model, *inputs):
    """How often each tensor was written to."""
    return [tensor._version for tensor in [*model.parameters(), *model.buffers(), *inputs]]


def compare(before, after):
    assert before.keys() == after.keys()
    assert not {name: (before[name], after[name]) for name in before if before[name] != after[name]}


class Small(nn.Module):
    writes = False

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.fc = nn.Conv2d(4, 6, 3, 2), nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        out = functional.dropout(self.conv2(x), training=self.training).relu_()
        return self.head(out)

    def head(self, x):
        return self.fc(x.mean((2, 3)))


class Attends:
    """In front of one of these networks: attention among the positions of its last map."""

    def head(self, x):
        x = x.flatten(2).mT
        return self.fc(functional.scaled_dot_product_attention(x, x, x).mean(1))


class WritesToItsBuffer(Small):
    writes = True

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.last.copy_(self.conv1(x).mean((0, 2, 3)))
        self.last[1:3].mul_(self.calls)
        return super().forward(x)


class WritesToItsParameter(Small):
    writes = True

    def forward(self, x):
        with torch.no_grad():
            self.conv1.weight.mul_(0.5)
            self.fc.bias.data.add_(1)
        return super().forward(x)


class WritesToItsInput(Small):
    writes = True

    def forward(self, x):
        x.mul_(2).sub_(0.1)
        x[:, 0] = 0
        return super().forward(functional.relu_(x))


class Draws(Small):
    def forward(self, x):
        x = x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(x.shape, dtype=x.dtype)
        return super().forward(functional.dropout(x, 0.3, training=True))


class Encoder(nn.Module):
    """Has the fused fast path of PyTorch."""

    writes = False

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.encoder(self.patches(x).flatten(2).mT).mean(1))


class Detects:
    """In front of another model: its scores become those of twelve boxes."""

    def forward(self, x):
        scores = super().forward(x).softmax(1)[..., None].expand(-1, -1, 12)
        boxes = 0 * scores[:, :4] + torch.tensor([8.0, 8, 12, 12]).to(scores)[:, None]
        return torch.cat([boxes, scores], 1)


KINDS = [Small, WritesToItsBuffer, WritesToItsParameter, WritesToItsInput, Draws, Encoder]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def build(method, kind=Small, dtype=torch.float32, memory_format=torch.contiguous_format):
    if METHODS[method].needs_attention and kind is not Encoder:
        kind = type(kind.__name__, (Attends, kind), {})
    if METHODS[method].needs_detections:
        kind = type(kind.__name__, (Detects, kind), {})
    model = kind().eval().to(dtype)
    images = torch.randn(2, 3, 16, 16).to(dtype).contiguous(memory_format=memory_format)
    # A step of training leaves gradients.
    probe = copy.deepcopy(model)
    probe(images.clone()).float().square().sum().backward()
    for item, other in zip(model.parameters(), probe.parameters(), strict=True):
        item.grad = other.grad
    next(iter(model.parameters())).grad = None
    return model, images


def explainer(method, model, **settings):
    return METHODS[method](model, **QUICK.get(method, {}), **settings)


def explain_and_compare(method, model, images, **settings):
    before, written = photograph(model, images), versions(model, images)
    explanation = explainer(method, model, **settings)(images)
    compare(before, photograph(model, images))
    # A graph that the user has built through these tensors can still be derived.
    assert getattr(model, "writes", False) or versions(model, images) == written
    assert explanation.heatmap.isfinite().all()
    return explanation


@every_method
@every_kind
def test_the_model_is_as_it_was(method, kind):
    explain_and_compare(method, *build(method, kind))


@every_method
@every_kind
def test_a_photograph_shows_what_the_model_itself_does(method, kind):
    """Otherwise the comparisons above would show nothing."""
    model, images = build(method, kind)
    before = photograph(model, images)
    with torch.no_grad():
        model(images)
    changed = {name for name, item in photograph(model, images).items() if item != before[name]}
    assert (
        changed
        == {
            Small: set(),
            Encoder: set(),
            WritesToItsBuffer: {"calls", "last"},
            WritesToItsParameter: {"conv1.weight", "fc.bias"},
            WritesToItsInput: {("input", 0)},
            Draws: {"random numbers"},
        }[kind]
    )


@every_method
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@every_kind
def test_the_model_is_as_it_was_after_an_exception(method, kind, where):
    model, images = build(method, kind)
    layers = []  # those that run
    with process_wide.register_module_forward_hook(lambda item, inputs, output: layers.append(item)):
        copied = copy.deepcopy(model)
        copied(images.clone())
    names = [
        name for item in layers for name, other in copied.named_modules() if other is item and not [*item.children()]
    ]
    layer = model.get_submodule({"first": names[0], "middle": names[len(names) // 2], "last": names[-1]}[where])
    if where == "last" and method == "eigen-cam":
        pytest.skip("its forward stops before")
    # Raises in place of the layer, without a hook on it.
    original = type(layer).forward

    def forward(self, *args, **kwargs):
        if self is layer:
            raise ZeroDivisionError("from the middle")
        return original(self, *args, **kwargs)

    before = photograph(model, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "forward", forward)
        with pytest.raises(ZeroDivisionError, match="from the middle"):
            explainer(method, model)(images)
    compare(before, photograph(model, images))
    # And the next call works.
    explain_and_compare(method, model, images)


@every_method
@every_kind
def test_two_explanations_in_a_row_are_the_same(method, kind):
    model, images = build(method, kind)
    explain = explainer(method, model)
    assert torch.equal(explain(images).heatmap, explain(images).heatmap)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in DataParallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@every_method
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_stay_and_do_not_change_the_result(method, wrap):
    model, images = build(method)
    plain = explainer(method, model)(images)
    wrapped = WRAPPERS[wrap](model)
    for _ in range(2):  # the second time after the compiler has run
        explanation = explain_and_compare(method, wrapped, images)
        assert torch.equal(explanation.heatmap, plain.heatmap)
        with torch.no_grad():
            wrapped(images)
    torch._dynamo.reset()


@every_method
@pytest.mark.parametrize("path", ["", "conv2"])
def test_a_module_compiled_in_place_stays_compiled(method, path):
    model, images = build(method)
    plain = explainer(method, model)(images)
    model.get_submodule(path).compile(backend="eager")
    with torch.no_grad():
        model(images)
    compiled = model.get_submodule(path)._compiled_call_impl
    explanation = explain_and_compare(method, model, images)
    assert model.get_submodule(path)._compiled_call_impl is compiled
    assert torch.equal(explanation.heatmap, plain.heatmap)
    torch._dynamo.reset()


@every_method
def test_frozen_parameters_stay_frozen(method):
    model, images = build(method)
    model.requires_grad_(False)
    model.fc.weight.requires_grad_(True)
    explain_and_compare(method, model, images)


@every_method
def test_an_input_that_requires_gradients_is_left_alone(method):
    model, images = build(method)
    images.requires_grad_()
    explanation = explain_and_compare(method, model, images)
    assert images.grad is None
    assert not explanation.heatmap.requires_grad


MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@every_method
@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_every_mode_of_the_caller(method, kind, mode):
    model, images = build(method, kind)
    with MODES[mode]():
        explain_and_compare(method, model, images)
    explain_and_compare(method, model, images)


@every_method
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_result_can_be_trained_on_whatever_the_mode_it_was_made_in(method, mode):
    model, images = build(method)
    with MODES[mode]():
        heatmap = explainer(method, model)(images).heatmap
    weight = torch.ones(16, 16, requires_grad=True)
    (heatmap * weight).sum().backward()
    assert weight.grad.isfinite().all()


@every_method
def test_hooks_of_the_user_stay_and_see_every_forward(method):
    model, images = build(method)
    recorded = []
    handle = model.conv2.register_forward_hook(lambda actual, inputs, output: recorded.append(output.shape))
    everywhere = process_wide.register_module_forward_hook(lambda actual, inputs, output: None)
    try:
        explain_and_compare(method, model, images)
    finally:
        handle.remove()
        everywhere.remove()
    assert recorded


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=case_id)
@every_kind
def test_every_precision(method, kind, dtype):
    explanation = explain_and_compare(method, *build(method, kind, dtype))
    # A game may end without evidence, in a model that is sure of nothing.
    assert method == "fgvis" or (explanation.heatmap.amax((1, 2)) > 0).any()


@every_method
@every_kind
def test_channels_last_inputs_and_parameters(method, kind):
    model, images = build(method, kind, memory_format=torch.channels_last)
    explain_and_compare(method, model, images)
    explain_and_compare(method, model.to(memory_format=torch.channels_last), images)
    explain_and_compare(method, model, images.contiguous())


@every_method
def test_an_input_that_is_a_view_of_something_larger(method):
    model, images = build(method, WritesToItsInput)
    whole = torch.randn(4, 5, 20, 20)
    images = whole[1:3, 1:4, 2:18, 2:18]
    before = whole.clone()
    explanation = explain_and_compare(method, model, images)
    assert torch.equal(whole, before)
    assert torch.equal(explanation.heatmap, explainer(method, model)(images.clone()).heatmap)


@every_method
def test_two_threads_at_once(method):
    """Each with a model of its own and one that both share."""
    shared, images = build(method)
    actual = [build(method, Encoder)[0], build(method, WritesToItsBuffer)[0]]
    models = [shared, *actual]
    everything = nn.ModuleList(models).eval()
    before = photograph(everything, images)
    expected = [explainer(method, model)(images).heatmap for model in models]
    wrong, barrier = [], threading.Barrier(2)

    def work(mine):
        try:
            barrier.wait(30)
            for _ in range(5):
                for i in (0, mine):
                    heatmap = explainer(method, models[i])(images).heatmap
                    if not torch.equal(heatmap, expected[i]):
                        wrong.append(f"model {i} in thread {mine}")
        except Exception as error:
            wrong.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    compare(before, photograph(everything, images))


def test_every_explainer_is_among_the_methods():
    """So that one that is written tomorrow is tested here."""

    def below(kind):
        return {kind, *(result for child in kind.__subclasses__() for result in below(child))}

    # The baselines of `evaluation` look at no model.
    ours = {k for k in below(Explainer) if k.__module__.startswith("pyfast_xai.explainers.") and "method" in vars(k)}
    assert ours == set(METHODS.values())


@every_method
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"]
)
def test_an_explanation_holds_nothing_of_the_callers(method, memory_format):
    """No graph, and no memory that the caller or the model will write to."""
    model, images = build(method, memory_format=memory_format)
    images = images.requires_grad_() * 1
    explanation = explainer(method, model)(images)
    foreign = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters(), *model.buffers())}
    for name, value in vars(explanation).items():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                assert not tensor.requires_grad, name
                assert not tensor.is_inference(), name
                assert tensor.untyped_storage().data_ptr() not in foreign, name
    assert torch.equal(explanation.images, images.detach())


@every_method
def test_an_exported_program_is_explained(method):
    """Its mode was fixed when it was exported; its flags say training, and cannot be set."""
    model, images = build(method)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with pytest.raises(NotImplementedError):
        program.eval()
    # It has no modules, by which Eigen-CAM would choose a layer.
    names = {"eigen-cam": ("conv2d_1", "conv2")}.get(method)
    settings = [{"layer": name} for name in names] if names else [{}, {}]
    result, expected = (
        explainer(method, item, **setting)(images).heatmap
        for item, setting in zip((program, model), settings, strict=True)
    )
    torch.testing.assert_close(result, expected)
