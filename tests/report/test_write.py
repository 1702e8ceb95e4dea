import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai import datasets, render, report
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document
from pyfast_xai.datasets.schema import COLUMNS
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel


def test_every_item_is_there_once_with_what_its_row_says(made, tmp_path, read):
    written = report.write(made.one, tmp_path / "r.html")
    page, rows = read(written.path), list(datasets.open(made.one))
    items = page.data["items"]
    assert items["id"] == [row["id"] for row in rows]
    assert items["index"] == list(range(15))
    assert items["label"] == [row["label"] for row in rows]
    assert page.column("status") == [1 if row["status"] == "ok" else 2 for row in rows]
    assert [page.word(name) for name in page.column("class")] == [row["class_name"] for row in rows]
    assert page.column("answer") == [row["topk_index"] and row["topk_index"][0] for row in rows]
    for row, score, error in zip(rows, page.column("score"), page.column("error"), strict=True):
        assert score == (None if row["score"] is None else pytest.approx(row["score"], rel=1e-3))
        output = None if error is None else [page.word(error[0]), error[1]]
        assert output == (None if row["status"] == "ok" else [row["error_type"], row["error_message"]])
    assert len(page.fields) == 15
    assert all(bool(map_) == (row["status"] == "ok") for (_, map_), row in zip(page.fields, rows, strict=True))
    assert (written.items, written.total, written.errors, written.pictures) == (15, 15, 2, 13)
    assert written.bytes == written.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_pictures_are_what_the_network_saw(made, tmp_path, read):
    page = read(report.write(made.one, tmp_path / "r.html").path)
    row = datasets.open(made.one)[0]
    with Image.open(io.BytesIO(base64.b64decode(page.fields[0][0][1:]))) as image:
        shown = render.from_pil(image)
    # WebP halves the resolution of colours.
    assert (shown - row.explanation().images[0]).mean(0).abs().mean() < 0.03
    assert page.data["runs"][0]["input"] == [24, 24]


def unpacked(text):
    raw = base64.b64decode(text)
    height, width, zero = raw[:3]
    return np.frombuffer(raw[3:], np.uint8).reshape(height, width).astype(np.float32), zero


@pytest.mark.parametrize(("method", "settings"), [("grad-cam", {}), ("eigen-cam", {}), ("saliency", {})])
def test_maps_are_those_of_the_run(method, settings, made, loaded, tmp_path, read, explained):
    out = explained(made.folder, loaded, tmp_path / "run", method, **settings)
    page = read(report.write(out, tmp_path / "r.html").path)
    for row, (_, field) in zip(datasets.open(out), page.fields, strict=True):
        if row["status"] != "ok":
            continue
        heat = render.normalize(row.explanation().heatmap)
        assert field[0] == "m"
        actual, zero = unpacked(field[1:])
        drawn = torch.nn.functional.interpolate(torch.from_numpy(actual.copy())[None, None], (24, 24), mode="bilinear")[
            0
        ]
        # Levels are a 255th apart, and what is cut off lies between two of them.
        assert (render.normalize(drawn.clamp_min(zero)) - heat).abs().max() < 2.5 / 255


def test_fine_maps_are_pictures(made, tmp_path, read, classes, explained, network):
    loaded = LoadedModel(network(), Preprocess(64), classes, "tiny")
    out = explained(made.folder, loaded, tmp_path / "run", "saliency")
    page = read(report.write(out, tmp_path / "r.html", side=48).path)
    row = datasets.open(out)[0]
    assert page.fields[0][1][0] == "g"
    with Image.open(io.BytesIO(base64.b64decode(page.fields[0][1][1:]))) as image:
        drawn = render.from_pil(image)[:1]
    heat = render.normalize(row.explanation().heatmap)
    small = torch.nn.functional.interpolate(heat[None], (48, 48), mode="bilinear", antialias=True)[0]
    assert (drawn - small).abs().mean() < 0.03
    assert np.corrcoef(drawn.flatten(), small.flatten())[0, 1] > 0.97


