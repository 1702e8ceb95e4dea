import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyfast_xai.tuning import Site, Verdict, Verdicts, environment, verdicts

SITE = Site("conv2d", "float32[1, 3, 8, 8]", "cpu", 2)
VERDICT = Verdict({"plain": [0.03, 0.02], "fast": [0.01]}, {"broken": "RuntimeError: no"})


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_another_process_finds_what_was_kept(tmp_path):
    Verdicts(tmp_path, {"torch": "1"}).put(SITE, VERDICT)
    later = Verdicts(tmp_path, {"torch": "1"})
    assert later.get(SITE) == VERDICT
    assert later.all() == {SITE: VERDICT}
    assert later.get(Site("conv2d", "float32[1, 3, 8, 8]", "cpu", 1)) is None


def test_another_environment_finds_nothing(tmp_path):
    Verdicts(tmp_path, {"torch": "1"}).put(SITE, VERDICT)
    assert Verdicts(tmp_path, {"torch": "2"}).get(SITE) is None
    assert Verdicts(tmp_path, {"torch": "2"}).all() == {}


@pytest.mark.parametrize("change", ["environment", "site"])
def test_a_foreign_file_is_ignored(tmp_path, change):
    Verdicts(tmp_path, {"torch": "1"}).put(SITE, VERDICT)
    [path] = files(tmp_path)
    content = json.loads(path.read_text())
    content[change]["torch" if change == "environment" else "op"] = "another"
    path.write_text(json.dumps(content))
    assert Verdicts(tmp_path, {"torch": "1"}).get(SITE) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * len(text),
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: text.replace("0.01", '"soon"'),
        lambda text: text.replace("0.01", "-1"),
        lambda text: text.replace("0.01", "NaN"),
        lambda text: text.replace("[0.01]", "[]"),
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace('"threads"', '"fibres"'),
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, damage):
    Verdicts(tmp_path, {}).put(SITE, VERDICT)
    [path] = files(tmp_path)
    path.write_text(damage(path.read_text()))
    later = Verdicts(tmp_path, {})
    assert later.get(SITE) is None
    assert later.all() == {}
    later.put(SITE, VERDICT)
    assert Verdicts(tmp_path, {}).get(SITE) == VERDICT


def test_bytes_that_are_no_text_are_ignored(tmp_path):
    Verdicts(tmp_path, {}).put(SITE, VERDICT)
    files(tmp_path)[0].write_bytes(b"\xff\xfe\xfd")
    assert Verdicts(tmp_path, {}).get(SITE) is None


def test_without_a_folder_verdicts_stay_in_memory():
    saved = Verdicts(None, {})
    saved.put(SITE, VERDICT)
    assert saved.get(SITE) == VERDICT
    assert saved.all() == {SITE: VERDICT}


def test_a_folder_that_cannot_be_made_leaves_them_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    saved = Verdicts(tmp_path / "file", {})
    saved.put(SITE, VERDICT)
    assert saved.get(SITE) == VERDICT
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_leaves_them_in_memory(tmp_path):
    tmp_path.chmod(0o500)
    saved = Verdicts(tmp_path, {})
    saved.put(SITE, VERDICT)
    assert saved.get(SITE) == VERDICT


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts.os, "replace", full)
    saved = Verdicts(tmp_path, {})
    saved.put(SITE, VERDICT)
    assert saved.get(SITE) == VERDICT
    assert files(tmp_path) == []


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.cache_folder() == tmp_path / "pyfast_xai"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(verdicts.Path, "home", homeless)
    assert verdicts.cache_folder() is None


def test_the_environment_names_hardware_and_versions():
    assert {"processor", "instruction set", "torch", "pyfast_xai"} <= environment().keys()
    json.dumps(environment())


def test_a_reader_never_sees_half_a_verdict(tmp_path):
    large = Verdict({"plain": [0.01] * 20_000})
    writer, stop, recorded = Verdicts(tmp_path, {}), threading.Event(), []
    writer.put(SITE, large)

    def write():
        while not stop.is_set():
            writer.put(SITE, large)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        recorded = [Verdicts(tmp_path, {}).get(SITE) for _ in range(50)]
    finally:
        stop.set()
        thread.join()
    assert all(result is not None and len(result.seconds["plain"]) == 20_000 for result in recorded)


_WRITER = """
import sys
from pathlib import Path
from pyfast_xai.tuning import Site, Verdict, Verdicts
kept = Verdicts(Path(sys.argv[1]), {})
for i in range(100):
    kept.put(Site("conv2d", str(i), "cpu", 2), Verdict({"plain": [1.0], sys.argv[2]: [0.5]}))
    kept.put(Site(sys.argv[2], str(i), "cpu", 2), Verdict({"plain": [1.0]}))
"""


def test_two_processes_write_at_once(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), name]) for name in ("one", "two")]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    result = Verdicts(tmp_path, {}).all()
    assert len(result) == 300
    assert all(path.suffix == ".json" for path in files(tmp_path))


def test_the_fastest_is_named_in_the_order_of_the_candidates():
    verdict = Verdict({"plain": [0.03, 0.02], "fast": [0.01, 0.01], "as fast": [0.0099, 0.0099]})
    assert verdict.fastest() == "fast"
    assert verdict.fastest(["plain", "as fast"]) == "as fast"
    assert verdict.fastest(["plain"]) == "plain"
