import json

import pytest
import torch

from pyfast_xai import reproduce
from pyfast_xai.errors import InputError
from pyfast_xai.reproduce import EXPERIMENTS, Outcome


@pytest.fixture
def experiments(monkeypatch, tmp_path):
    """Two experiments of a paper: one that runs and one whose data is not there."""

    def works(data):
        data.advance("squares", 3)
        recorded.append(data)
        return Outcome("A table", ["a", "paper"], [["1.5", "2.0"]], ["Smaller."], {"map": _picture()})

    def lacks(data):
        raise InputError("data must hold squares, got none")

    recorded = []
    monkeypatch.setitem(reproduce.EXPERIMENTS, "fgvis", {"works": works, "lacks": lacks})
    return recorded


def _picture():
    from pyfast_xai import render

    return render.to_pil(torch.zeros(3, 4, 4))


def test_experiments_run_and_those_without_data_say_so(run, experiments, tmp_path):
    out = tmp_path / "out"
    result = run("reproduce", "fgvis", "--data", tmp_path, "--out", out, "--pictures", 0, "--networks", "a, b")
    assert "A table" in result.output
    assert "data must hold squares" in result.output
    assert {path.name for path in (out / "fgvis").iterdir()} == {"works.md", "works.csv", "works.map.png"}
    assert (experiments[0].count, experiments[0].names) == (None, ("a", "b"))


def test_exit_codes(run, experiments, tmp_path):
    options = ("reproduce", "fgvis", "--data", tmp_path, "--out", tmp_path / "out")
    run(*options, "--experiment", "works")
    run(*options, "--experiment", "lacks", code=2)
    run(*options, "--experiment", "works,lacks", code=1)
    run(*options, "--experiment", "works", "--experiment", "lacks", code=1)


def test_networks_may_be_repeated(run, experiments, tmp_path):
    options = ("--data", tmp_path, "--out", tmp_path / "out", "--experiment", "works")
    run("reproduce", "fgvis", *options, "--networks", "a", "--networks", "b,c")
    assert experiments[0].names == ("a", "b", "c")


def test_experiments_are_listed(run, experiments):
    lines = run("reproduce", "--list").output.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    (fgvis,) = [line for line in lines if line.startswith("fgvis")]
    assert "works, lacks" in fgvis


def test_tables_as_json(run, experiments, tmp_path):
    result = run("reproduce", "fgvis", "--data", tmp_path, "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == {
        "works": {"title": "A table", "heads": ["a", "paper"], "rows": [["1.5", "2.0"]]}
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("grad-cam",), "paper must be one of fixations, eigen-cam"),
        (("fgvis", "--experiment", "table-9"), "experiment must be one of works, lacks"),
        (("fgvis", "--data", "nowhere"), "data must be a folder of data sets, got 'nowhere'"),
    ],
)
def test_refusals(run, experiments, tmp_path, given, message):
    arguments = given if "--data" in given else (*given, "--data", tmp_path)
    assert message in " ".join(run("reproduce", *arguments, code=2).output.split())
