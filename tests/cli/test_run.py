import json
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("pyarrow")

from pyfast_xai import datasets, demo
from pyfast_xai.datasets.attachments import attached
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document
from pyfast_xai.datasets.schema import COLUMNS


@pytest.fixture
def go(run, folder, tmp_path):
    """`pyfast-xai run` of the five pictures with the network of the demo."""

    def call(*more, source=folder, code=0, model="digits"):
        options = ("--model", model, "--out", tmp_path / "out", "--method", "fixations", "--shard-size", 2)
        return run("run", source, *options, *more, code=code)

    return call


def test_run_status_verify_export(go, run, tmp_path):
    result = go("--json", "--log", tmp_path / "log.jsonl", "--prometheus", tmp_path / "run.prom")
    figures = dict(
        line.split() for line in (tmp_path / "run.prom").read_text().splitlines() if not line.startswith("#")
    )
    assert (figures["pyfast_xai_items"], figures["pyfast_xai_rows"], figures["pyfast_xai_error_rows"]) == (
        "5",
        "5",
        "0",
    )
    assert not list(tmp_path.glob(".run.prom*"))
    summary = json.loads(result.stdout)
    assert (summary["items"], summary["rows"], summary["errors"], summary["complete"]) == (5, 5, 0, True)
    assert "5 of 5 rows there" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["rows"] == 5
    assert [row["class_name"] is not None for row in datasets.open(tmp_path / "out")] == [True] * 5
    output = json.loads(run("status", tmp_path / "out", "--json").stdout)
    assert (output["rows"], output["parts"], output["shards"]) == (5, 3, 3)
    assert "5 of 5 rows (100.0%) in 3 of 3 parts" in run("status", tmp_path / "out").output
    assert "sound" in run("verify", tmp_path / "out", "--source", tmp_path / "pictures").output
    assert json.loads(run("verify", tmp_path / "out", "--json").stdout) == {"rows": 5, "missing": 0, "faults": []}
    run("export", tmp_path / "out", "--out", tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 6
    assert "5 rows written" in run("export", tmp_path / "out", "--out", tmp_path / "t", "--to", "webdataset").output
    run("export", tmp_path / "out", "--out", tmp_path / "a.csv", code=2)
    assert json.loads(go("--json").stdout)["before"] == 5


def test_rows_are_those_of_explain(go, run, folder, tmp_path):
    go()
    run("explain", folder, "--model", "digits", "--method", "fixations", "--out", tmp_path / "explained")
    records = json.loads((tmp_path / "explained" / "explanations.json").read_text())["images"]
    for row, record in zip(datasets.open(tmp_path / "out"), records, strict=True):
        assert row["target"] == record["fixations"]["target"]
        assert [[p["y"], p["x"]] for p in row["points"]] == record["fixations"]["points"]["input"]
        assert row["box_in_picture"] == record["fixations"]["box"]["original"]


def test_exit_codes(go, run, folder, tmp_path):
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_text("no")
    assert "1  ImageError" not in go().output
    assert "2 error rows" in go("--max-errors", 2).output
    assert go("--max-errors", "1%", code=3).output
    result = go("--max-errors", 1, code=3)
    assert result.stderr.strip().splitlines()[-1].startswith("Rows:")
    for wrong in ("--max-errors", "many"), ("--batch-size", "0"), ("--set", "fixations.none=1"), ("--target", "cat"):
        go(*wrong, code=2)
    changed = go("--set", "fixations.variant=paper", code=2).output
    assert "must be continued as it was begun, with method.box_rule" in changed
    assert "method.settings.variant differ" in changed
    assert (
        "method must be one of"
        in run("run", folder, "--model", "digits", "--out", tmp_path / "x", "--method", "no", code=2).output
    )
    for command in ("status", "verify", "retry"):
        assert "must be one of a run" in run(command, folder, code=2).output
    assert run("run", code=2)


def test_a_run_that_stops_early_tells_how_it_goes_on(run, folder, tmp_path):
    for n in range(4):
        (folder / f"{n}.png").write_bytes(b"")
    out = tmp_path / "my out"
    options = ("--model", "digits", "--out", out, "--shard-size", 1, "--max-errors", 1, "--pictures")
    result = run("run", folder, *options, "--set", "eigen-cam.center=true", code=3)
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        f"resume  pyfast-xai run {folder} --model digits --out '{out}' --set eigen-cam.center=true --pictures "
        "--shard-size 1 --max-errors 1"
    )


