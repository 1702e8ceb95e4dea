import json

import numpy as np
import pytest
from PIL import Image

from pyfast_xai import demo
from pyfast_xai.cli.demo import METHODS as DEMONSTRATED
from pyfast_xai.explainers import METHODS, EigenCAM


def test_demo(run, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--count", 9)
    quick = {name: METHODS[name] for name in DEMONSTRATED}
    lines = result.stdout.strip().splitlines()
    assert str(out / "demo.png") in lines[-1]
    table = json.loads((out / "demo.json").read_text())
    assert [row["method"] for row in table["methods"]] == ["centred box, centre point", *quick]
    assert len(list(out.glob("scene-*.png"))) == 9 * len(quick)
    with Image.open(out / "demo.png") as sheet:
        assert sheet.width > 1000

    scenes = demo.make_scenes(9, 0)
    correct = demo.load()(scenes.images).argmax(1) == scenes.labels
    assert table["top1"] == pytest.approx(float(correct.float().mean()))
    for row, (name, explainer) in zip(table["methods"][1:], quick.items(), strict=True):
        explanation = explainer(demo.load())(scenes.images)
        hits = peaks = 0
        for n in correct.nonzero().flatten().tolist():
            x1, y1, x2, y2 = scenes.boxes[n].tolist()
            a = np.zeros((96, 96), bool)
            a[y1 : y2 + 1, x1 : x2 + 1] = True
            b = np.zeros((96, 96), bool)
            bx1, by1, bx2, by2 = explanation.boxes()[n].int().tolist()
            b[by1 : by2 + 1, bx1 : bx2 + 1] = True
            hits += (a & b).sum() >= 0.5 * (a | b).sum()
            heat = explanation.heatmap[n].numpy()
            peaks += a[np.unravel_index(heat.argmax(), heat.shape)]
        assert row["box"] == pytest.approx(hits / int(correct.sum()))
        assert row["peak"] == pytest.approx(peaks / int(correct.sum()))
        assert row["seconds"] > 0
        assert name in result.stdout


def test_demo_as_json_and_of_one_scene(run, tmp_path):
    result = run("demo", "--out", tmp_path, "--count", 1, "--json")
    assert json.loads(result.stdout)["scenes"] == 1
    run("demo", "--out", tmp_path, "--count", 0, code=2)


def test_demo_tells_of_other_methods_and_shows_them_where_asked(run, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "other-one", EigenCAM)
    result = run("demo", "--out", tmp_path / "all", "--count", 1)
    assert "other-one" in result.stdout.splitlines()[-2]
    assert not list((tmp_path / "all").glob("*other-one*"))
    result = run("demo", "--out", tmp_path / "one", "--count", 1, "--method", "other-one")
    assert [path.name for path in (tmp_path / "one").glob("scene-*")] == ["scene-000.other-one.png"]
    assert "There are more" not in result.stdout
    assert "method must be one of" in run("demo", "--out", tmp_path, "--method", "magic", code=2).stderr
