import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import pyfast_xai
from pyfast_xai import CNNFixations, EigenCAM, cli, demo
from pyfast_xai.explainers import METHODS


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def opened(path):
    with Image.open(path) as image:
        return image.copy()


@pytest.fixture(scope="module")
def scenes():
    return demo.make_scenes(5, seed=3)


@pytest.fixture
def folder(tmp_path, scenes):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, image in enumerate(scenes.images):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{n}.png")
    return folder


def inputs(folder, names):
    read = [np.array(opened(folder / name).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2) / 255


def test_explain_writes_what_the_explainers_find(folder, tmp_path):
    out = tmp_path / "results"
    run("explain", folder, "--model", "digits", "--out", out, "--batch", 2)
    results = json.loads((out / "explanations.json").read_text())
    assert json.loads((out / "errors.json").read_text()) == {"errors": []}
    assert results["model"] == "digits"
    assert results["methods"] == ["fixations", "eigen-cam"]
    records = results["images"]
    assert [record["file"] for record in records] == [str(folder / f"{n}.png") for n in range(5)]

    images = inputs(folder, [f"{n}.png" for n in range(5)])
    fixations, eigen = CNNFixations(demo.load())(images), EigenCAM(demo.load())(images)
    for n, record in enumerate(records):
        found = record["fixations"]
        assert found["target"] == int(fixations.target[n])
        assert found["class"] == str(found["target"])
        assert found["score"] == pytest.approx(float(fixations.score[n]), abs=1e-5)
        assert found["points"]["input"] == fixations.points[n].tolist()
        assert found["box"]["input"] == fixations.boxes()[n].int().tolist()
        assert record["eigen-cam"]["box"]["input"] == eigen.boxes()[n].int().tolist()
        # A picture of the input's own size is the input.
        assert found["points"]["original"] == found["points"]["input"]
        assert found["box"]["original"] == found["box"]["input"]
        for name in ("fixations", "eigen-cam"):
            overlay = opened(out / record[name]["overlay"])
            assert overlay.size == (480, 480)
            assert np.array(overlay.resize((96, 96), Image.Resampling.BOX)).std() > 5
        assert opened(out / record["sheet"]).width > 3 * 400
    assert len(list(out.glob("*.png"))) == 3 * 5


def test_places_are_told_in_pixels_of_the_file(folder, tmp_path, scenes):
    # Twice as large, with a margin that the centre crop cuts off.
    large = Image.new("RGB", (292, 192), "gray")
    large.paste(opened(folder / "0.png").resize((192, 192), Image.Resampling.NEAREST), (50, 0))
    large.save(tmp_path / "large.jpg", quality=100, subsampling=0)
    turned = large.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", quality=100, subsampling=0, exif=exif)
    run("explain", tmp_path / "large.jpg", tmp_path / "turned.jpg", "--model", "digits", "--out", tmp_path / "out")
    records = json.loads((tmp_path / "out/explanations.json").read_text())["images"]
    for record in records:
        assert record["size"] == {"original": [192, 292], "input": [96, 96]}
        found = record["fixations"]
        assert found["points"]["original"] == [[2 * y + 1, 2 * x + 51] for y, x in found["points"]["input"]]
        x1, y1, x2, y2 = found["box"]["input"]
        assert found["box"]["original"] == [2 * x1 + 50, 2 * y1, 2 * x2 + 51, 2 * y2 + 1]


def test_bad_files_are_reported_and_the_others_done(folder, tmp_path):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    out, missing = tmp_path / "out", tmp_path / "missing.png"
    result = run("explain", folder, missing, "--model", "digits", "--out", out, "--batch", 3, code=3)
    errors = json.loads((out / "errors.json").read_text())["errors"]
    assert [e["file"] for e in errors] == [
        *(str(folder / n) for n in ("broken.png", "empty.png", "text.jpg")),
        str(missing),
    ]
    done = json.loads((out / "explanations.json").read_text())["images"]
    assert [record["file"] for record in done] == [str(folder / f"{n}.png") for n in range(5)]
    for error in errors:
        assert error["file"] in error["error"]
        assert sum(error["error"] in line for line in result.output.splitlines()) == 1
    assert "5 images explained" in result.output
    assert "4 failed" in result.output


def test_no_image_can_be_read(tmp_path):
    (tmp_path / "a.png").touch()
    run("explain", tmp_path / "a.png", "--model", "digits", "--out", tmp_path / "out", code=3)
    assert json.loads((tmp_path / "out/explanations.json").read_text())["images"] == []


def test_names_with_odd_characters(folder, tmp_path):
    names = ["[red]a[bold].png", "two\nlines.png", "ünï & $x;.png", "-m.png", "x" * 240 + ".png", "*.png"]
    names += [os.fsdecode(b"bytes \xff.png"), "same.png", "same.jpg", "SAME.webp", "same-2.png"]
    odd = tmp_path / "odd [1]"
    odd.mkdir()
    for name in names:
        opened(folder / "0.png").save(odd / name)
    (odd / "[bold]bad[").with_suffix(".png").write_text("no")
    out = tmp_path / "[blue]out"
    result = run("explain", odd, "--model", "digits", "--method", "eigen-cam", "--out", out, code=3)
    records = json.loads((out / "explanations.json").read_text())["images"]
    assert sorted(record["file"] for record in records) == sorted(str(odd / name) for name in names)
    pictures = [record["eigen-cam"]["overlay"] for record in records] + [record["sheet"] for record in records]
    assert len({name.casefold() for name in pictures}) == 2 * len(names)
    assert all((out / name).is_file() for name in pictures)
    assert "[blue]out" in result.output
    assert "[bold]bad[" in result.output


def test_json_on_stdout_is_for_machines(folder, tmp_path):
    (folder / "bad.png").touch()
    result = run("explain", folder, "--model", "digits", "--out", tmp_path / "out", "--json", code=3)
    printed = json.loads(result.stdout)
    assert len(printed["images"]) == 5
    assert printed["errors"][0]["file"].endswith("bad.png")
    assert "5 images explained" in result.stderr
    without = run("explain", folder, "--model", "digits", "--out", tmp_path / "out", code=3)
    assert "5 images explained" in without.stdout


@pytest.mark.parametrize(("given", "expected"), [("none", None), ("3", 3), ("7", 7)])
def test_target(folder, tmp_path, given, expected):
    out = tmp_path / "out"
    run("explain", folder / "0.png", "--model", "digits", "--method", "fixations", "--target", given, "--out", out)
    found = json.loads((out / "explanations.json").read_text())["images"][0]["fixations"]
    expected = CNNFixations(demo.load())(inputs(folder, ["0.png"]), expected)
    assert found["target"] == int(expected.target)
    assert found["points"]["input"] == expected.points[0].tolist()


def test_target_by_the_name_of_a_class():
    classes = ["tabby cat", "Tiger", "tench"]
    assert cli._target("tiger", classes) == 1
    assert cli._target("2", classes) == 2
    assert cli._target("None", classes) is None
    assert cli._target("12", None) == 12
    # The digits are called by their number.
    assert cli._target("1", ["1", "0"]) == 0


def test_layer_and_threshold_reach_the_explainer(folder, tmp_path):
    layer = next(name for name, module in demo.load().named_modules() if isinstance(module, torch.nn.MaxPool2d))
    arguments = ("--method", "eigen-cam", "--layer", layer, "--threshold", 0.6, "--colormap", "viridis")
    run("explain", folder / "1.png", "--model", "digits", *arguments, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/explanations.json").read_text())["images"][0]["eigen-cam"]
    expected = EigenCAM(demo.load(), layer=layer)(inputs(folder, ["1.png"]))
    assert found["box"]["input"] == expected.boxes(0.6)[0].int().tolist()
    assert found["box"]["input"] != EigenCAM(demo.load())(inputs(folder, ["1.png"])).boxes()[0].int().tolist()


def test_own_module_and_weights(folder, tmp_path, monkeypatch):
    code = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), "
    code += "torch.nn.Flatten(), torch.nn.LazyLinear(2))\n"
    code += "def small():\n    from pyfast_xai.demo import DigitsNet\n    return DigitsNet()\n"
    (tmp_path / "cli_networks.py").write_text(code)
    save_file(demo.load().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    own = ("--weights", "w.safetensors", "--size", 96, "--mean", "0,0,0", "--std", "1,1,1")
    run("explain", folder / "2.png", "--model", "cli_networks:small", *own, "--out", "out")
    record = json.loads((tmp_path / "out/explanations.json").read_text())["images"][0]
    assert record["size"]["input"] == [96, 96]
    assert record["fixations"]["class"] is None
    sys.modules.pop("cli_networks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method must be one of fixations, eigen-cam, got 'magic'"),
        (["--method", ","], "method must be one of"),
        (["--target", "zebra"], "target must be none, an index or a class of the model, got 'zebra'"),
        (["--target", "10"], "target must lie in [0, 10), got 10"),
        (["--target", "-1"], "target must lie in [0, 10), got -1"),
        (["--colormap", "pink"], "colormap must be one of turbo"),
        (["--device", "abacus"], "device must be one that is here"),
        (["--threshold", "15"], "threshold must lie between 0 and 1, got 15"),
        (["--alpha", "3"], "alpha must lie in 0 to 1, got 3"),
        (["--mean", "a,b"], "mean must be numbers separated by commas, got 'a,b'"),
        (["--std", "1"], "mean and std must have 3 values each"),
        (["--weights", "missing.pt"], "weights must be a file, got 'missing.pt'"),
        (["--layer", "nowhere"], "nowhere"),
        (["--method", "fixations", "--layer", "conv1"], "layer must be left out for fixations"),
        (["--batch", "0"], "--batch"),
        (["--model", "nonsense"], "model must be 'digits'"),
    ],
)
def test_wrong_usage_is_one_sentence(folder, tmp_path, arguments, message):
    model = [] if "--model" in arguments else ["--model", "digits"]
    result = run("explain", folder, *model, *arguments, "--out", tmp_path / "out", code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    if "--batch" not in arguments:
        assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_usage_without_images_or_model(folder, tmp_path):
    run("explain", code=2)
    run("explain", folder, code=2)
    (tmp_path / "empty").mkdir()
    assert "at least one picture" in run("explain", tmp_path / "empty", "--model", "digits", code=2).stderr


def test_folder_that_cannot_be_written_fails(folder, tmp_path):
    (tmp_path / "file").touch()
    result = run("explain", folder, "--model", "digits", "--out", tmp_path / "file" / "out", code=1)
    assert len(result.stderr.strip().splitlines()) == 1


def test_model_without_a_rule_fails(folder, tmp_path, monkeypatch):
    code = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
    code += "        return torch.fft.rfft2(x).abs().mean((2, 3))\n"
    (tmp_path / "cli_odd_network.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    result = run("explain", folder, "--model", "cli_odd_network:Net", "--method", "fixations", code=1)
    assert "fft" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    sys.modules.pop("cli_odd_network")


def test_one_image_that_spoils_a_batch_is_named(folder, tmp_path, monkeypatch):
    # A picture of pure black makes this network divide by zero.
    Image.new("RGB", (96, 96)).save(folder / "black.png")
    code = "import torch\nfrom pyfast_xai.demo import load\nclass Net(torch.nn.Module):\n"
    code += "    def __init__(self):\n        super().__init__()\n        self.net = load()\n"
    code += "    def forward(self, x):\n        return self.net(x / x.amax((1, 2, 3), keepdim=True))\n"
    (tmp_path / "cli_fragile.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    own = ("--model", "cli_fragile:Net", "--size", 96, "--mean", "0,0,0", "--std", "1,1,1", "--method", "eigen-cam")
    run("explain", folder, *own, "--out", "out", code=3)
    errors = json.loads((tmp_path / "out/errors.json").read_text())["errors"]
    assert [error["file"] for error in errors] == [str(folder / "black.png")]
    assert "finite" in errors[0]["error"]
    assert len(json.loads((tmp_path / "out/explanations.json").read_text())["images"]) == 5
    sys.modules.pop("cli_fragile")


def test_demo(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--count", 9)
    lines = result.stdout.strip().splitlines()
    assert str(out / "demo.png") in lines[-1]
    table = json.loads((out / "demo.json").read_text())
    assert [row["method"] for row in table["methods"]] == ["centred box, centre point", *METHODS]
    assert len(list(out.glob("scene-*.png"))) == 9 * len(METHODS)
    assert opened(out / "demo.png").width > 1000

    scenes = demo.make_scenes(9, 0)
    correct = demo.load()(scenes.images).argmax(1) == scenes.labels
    assert table["top1"] == pytest.approx(float(correct.float().mean()))
    for row, (name, explainer) in zip(table["methods"][1:], METHODS.items(), strict=True):
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


def test_demo_as_json_and_of_one_scene(tmp_path):
    result = run("demo", "--out", tmp_path, "--count", 1, "--json")
    assert json.loads(result.stdout)["scenes"] == 1
    run("demo", "--out", tmp_path, "--count", 0, code=2)


def test_backends_tells_who_serves_what():
    output = run("backends").stdout
    for name in ("conv_trace", "point_density", "cpu", "torch", "numba", "triton", "cupy", torch.__version__):
        assert name in output
    assert pyfast_xai.__version__ in output


def test_methods_lists_every_explainer():
    output = run("methods").stdout
    for name in METHODS:
        assert name in output


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from pyfast_xai.cli import app\n"
        "for a in (['--help'], ['explain', '--help'], ['--version']):\n"
        "    result = CliRunner().invoke(app, a); assert result.exit_code == 0, result.output\n"
        "print(result.output, [m for m in ('torch', 'numpy', 'PIL', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert pyfast_xai.__version__ in done.stdout
    assert done.stdout.strip().endswith("[]")
