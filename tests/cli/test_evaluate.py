import json

import pytest


@pytest.fixture
def annotations(tmp_path, scenes):
    rows = [
        {"file": f"{n}.png", "label": label, "boxes": [box]}
        for n, (label, box) in enumerate(zip(scenes.labels.tolist(), scenes.boxes.tolist(), strict=True))
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    return path


def test_evaluate(run, folder, annotations, tmp_path):
    out = tmp_path / "out"
    options = ("evaluate", folder, "--model", "digits", "--annotations", annotations, "--out", out)
    shown = run(*options, "--methods", "centre,eigen-cam", "--metrics", "box-error,pointing", "--resamples", 20)
    assert "eigen-cam" in shown.output
    assert "5 pictures" in shown.output
    result = json.loads((out / "evaluation.json").read_text())
    values = {(f["method"], f["metric"], f["subset"]): f["value"] for f in result["figures"]}
    # The demo's digits are anywhere: the network's own map finds them.
    assert values["eigen-cam", "pointing", "all"] > values["centre", "pointing", "all"]


def test_json_alone_on_stdout(run, folder, annotations, tmp_path):
    options = ("evaluate", folder, "--model", "digits", "--annotations", annotations, "--out", tmp_path / "out")
    result = run(*options, "--methods", "saliency", "--set", "saliency.reduction=norm", "--json")
    assert json.loads(result.stdout)["small"] == 5


def test_a_bad_picture_is_told(run, folder, annotations, tmp_path):
    (folder / "0.png").write_bytes(b"no picture")
    options = ("evaluate", folder, "--model", "digits", "--annotations", annotations, "--out", tmp_path / "out")
    assert "1 failed" in run(*options, "--methods", "centre", code=3).output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--methods", "magic"), "method must be one of"),
        (("--metrics", "iou"), "metric must be one of"),
        (("--metric", "box_error"), "did you mean 'box-error'?"),
        (("--metrics", "pxap"), "annotations must have a mask"),
        (("--target", "best"), "target must be one of"),
        (("--annotations", "nowhere"), "annotations must be"),
        (("--set", "centre.seed=1"), "set must begin with a chosen method"),
    ],
)
def test_refusals(run, folder, annotations, tmp_path, change, message):
    options = ["evaluate", folder, "--model", "digits", "--annotations", annotations, "--out", tmp_path / "out"]
    assert message in " ".join(run(*options, "--method", "eigen-cam", *change, code=2).output.split())


def test_annotations_of_other_pictures(run, folder, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([{"file": "else.png", "boxes": []}]))
    result = run("evaluate", folder, "--model", "digits", "--annotations", path, "--out", tmp_path / "out", code=2)
    assert "which tells of none of them" in " ".join(result.output.split())
