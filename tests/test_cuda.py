"""Explainers on a CUDA device: what they give on the CPU, in every precision, mode and stream a caller may use.

With PYFAST_XAI_TEST_DEVICE=cpu the same bodies run on the CPU.
"""

import contextlib
import importlib.util
import os
import threading
import warnings

import pytest
import torch
from case_ids import case_id
from torch import nn

from pyfast_xai import Explanation, record, replay
from pyfast_xai.acceleration import cuda_graphs
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.output_gradients import one_hot
from pyfast_xai.explainers.fixations import VARIANTS
from pyfast_xai.ops import registry
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence.points import marking
from pyfast_xai.rules.gradient import GUIDED, GradientRules, backward_pass
from pyfast_xai.rules.gradient.bounds import Bounding, Clipped, bounds_of

DEVICE = os.environ.get("PYFAST_XAI_TEST_DEVICE", "cuda")
REAL = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason="needs a device"),
]
on_a_real_device = pytest.mark.skipif(not REAL or not torch.cuda.is_available(), reason="needs a device")
every_method = pytest.mark.parametrize("method", METHODS)

# These need tens of forwards by default; a few show the same here.
QUICK = {
    "fgvis": {"n_iterations": 4},
    "smoothgrad": {"n_samples": 2},
    "integrated-gradients": {"n_steps": 2},
    "occlusion": {"window": 8, "stride": 8},
    "rise": {"n_masks": 4},
    "lime": {
        "n_samples": 8,
        "feature_mask": torch.arange(16).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1),
    },
    "meaningful-perturbation": {"n_iterations": 2, "initial_mask": "random"},
    **{"feature-ablation": {"feature_mask": 3}, "feature-permutation": {"feature_mask": 3}},
    **{
        "kernel-shap": {"feature_mask": 3, "n_samples": 20},
        "shapley-value-sampling": {"feature_mask": 3, "n_samples": 2},
    },
    "shapley-values": {"feature_mask": 2},
    **{"hsic": {"feature_mask": 2, "n_samples": 8}, "sobol": {"feature_mask": 2, "n_designs": 2}},
    "extremal-perturbation": {"n_iterations": 2, "sigma": 6.0, "step": 3},
    **{"ss-cam": {"n_samples": 2}, "is-cam": {"n_steps": 2}},
    **{"smooth-grad-cam++": {"n_samples": 2}, "sess": {"n_scales": 2}},
}


class Small(nn.Module):
    """Folded and functional rectifiers, a max-pool, a skip, an average before the classes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv2, self.conv3, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv1(x))))
        x = torch.relu(x + self.conv2(x))
        return self.fc(self.relu(self.conv3(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _full_precision():
    """Convolutions in float32, not in TF32, which they take by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer name for it
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        yield
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["chosen", "triton"])
def kernels(request, monkeypatch):
    """The kernels that serve by themselves, and Triton's wherever it has one and no compiled one is there."""
    if request.param == "triton":
        if not REAL or registry.OPS["relu_forward"].missing("triton", "cuda") is not None:
            pytest.skip("no Triton for this device")
        monkeypatch.setattr(registry, "TO_PROVE", ())
        registry.Op._fallback_kernel.cache_clear()
    yield request.param
    registry.Op._fallback_kernel.cache_clear()


def build(dtype=torch.float64, memory_format=torch.contiguous_format):
    model = Small().eval().to(dtype)
    return model, torch.randn(2, 3, 16, 16).to(dtype).contiguous(memory_format=memory_format)


def explain(method, model, images, **kwargs):
    return METHODS[method](model, **QUICK.get(method, {}))(images, **kwargs)


def on_device(model, images):
    """The same model and images on the device."""
    copy = Small().eval().to(DEVICE, images.dtype)
    copy.load_state_dict(model.state_dict())
    return copy, images.to(DEVICE)


def tensors_of(explanation):
    result = {name: value for name, value in vars(explanation).items() if isinstance(value, torch.Tensor)}
    return result | {f"points {n}": item for n, item in enumerate(explanation.points or ())}


