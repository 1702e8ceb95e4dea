"""Steps as graphs, without a device: a stand-in captures what reads nothing, and replays it on the same memory.

Its replay calls the function again on the tensors it was captured with, and copies what comes out to where it was. So a
function that used other memory, or needed Python, shows.
"""

import contextlib
import copy
import gc
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import device_waits
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import pyfast_xai
from pyfast_xai.acceleration import cuda_graphs
from pyfast_xai.acceleration.cuda_graphs import CudaGraphCache
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import fgvis
from pyfast_xai.explainers.common import gradient_pass
from pyfast_xai.rules.evidence.points import marking
from pyfast_xai.serve import Explained


def tensors_in(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def unexpanded(tensor):
    """A tensor without dimensions along which it has the same memory."""
    for dim, stride in enumerate(tensor.stride()):
        tensor = tensor[(slice(None),) * dim + (slice(1),)] if stride == 0 else tensor
    return tensor


class Pretended:
    """In the place of `cuda_graphs.Device`."""

    captures = replays = turns = 0

    def __init__(self, device):
        self.within = 0

    def capture(self, run, stopped):
        run()
        if stopped():
            return None
        Pretended.captures += 1
        with device_waits.ForbidReads():
            result = run()
        for tensor in tensors_in(result):  # a capture computes nothing
            with torch.inference_mode():
                tensor.fill_(77)

        def replay():
            assert self.within == 1, "not its turn"
            Pretended.replays += 1
            for item, new in zip(tensors_in(result), tensors_in(run()), strict=True):
                with torch.inference_mode():
                    unexpanded(item).copy_(unexpanded(new))

        return result, replay

    @contextlib.contextmanager
    def on_current_stream(self, tensors):
        Pretended.turns += 1
        self.within += 1
        yield
        self.within -= 1


def on_the_cpu(arguments):
    devices = {tensor.device for tensor in tensors_in(arguments)}
    return torch.device("cpu") if devices == {torch.device("cpu")} else None


@pytest.fixture
def device(monkeypatch):
    """The CPU in the place of a CUDA device."""
    monkeypatch.setattr(cuda_graphs, "Device", Pretended)
    monkeypatch.setattr(cuda_graphs, "device_of", on_the_cpu)
    monkeypatch.setattr(gradient_pass, "device_of", on_the_cpu)
    Pretended.captures = Pretended.replays = Pretended.turns = 0
    with marking():  # lists of points are as long as on a device
        yield Pretended


def double(x, more=None):
    return {"twice": 2 * x, "more": more, "shape": list(x.shape)}


# The class itself


def test_a_function_is_captured_the_second_time(device):
    run, results = CudaGraphCache(), []
    options = [torch.full((3,), float(i)) for i in range(5)]
    for x in options:
        results.append(run(double, x, key="double"))
        assert device.captures == (1 if len(results) > 1 else 0)
    assert device.replays == 4
    for i, result in enumerate(results):  # none was overwritten by a later one
        assert torch.equal(result["twice"], torch.full((3,), 2.0 * i))
        assert (result["more"], result["shape"]) == (None, [3])
        assert torch.equal(options[i], torch.full((3,), float(i)))
        result["twice"].add_(1)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.double(),), "double"),
        lambda x: ((x[:2],), "double"),
        lambda x: ((x.T,), "double"),
        lambda x: ((x, 1), "double"),
        lambda x: ((x,), "another"),
    ],
    ids=["dtype", "shape", "strides", "argument", "key"],
)
def test_what_differs_has_a_graph_of_its_own(device, other):
    run, x = CudaGraphCache(), torch.rand(3, 3)
    arguments, key = other(x)
    for _ in range(3):
        assert torch.equal(run(double, x, key="double")["twice"], 2 * x)
        assert torch.equal(run(double, *arguments, key=key)["twice"], 2 * arguments[0])
    assert device.captures == 2


def test_another_backend_has_a_graph_of_its_own(device):
    run, x = CudaGraphCache(), torch.rand(3)
    for _ in range(2):
        run(double, x, key="double")
        with pyfast_xai.backend("reference"):
            run(double, x, key="double")
    assert device.captures == 2


