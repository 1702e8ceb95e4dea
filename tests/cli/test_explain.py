import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pyfast_xai import CNNFixations, EigenCAM, demo, render
from pyfast_xai.cli import arguments
from pyfast_xai.explainers import METHODS
from pyfast_xai.progress import Progress


def opened(path):
    with Image.open(path) as image:
        return image.copy()


def inputs(folder, names):
    read = [np.array(opened(folder / name).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2) / 255


def test_explain_writes_what_the_explainers_find(run, folder, tmp_path):
    out = tmp_path / "results"
    run("explain", folder, "--model", "digits", "--out", out, "--batch-size", 2)
    results = json.loads((out / "explanations.json").read_text())
    assert json.loads((out / "errors.json").read_text()) == {"errors": []}
    assert results["model"] == "digits"
    assert results["methods"] == ["fixations", "eigen-cam"]
    records = results["images"]
    assert [record["file"] for record in records] == [str(folder / f"{n}.png") for n in range(5)]

    images = inputs(folder, [f"{n}.png" for n in range(5)])
    fixations, eigen = CNNFixations(demo.load())(images), EigenCAM(demo.load())(images)
    for n, record in enumerate(records):
        result = record["fixations"]
        assert result["target"] == int(fixations.target[n])
        assert result["class"] == str(result["target"])
        assert result["score"] == pytest.approx(float(fixations.score[n]), abs=1e-5)
        assert result["points"]["input"] == fixations.points[n].tolist()
        assert result["box"]["input"] == fixations.boxes()[n].int().tolist()
        assert record["eigen-cam"]["box"]["input"] == eigen.boxes()[n].int().tolist()
        # A picture of the input's own size is the input.
        assert result["points"]["original"] == result["points"]["input"]
        assert result["box"]["original"] == result["box"]["input"]
        for name in ("fixations", "eigen-cam"):
            overlay = opened(out / record[name]["overlay"])
            assert overlay.size == (480, 480)
            assert np.array(overlay.resize((96, 96), Image.Resampling.BOX)).std() > 5
        assert opened(out / record["sheet"]).width > 3 * 400
    assert len(list(out.glob("*.png"))) == 3 * 5


def test_places_are_told_in_pixels_of_the_file(run, folder, tmp_path, scenes):
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
        result = record["fixations"]
        assert result["points"]["original"] == [[2 * y + 1, 2 * x + 51] for y, x in result["points"]["input"]]
        x1, y1, x2, y2 = result["box"]["input"]
        assert result["box"]["original"] == [2 * x1 + 50, 2 * y1, 2 * x2 + 51, 2 * y2 + 1]


def test_bad_files_are_reported_and_the_others_done(run, folder, tmp_path):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    out, missing = tmp_path / "out", tmp_path / "missing.png"
    result = run("explain", folder, missing, "--model", "digits", "--out", out, "--batch-size", 3, code=3)
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


def test_no_image_can_be_read(run, tmp_path):
    (tmp_path / "a.png").touch()
    result = run("explain", tmp_path / "a.png", "--model", "digits", "--out", tmp_path / "out", code=1)
    assert result.output.strip().splitlines()[-1] == "No image was explained, 1 failed."
    assert json.loads((tmp_path / "out/explanations.json").read_text())["images"] == []


def test_names_with_odd_characters(run, folder, tmp_path):
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


def test_every_result_has_a_name_of_its_own(run, folder, tmp_path):
    # Names that look like results of each other, and the same name thrice.
    names = ["a.png", "a.eigen-cam.png", "a.sheet.png", "a.eigen-cam.sheet.png", "a.jpg", "sub/a.png", "a-2.png"]
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for n, name in enumerate(names):
        opened(folder / f"{n % 5}.png").save(photos / name)
    output = []
    for out in (tmp_path / "once", tmp_path / "again"):
        run("explain", photos, "--model", "digits", "--method", "eigen-cam", "--out", out)
        records = json.loads((out / "explanations.json").read_text())["images"]
        pictures = [name for record in records for name in (record["eigen-cam"]["overlay"], record["sheet"])]
        assert sorted(pictures) == sorted(path.name for path in out.glob("*.png"))
        assert len(pictures) == 2 * len(names)
        output.append({record["file"]: (record["eigen-cam"]["overlay"], record["sheet"]) for record in records})
    assert output[0] == output[1]


@pytest.mark.parametrize(
    ("images", "out"),
    [
        ("pictures", "pictures"),
        ("pictures/0.png", "pictures"),
        ("pictures/*.png", "link to pictures"),
        ("link to pictures", "pictures/../pictures"),
        ("links", "pictures"),
        ("pictures", "links"),
    ],
)
def test_pictures_are_never_overwritten(run, folder, tmp_path, images, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link to pictures").symlink_to(folder)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/0.png").symlink_to(folder / "0.png")
    # As results of 1.png are called; a picture may have been linked there since.
    (tmp_path / "links/1.eigen-cam.png").symlink_to(folder / "1.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = (images, out) != ("pictures", "links")
    result = run("explain", images, "--model", "digits", "--method", "eigen-cam", "--out", out, code=2 * refused)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if refused:
        assert f"out must be a folder without pictures to explain, got '{out}', where '" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_results_below_the_pictures_are_not_explained_in_the_next_run(run, folder):
    for _ in range(2):
        run("explain", folder, "--model", "digits", "--method", "eigen-cam", "--out", folder / "explained")
        records = json.loads((folder / "explained/explanations.json").read_text())["images"]
        assert [record["file"] for record in records] == [str(folder / f"{n}.png") for n in range(5)]


def test_pictures_of_extreme_shape(run, folder, tmp_path):
    Image.new("RGB", (1, 20_000), "red").save(folder / "tall.png")
    Image.new("RGB", (20_000, 1), "red").save(folder / "wide.png")
    run("explain", folder, "--model", "digits", "--out", tmp_path / "out")
    records = json.loads((tmp_path / "out/explanations.json").read_text())["images"]
    assert [record["size"]["original"] for record in records[5:]] == [[20_000, 1], [1, 20_000]]


def test_sheet_shows_an_attribution_in_colour(run, folder, tmp_path, monkeypatch):
    class Painted(EigenCAM):
        def __call__(self, images, target=None):
            explanation = super().__call__(images)
            explanation.attribution = images * 0
            explanation.attribution[:, 0, 0, 0], explanation.attribution[:, 0, 0, 1] = -1, 1
            return explanation

    monkeypatch.setitem(METHODS, "painted", Painted)
    run("explain", folder, "--model", "digits", "--method", "eigen-cam,painted", "--out", tmp_path)
    sheet = opened(tmp_path / "0.sheet.png")
    # Picture, two overlays, and the mid grey of no influence.
    assert sheet.width > 4 * 448
    assert sheet.getpixel((sheet.width - 240, sheet.height - 240)) == (128, 128, 128)


def test_sheets_say_what_their_colours_and_marks_mean(run, folder, tmp_path, monkeypatch):
    drawn = []
    montage = render.montage
    monkeypatch.setattr(render, "montage", lambda *given, **how: drawn.append(how["keys"]) or montage(*given, **how))
    run("explain", folder, "--model", "digits", "--method", "eigen-cam,fixations,saliency", "--out", tmp_path)
    assert drawn
    for keys in drawn:
        assert [key.text for key in keys] == ["hot: matters most", "fixation", "box"]
        assert keys[0].colormap == render.DEFAULT_COLORMAP


def test_slow_method_tells_how_far_it_is(run, folder, tmp_path, monkeypatch):
    class Slow(EigenCAM):
        def __init__(self, model, *, progress=None, labels=None):
            super().__init__(model, labels=labels)
            self.progress = progress

        def __call__(self, images, target=None):
            for iteration in range(1, 4):
                self.progress(Progress(iteration, 3, {"score": 0.5}))
            return super().__call__(images)

    monkeypatch.setitem(METHODS, "slow", Slow)
    run("explain", folder, "--model", "digits", "--method", "slow", "--out", tmp_path / "out")


def test_json_on_stdout_is_for_machines(run, folder, tmp_path):
    (folder / "bad.png").touch()
    result = run("explain", folder, "--model", "digits", "--out", tmp_path / "out", "--json", code=3)
    printed = json.loads(result.stdout)
    assert len(printed["images"]) == 5
    assert printed["errors"][0]["file"].endswith("bad.png")
    assert "5 images explained" in result.stderr
    without = run("explain", folder, "--model", "digits", "--out", tmp_path / "out", code=3)
    assert "5 images explained" in without.stdout


@pytest.mark.parametrize(("given", "expected"), [("none", None), ("3", 3), ("7", 7)])
def test_target(run, folder, tmp_path, given, expected):
    out = tmp_path / "out"
    run("explain", folder / "0.png", "--model", "digits", "--method", "fixations", "--target", given, "--out", out)
    result = json.loads((out / "explanations.json").read_text())["images"][0]["fixations"]
    expected = CNNFixations(demo.load())(inputs(folder, ["0.png"]), expected)
    assert result["target"] == int(expected.target)
    assert result["points"]["input"] == expected.points[0].tolist()


def test_target_by_the_name_of_a_class():
    classes = ["tabby cat", "Tiger", "tench"]
    assert arguments.target("tiger", classes) == 1
    assert arguments.target("2", classes) == 2
    assert arguments.target("None", classes) is None
    assert arguments.target("12", None) == 12
    # The digits are called by their number.
    assert arguments.target("1", ["1", "0"]) == 0


def test_layer_and_box_rule_reach_the_explainer(run, folder, tmp_path):
    layer = next(name for name, module in demo.load().named_modules() if isinstance(module, torch.nn.MaxPool2d))
    arguments = ("--method", "eigen-cam", "--layer", layer, "--box-rule", "segment:0.6", "--colormap", "viridis")
    run("explain", folder / "1.png", "--model", "digits", *arguments, "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out/explanations.json").read_text())["images"][0]["eigen-cam"]
    expected = EigenCAM(demo.load(), layer=layer)(inputs(folder, ["1.png"]))
    assert result["box"]["input"] == expected.boxes("segment:0.6")[0].int().tolist()
    assert result["box"]["input"] != EigenCAM(demo.load())(inputs(folder, ["1.png"])).boxes()[0].int().tolist()


def test_settings_reach_the_explainer(run, folder, tmp_path):
    settings = (
        "--set",
        "fixations.variant=paper",
        "--set",
        "fixations.radius_share=0.3",
        "--set",
        "eigen-cam.center=true",
    )
    run("explain", folder / "1.png", "--model", "digits", *settings, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out/explanations.json").read_text())["images"][0]
    images = inputs(folder, ["1.png"])
    fixations = CNNFixations(demo.load(), variant="paper", radius_share=0.3)(images)
    assert record["fixations"]["points"]["input"] == fixations.points[0].tolist()
    assert record["eigen-cam"]["box"]["input"] == EigenCAM(demo.load(), center=True)(images).boxes()[0].int().tolist()


def test_own_module_and_weights(run, folder, tmp_path, monkeypatch):
    code = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), "
    code += "torch.nn.Flatten(), torch.nn.LazyLinear(2))\n"
    code += "def small():\n    from pyfast_xai.demo import DigitsNet\n    return DigitsNet()\n"
    (tmp_path / "cli_networks.py").write_text(code)
    save_file(demo.load().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    actual = ("--weights", "w.safetensors", "--size", 96, "--mean", "0,0,0", "--std", "1,1,1")
    run("explain", folder / "2.png", "--model", "cli_networks:small", *actual, "--out", "out")
    record = json.loads((tmp_path / "out/explanations.json").read_text())["images"][0]
    assert record["size"]["input"] == [96, 96]
    assert record["fixations"]["class"] is None
    sys.modules.pop("cli_networks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], f"method must be one of {', '.join(METHODS)}, got 'magic'"),
        (["--method", "gradcam"], "method 'gradcam' does not exist; did you mean 'grad-cam'?"),
        (["--method", "grad-cam", "--method", "Grad_CAM++"], "'Grad_CAM++' does not exist; did you mean 'grad-cam++'?"),
        (["--method", ","], "method must be one of"),
        (["--target", "zebra"], "target must be none, an index or a class of the model, got 'zebra'"),
        (["--target", "10"], "target must lie in [0, 10), got 10"),
        (["--target", "-1"], "target must lie in [0, 10), got -1"),
        (["--colormap", "pink"], "colormap must be one of plasma"),
        (["--device", "abacus"], "device must be one that is here"),
        (["--box-rule", "segment:15"], "threshold must lie between 0 and 1, got 15"),
        (["--alpha", "3"], "alpha must lie in 0 to 1, got 3"),
        (["--mean", "a,b"], "mean must be numbers separated by commas, got 'a,b'"),
        (["--std", "1"], "mean and std must have 3 values each"),
        (["--weights", "missing.pt"], "weights must be a file, got 'missing.pt'"),
        (["--layer", "nowhere"], "nowhere"),
        (["--set", "fixations.radius_share=2"], "radius_share must"),
        (["--set", "fixations"], "set must look like METHOD.NAME=VALUE, got 'fixations'"),
        (["--method", "fixations", "--layer", "conv1"], "layer must be left out for fixations"),
        (["--batch-size", "0"], "--batch-size"),
        (["--model", "nonsense"], "model must be 'digits'"),
    ],
)
def test_wrong_usage_is_one_sentence(run, folder, tmp_path, arguments, message):
    model = [] if "--model" in arguments else ["--model", "digits"]
    result = run("explain", folder, *model, *arguments, "--out", tmp_path / "out", code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    if "--batch-size" not in arguments:
        assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_usage_without_images_or_model(run, folder, tmp_path):
    run("explain", code=2)
    run("explain", folder, code=2)
    (tmp_path / "empty").mkdir()
    assert "at least one picture" in run("explain", tmp_path / "empty", "--model", "digits", code=2).stderr


def test_folder_that_cannot_be_written_fails(run, folder, tmp_path):
    (tmp_path / "file").touch()
    result = run("explain", folder, "--model", "digits", "--out", tmp_path / "file" / "out", code=1)
    assert len(result.stderr.strip().splitlines()) == 1


def test_model_without_a_rule_fails(run, folder, tmp_path, monkeypatch):
    code = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
    code += "        return torch.fft.rfft2(x).abs().mean((2, 3))\n"
    (tmp_path / "cli_odd_network.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    result = run("explain", folder, "--model", "cli_odd_network:Net", "--method", "fixations", code=1)
    assert "no rule for complex numbers" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    sys.modules.pop("cli_odd_network")


def test_one_image_that_spoils_a_batch_is_named(run, folder, tmp_path, monkeypatch):
    # A picture of pure black makes this network divide by zero.
    Image.new("RGB", (96, 96)).save(folder / "black.png")
    code = "import torch\nfrom pyfast_xai.demo import load\nclass Net(torch.nn.Module):\n"
    code += "    def __init__(self):\n        super().__init__()\n        self.net = load()\n"
    code += "    def forward(self, x):\n        return self.net(x / x.amax((1, 2, 3), keepdim=True))\n"
    (tmp_path / "cli_fragile.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    actual = ("--model", "cli_fragile:Net", "--size", 96, "--mean", "0,0,0", "--std", "1,1,1", "--method", "eigen-cam")
    run("explain", folder, *actual, "--out", "out", code=3)
    errors = json.loads((tmp_path / "out/errors.json").read_text())["errors"]
    assert [error["file"] for error in errors] == [str(folder / "black.png")]
    assert "finite" in errors[0]["error"]
    assert len(json.loads((tmp_path / "out/explanations.json").read_text())["images"]) == 5
    sys.modules.pop("cli_fragile")


def test_an_option_is_repeated_or_holds_several(run, folder, tmp_path):
    methods = ("--method", "eigen-cam", "--method", "grad-cam,saliency")
    run("explain", folder / "0.png", "--model", "digits", *methods, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/explanations.json").read_text())["methods"] == [
        "eigen-cam",
        "grad-cam",
        "saliency",
    ]


def test_names_of_pictures_are_never_broken(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    deep = tmp_path / ("a-folder-with-a-long-name-" * 3)
    deep.mkdir()
    (folder / "0.png").rename(deep / "picture.png")
    result = run("explain", deep, "--model", "digits", "--method", "eigen-cam", "--out", tmp_path / "out")
    assert any(line.split()[:1] == ["picture.png"] for line in result.stdout.splitlines())