def test_nothing_but_errors_is_told(go, folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    go(code=3)


def test_a_full_disk_fails_and_tells_how_it_goes_on(go, monkeypatch, tmp_path):
    real = os.replace

    def full(old, new):
        if "part-00000001" in str(new):
            raise OSError(28, "No space left on device")
        real(old, new)

    monkeypatch.setattr(os, "replace", full)
    result = go(code=1)
    lines = result.stderr.strip().splitlines()
    assert "No space left on device" in lines[-2]
    assert lines[-1].startswith("resume  pyfast-xai run")
    assert [name for name in sorted(os.listdir(tmp_path / "out")) if not name.startswith("_listing")] == [
        ".lock",
        "_run.parquet",
        "part-00000000.parquet",
    ]
    monkeypatch.undo()
    go()


def test_out_must_not_be_among_the_pictures(run, folder):
    run("run", folder, "--model", "digits", "--out", folder, code=2)
    assert sorted(os.listdir(folder)) == [f"{n}.png" for n in range(5)]


def test_faults_have_an_exit_code(go, run, tmp_path):
    go()
    path = tmp_path / "out" / "part-00000000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    result = run("verify", tmp_path / "out", code=1)
    assert "part-00000000.parquet must be readable" in result.output
    path.unlink()
    assert "2 not there yet: sound" in run("verify", tmp_path / "out").output
    go()
    run("verify", tmp_path / "out")


def test_retry(go, run, folder, tmp_path, scenes):
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:200])
    (folder / "3.png").write_bytes(b"")
    go()
    (folder / "1.png").write_bytes(whole)
    result = run("retry", tmp_path / "out", "--json", code=3)
    assert json.loads(result.stdout)["errors"] == 1
    rows = [dict(row) for row in datasets.open(tmp_path / "out")]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "error", "ok"]
    (folder / "3.png").write_bytes(whole)
    run("retry", tmp_path / "out")
    assert "sound" in run("verify", tmp_path / "out").output


def test_retry_imports_nothing_that_was_not_named(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_net.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\nfrom pyfast_xai import demo\nnet = demo.load\n"
    )
    (folder / "1.png").write_bytes(b"")
    options = ("--model", "own_net:net", "--size", 96, "--mean", "0,0,0", "--std", "1,1,1", "--out", tmp_path / "out")
    run("run", folder, *options)
    (tmp_path / "imported").unlink()
    sys.modules.pop("own_net")
    assert "must be named again" in run("retry", tmp_path / "out", code=2).output
    assert not (tmp_path / "imported").exists()
    run("retry", tmp_path / "out", "--model", "own_net:net", code=3)
    document = read_document(run_folder(tmp_path / "out"))
    request = document["made"]["request"]
    for wrong in (
        {},
        None,
        [],
        {**request, "more": 1},
        {**request, "size": "96"},
        {**request, "source": [1]},
        {**request, "source": ["hf:x"]},
        {**request, "source": ["memory://x"]},
    ):
        document["made"]["request"] = wrong
        (tmp_path / "out" / NAME).write_bytes(attached(json.dumps(document).encode(), COLUMNS))
        run("retry", tmp_path / "out", "--model", "own_net:net", code=2)


def test_pickles_are_refused(run, folder, tmp_path):
    class Boom:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was_here",)

    for name, content in (("evil.pt", {"a": Boom()}), ("module.pt", demo.load())):
        torch.save(content, tmp_path / name)
        options = ("--model", "digits", "--weights", tmp_path / name, "--out", tmp_path / "out")
        assert "weights" in run("run", folder, *options, code=2).output
    assert not (tmp_path / "was_here").exists()
    assert not (tmp_path / "out").exists()
    save_file(demo.load().state_dict(), tmp_path / "fine.safetensors")
    run("run", folder, "--model", "digits", "--weights", tmp_path / "fine.safetensors", "--out", tmp_path / "out")


def test_odd_names_disturb_no_terminal(go, folder, tmp_path):
    odd = folder / "[red]\x1b[2J\nb.png"
    Image.open(folder / "0.png").save(odd)
    (folder / "\x1b[31mbad.png").write_bytes(b"")
    output = go().output
    assert "\x1b" not in output
    assert any("\x1b" in row["id"] for row in datasets.open(tmp_path / "out"))


def test_a_list_with_labels(go, folder, tmp_path):
    (folder / "list.csv").write_text("path,label\n0.png,3\n2.png,4\n")
    go("--target", "label", source=folder / "list.csv")
    assert [row["target"] for row in datasets.open(tmp_path / "out")] == [3, 4]


def test_ray_must_be_installed(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ("run", folder, "--model", "digits", "--out", tmp_path / "out", "--ray", "local")
    assert "ray must be installed for a run on it" in " ".join(run(*options, code=2).stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [("--actors", 2), ("--gpus", 0.5)])
def test_workers_belong_to_ray(run, folder, tmp_path, given):
    output = run("run", folder, "--model", "digits", "--out", tmp_path / "out", *given, code=2).stderr
    assert "actors and gpus must be left out where ray is not given" in " ".join(output.split())