def test_an_object_is_told_from_one_that_moves_in_where_it_was(device):
    class Adds:
        def __init__(self, number):
            self.number = number

    run, x = CudaGraphCache(), torch.zeros(3)
    for number in range(20):
        adds = Adds(number)
        for _ in range(2):
            assert run(lambda x, adds: x + adds.number, x, adds, key="adds")[0] == number
        del adds


def test_only_the_last_graphs_are_kept(device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 2)
    run = CudaGraphCache()
    for size in (1, 2, 1, 3, 1, 2):
        for _ in range(2):
            run(double, torch.rand(size), key="double")
    assert device.captures == 4  # of 2 again
    assert len(run._graphs) == run.captured == 2


def test_where_capturing_fails_it_goes_on_without(device, caplog):
    def reads(x):
        return x * float(x.sum())

    run, x = CudaGraphCache(), torch.ones(2)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        for size in (2, 2, 2, 3, 3):
            x = torch.ones(size)
            assert torch.equal(run(reads, x, key="reads"), x * size)
        with run.repeating(reads, x, key="reads") as repeated:
            assert torch.equal(repeated(), x * 3)
    (output,) = caplog.messages
    assert output.startswith("accelerate: goes on without CUDA graphs, capturing one failed (")
    assert device.captures == 1
    assert device.replays == 0


def test_an_error_of_the_function_is_raised(device):
    def refuses(x):
        raise InputError("images must be nicer")

    run = CudaGraphCache()
    for _ in range(3):
        with pytest.raises(InputError, match="nicer"):
            run(refuses, torch.ones(2), key="refuses")


def test_it_can_be_stopped(device):
    run, x = CudaGraphCache(), torch.ones(2)
    run(double, x, key="double")
    run.stop()
    run(double, x, key="double")
    assert device.captures == 0

    run = CudaGraphCache()

    def stops(x):  # while warming up
        run.stop()
        return x + 1

    for _ in range(2):
        assert torch.equal(run(stops, x, key="stops"), x + 1)
    assert device.captures == 0


def count_up(state, by):
    state["sum"].add_(by)
    state["calls"].add_(1)
    return state["sum"].amax()


@pytest.mark.parametrize("graphs", [False, True])
def test_repeating(graphs, monkeypatch, request):
    if graphs:
        request.getfixturevalue("device")
    run = CudaGraphCache()
    for start in (0.0, 5.0):
        state, by = {"sum": torch.full((3,), start), "calls": torch.zeros(())}, torch.arange(3.0)
        with run.repeating(count_up, state, by, key="count") as repeated:
            actual, _ = repeated.arguments
            assert (actual is not state) == graphs
            for i in range(1, 5):
                assert repeated() == start + 2 * i
            assert torch.equal(actual["sum"], start + 4 * by)
            assert actual["calls"] == 4
        if graphs:
            assert torch.equal(state["sum"], torch.full((3,), start))
    if graphs:
        assert (Pretended.captures, Pretended.replays) == (1, 8)


def test_another_thread_calls_the_function_meanwhile(device):
    run = CudaGraphCache()
    result = []

    def other(by):
        state = {"sum": torch.zeros(3), "calls": torch.zeros(())}
        with run.repeating(count_up, state, by, key="count") as repeated:
            repeated(), repeated()
            result.append(repeated.arguments[0] is state and float(state["sum"].max()))

    state, by = {"sum": torch.zeros(3), "calls": torch.zeros(())}, torch.arange(3.0)
    with run.repeating(count_up, state, by, key="count") as repeated:
        repeated()
        thread = threading.Thread(target=other, args=(by,))
        thread.start()
        thread.join()
        assert repeated() == 4
    assert result == [4.0]
    other(by)
    assert result[1] is False  # the graph is free again


def test_where_a_function_can_be_a_graph(monkeypatch):
    assert cuda_graphs.device_of(torch.ones(1)) is None
    assert cuda_graphs.device_of((torch.ones(1, device="meta"), 3)) is None
    assert cuda_graphs.device_of("nothing") is None
    with FakeTensorMode():
        there, here = torch.empty(1, device="cuda:1"), torch.empty(1)
        assert cuda_graphs.device_of([there, {"more": there}]) == torch.device("cuda:1")
        assert cuda_graphs.device_of([there, here]) is None
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert cuda_graphs.device_of(there) is None


