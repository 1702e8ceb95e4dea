import importlib
import inspect
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from pyfast_xai import ops
from pyfast_xai.errors import BackendError, InputError
from pyfast_xai.ops import registry
from pyfast_xai.ops.registry import BACKENDS, OPS

DEFAULT = registry._forced.get()
POINTS = torch.tensor([4, 1, 4])


@pytest.fixture
def served_by(monkeypatch):
    """Names of the Python backends asked, in order; every one of them answers with the reference."""
    names = []
    original = registry.Op._python_kernel

    def kernel(op, name):
        names.append(name)
        return original(op, "reference")

    monkeypatch.setattr(registry.Op, "_python_kernel", kernel)
    monkeypatch.setattr(registry.Op, "missing", lambda op, name, device: None)
    return names


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "auto"])
def test_a_named_backend_works_or_says_why_not(name):
    missing = OPS["points_union"].missing(name, "cpu")
    with ops.backend(name):
        if missing is None:
            assert ops.points_union(POINTS, 5).tolist() == [1, 4]
        else:
            with pytest.raises(BackendError, match=f"'{name}' cannot serve points_union on cpu: {missing}"):
                ops.points_union(POINTS, 5)


def test_a_backend_for_another_device_is_refused():
    with ops.backend("triton"), pytest.raises(BackendError, match="it has no kernels for cpu"):
        ops.points_union(POINTS, 5)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="reference, numba, cpp, triton, cuda, got 'fortran'"):
        ops.backend("fortran")


def test_the_reference_serves_every_op_everywhere():
    assert all(op.missing("reference", device) is None for op in OPS.values() for device in ("cpu", "cuda", "meta"))


def test_nested_backends_are_restored(served_by):
    with ops.backend("reference"):
        with ops.backend("numba"):
            ops.points_union(POINTS, 5)
        ops.points_union(POINTS, 5)
    assert served_by == ["numba", "reference"]
    assert registry._forced.get() == DEFAULT


def test_an_exception_restores_the_backend():
    def fail():
        with ops.backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert registry._forced.get() == DEFAULT


def test_one_context_can_be_entered_twice(served_by):
    numba = ops.backend("numba")
    with numba, ops.backend("reference"), numba:
        ops.points_union(POINTS, 5)
    assert served_by == ["numba"]
    assert registry._forced.get() == DEFAULT


def test_a_decorated_function_runs_on_its_backend(served_by):
    @ops.backend("numba")
    def union():
        return ops.points_union(POINTS, 5)

    assert union().tolist() == [1, 4]
    assert served_by == ["numba"]


def test_auto_undoes_an_outer_choice(served_by):
    with ops.backend("reference"), ops.backend("auto"):
        ops.points_union(POINTS, 5)
    assert "reference" not in served_by


def test_a_choice_stays_in_its_thread():
    recorded = {}
    inside = threading.Barrier(2)

    def work(name):
        recorded[name, "before"] = registry._forced.get()
        with ops.backend(name):
            inside.wait(10)
            recorded[name, "inside"] = registry._forced.get()
            inside.wait(10)

    with ops.backend("cpp"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "numba")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert registry._forced.get() == "cpp"
    assert recorded == {
        ("reference", "before"): DEFAULT,
        ("numba", "before"): DEFAULT,
        ("reference", "inside"): "reference",
        ("numba", "inside"): "numba",
    }


def _python(code, backend):
    environment = os.environ | {"PYFAST_XAI_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_a_backend():
    code = """
import torch
from pyfast_xai import ops
from pyfast_xai.errors import BackendError
try:
    ops.points_union(torch.tensor([1]), 5)
except BackendError as error:
    print(error)
"""
    done = _python(code, "triton")
    assert done.returncode == 0, done.stderr
    assert "backend 'triton' cannot serve points_union on cpu" in done.stdout


def test_an_unknown_backend_in_the_environment_is_refused():
    done = _python("import pyfast_xai.ops", "fortran")
    assert done.returncode != 0
    assert "InputError: backend must be one of auto, reference" in done.stderr


def test_report_has_every_op_with_a_reason():
    table = {(cell.op, cell.device): cell for cell in ops.report()}
    assert {op for op, _ in table} == set(OPS)
    for op in OPS.values():
        cell = table[op.name, "cpu"]
        assert op.missing(cell.backend, "cpu") is None
        assert (cell.backend, cell.reason) == op.served("cpu")
        assert cell.reason


def test_report_names_what_was_passed_over(monkeypatch):
    monkeypatch.setattr(
        registry.Op, "missing", lambda op, name, device: None if name == "reference" else f"{name} is away"
    )
    assert OPS["points_union"].served("cpu") == ("reference", "cpp: cpp is away; numba: numba is away")


def test_every_public_op_is_registered():
    assert set(OPS) <= set(ops.__all__)


def test_a_fallback_is_a_warning_once_for_all_ops(monkeypatch, caplog):
    monkeypatch.setattr(registry.Op, "missing", lambda op, name, device: None if name == "reference" else "away")
    monkeypatch.setattr(registry, "_warned_devices", set())
    registry.Op._fallback_kernel.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="pyfast_xai"):
            for _ in range(3):
                assert OPS["points_union"]._fall_back(POINTS, 5).tolist() == [1, 4]
                assert OPS["sign_bits"]._fall_back(torch.ones(1, 3)) is not None
    finally:
        registry.Op._fallback_kernel.cache_clear()
    why = "on cpu runs on backend reference (cpp: away; numba: away)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"points_union {why}; `pyfast-xai backends` lists all ops"),
        ("INFO", f"sign_bits {why}"),
    ]


def test_a_named_backend_is_not_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="pyfast_xai"), ops.backend("reference"):
        ops.points_union(POINTS, 5)
    assert not caplog.records


@pytest.mark.parametrize("name", ["reference", "numba"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_python_kernels_take_what_the_schema_says(op, name):
    missing = op.missing(name, "cpu")
    if missing is not None:
        pytest.skip(missing)
    kernel = getattr(importlib.import_module(f"pyfast_xai.kernels.{name}.{op.name}"), op.name)
    assert list(inspect.signature(kernel).parameters) == [a.name for a in op.overload._schema.arguments]
