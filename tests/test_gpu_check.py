"""The one command for a machine with a GPU, rehearsed without one, and its parts on their own."""

import csv
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPT = BENCH / "gpu_check.py"

if not SCRIPT.is_file():
    pytest.skip("bench/ is not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def part():
    """A module of the script."""
    sys.path.insert(0, str(BENCH))
    yield lambda name: importlib.import_module(f"gpu.{name}")
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "results"
    # From another folder and without the package on the path: it brings its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--no-build", "--out", str(out)]
    cwd = out.parent
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


def test_a_rehearsal_runs_every_step(rehearsal):
    printed, out = rehearsal
    result = json.loads((out / "gpu.json").read_text())
    states = {step["name"]: step["state"] for step in result["steps"]}
    assert list(states) == [
        *("tests, triton: max_pool", "tests, explainers: equal the CPU"),
        *("kernels", "explainers, resnet50", "small calls"),
    ]
    without_triton = {"unavailable"} if importlib.util.find_spec("triton") is None else set()
    assert set(states.values()) <= {"done"} | without_triton
    assert result["rehearsal"] is True
    assert result["versions"]["torch"] == torch.__version__
    assert result["goals"] == []
    assert "kernels" in printed
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.csv", "gpu.log"}


def test_a_rehearsal_measures_every_op_and_some_explainers(rehearsal):
    from pyfast_xai.ops.registry import OPS

    _, out = rehearsal
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    assert not [row for row in rows if "error" in row or row.get("right") is False]
    ops = {(row["name"], row["backend"]) for row in rows if row["kind"] == "op"}
    on_device = {name for name, op in OPS.items() if op.missing("triton", "cuda") is None}
    assert on_device <= {name for name, backend in ops if backend == "reference"} <= set(OPS)
    assert all(row["median_ms"] > 0 for row in rows)
    explained = {(row["name"], row["backend"]) for row in rows if row["kind"] == "explainer"}
    assert explained == {(name, by) for name in ("eigen-cam", "saliency") for by in ("best", "reference")}
    assert {row["name"] for row in rows if row["kind"] == "ceiling"} == {"copy", "bfloat16", "float32"}


def test_the_table_has_the_rows_of_the_json(rehearsal):
    _, out = rehearsal
    result = json.loads((out / "gpu.json").read_text())
    with (out / "gpu.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in result["rows"]]
    assert {row["commit"] for row in table} == {result["commit"]}
    assert {row["date"] for row in table} == {result["date"]}
    assert all(float(row["median_ms"]) > 0 for row in table)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_rows_are_taken_by_a_command(rehearsal, tmp_path):
    gpu_rows = runpy.run_path(str(BENCH / "gpu_rows.py"))
    data, results = tmp_path / "gpu.csv", tmp_path / "results"
    with pytest.raises(SystemExit, match="of a rehearsal on a CPU"):
        gpu_rows["take"](rehearsal[1], data)
    shutil.copytree(rehearsal[1], results)
    facts = json.loads((results / "gpu.json").read_text())
    (results / "gpu.json").write_text(json.dumps(facts | {"rehearsal": False}))
    count = gpu_rows["take"](results, data)
    assert count
    before = data.read_text()
    assert gpu_rows["take"](results, data) == count  # the same rows replace themselves
    assert data.read_text() == before


def test_without_a_device_it_says_so(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check needs a CUDA device")
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Steps


def run(part, tmp_path, code, limit=20.0):
    return part("steps").run("one", [sys.executable, "-c", code], limit, tmp_path / "log", {"GIVEN": "7"}, tmp_path)


def test_a_step_that_ends_well(part, tmp_path):
    outcome = run(part, tmp_path, "import os; print(os.environ['GIVEN'], os.getcwd())")
    assert (outcome.state, outcome.bad) == ("done", False)
    assert (tmp_path / "log").read_text().split() == ["7", str(tmp_path)]


def test_a_step_that_raises(part, tmp_path):
    outcome = run(part, tmp_path, "print('before'); raise ValueError('what is wrong')")
    assert (outcome.state, outcome.bad) == ("failed", True)
    assert outcome.detail.startswith("exit code 1; ")
    assert outcome.detail.endswith("ValueError: what is wrong")


def test_a_step_that_crashes(part, tmp_path):
    outcome = run(part, tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert outcome.bad
    assert outcome.detail.startswith("signal SIGSEGV")


def test_a_step_that_hangs_is_ended_with_all_that_it_started(part, tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = run(part, tmp_path, code, limit=1.5)
    assert (outcome.state, outcome.bad) == ("timed out", True)
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_a_step_without_time_or_program(part, tmp_path):
    assert run(part, tmp_path, "", limit=0.5).state == "skipped"
    missing = part("steps").run("one", ["/no/such/program"], 9, tmp_path / "log", {}, tmp_path)
    assert (missing.state, missing.bad) == ("unavailable", False)


def test_rows_survive_a_crash_in_the_middle(part, tmp_path):
    rows = part("steps").Rows(tmp_path / "rows.jsonl")
    assert rows.read() == []
    rows.add(name="a", median_ms=1.5)
    rows.add(name="b", right=None)
    with rows.path.open("a") as file:
        file.write('{"name": "c", "med')
    assert rows.read() == [{"name": "a", "median_ms": 1.5}, {"name": "b", "right": None}]


# Goals


def measured(**row):
    return {"backend": "best", "dtype": "bfloat16", **row}


def goal(part, rows, name):
    return next(item for item in part("goals").goals(rows) if item.name == name)


def test_goals_nobody_measured_are_neither_reached_nor_missed(part):
    assert all(item.value is None and item.reached is None for item in part("goals").goals([]))


def test_a_goal_goes_by_its_worst_row(part):
    rows = [measured(kind="op", name="relu_forward", backend="triton", share=item) for item in (0.95, 0.84, 0.9)]
    assert (goal(part, rows, "relu_forward").value, goal(part, rows, "relu_forward").reached) == (0.84, False)
    rows += [measured(kind="op", name="relu_forward", backend="reference", share=0.1)]
    assert goal(part, [*rows[:1], *rows[2:]], "relu_forward").reached is True


def test_goals_of_explainers_by_network(part):
    rows = [measured(kind="explainer", name="fgvis", network="vgg16", forwards=2.3)]
    rows += [measured(kind="explainer", name="fgvis", network="vgg16", forwards=9.0, backend="reference")]
    rows += [measured(kind="explainer", name="fgvis", network="resnet50", error="out of memory")]
    assert goal(part, rows, "FGVis, an iteration, vgg16").reached is True
    assert goal(part, rows, "FGVis, an iteration, resnet50").reached is None


def test_goals_beside_others_are_ratios_of_the_same_kind(part):
    common = {"kind": "explainer", "name": "saliency", "network": "vgg16", "dtype": "float32"}
    rows = [measured(**common, median_ms=10.0), {**common, "backend": "captum", "median_ms": 120.0}]
    rows += [measured(kind="explainer", name="saliency", network="vgg16", median_ms=1.0)]
    assert goal(part, rows, "saliency, beside captum").value == 12
    matrices = {"kind": "op", "name": "leading_singular", "shape": "256 of 49x2048"}
    rows = [
        {**matrices, "backend": "triton", "median_ms": 2.0},
        {**matrices, "backend": "torch.linalg.svd", "median_ms": 90.0},
    ]
    assert goal(part, rows, "leading_singular, 256 of 49x2048").value == 45
    assert goal(part, rows, "leading_singular, 256 of 49x2048").reached is False


def test_a_share_is_of_the_longer_of_moving_and_computing():
    from pyfast_xai.proof.networks import share

    ceilings = {"copy": 1e12, "float32": 1e13}
    assert share(10**9, 10**6, 2e-3, ceilings) == (0.5, "copy")
    assert share(10**6, 10**10, 4e-3, ceilings) == (0.25, "float32")
    assert share(1, 1, 1.0, {}) == (None, "")


# Machines without pytest

TESTS = """
import pytest, torch
pytestmark = pytest.mark.cuda

@pytest.fixture(params=[1, 2])
def number(request, monkeypatch):
    monkeypatch.setattr(torch, "changed", request.param)
    yield request.param
    assert torch.changed == request.param

@pytest.fixture(autouse=True)
def around():
    torch.around = True
    yield
    del torch.around

torch.changed = 0

def test_plain():
    assert torch.around and torch.changed == 0

@pytest.mark.parametrize("a", [3, pytest.param(4, id="four")], ids=str)
@pytest.mark.parametrize(("b", "c"), [(5, 6), (7, 8)])
def test_product(a, b, c, number):
    assert a in (3, 4) and c == b + 1 and torch.changed == number
    assert not (a == 4 and b == 7 and number == 2), "the one that fails"

def test_raises():
    with pytest.raises(ValueError, match="some .* words") as raised:
        raise ValueError("some other words")
    assert "other" in str(raised.value)

def test_that_nothing_was_raised_is_a_failure():
    with pytest.raises(AssertionError):
        with pytest.raises(ValueError):
            pass

def test_skips():
    pytest.skip("not here")

@pytest.mark.skipif(True, reason="never")
def test_never():
    raise AssertionError
"""


def test_tests_run_without_pytest(tmp_path):
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, str(SCRIPT), "--plain-tests", str(tmp_path / "test_some.py")]
    done = subprocess.run([*command, ""], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "10 passed, 1 failed, 2 skipped"
    assert "FAILED test_product[4-7-8-2]" in done.stdout.replace("four", "4")
    assert "the one that fails" in done.stdout
    chosen = subprocess.run([*command, "test_plain or test_raises"], capture_output=True, text=True, check=False)
    assert (chosen.returncode, chosen.stdout.splitlines()[-1]) == (0, "2 passed, 0 failed, 0 skipped")


def test_every_job_names_tests_that_are_there(part):
    for job in (*part("agree").JOBS, *part("agree").REHEARSED):
        text = (BENCH.parent / job.path).read_text()
        names = [line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def test_")]
        for word in job.selection.split(" or "):
            assert any(word in name for name in names), f"{job.name}: {word}"


def test_stand_ins_have_the_layers_of_torchvision(part):
    models = pytest.importorskip("torchvision.models")
    for name in part("architectures").NETWORKS:
        with torch.device("meta"):
            actual, other = part("architectures").HERE[name](), models.get_model(name, weights=None)
        shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (actual, other)]
        assert shapes[0] == shapes[1]