class Cuda:
    """What `Device` asks of torch.cuda, written down."""

    def __init__(self):
        self.log, self.fails = [], False
        self.current = self.make("default")

    def make(self, name):
        log = self.log

        class Stream:
            def __init__(self):
                self.name = name

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        return Stream()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(f"captures in {pool} on {stream.name}, {capture_error_mode}")
        self.current = stream
        yield
        if self.fails:  # as torch does it, the stream stays
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = self.before


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    fake.before = fake.current

    class Graph:
        def replay(self):
            fake.log.append(f"replays on {fake.current.name}")

    for name, value in {
        "Stream": lambda device: fake.make("own"),
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda device=None: fake.current,
        "stream": fake.stream,
        "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": fake.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_how_a_device_is_asked(cuda):
    device = cuda_graphs.Device(torch.device("cuda:0"))
    result, replay = device.capture(lambda: cuda.log.append(f"runs on {cuda.current.name}") or 5, lambda: False)
    assert result == 5
    assert cuda.log == [
        "own waits for default",
        *["runs on own"] * 3,
        "default waits for own",
        "captures in pool on own, thread_local",
        "runs on own",
    ]
    cuda.log.clear()
    used = []
    tensor = type("Recorded", (), {"record_stream": lambda self, stream: used.append(stream.name)})()
    for name in ("default", "second", "second"):
        with cuda.stream(cuda.current if name == "default" else cuda.make(name)), device.on_current_stream([tensor]):
            replay()
    assert cuda.log[:3] == ["replays on default", "second waits for default", "replays on second"]
    assert used == ["default", "second", "second"]


def test_a_failed_capture_leaves_the_stream(cuda):
    cuda.fails = True
    before = cuda.current
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graphs.Device(torch.device("cuda:0")).capture(lambda: None, lambda: False)
    assert cuda.current is before
    with ThreadPoolExecutor(1) as pool:  # which could not take the lock from this thread
        assert pool.submit(
            lambda: cuda_graphs._capturing.__enter__() or cuda_graphs._capturing.__exit__() or True
        ).result(10)


def test_what_is_stopped_is_not_captured(cuda):
    assert cuda_graphs.Device(torch.device("cuda:0")).capture(lambda: None, lambda: True) is None
    assert not any("captures" in line for line in cuda.log)


# Explainers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv2, self.conv3, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv1(x))))
        x = torch.relu(x + self.conv2(x))
        return self.fc(self.relu(self.conv3(x)).mean((2, 3)))


@pytest.fixture
def model():
    model = Net().double().eval()
    with torch.no_grad():
        model.fc.weight.mul_(20)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


EXPLAINERS = {
    "saliency": pyfast_xai.Saliency,
    "deconvnet": pyfast_xai.DeconvNet,
    "guided": pyfast_xai.GuidedBackprop,
    "input-x-gradient": pyfast_xai.InputXGradient,
    "smoothgrad": lambda model: pyfast_xai.SmoothGrad(model, n_samples=3),
    "integrated": lambda model: pyfast_xai.IntegratedGradients(model, n_steps=3),
    "grad-cam": pyfast_xai.GradCAM,
    "grad-cam on two": lambda model: pyfast_xai.GradCAM(model, layer=["pool", "conv3"]),
    "grad-cam++": pyfast_xai.GradCAMPlusPlus,
    "excitation": lambda model: pyfast_xai.ExcitationBackprop(model, layer="pool"),
    "contrastive": lambda model: pyfast_xai.ExcitationBackprop(model, layer="pool", contrastive=True),
    "guided grad-cam": pyfast_xai.GuidedGradCAM,
    "guided grad-cam on two": lambda model: pyfast_xai.GuidedGradCAM(model, layer=["pool", "conv3"]),
    "cam": pyfast_xai.CAM,
    "eigen-cam": pyfast_xai.EigenCAM,
    "eigen-cam on two": lambda model: pyfast_xai.EigenCAM(
        model, layer=["pool", "conv3"], component=[1, 2], center=True
    ),
    "clear": lambda model: pyfast_xai.CLEAR(model, candidates=2),
    "clear of all": lambda model: pyfast_xai.CLEAR(
        model, candidates=None, chunk_size=2, reduction="norm", scale="class"
    ),
    "clear of some": lambda model: pyfast_xai.CLEAR(model, candidates=[4, 0], project_from="logit", variant="linear"),
    "fixations": pyfast_xai.CNNFixations,
    "fixations of the authors": lambda model: pyfast_xai.CNNFixations(model, variant="authors"),
    "fgvis": lambda model: pyfast_xai.FGVis(model, n_iterations=10, patience=2, score_ratio=0.3, progress=False),
    "fgvis forward": lambda model: pyfast_xai.FGVis(model, n_iterations=3, defence="forward", progress=False),
}
every_explainer = pytest.mark.parametrize("explainer", EXPLAINERS)


def assert_same(result, expected):
    result, expected = (
        {f"{name} {i}": tensor for name in vars(item) for i, tensor in enumerate(tensors_in(getattr(item, name)))}
        for item in (result, expected)
    )
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not result[name].is_inference(), name
        torch.testing.assert_close(
            result[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda text, of=name: f"{of}: {text}"
        )


@every_explainer
@pytest.mark.parametrize("target", [None, [[1, 2], [3, 0], [4, 4]]], ids=["largest", "two"])
def test_explanations_are_the_same(device, model, images, explainer, target):
    plain, fast = EXPLAINERS[explainer](model), EXPLAINERS[explainer](model).accelerate()
    for batch in (images, images.flip(0), -images):
        assert_same(fast(batch, target), plain(batch, target))
    assert device.captures
    assert device.replays > 1


@every_explainer
def test_shapes_take_turns(device, model, images, explainer):
    plain, fast = EXPLAINERS[explainer](model), EXPLAINERS[explainer](model).accelerate()
    for batch in (images, images[:2], images, images[:2], images.flip(3), images[1:]):
        assert_same(fast(batch), plain(batch))
    assert device.captures >= 2


@every_explainer
def test_a_changed_model_is_captured_anew(device, model, images, explainer):
    fast = EXPLAINERS[explainer](model).accelerate()
    for _ in range(2):
        fast(images)
    captures = device.captures
    with torch.no_grad():
        model.conv1.weight.mul_(-1)
        model.bn.running_mean.add_(0.5)
    for _ in range(3):
        assert_same(fast(images), EXPLAINERS[explainer](model)(images))
    assert device.captures > captures


def test_a_changed_setting_is_captured_anew(device, model, images):
    fast = pyfast_xai.FGVis(model, n_iterations=4, progress=False).accelerate()
    fast(images)
    fast.lr, fast.similarity = 0.3, "softmax"
    plain = pyfast_xai.FGVis(model, n_iterations=4, lr=0.3, similarity="softmax", progress=False)
    assert_same(fast(images), plain(images))
    fast = pyfast_xai.ExcitationBackprop(model, layer="pool").accelerate()
    fast(images), fast(images)
    fast.contrastive = True
    assert_same(fast(images), pyfast_xai.ExcitationBackprop(model, layer="pool", contrastive=True)(images))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, r"target must lie in \[0, 5\), got 5"),
        ([0, -1, 2], r"target must lie in \[0, 5\), got -1"),
        ([0, 1], "one entry for each of 3 images"),
        ("cat", "got str"),
        ([0.5, 1, 2], "must hold integers"),
    ],
)
@pytest.mark.parametrize("explainer", ["saliency", "grad-cam", "excitation", "cam", "clear", "fixations"])
def test_bad_targets_are_refused_by_a_graph(device, model, images, explainer, target, message):
    fast = EXPLAINERS[explainer](model).accelerate()
    for _ in range(3):
        with pytest.raises(InputError, match=message):
            fast(images, target)
        fast(images, 1)