def assert_on_device(explanation):
    assert isinstance(explanation, Explanation)
    for name, tensor in tensors_of(explanation).items():
        assert tensor.device.type == torch.device(DEVICE).type, name


def assert_same(result, expected, rtol):
    """Everything in two explanations; numbers up to `rtol` of the largest, positions and classes exactly."""
    result, expected = tensors_of(result), tensors_of(expected)
    assert result.keys() == expected.keys()
    for name, other in expected.items():
        actual = result[name].cpu()
        assert (actual.shape, actual.dtype) == (other.shape, other.dtype), name
        if other.is_floating_point():
            scale = float(other.abs().max()) if other.numel() else 0
            torch.testing.assert_close(
                actual, other, rtol=0, atol=rtol * scale, msg=lambda text, of=name: f"{of}: {text}"
            )
        else:
            assert torch.equal(actual, other), name


@every_method
def test_equals_the_cpu(method, kernels):
    model, images = build()
    result = explain(method, *on_device(model, images))
    assert_on_device(result)
    # Heat maps are float32 whatever the model's precision.
    assert_same(result, explain(method, model, images), rtol=1e-6)


@every_method
@pytest.mark.parametrize("target", [3, [4, 0], [[1, 2], [3, 0]]], ids=case_id)
def test_equals_the_cpu_for_targets(method, target):
    if method == "eigen-cam":
        pytest.skip("knows no classes")
    model, images = build()
    result = explain(method, *on_device(model, images), target=target)
    assert_on_device(result)
    assert_same(result, explain(method, model, images, target=target), rtol=1e-6)


@pytest.mark.parametrize("method", ["saliency", "deconvnet", "guided-backprop", "eigen-cam", "clear", "grad-cam"])
def test_equals_the_cpu_in_float32(method, kernels):
    model, images = build(torch.float32)
    result, expected = explain(method, *on_device(model, images)), explain(method, model, images)
    scale = float(expected.heatmap.max())
    torch.testing.assert_close(result.heatmap.cpu(), expected.heatmap, rtol=0, atol=1e-3 * scale)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=case_id)
def test_half_precision_in_channels_last(method, dtype, kernels):
    model, images = on_device(*build(dtype, torch.channels_last))
    result = explain(method, model.to(memory_format=torch.channels_last), images)
    assert_on_device(result)
    assert result.heatmap.dtype == torch.float32
    assert result.heatmap.isfinite().all()


@every_method
def test_memory_formats_give_the_same(method, kernels):
    model, images = on_device(*build())
    plain = explain(method, model, images)
    last = explain(
        method, model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    )
    assert_same(last.to("cpu"), plain.to("cpu"), rtol=1e-6)


@every_method
def test_under_autocast(method, kernels):
    model, images = on_device(*build(torch.float32))
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        result = explain(method, model, images)
    assert_on_device(result)
    assert result.heatmap.isfinite().all()


@every_method
def test_of_a_compiled_model(method):
    model, images = on_device(*build())
    plain = explain(method, model, images)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    assert_same(explain(method, compiled, images).to("cpu"), plain.to("cpu"), rtol=1e-9)
    torch._dynamo.reset()


def _another_stream():
    """A stream of its own, with work before what follows, while the default one is busy, too."""
    if not REAL:
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(20_000_000)
    return torch.cuda.stream(stream)


@every_method
def test_on_another_stream(method, kernels):
    model, images = on_device(*build())
    expected = explain(method, model, images).to("cpu")
    with _another_stream():
        actual = torch.zeros_like(images)
        if REAL:
            torch.cuda._sleep(20_000_000)
        actual.copy_(images)  # whoever does not wait for this stream explains a black image
        result = explain(method, model, actual).to("cpu")
    assert_same(result, expected, rtol=1e-6)


def test_two_threads_with_a_stream_each():
    model, images = on_device(*build())
    methods = ("guided-backprop", "fixations")
    expected = {method: explain(method, model, images).to("cpu") for method in methods}
    wrong = []

    def work(method):
        try:
            for _ in range(3):
                with _another_stream():
                    assert_same(explain(method, model, images).to("cpu"), expected[method], rtol=1e-6)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(method,)) for method in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