def test_runs_side_by_side(made, tmp_path, read, classes):
    page = read(report.write(made.runs, tmp_path / "r.html").path)
    assert [run["name"] for run in page.data["runs"]] == ["grad-cam", "clear"]
    # The same input, so one picture; then a map of each.
    assert [(run["picture"], run["map"]) for run in page.data["runs"]] == [(0, 1), (0, 2)]
    row = datasets.open(made.runs[1])[0]
    winner, best = row.explanation().dominant_class, row.explanation().signed_map
    weights = torch.zeros(5).index_add_(0, winner.flatten(), best.clamp_min(0).flatten())
    assert page.fields[0][2][0] == "c"
    assert page.word(page.column("legend", 1)[0][0][0]) == classes[int(weights.argmax())]
    assert page.column("legend", 0) is None


def test_networks_of_other_inputs_have_pictures_of_their_own(made, tmp_path, read, classes, explained, network):
    wide = LoadedModel(network(), Preprocess((24, 40)), classes, "tiny")
    other = explained(made.folder, wide, tmp_path / "wide")
    page = read(report.write([made.one, other], tmp_path / "r.html", side=32).path)
    assert [(run["name"], run["picture"], run["map"]) for run in page.data["runs"]] == [
        ("grad-cam 1 (grad-cam)", 0, 2),
        ("grad-cam 2 (wide)", 1, 3),
    ]
    assert [run["input"] for run in page.data["runs"]] == [[24, 24], [19, 32]]


def test_what_a_run_has_not_reached_yet(made, tmp_path, read):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made.runs[1], unfinished)
    (unfinished / "part-00000000.parquet").unlink()
    page = read(report.write([made.one, unfinished], tmp_path / "r.html").path)
    assert page.column("status", 1) == [0] * 8 + [1] * 6 + [2]
    assert len(page.data["items"]["id"]) == 15
    page = read(report.write(unfinished, tmp_path / "r.html").path)
    assert page.data["items"]["index"] == list(range(8, 15))
    assert page.data["of"] == 15


def test_an_empty_run(made, tmp_path, read):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(made.one / NAME, empty)
    written = report.write(empty, tmp_path / "r.html")
    page = read(written.path)
    assert (written.items, page.data["items"]["id"], page.fields) == (0, [], [])
    assert page.data["runs"][0]["rows"] == 0


def test_nothing_but_errors(loaded, tmp_path, read, explained):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(b"no picture")
    out = explained(folder, loaded, tmp_path / "run", max_errors=3)
    written = report.write(out, tmp_path / "r.html")
    page = read(written.path)
    assert (written.items, written.errors, written.pictures) == (3, 3, 0)
    assert page.column("status") == [2, 2, 2]
    views = page.data["runs"][0]["views"]
    assert (views["scores"], views["confusion"], views["means"]) == (None, None, [])


