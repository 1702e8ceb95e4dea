import os
import random
import sys
from pathlib import Path

import cuda_emulation
import numpy as np
import pytest
import torch
from skips_reported import *  # noqa: F403 hooks
from torch.utils._python_dispatch import _disable_current_modes

from pyfast_xai import ops
from pyfast_xai.kernels.reference import leading_singular
from pyfast_xai.ops.registry import OPS

# Contests are off, so that the choice of kernels does not depend on this machine; their own tests turn them on.
os.environ["PYFAST_XAI_TUNING"] = "off"


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poison(tensor):
    # Not for fake, meta or wrapped tensors: they have no memory of their own.
    if type(tensor) is torch.Tensor and tensor.device.type != "meta":
        # A tape must not record it either.
        with _disable_current_modes():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
    return tensor


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What pyfast_xai allocates without a value holds NaN or a huge number: an element never written shows."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if torch.compiler.is_compiling():
                return tensor
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(tensor) if caller.split(".")[0] == "pyfast_xai" else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


BATCHED = "reference on a device"  # plain PyTorch where the solvers of PyTorch would wait


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        emulated = metafunc.definition.path.stem.removeprefix("test_") in cuda_emulation.OPS
        names = ["reference", "numba", "cpp", *([cuda_emulation.NAME] if emulated else [])]
        if metafunc.definition.path.stem == "test_leading_singular":
            names.append(BATCHED)
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request):
    """Name of the backend that serves the test on the CPU.

    In `test_<op>.py` it is there if it has that op, elsewhere if it has any. The CUDA C++ kernels are emulated.
    """
    name, tested = request.param, request.path.stem.removeprefix("test_")
    if name == cuda_emulation.NAME:
        with cuda_emulation.serving():
            yield name
        return
    if name == BATCHED:
        request.getfixturevalue("monkeypatch").setattr(leading_singular, "_solvers_wait", lambda device: True)
        with ops.backend("reference"):
            yield name
        return
    served = [OPS[tested]] if tested in OPS else list(OPS.values())
    missing = [op.missing(name, "cpu") for op in served]
    if all(missing):
        pytest.skip(f"{served[0].name} on {name}: {missing[0]}")
    with ops.backend(name):
        yield name


@pytest.fixture(scope="session")
def real_data():
    """Folder of real images and weights."""
    folder = Path(os.environ.get("PYFAST_XAI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set PYFAST_XAI_DATA")
    return folder