@every_method
def test_the_model_is_as_it_was(method):
    model, images = on_device(*build(torch.float32))
    before = {name: item.clone() for name, item in model.state_dict().items()}
    state = torch.cuda.get_rng_state() if REAL else torch.get_rng_state()
    given = images.clone()
    explain(method, model, images)
    assert torch.equal(images, given)
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state() if REAL else torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@every_method
def test_results_can_be_looked_at(method):
    """Places and pictures of a result that lies on the device."""
    if not (REAL and importlib.util.find_spec("cupyx")):
        pytest.importorskip("scipy")
    model, images = on_device(*build(torch.float32))
    result = explain(method, model, images)
    assert result.boxes().device == result.heatmap.device
    assert result.peak().device == result.heatmap.device
    assert result.overlay().shape == (len(result), 3, 16, 16)
    assert torch.from_dlpack(result).data_ptr() == result.heatmap.data_ptr()
    assert result.numpy().shape == result.heatmap.shape


def test_a_replay_on_the_device():
    model, images = on_device(*build())
    other = torch.randn_like(images)
    with torch.no_grad():
        torch.testing.assert_close(replay(record(model, images), other), model(other))


def gradient(policy, model, images, classes):
    tape = record(model, images, policy=policy)
    return backward_pass(policy, tape, {tape.outputs: one_hot(classes, tape.result)}, [tape.inputs[0]])[0]


def fgvis_step(model, images, classes):
    clipped = Clipped(bounds_of(record(model, images, policy=Bounding())))
    return gradient(clipped, model, 0.5 * images, classes)


STEPS = {
    "saliency": lambda *given: gradient(GradientRules(), *given),
    "guided": lambda *given: gradient(GradientRules(GUIDED), *given),
    "fgvis": fgvis_step,
    "replay": lambda model, images, classes: replay(record(model, images), images),
}