def test_without_labels_and_without_pictures(loaded, tmp_path, read, explained, paint):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 4)
    out = explained(folder, loaded, tmp_path / "run", labels=False)
    page = read(report.write(out, tmp_path / "r.html").path)
    assert page.data["items"]["label"] == [None] * 4
    assert page.data["runs"][0]["views"]["confusion"] is None
    moved = folder.rename(tmp_path / "moved")
    assert report.write(out, tmp_path / "r.html").pictures == 0
    assert all(not picture and map_ for picture, map_ in read(tmp_path / "r.html").fields)
    assert report.write(out, tmp_path / "r.html", source=str(moved)).pictures == 4
    (moved / "more.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"^source must be the one of the run"):
        report.write(out, tmp_path / "r.html", source=str(moved))


def test_methods_without_classes_show_the_answer(made, loaded, tmp_path, read, classes, explained):
    out = explained(made.folder, loaded, tmp_path / "run", "eigen-cam")
    page, row = read(report.write(out, tmp_path / "r.html").path), datasets.open(out)[0]
    assert row["target"] is None
    assert page.word(page.column("class")[0]) == classes[row["topk_index"][0]]
    assert page.column("score")[0] == pytest.approx(row["topk_score"][0], rel=1e-3)


def test_a_limit_is_spread_over_the_source(made, tmp_path, read):
    written = report.write(made.runs, tmp_path / "r.html", limit=5)
    page = read(written.path)
    assert page.data["items"]["index"] == [0, 3, 6, 9, 12]
    assert (written.items, written.total) == (5, 15)
    # All rows are counted nevertheless.
    assert page.data["runs"][0]["errors"] == 2
    assert sum(map(sum, page.data["runs"][0]["views"]["confusion"]["counts"])) == 13


def test_views_count_what_is_there(made, tmp_path, read, classes):
    page = read(report.write(made.runs, tmp_path / "r.html").path)
    rows = [row for row in datasets.open(made.one) if row["status"] == "ok"]
    views = page.data["runs"][0]["views"]
    known = views["confusion"]["classes"]
    expected = np.zeros((len(known), len(known)), int)
    for row in rows:
        expected[known.index(row["label"]), known.index(row["topk_index"][0])] += 1
    assert views["confusion"]["counts"] == expected.tolist()
    assert (views["right"], views["labelled"]) == (sum(r["label"] == r["topk_index"][0] for r in rows), 13)
    assert sum(views["scores"]["right"]) == views["right"]
    assert sum(views["scores"]["right"] + views["scores"]["wrong"]) == 13
    for index, name, count, packed in views["means"]:
        actual = [render.normalize(row.explanation().heatmap) for row in rows if row["target"] == index]
        assert (page.word(name), count) == (classes[index], len(actual))
        mean = torch.nn.functional.adaptive_avg_pool2d(torch.cat(actual).mean(0, keepdim=True), 32)
        assert np.abs(unpacked(packed)[0] / 255 - render.normalize(mean)[0].numpy()).max() < 1 / 255
    dominance = page.data["runs"][1]["views"]["dominance"]
    assert sum(map(sum, dominance["counts"])) == sum(legend is not None for legend in page.column("legend", 1))
    assert page.data["runs"][0]["views"]["dominance"] is None


def test_many_classes_are_counted_together():
    from types import SimpleNamespace

    from pyfast_xai.report.views import CLASSES as MOST
    from pyfast_xai.report.views import matrix

    run = SimpleNamespace(class_name=str)
    pairs = [(n, n) for n in range(MOST + 10)] + [(n, 0) for n in range(1, MOST)]
    output = matrix(pairs, run, str)
    assert len(output["classes"]) == MOST + 1
    assert output["classes"][-1] == -1
    assert output["names"][-1] == "10 others"
    assert sum(map(sum, output["counts"])) == len(pairs)
    assert output["counts"][-1][-1] == 10


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def evil(folder, tmp_path):
    """The same run, whose manifest somebody has written who wants to be noticed."""
    out = tmp_path / "evil"
    shutil.copytree(folder, out)
    manifest = datasets.open(out).manifest
    output = read_document(run_folder(out))
    payload = "</title></script ><script>document.title='owned'</script ><!-- <script \u2028 &lt;"
    output["model"]["name"] = output["method"]["name"] = payload
    output["made"]["classes"] = [payload, None, 7, ["x"], {"a": payload}]
    described = {key: value for key, value in output.items() if key not in ("fingerprint", "made")}
    type(manifest)(described, output["made"]).write(run_folder(out), COLUMNS)
    return out, payload


def test_names_cannot_become_markup(made, tmp_path, read, evil_name):
    plain, wicked = Tags(), Tags()
    plain.feed(report.write(made.one, tmp_path / "a.html").path.read_text())
    out, payload = evil(made.one, tmp_path)
    # Parts are of another run now, which a report does not mind and `verify` tells.
    written = report.write(out, tmp_path / "b.html")
    page = read(written.path)
    wicked.feed(page.text)
    assert wicked.tags == plain.tags
    assert not wicked.links
    assert page.data["runs"][0]["name"] == payload
    assert evil_name in page.data["items"]["id"]
    (title,) = re.findall(r"<title>(.*?)</title>", page.text, re.DOTALL)
    assert "<" not in title
    assert page.text.isascii()


def test_the_page_may_run_its_own_script_and_reach_nothing(made, tmp_path, read):
    page = read(report.write(made.runs, tmp_path / "r.html").path)
    (script,) = (body for head, body in page.scripts if not head)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page.text)
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "http" not in page.text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    for word in ("fetch(", "XMLHttpRequest", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in script


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("name", 3, "method.name"), ("box_rule", 0.5, "method.box_rule"), ("sigma", [1], "method.sigma")],
)
def test_odd_manifests_are_refused_in_one_sentence(key, value, told, made, tmp_path):
    out = tmp_path / "odd"
    shutil.copytree(made.one, out)
    manifest = datasets.open(out).manifest
    manifest.described["method"][key] = value
    manifest.write(run_folder(out), COLUMNS)
    with pytest.raises(InputError, match=f"^{told} in _run.parquet must be"):
        report.write(out, tmp_path / "r.html")


