"""What a model answers once red, green and blue have traded places, as columns of a run."""

import os

import pytest
import torch
from PIL import Image
from torch import nn

from pyfast_xai import datasets
from pyfast_xai.datasets.color_swap import SWAPS
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.metrics import color_swap
from pyfast_xai.models import LoadedModel


def network(channels=3):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    with torch.no_grad():  # so that answers differ
        net[0].weight.mul_(8)
        net[-1].bias.zero_()
    return net


@pytest.fixture
def loaded():
    return LoadedModel(network(), Preprocess(24), ["ant", "bee", "cat", "dog", "elk"], "tiny")


def run(folder, loaded, out, **how):
    settings = {"method": "saliency", "shard_size": 6, "batch_size": 4, "color_swap": True, **how}
    return datasets.explain(str(folder), loaded, out=out, **settings)


def pictures(folder):
    for name in sorted(os.listdir(folder)):
        with Image.open(folder / name) as image:
            yield image.convert("RGB")


@pytest.mark.parametrize("method", ["saliency", "eigen-cam", "fixations"])
def test_rows_say_what_the_model_says_of_swapped_pictures(folder, loaded, tmp_path, method):
    run(folder, loaded, tmp_path / "out", method=method)
    rows = list(datasets.open(tmp_path / "out"))
    for row, image in zip(rows, pictures(folder), strict=True):
        bands = image.split()
        before = loaded.model(loaded.preprocess(image)[0][None]).softmax(1)[0]
        assert row["topk_index"][0] == int(before.argmax())
        # Swapped before anything is cut, scaled or normalised.
        shown = [Image.merge("RGB", [bands[channel] for channel in swap]) for swap in SWAPS]
        after = torch.stack([loaded.model(loaded.preprocess(one)[0][None]).softmax(1)[0] for one in shown])
        assert row["swapped_index"] == after.argmax(1).tolist()
        # JPEG decoders may differ by a grey level.
        close = 1e-5 if row["id"].endswith("png") else 0.02
        assert row["swapped_score"] == pytest.approx(after[:, row["topk_index"][0]].tolist(), abs=close)
    assert any(row["swapped_index"] != row["topk_index"][:1] * 2 for row in rows)


def test_answers_stay_where_the_metric_says_so(folder, loaded, tmp_path):
    run(folder, loaded, tmp_path / "out")
    images = torch.stack([row.explanation().images[0] for row in datasets.open(tmp_path / "out")])
    mean, std = (torch.tensor(item).view(3, 1, 1) for item in (loaded.preprocess.mean, loaded.preprocess.std))
    output = color_swap(loaded.model, (images - mean) / std, mean=loaded.preprocess.mean, std=loaded.preprocess.std)
    stays = [[item == row["topk_index"][0] for item in row["swapped_index"]] for row in datasets.open(tmp_path / "out")]
    assert stays == output.unchanged.tolist()


def test_it_is_asked_for(folder, loaded, tmp_path):
    run(folder, loaded, tmp_path / "plain", color_swap=False)
    run(folder, loaded, tmp_path / "swapped")
    plain, swapped = (datasets.open(tmp_path / name) for name in ("plain", "swapped"))
    assert not [name for name in plain[0] if name.startswith("swapped")]
    assert "color_swap" not in plain.manifest.described["rows"]
    assert swapped.manifest.described["rows"]["color_swap"] == [[2, 0, 1], [1, 2, 0]]
    times = ("decode_ms", "explain_ms", "swapped_index", "swapped_score")
    for one, other in zip(plain, swapped, strict=True):
        assert dict(one).items() >= {name: item for name, item in other.items() if name not in times}.items()
    assert plain.manifest.fingerprint != swapped.manifest.fingerprint
    with pytest.raises(InputError, match=r"^out .* must be continued as it was begun, with rows.color_swap null"):
        run(folder, loaded, tmp_path / "plain")


@pytest.mark.parametrize("pictures_too", [False, True])
def test_error_rows_have_none_and_retry_makes_them(folder, loaded, tmp_path, pictures_too):
    whole = (folder / "04.png").read_bytes()
    (folder / "04.png").write_bytes(b"no picture")
    run(folder, loaded, tmp_path / "out", pictures=pictures_too)
    row = datasets.open(tmp_path / "out")[4]
    assert row["status"] == "error"
    assert row["swapped_index"] is row["swapped_score"] is None
    (folder / "04.png").write_bytes(whole)
    how = {"method": "saliency", "shard_size": 6, "batch_size": 4, "color_swap": True, "pictures": pictures_too}
    datasets.retry(datasets.prepare(str(folder), loaded, out=tmp_path / "out", **how))
    row = datasets.open(tmp_path / "out")[4]
    assert row["status"] == "ok"
    assert len(row["swapped_index"]) == len(row["swapped_score"]) == 2
    assert datasets.verify(tmp_path / "out").faults == []


def test_inputs_without_colours(tmp_path, loaded):
    shades = torch.rand(3, 1, 24, 24)
    grey = LoadedModel(network(1), Preprocess(24, mean=(0.5,), std=(0.5,)), loaded.labels, "grey")
    with pytest.raises(InputError, match=r"^color_swap must be left out for a model of grey pictures"):
        run_on(shades, grey, tmp_path / "a")
    with pytest.raises(InputError, match=r"^top_k must be at least 1 for color_swap"):
        run_on(shades, loaded, tmp_path / "b", top_k=0)
    assert not list(tmp_path.iterdir())
    # The source gives what it likes, the preprocessing is the usual one.
    plain = LoadedModel(network(1), Preprocess(24), loaded.labels, "grey")
    run_on(shades, plain, tmp_path / "c")
    assert [(row["status"], row["swapped_index"]) for row in datasets.open(tmp_path / "c")] == [("ok", None)] * 3


def run_on(source, loaded, out, **how):
    return datasets.explain(source, loaded, method="saliency", out=out, color_swap=True, **how)


def test_the_command(folder, tmp_path):
    from typer.testing import CliRunner

    from pyfast_xai import cli

    def call(*options):
        return CliRunner().invoke(cli.app, [str(one) for one in options])

    started = ("run", folder, "--model", "digits", "--out", tmp_path / "out", "--color-swap")
    done = call(*started)
    assert done.exit_code == 0, done.output
    rows = list(datasets.open(tmp_path / "out"))
    assert all(len(row["swapped_index"]) == 2 for row in rows)
    # `retry` asks for the same again.
    (folder / "04.png").write_bytes(b"no picture")
    repeated = call("run", folder, "--model", "digits", "--out", tmp_path / "more", "--color-swap")
    assert repeated.exit_code == 0, repeated.output
    (folder / "04.png").write_bytes((folder / "06.png").read_bytes())
    assert call("retry", tmp_path / "more").exit_code == 0
    assert len(datasets.open(tmp_path / "more")[4]["swapped_index"]) == 2
