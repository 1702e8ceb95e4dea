"""A recording leaves the process as it was, whatever other threads do meanwhile."""

import logging
import os
import random
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as process_wide
from torch.utils import _python_dispatch

from pyfast_xai import GradCAM
from pyfast_xai.explainers import Saliency
from pyfast_xai.tape import isolation, module_hooks, record, shared_state

import torch._dynamo  # isort: skip  # so that there is something to switch off

HOOKS = [name for name in vars(process_wide) if name.startswith("_global") and "hooks" in name]
FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]


def process():
    """All that a recording could switch for everybody, and what it could leave on this thread."""
    return {
        "stance": torch._dynamo.eval_frame._stance,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "hooks": [list(getattr(process_wide, name) or ()) for name in HOOKS],
        "inside a mode": [getattr(_python_dispatch, name) for name in FLAGS],
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "keys": [repr(torch._C._dispatch_tls_local_exclude_set()), repr(torch._C._dispatch_tls_local_include_set())],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "tracing": torch._guards.TracingContext.try_get(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's": random.getstate(),
        "NumPy's": repr(np.random.get_state()),
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deriving": module_hooks._following,
    }


class Net(nn.Module):
    """Draws, writes to its buffer, has the fused fast path of PyTorch, and raises when it is told to."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, fails=False):
        self.calls += 1
        x = self.conv(x) * self.calls
        if fails:
            raise ZeroDivisionError("from the middle")
        x = F.dropout(x, 0.1, training=True)
        return self.head(self.encoder(x.flatten(2).mT).mean(1))


def run_threads(*functions):
    """Run functions at once, and raise what any of them raises."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_many_threads_leave_the_process_as_it_was():
    models = [Net().eval() for _ in range(3)]
    images = torch.randn(2, 3, 16, 16)
    expected = [record(model, images).result for model in models]
    before = process()
    barrier = threading.Barrier(8)

    def work(number):
        threads_before = process()
        barrier.wait(30)
        for call in range(12):
            model = models[(number + call) % 3]
            if (number + call) % 4 == 0:
                with pytest.raises(ZeroDivisionError):
                    record(model, images, True)
            elif (number + call) % 4 == 1:
                assert record(model, images, until="conv").reached is not None
            else:
                # Each draws the numbers, and counts the calls, of a forward that is alone.
                assert torch.equal(record(model, images).result, expected[models.index(model)])
        after = process()
        for name in ("modes", "keys", "grad", "autocast", "tracing"):
            assert after[name] == threads_before[name]

    run_threads(*(lambda number=number: work(number) for number in range(8)))
    assert process() == before
    assert all(model.calls == 0 for model in models)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_lifetimes_that_overlap(first_ends_first):
    """The first recording begins before the second, and ends before or after it."""
    steps = {name: threading.Event() for name in ("first is in", "second is in", "first may end", "second may end")}

    class Waits(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            steps[f"{self.name} is in"].set()
            assert steps[f"{self.name} may end"].wait(30)
            return x.relu()

    images = torch.randn(1, 3, 4, 4)
    before = process()
    first = threading.Thread(target=record, args=(Waits("first"), images))
    second = threading.Thread(target=record, args=(Waits("second"), images))
    first.start()
    assert steps["first is in"].wait(30)
    second.start()
    assert steps["second is in"].wait(30)
    for thread, name in [(first, "first"), (second, "second")][:: 1 if first_ends_first else -1]:
        steps[f"{name} may end"].set()
        thread.join()
    assert process() == before


def test_other_threads_compile_while_one_records():
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert done.wait(60)
            return x.relu()

    thread = threading.Thread(target=record, args=(Waits(), torch.randn(1, 3, 4, 4)))
    thread.start()
    assert inside.wait(30)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    ops = []

    class Watch(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ops.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    try:
        torch.compile(lambda x: x.sin() * 2, backend=backend)(torch.randn(3))
        with torch.no_grad(), Watch():
            encoder(torch.randn(2, 3, 8))
    finally:
        done.set()
        thread.join()
        torch._dynamo.reset()
    assert len(graphs) == 1
    assert "aten::_transformer_encoder_layer_fwd" in ops  # the fast path is theirs


@pytest.mark.parametrize("stance", ["default", "force_eager", "eager_on_recompile"])
def test_a_stance_of_the_user_stays(stance):
    model, images = Net().eval(), torch.randn(2, 3, 16, 16)
    with torch.compiler.set_stance(stance):
        before = process()
        record(model, images)
        assert process() == before


def test_a_function_compiled_in_the_middle_of_a_model_runs_as_written():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def inner(x):
        return x.sin() * 2

    class Model(nn.Module):
        def forward(self, x):
            return inner(x) + torch.compile(torch.cos, backend=backend)(x)

    images = torch.randn(1, 3, 4, 4)
    inner(images)
    assert graphs
    graphs.clear()
    assert [node.name for node in record(Model(), images)] == ["sin", "mul", "cos", "add"]
    assert not graphs
    torch._dynamo.reset()


def test_fused_attention_is_taken_apart_while_it_is_recorded_and_in_a_plain_forward():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens = torch.randn(2, 3, 8)
    assert any("scaled_dot_product_attention" in node.name for node in record(model, tokens))


def test_weights_cast_by_autocast_can_be_trained_in_the_same_region():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        record(model, images)
        Saliency(model).forward(images)
        model(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("hook", ["register_hook", "retain_grad"])
def test_a_model_may_hook_its_tensors(hook, caplog):
    isolation._warn_hooks_do_not_run.cache_clear()

    class Hooks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x).relu()
            if hook == "retain_grad":
                y.retain_grad()
            else:
                handle = y.register_hook(lambda grad: grad)
                handle.remove()
                y.register_hook(lambda grad: grad)
            return y.mean((2, 3))

    model, images = Hooks().eval(), torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        for _ in range(2):
            result = record(model, images).result
    assert torch.equal(result, model(images).detach())
    assert len(caplog.messages) == (hook == "register_hook")
    assert GradCAM(model, layer="conv")(images).heatmap.isfinite().all()


READS = {
    "numpy": lambda x: x.numpy().sum(),
    "asarray": lambda x: np.asarray(x).sum(),
    "detached": lambda x: x.detach().cpu().numpy().sum(),
    "tolist": lambda x: x.flatten().tolist()[0],
    "dlpack": lambda x: np.from_dlpack(x).sum(),
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "address": lambda x: x.data_ptr(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_numbers_that_leave_pytorch_may_decide(read):
    class Decides(nn.Module):
        def forward(self, x):
            return x.relu() if read(x * 2) > 0 else -x

    class DecidesOnItsOwn(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            return x.relu() if read(self.weight) > 0 else -x

    assert record(Decides(), torch.randn(1, 3, 4, 4)).not_replayable is not None
    assert record(DecidesOnItsOwn(), torch.randn(1, 3, 4, 4)).not_replayable is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_child_forked_while_others_record_can_record():
    model, images = Net().eval(), torch.randn(1, 3, 16, 16)
    torch.set_num_threads(1)
    expected = record(model, images).result
    stop = threading.Event()

    def work():
        while not stop.is_set():
            record(model, images)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a child that hangs
                good = model.calls == 0 and torch.equal(record(model, images).result, expected)
                good = good and module_hooks._following == 0 and not any(process()["hooks"])
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    with shared_state._exclusive:  # nobody holds it
        pass