def test_what_is_wrong_is_said_before_anything_is_written(made, loaded, tmp_path, explained, paint):
    other = tmp_path / "pictures"
    other.mkdir()
    paint(other, 3)
    run = explained(other, loaded, tmp_path / "run")
    page = tmp_path / "r.html"
    for folders, settings, output in (
        ([], {}, "folders must name at least one run, got none"),
        ([made.one, run], {}, "folders must be of runs over the same source, got"),
        (tmp_path, {}, "folder must be one of a run"),
        (made.one, {"limit": 0}, "limit must be at least 1, got 0"),
        (made.one, {"side": 2}, "side must lie in 16 to 1024 pixels, got 2"),
        (made.one, {"source": str(other)}, "source must be the one of the run"),
    ):
        with pytest.raises(InputError, match=f"^{output}"):
            report.write(folders, page, **settings)
    with pytest.raises(InputError, match=r"^out must be a file, got the folder"):
        report.write(made.one, other)
    assert not page.exists()


def test_a_failure_leaves_the_old_report(made, tmp_path):
    page = tmp_path / "r.html"
    page.write_text("old")

    def stop(progress):
        assert progress.total == 15
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write(made.one, page, progress=stop)
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_the_same_runs_make_the_same_page(made, tmp_path):
    first, second = (report.write(made.runs, tmp_path / name).path.read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_row_takes_little_room(loaded, tmp_path, explained, paint):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 60)
    out = explained(folder, loaded, tmp_path / "run", labels=False)
    sizes = [report.write(out, tmp_path / "r.html", limit=limit).bytes for limit in (10, 60)]
    assert (sizes[1] - sizes[0]) / 50 < 1200  # a 24 x 24 picture and a 5 x 5 map among them


def test_the_command(made, tmp_path):
    from typer.testing import CliRunner

    from pyfast_xai import cli

    page = tmp_path / "r.html"
    runner = CliRunner()
    result = runner.invoke(cli.app, ["report", *map(str, made.runs), "--out", str(page), "--limit", "7", "--json"])
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output == {
        "out": str(page),
        "items": 7,
        "total": 15,
        "errors": 0,
        "pictures": 7,
        "bytes": page.stat().st_size,
    }
    assert "7 of 15 pictures" in result.stderr
    refused = runner.invoke(cli.app, ["report", str(made.one), "--out", str(tmp_path / "r.png")])
    assert refused.exit_code == 2
    assert "out must be a .html file" in refused.output
    assert runner.invoke(cli.app, ["report", str(tmp_path)]).exit_code == 2


def test_page_files_are_part_of_the_package():
    from importlib.resources import files

    assert all((files("pyfast_xai.report") / f"page.{kind}").is_file() for kind in ("html", "css", "js"))


def test_parts_without_a_column_are_refused(made, tmp_path):
    import pyarrow.parquet as pq

    out = tmp_path / "run"
    shutil.copytree(made.one, out)
    for path in datasets.open(out).paths:
        pq.write_table(pq.read_table(path).drop_columns(["score"]), path)
    with pytest.raises(InputError, match="must have a column 'score', got none"):
        report.write(out, tmp_path / "r.html")
