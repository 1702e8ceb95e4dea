"""A run keeps to the files that its relative names meant when it began, whatever the working folder is later."""

import csv
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from pyfast_xai import datasets, demo
from pyfast_xai.cli import app

COUNT = 20


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """A working folder whose name is a pattern, with `pictures` in it, and lists, tars and Parquet files of them."""
    start = tmp_path / "start[1]"
    start.mkdir()
    folder.rename(start / "pictures")
    monkeypatch.chdir(start)
    names = sorted(os.listdir("pictures"))
    with open("list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], *([f"pictures/{name}"] for name in names)])
    pq.write_table(pa.table({"path": [f"pictures/{name}" for name in names]}), "list.parquet")
    struct = pa.array([{"bytes": None, "path": f"pictures/{name}"} for name in names])
    pq.write_table(pa.table({"image": struct}), "images.parquet")
    with tarfile.open("images.tar", "w") as tar:
        tar.add("pictures")
    return start


def hugging_face_paths():
    hugging_face = pytest.importorskip("datasets")
    names = [f"pictures/{name}" for name in sorted(os.listdir("pictures"))]
    return hugging_face.Dataset.from_dict({"image": names}).cast_column("image", hugging_face.Image())


SOURCES = {
    "folder": lambda: "pictures",
    "parent": lambda: "pictures/../pictures",
    "pattern": lambda: "pictures/*",
    "files": lambda: [f"pictures/{name}" for name in sorted(os.listdir("pictures"))],
    "files-object": lambda: datasets.Files([f"pictures/{name}" for name in sorted(os.listdir("pictures"))]),
    "csv": lambda: "list.csv",
    "list": lambda: "list.parquet",
    "parquet": lambda: "images.parquet",
    "tar": lambda: "images.tar",
    "tars": lambda: "*.tar",
    "hugging-face": hugging_face_paths,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_prepared_run_works_in_another_folder(name, start, loaded, tmp_path, monkeypatch):
    options = datasets.RunOptions(method="saliency", out="out", shard_size=8, batch_size=4)
    job = datasets.prepare(SOURCES[name](), loaded, options)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = datasets.run_job(job)
    assert (done.rows, done.errors) == (COUNT, 0)
    assert os.listdir(elsewhere) == []
    results = datasets.open(start / "out")
    if name not in ("files-object", "hugging-face"):  # which have no name to open them by
        assert results.picture(3).shape == (3, 24, 24)
    assert len(results.query("select * from results").fetchall()) == COUNT


@pytest.mark.parametrize("name", ["folder", "pattern", "csv", "parquet", "tar"])
def test_a_run_goes_on_from_another_folder(name, start, loaded, tmp_path, monkeypatch):
    options = datasets.RunOptions(method="saliency", out=start / "out", shard_size=8)
    job = datasets.prepare(SOURCES[name](), loaded, options)
    datasets.run_job(job)
    os.unlink(start / "out" / "part-00000001.parquet")
    monkeypatch.chdir(tmp_path)
    # Ids of a pattern are the names as they were given.
    given = os.path.join(start.name, {"folder": "pictures", "csv": "list.csv"}.get(name, f"images.{name}"))
    source = datasets.open(start / "out").source() if name == "pattern" else given
    done = datasets.explain(source, loaded, options)
    assert (done.before, done.rows, done.errors) == (COUNT - 8, COUNT, 0)


@pytest.mark.parametrize("name", ["pattern", "files", "csv"])
def test_retry_report_and_export_read_relative_names_from_any_folder(name, start, make_picture, tmp_path, monkeypatch):
    (start / "pictures" / "02.png").write_bytes(b"")
    torch.save(demo.load().state_dict(), "weights.pt")
    source = SOURCES[name]()
    names = [source] if isinstance(source, str) else source
    command = ["--model", "digits", "--weights", "weights.pt", "--method", "saliency", "--out", "out"]
    run = CliRunner().invoke(app, ["run", *names, *command])
    assert run.exit_code == 0, run.output
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["retry", "start[1]/out"]).exit_code == 3  # still no picture
    (start / "pictures" / "02.png").write_bytes(make_picture(2))
    assert CliRunner().invoke(app, ["retry", "start[1]/out"]).exit_code == 0
    report = CliRunner().invoke(app, ["report", "start[1]/out", "--out", "report.html", "--json"])
    assert '"pictures": 20' in report.output, report.output
    for form in ("csv", "webdataset", "huggingface", "fiftyone"):
        export = CliRunner().invoke(app, ["export", "start[1]/out", "--to", form, "--out", f"exported/{form}"])
        assert export.exit_code == 0, export.output
    pictures = pq.read_table("exported/huggingface/data")["image"].to_pylist()
    files = [os.path.join(start, "pictures", name) for name in sorted(os.listdir(start / "pictures"))]
    assert [picture["bytes"] for picture in pictures] == [Path(file).read_bytes() for file in files]
    assert len(os.listdir("exported/fiftyone/data")) == COUNT


def test_a_folder_of_results_that_was_opened_stays_open(start, loaded, tmp_path, monkeypatch):
    datasets.explain("pictures", loaded, method="saliency", out="out")
    results = datasets.open("out")
    monkeypatch.chdir(tmp_path)
    assert results[0].explanation().images.shape == (1, 3, 24, 24)
    assert datasets.verify(start / "out").faults == []