@on_a_real_device
@pytest.mark.parametrize("step", STEPS)
def test_a_step_waits_for_nothing(step, kernels):
    model, images = on_device(*build(torch.float32))
    given = (model, images, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE))
    expected = STEPS[step](*given)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this way of looking is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = STEPS[step](*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@on_a_real_device
@pytest.mark.parametrize("step", STEPS)
def test_a_step_can_be_a_graph(step, kernels):
    model, images = on_device(*build(torch.float32))
    classes = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels and chooses algorithms
            STEPS[step](model, images, classes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = STEPS[step](model, images, classes)
    images.copy_(torch.randn_like(images))
    classes.fill_(3)
    graph.replay()
    expected = STEPS[step](model, images, classes)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def trace(model, images, classes, variant):
    """CNN-Fixations from the recording to the sorted list of pixels, -1 behind the last."""
    tape = record(model, images, policy=evidence.policy)
    starts = torch.arange(len(images), device=images.device) * tape.outputs.shape[1] + classes[:, 0]
    options = METHODS["fixations"](model, variant=variant).options
    return evidence.walk(tape, {tape.outputs: evidence.Points(starts)}, tape.inputs[0], options).index


def pixels_of(index):
    return set(index.tolist()) - {-1}


every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_a_trace_equals_the_cpu(variant, kernels):
    model, images = build()
    classes = torch.tensor([[3], [1]])
    expected = trace(model, images, classes, variant)
    assert len(expected)
    with marking():
        result = trace(*on_device(model, images), classes.to(DEVICE), variant)
    assert result.device.type == torch.device(DEVICE).type
    assert pixels_of(result) == pixels_of(expected)
    assert len(result) >= len(expected)


@on_a_real_device
@every_variant
def test_a_trace_waits_for_nothing(variant, kernels):
    model, images = on_device(*build())
    given = (model, images, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), variant)
    expected = trace(*given)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this way of looking is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = trace(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, expected)


@on_a_real_device
@every_variant
def test_a_trace_can_be_a_graph(variant, kernels):
    model, images = on_device(*build())
    classes = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels and chooses algorithms
            trace(model, images, classes, variant)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = trace(model, images, classes, variant)
    for k in (3, 1):
        images.copy_(torch.randn_like(images))
        classes.fill_(k)
        graph.replay()
        assert pixels_of(result)
        assert pixels_of(result) == pixels_of(trace(model, images, classes, variant))


# Methods for which an accelerated explainer captures graphs.
GRAPHED = (
    *("saliency", "deconvnet", "guided-backprop", "input-x-gradient", "smoothgrad", "integrated-gradients"),
    *("grad-cam", "grad-cam++", "excitation-backprop", "fgvis"),
    *("guided-grad-cam", "cam", "eigen-cam", "clear", "fixations"),
)
every_graphed_method = pytest.mark.parametrize("method", GRAPHED)


def accelerated(method, model):
    return METHODS[method](model, **QUICK.get(method, {})).accelerate()


def graphs_of(explainer):
    """How many graphs an explainer has, none of which may have failed."""
    if not REAL:
        return 2
    graphs = explainer.accelerated_model._graphs()
    assert not graphs._stopped
    return graphs.captured


@every_method
def test_accelerated_is_the_same(method, kernels):
    model, images = on_device(*build())
    fast = accelerated(method, model)
    for batch in (images, images.flip(0), -images):
        assert_same(fast(batch).to("cpu"), explain(method, model, batch).to("cpu"), rtol=1e-6)
    assert method not in GRAPHED or graphs_of(fast)


@every_graphed_method
@pytest.mark.parametrize("target", [3, [[1, 2], [3, 0]]], ids=case_id)
def test_graphs_of_given_targets(method, target):
    model, images = on_device(*build())
    fast = accelerated(method, model)
    for batch in (images, images.flip(0), -images):
        assert_same(fast(batch, target).to("cpu"), explain(method, model, batch, target=target).to("cpu"), rtol=1e-6)
    assert graphs_of(fast)


@every_graphed_method
def test_graphs_of_two_shapes_take_turns(method):
    """They share memory; results that were handed out must not lie in it."""
    model, images = on_device(*build())
    fast, saved = accelerated(method, model), []
    for batch in (images, images[:1], images.flip(0), -images[:1], -images, images[1:]):
        saved.append((fast(batch), explain(method, model, batch)))
    for result, expected in saved:
        assert_same(result.to("cpu"), expected.to("cpu"), rtol=1e-6)
    assert graphs_of(fast) >= 2


@every_graphed_method
def test_graphs_of_a_model_that_changes(method):
    model, images = on_device(*build())
    fast = accelerated(method, model)
    for _ in range(2):
        fast(images)
    with torch.no_grad():
        model.conv2.weight.neg_()
        model.bn.running_mean.add_(0.5)
    for batch in (images, images.flip(0), -images):
        assert_same(fast(batch).to("cpu"), explain(method, model, batch).to("cpu"), rtol=1e-6)
    assert graphs_of(fast)


@every_graphed_method
def test_graphs_on_two_streams(method):
    """A graph waits for its turn on another stream, and for its images on its own."""
    model, images = on_device(*build())
    expected = [explain(method, model, batch).to("cpu") for batch in (images, -images)]
    fast = accelerated(method, model)
    for _ in range(2):
        fast(images)
    result = []
    for batch in (images, -images):
        with _another_stream():
            item = torch.zeros_like(batch)
            item.copy_(batch)
            result.append(fast(item))
    if REAL:
        torch.cuda.synchronize()
    for item, other in zip(result, expected, strict=True):
        assert_same(item.to("cpu"), other, rtol=1e-6)


@pytest.mark.parametrize("method", ["guided-backprop", "grad-cam", "fgvis"])
def test_graphs_of_threads_with_a_stream_each(method):
    model, images = on_device(*build())
    batches = [images, -images, images.flip(0)]
    expected = [explain(method, model, batch).to("cpu") for batch in batches]
    fast = accelerated(method, model)
    fast(images)
    wrong = []

    def work(n):
        try:
            for _ in range(4):
                with _another_stream():
                    assert_same(fast(batches[n]).to("cpu"), expected[n], rtol=1e-6)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


@pytest.mark.parametrize(
    "settings", [{}, {"game": "preservation", "defence": "forward"}, {"game": "repression"}], ids=case_id
)
def test_a_long_game_is_the_same(settings):
    """Looked at now and then, in a batch that is halved, as a graph and not: all as on the CPU."""
    model, images = build()
    with torch.no_grad():
        model.fc.weight.mul_(20)  # sure of its classes, so that games are won
    images = torch.cat([images, -images, 2 * images])
    settings = {"n_iterations": 40, "patience": 3, "score_ratio": 0.5, "progress": False, **settings}
    expected = METHODS["fgvis"](model, **settings)(images)
    assert expected.iterations.unique().numel() > 2
    there, images = on_device(model, images)
    # The games of a chaotic descent part in the end where roundings differ.
    near = {"rtol": 0, "atol": 1e-4}
    for explainer in (METHODS["fgvis"](there, **settings), METHODS["fgvis"](there, **settings).accelerate()):
        result = explainer(images)
        assert torch.equal(result.iterations.cpu(), expected.iterations)
        torch.testing.assert_close(result.mask.cpu(), expected.mask, **near)


@on_a_real_device
@every_graphed_method
def test_half_precision_graphs(method):
    model, images = on_device(*build(torch.bfloat16, torch.channels_last))
    fast = accelerated(method, model.to(memory_format=torch.channels_last))
    first = fast(images)
    for _ in range(2):
        repeated = fast(images)
    assert graphs_of(fast)
    scale = float(first.heatmap.abs().max())
    torch.testing.assert_close(repeated.heatmap, first.heatmap, rtol=0, atol=0.05 * scale)


@on_a_real_device
def test_under_autocast_nothing_is_a_graph():
    model, images = on_device(*build(torch.float32))
    fast = accelerated("saliency", model)
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            result = fast(images)
    assert graphs_of(fast) == 0
    assert result.heatmap.isfinite().all()


@on_a_real_device
def test_a_capture_that_fails_is_said_and_gone_on_without(monkeypatch):
    model, images = on_device(*build())
    fast = accelerated("saliency", model)
    fast(images)
    record = fast.record

    def reads(*args, **kwargs):
        tape = record(*args, **kwargs)
        tape.result.sum().item()  # which a graph cannot
        return tape

    output = []
    monkeypatch.setattr(fast, "record", reads)
    monkeypatch.setattr(cuda_graphs.logger, "warning", lambda text, *args: output.append(text % args))
    stream = torch.cuda.current_stream()
    for batch in (images, -images):
        assert_same(fast(batch).to("cpu"), explain("saliency", model, batch).to("cpu"), rtol=1e-6)
    (output,) = [message for message in output if "graph" in message]
    assert output.startswith("accelerate: goes on without CUDA graphs, capturing one failed (")
    assert torch.cuda.current_stream() == stream


@on_a_real_device
def test_an_iteration_of_a_game_waits_for_nothing(monkeypatch):
    """Ten iterations a look: the bounds, then nine calls between one read and the next."""
    model, images = on_device(*build(torch.float32))
    game = METHODS["fgvis"](model, n_iterations=10, progress=False)
    iterate, modes = game._iterate, []

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return iterate(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            modes.append(True)

    monkeypatch.setattr(game, "_iterate", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this way of looking is a prototype
        game(images)
    assert len(modes) == 10


@on_a_real_device
@every_method
def test_on_a_device_that_is_not_the_current_one(method):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    model, images = build()
    there = f"cuda:{torch.cuda.device_count() - 1}"
    copy = Small().eval().to(there, images.dtype)
    copy.load_state_dict(model.state_dict())
    result = explain(method, copy, images.to(there))
    assert str(result.heatmap.device) == there
    assert_same(result.to("cpu"), explain(method, model, images), rtol=1e-6)