@pytest.mark.parametrize("target", [lambda logits: logits.square().sum(1), torch.ones(3, 5, dtype=torch.float64)])
def test_other_targets_are_walked_as_they_are(device, model, images, target):
    fast = pyfast_xai.Saliency(model).accelerate()
    for batch in (images, images.flip(0), -images):
        assert_same(fast(batch, target), pyfast_xai.Saliency(model)(batch, target))
    assert not device.captures


def test_a_model_that_cannot_be_replayed_is_not_captured(device, images):
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.mean((2, 3)) * self.calls

    class Decides(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    for model in (Counts().eval(), Decides().eval()):
        fast = pyfast_xai.Saliency(model).accelerate()
        for batch in (images, -images, images):
            fast(batch)
        assert isinstance(model, Counts) or torch.equal(
            fast(images).attribution, pyfast_xai.Saliency(model)(images).attribution
        )
        assert not device.captures


def test_a_model_on_two_devices_is_not_captured(device, images):
    class Leaves(nn.Module):
        def forward(self, x):
            x.to("meta").sum()
            return x.mean((2, 3))

    model = Leaves().eval()
    fast = pyfast_xai.Saliency(model).accelerate()
    for batch in (images, -images, images):
        assert_same(fast(batch), pyfast_xai.Saliency(model)(batch))
    assert not device.captures


def test_a_copy_has_graphs_of_its_own(device, model, images):
    fast = pyfast_xai.GuidedBackprop(model).accelerate()
    for _ in range(2):
        fast(images)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.model.conv2.weight.neg_()
    for _ in range(2):
        assert_same(other(images), pyfast_xai.GuidedBackprop(other.model)(images))
        assert_same(fast(images), pyfast_xai.GuidedBackprop(model)(images))


def test_the_outputs_are_heard_from_a_graph(device, model, images):
    served = Explained(model, pyfast_xai.Saliency(model).accelerate())
    for batch in (images, images + 1, images - 1):
        logits, explanation = served(batch)
        torch.testing.assert_close(logits, model(batch))
        assert_same(explanation, pyfast_xai.Saliency(model)(batch))
    assert device.captures == 1
    assert device.replays == 2


def test_a_graph_runs_to_the_end(device, model, images):
    plain, fast = pyfast_xai.EigenCAM(model), pyfast_xai.EigenCAM(model).accelerate()
    for batch in (images, images + 1, images - 1):
        with plain.run_whole_model():
            expected = plain(batch)
        with fast.run_whole_model():
            result = fast(batch)
        assert_same(result, expected)
        torch.testing.assert_close(result.logits, model(batch))
    assert (device.captures, device.replays) == (1, 2)


def test_a_graph_goes_with_its_explainer(device, model, images, monkeypatch):
    """At once, without the garbage collector, which knows nothing of the memory of a device."""
    capture = Pretended.capture

    def captures_alone(self, run, stopped):  # as a graph, which does not hold the function
        result, _ = capture(self, run, stopped)
        return result, lambda: None

    monkeypatch.setattr(Pretended, "capture", captures_alone)
    fast = pyfast_xai.Saliency(model).accelerate()
    for _ in range(2):
        fast(images)
    (graph,) = fast.accelerated_model._graphs()._graphs.values()
    gone = weakref.ref(graph)
    gc.disable()
    try:
        del fast, graph
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("every", [4])
def test_fgvis_looks_now_and_then(device, model, images, monkeypatch, every):
    images = torch.cat([images, -images, 2 * images])
    made = {"n_iterations": 22, "patience": 2, "score_ratio": 0.3, "progress": False}
    expected = pyfast_xai.FGVis(model, **made)(images)
    assert expected.iterations.unique().numel() > 2
    output = []
    monkeypatch.setitem(fgvis.LOOKS, "cpu", every)
    made["progress"] = output.append
    for explainer in (pyfast_xai.FGVis(model, **made), pyfast_xai.FGVis(model, **made).accelerate()):
        output.clear()
        assert_same(explainer(images), expected)
        assert [progress.done for progress in output][:-1] == list(range(every, output[-1].done, every))
        assert output[-1].details["images"] == 0 or output[-1].done == 22
