"""A child that is forked while another thread explains: it explains, too, and finds the process as it was."""

import importlib
import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.modules import module as process_wide

import pyfast_xai
from pyfast_xai.forks import ForkSafeLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Waits(nn.Module):
    """Stops in the middle of its forward, in one thread."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.thread, self.inside, self.go_on = None, threading.Event(), threading.Event()

    def forward(self, x):
        x = self.conv(x).relu()
        if threading.current_thread() is self.thread:
            self.inside.set()
            self.go_on.wait(60)
        return self.attention(x.mean((2, 3)))


def in_a_child(check):
    """Whether `check` returns true in a forked child within a minute."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        torch.set_num_threads(1)  # the OpenMP threads of the parent are not here, and PyTorch would wait for them
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_child_explains_while_a_thread_of_the_parent_does(accelerated):
    torch.manual_seed(0)
    model, images = Waits().eval(), torch.rand(2, 3, 8, 8)
    explainer = pyfast_xai.GradCAM(model, layer="conv")
    expected = explainer(images).heatmap
    if accelerated:
        explainer.accelerate()
    model.thread = threading.Thread(target=explainer, args=(images,))
    model.thread.start()
    assert model.inside.wait(60)
    hooks = process_wide._global_forward_hooks, process_wide._global_forward_pre_hooks

    def check():
        if hooks[0] or hooks[1] or not torch.backends.mha.get_fastpath_enabled():
            return False
        torch.testing.assert_close(explainer(images).heatmap, expected)
        return not (hooks[0] or hooks[1])

    try:
        assert in_a_child(check)
        assert hooks[0], "the recording of the parent goes on"
    finally:
        model.go_on.set()
        model.thread.join()
    assert not hooks[0]


def test_a_lock_is_free_in_a_child_unless_the_thread_that_forked_holds_it():
    lock, other = ForkSafeLock(), ForkSafeLock()
    used, done = threading.Event(), threading.Event()

    def hold():
        with other:
            used.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    used.wait(60)

    def check():
        with other, other:
            pass
        return True

    def leaves():
        with lock:
            return in_a_child(check)

    assert leaves()
    with lock:
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
    if not child:  # its block ended without a word
        os._exit(0)
    done.set()
    thread.join()


def test_a_module_that_another_thread_imports_can_be_imported_in_a_child(tmp_path, monkeypatch):
    """As the first explanation imports parts of PyTorch."""
    (tmp_path / "slow_part.py").write_text(
        "import threading\nstarted, go_on = threading.Event(), threading.Event()\n"
        "import sys\nsys.slow_part = started, go_on\nstarted.set()\ngo_on.wait(60)\n"
    )
    monkeypatch.setattr(torch, "__path__", [*torch.__path__, str(tmp_path)])
    thread = threading.Thread(target=importlib.import_module, args=("torch.slow_part",))
    thread.start()
    while not hasattr(sys, "slow_part"):
        time.sleep(0.01)
    started, go_on = sys.slow_part
    started.wait(60)
    threading.Timer(0.5, go_on.set).start()
    try:
        assert in_a_child(lambda: importlib.import_module("torch.slow_part") is not None)
    finally:
        go_on.set()
        thread.join()
        del sys.slow_part, sys.modules["torch.slow_part"]


def test_a_kernel_of_numba_runs_in_a_child():
    numba = pytest.importorskip("pyfast_xai.kernels.numba")
    guarded = numba.one_thread(lambda: True)
    used, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=numba.one_thread(lambda: (used.set(), done.wait(60))))
    thread.start()
    used.wait(60)
    try:
        assert in_a_child(guarded)
    finally:
        done.set()
        thread.join()
