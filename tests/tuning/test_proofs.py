"""Kernels are proven in a process of their own, whatever they do to it; only those that are right and fast serve."""

import json
import os
import subprocess
import sys

import pytest
import stand_in_device
import torch

from pyfast_xai.ops.registry import OPS
from pyfast_xai.tuning import Verdicts, proofs
from pyfast_xai.tuning.proofs import Proofs

CPU = torch.device("cpu")
WORDS = {
    "wrong": "it gives other numbers for",
    "dies": "it was ended by SIGSEGV",
    "hangs": "it did not end within 4 seconds",
    "raises": "RuntimeError: no kernel image is available for",
}


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")


def prove(*names, verdicts=None, listen=lambda message: None):
    actual = Proofs(verdicts or Verdicts(None, {}), stand_in_device.program(*names), time_limit=4, small=True)
    return actual, actual.prove_all({"points_union": names}, CPU, listen, rounds=3)


@pytest.fixture(scope="module")
def of_all():
    """A proof of kernels of every kind, one after another."""
    message = []
    actual, proven = prove("prints", "slower", *WORDS, listen=message.append)
    return actual, proven["points_union"], message


@pytest.mark.parametrize("name", WORDS)
def test_a_bad_kernel_is_not_chosen_and_the_table_says_why(of_all, name):
    actual, verdict, _ = of_all
    against, praise = actual.judge(verdict, "points_union", name, CPU)
    assert against.startswith(WORDS[name])
    assert praise == ""
    assert "\n" not in against
    assert name not in verdict.seconds


def test_a_slow_kernel_is_not_chosen(of_all):
    actual, verdict, _ = of_all
    against, _ = actual.judge(verdict, "points_union", "slower", CPU)
    assert against == "correct, but prints is faster"
    alone = proofs.Verdict({name: verdict.seconds[name] for name in ("reference", "slower")})
    against, _ = actual.judge(alone, "points_union", "slower", CPU)
    assert against.endswith("times as fast as plain PyTorch")
    assert float(against.split()[0]) < 1


def test_a_right_and_fast_kernel_is_chosen_whatever_it_prints(of_all):
    actual, verdict, _ = of_all
    assert verdict.fastest() == "prints"
    against, praise = actual.judge(verdict, "points_union", "prints", CPU)
    assert against is None
    assert praise.startswith(f"proven on this device on {verdict.date[:10]}, ")


def test_rows_say_how_long_it_took(of_all):
    _, verdict, message = of_all
    rows = {row["backend"]: row for row in message if row["kind"] == "row"}
    assert set(rows) == {"reference", "prints", "slower"} == set(verdict.seconds)
    assert all(row["median_ms"] > 0 and row["bytes"] > 0 for row in rows.values())
    assert rows["slower"]["median_ms"] >= 50
    assert rows["prints"]["ratio"] > 1 > rows["slower"]["ratio"]


def test_a_process_that_does_not_start_proves_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    actual, proven = prove("prints")
    assert proven == {}
    assert actual.verdicts.all() == {}
    against, _ = actual.judge(None, "points_union", "prints", CPU)
    assert against.startswith("it could not be proven (no process could be started (")


def test_a_process_that_ends_at_once_proves_nothing():
    actual = Proofs(Verdicts(None, {}), ("-c", "raise SystemExit('no driver')"), small=True)
    assert actual.prove_all({"points_union": ["prints"], "sign_bits": ["prints"]}, CPU) == {}
    for op in ("points_union", "sign_bits"):
        assert actual.judge(None, op, "prints", CPU)[0] == "it could not be proven (no driver)"


def test_a_failed_proof_is_not_tried_at_every_call(monkeypatch):
    actual = Proofs(Verdicts(None, {}), ("-c", "raise SystemExit('no driver')"), small=True)
    assert actual.prove("points_union", ["prints"], CPU) is None
    monkeypatch.setattr(actual, "prove_all", lambda *args, **kwargs: pytest.fail("tried again"))
    assert actual.prove("points_union", ["prints"], CPU) is None


def test_nothing_is_proven_with_tuning_off(monkeypatch):
    actual = Proofs(Verdicts(None, {}), ("-c", "raise SystemExit(1)"))
    monkeypatch.setenv("PYFAST_XAI_TUNING", "off")
    monkeypatch.setattr(actual, "prove_all", lambda *args, **kwargs: pytest.fail("started"))
    assert actual.prove("points_union", ["prints"], CPU) is None
    assert actual.judge(None, "points_union", "prints", CPU)[0] == "PYFAST_XAI_TUNING=off leaves it unproven"


