"""How far answers depend on colour: counted slowly, and shown."""

import shutil

import numpy as np
import pytest

from pyfast_xai import datasets, report
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document
from pyfast_xai.datasets.schema import COLUMNS
from pyfast_xai.errors import InputError


@pytest.fixture(scope="module")
def swapped(made, loaded, tmp_path_factory, explained):
    """A run over the fifteen pictures, asked again with colours swapped."""
    return explained(made.folder, loaded, tmp_path_factory.mktemp("runs") / "swapped", color_swap=True)


@pytest.fixture(scope="module")
def unlabelled(made, loaded, tmp_path_factory, explained):
    out = tmp_path_factory.mktemp("runs") / "unlabelled"
    return explained(made.folder, loaded, out, labels=False, color_swap=True)


def slowly(rows, labelled):
    """Of each class the pictures, the shares that stay, the score and the swapped scores, as the paper counts them."""
    result = {}
    for row in rows:
        if row["status"] != "ok" or (labelled and row["label"] != row["topk_index"][0]):
            continue
        answer = row["topk_index"][0]
        stays = [item == answer for item in row["swapped_index"]]
        result.setdefault(answer, []).append((stays, row["topk_score"][0], row["swapped_score"]))
    return {
        answer: (len(item), *(np.mean([one[place] for one in item], 0) for place in range(3)))
        for answer, item in result.items()
    }


@pytest.mark.parametrize("labelled", [True, False])
def test_the_view_counts_as_the_paper_does(swapped, unlabelled, labelled, tmp_path, read, classes):
    run = swapped if labelled else unlabelled
    page = read(report.write(run, tmp_path / "r.html").path)
    output, expected = page.data["runs"][0]["views"]["colors"], slowly(datasets.open(run), labelled)
    assert output["labelled"] is labelled
    assert output["swaps"] == [[2, 0, 1], [1, 2, 0]]
    assert {row[0] for row in output["rows"]} == set(expected)
    for index, name, count, saved, before, after in output["rows"]:
        number, stays, score, swapped_scores = expected[index]
        assert (page.word(name), count) == (classes[index], number)
        assert saved == pytest.approx(stays.tolist())
        assert before == pytest.approx(score, rel=1e-6)
        assert after == pytest.approx(swapped_scores.tolist(), rel=1e-6)
    pictures = [item[0] for item in expected.values()]
    assert output["pictures"] == sum(pictures)
    assert output["classes"] == len(expected)
    shares = np.average([item[1] for item in expected.values()], 0, pictures)
    assert output["kept"] == pytest.approx(shares.tolist())
    assert 0 < shares.mean() < 1
    assert output["lost"] == sum(item[1].mean() <= 0.25 for item in expected.values())


def test_every_row_says_what_was_answered(swapped, tmp_path, read, classes):
    page = read(report.write(swapped, tmp_path / "r.html").path)
    for row, output in zip(datasets.open(swapped), page.column("swapped"), strict=True):
        if row["status"] != "ok":
            assert output is None
            continue
        assert output[::3] == row["swapped_index"]
        assert [page.word(name) for name in output[1::3]] == [classes[index] for index in row["swapped_index"]]
        assert output[2::3] == pytest.approx(row["swapped_score"], rel=1e-3)


def test_runs_that_were_not_asked_have_no_view(made, swapped, tmp_path, read):
    page = read(report.write([made.one, swapped], tmp_path / "r.html").path)
    plain, requests = page.data["runs"]
    assert plain["views"]["colors"] is plain["columns"]["swapped"] is None
    assert requests["views"]["colors"]["pictures"] > 0


def test_a_run_without_rows(swapped, tmp_path, read):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(swapped / NAME, empty)
    page = read(report.write(empty, tmp_path / "r.html").path)
    assert page.data["runs"][0]["views"]["colors"]["pictures"] == 0


@pytest.mark.parametrize("odd", [[], "RGB", [[0, 1]], [[0, 1, 3]], [[0, 1, 2], None], 3])
def test_odd_manifests_are_refused(swapped, tmp_path, odd):
    out = tmp_path / "odd"
    shutil.copytree(swapped, out)
    output = read_document(run_folder(out))
    output["rows"]["color_swap"] = odd
    described = {key: value for key, value in output.items() if key not in ("fingerprint", "made")}
    type(datasets.open(swapped).manifest)(described, output["made"]).write(run_folder(out), COLUMNS)
    with pytest.raises(InputError, match=r"^rows.color_swap in _run.parquet must hold"):
        report.write(out, tmp_path / "r.html")


def test_a_column_that_is_missing_is_named(swapped, made, tmp_path):
    out = tmp_path / "odd"
    shutil.copytree(made.one, out)
    shutil.copy(swapped / NAME, out)
    with pytest.raises(InputError, match=r"must have a column 'swapped_index', got none"):
        report.write(out, tmp_path / "r.html")