def test_a_kernel_that_came_later_is_proven(tmp_path):
    actual, proven = prove("prints", verdicts=Verdicts(tmp_path, {}))
    assert actual.find("points_union", ["prints"], CPU) == proven["points_union"]
    assert actual.find("points_union", ["prints", "slower"], CPU) is None
    assert Proofs(Verdicts(tmp_path, {})).find("points_union", ["prints"], CPU) == proven["points_union"]


def test_kernels_that_were_written_anew_are_proven_anew(tmp_path, monkeypatch):
    actual, _ = prove("prints", verdicts=Verdicts(tmp_path, {}))
    monkeypatch.setattr(proofs, "_fingerprint", lambda: "another")
    assert actual.find("points_union", ["prints"], CPU) is None


# A user's process, which knows nothing of proofs.

USER = """
import json, sys, torch, stand_in_device
names = sys.argv[1:]
stand_in_device.install(*names)
from pyfast_xai import ops
from pyfast_xai.tuning import Verdicts, proofs
own = proofs.Proofs(Verdicts(proofs.cache_folder(), proofs.environment()), stand_in_device.program(*names), 4, True)
proofs.machine_proofs = lambda: own
starts = []
messages = own._messages
own._messages = lambda request: (starts.append(1), messages(request))[1]
found = [ops.points_union(torch.tensor([4, 1, 4]), 5).tolist() for _ in range(3)]
served = next(cell for cell in ops.report() if cell.op == "points_union" and cell.device == "cpu")
print(json.dumps({"found": found, "backend": served.backend, "reason": served.reason, "starts": len(starts)}))
"""


COMMAND = """
import sys
import stand_in_device
names = sys.argv[1:]
stand_in_device.install(*names)
from pyfast_xai.cli.prove import prove
from pyfast_xai.tuning import Verdicts, proofs
own = proofs.Proofs(Verdicts(proofs.cache_folder(), proofs.environment()), stand_in_device.program(*names), 4, True)
proofs.machine_proofs = lambda: own
prove(["points_union"], "cpu")
"""


def run(code, folder, *names, tuning="on"):
    path = os.pathsep.join(filter(None, [os.path.dirname(stand_in_device.__file__), *sys.path]))
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder), "PYFAST_XAI_TUNING": tuning}
    environment |= {"COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def use(folder, *names, tuning="on"):
    return json.loads(run(USER, folder, *names, tuning=tuning).splitlines()[-1])


def test_the_user_lives_and_gets_the_right_kernel(tmp_path):
    first = use(tmp_path, "dies", "hangs", "prints")
    assert first["found"] == [[1, 4]] * 3
    assert first["backend"] == "prints"
    assert "dies: it was ended by SIGSEGV; hangs: it did not end within 4 seconds" in first["reason"]
    assert first["starts"] == 3  # one more for each that took its process down
    repeated = use(tmp_path, "dies", "hangs", "prints")
    assert repeated == {**first, "starts": 0}


def test_the_command_outlives_every_kernel_and_says_in_words_what_is_wrong(tmp_path):
    printed = " ".join(run(COMMAND, tmp_path, *WORDS, "slower", "prints").split())
    for name, words in WORDS.items():
        assert f"{name} not chosen: {words}" in printed
    assert "slower not chosen: correct, but prints is faster" in printed
    assert "prints proven on this device on" in printed


def test_where_all_kernels_are_bad_plain_pytorch_serves(tmp_path):
    result = use(tmp_path, "wrong", "dies")
    assert result["found"] == [[1, 4]] * 3
    assert result["backend"] == "reference"


def test_with_tuning_off_plain_pytorch_serves(tmp_path):
    result = use(tmp_path, "dies", "prints", tuning="off")
    assert result["found"] == [[1, 4]] * 3
    assert (result["backend"], result["starts"]) == ("reference", 0)
    assert "PYFAST_XAI_TUNING=off leaves it unproven" in result["reason"]


def test_every_op_has_corner_cases():
    from pyfast_xai.proof import corners

    assert {name for name in OPS if callable(getattr(corners, name, None))} == set(OPS)
