import json
import subprocess
import sys

import pytest

from pyfast_xai import METHODS, cli, demo, layers, models
from pyfast_xai.cli import settings
from pyfast_xai.errors import InputError


def test_the_table_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("methods").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = [line.split()[0] for line in lines if line.strip()]
    assert all(name in first for name in METHODS)


def test_one_method_tells_its_settings(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("methods", "grad-cam").stdout
    assert "pyfast_xai.GradCAM" in shown
    assert METHODS["grad-cam"].paper.split()[-1] in shown
    for name in settings.settable("grad-cam"):
        assert name in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "did you mean 'grad-cam'?" in run("methods", "gradcam", code=2).stderr


def test_methods_as_json(run):
    output = json.loads(run("methods", "--json").stdout)
    assert [one["method"] for one in output] == list(METHODS)
    for one in output:
        assert METHODS[one["method"]].__name__ == one["class"]
        assert one["summary"]
        assert one["paper"]
        assert {item["name"] for item in one["settings"]} == set(settings.settable(one["method"]))
    # What a method takes from its base is explained, too.
    (fixations,) = json.loads(run("methods", "fixations", "--json").stdout)
    assert all(item["meaning"] and item["values"] for item in fixations["settings"])


def test_layers_are_those_of_the_library(run):
    import torch

    expected = layers(demo.load(), torch.zeros(1, 3, 96, 96))
    output = json.loads(run("layers", "digits", "--json").stdout)
    assert [one["name"] for one in output] == [one.name for one in expected]
    shown = run("layers", "digits").stdout
    assert all(one.name in shown for one in expected)
    assert "model must be" in run("layers", "nonsense", code=2).stderr


def test_help_groups_the_options_of_a_run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = run("run", "--help").stdout
    for panel in ("Network", "Method and target", "Results", "Speed and limits", "Ray", "Watching"):
        assert f"─ {panel} ─" in shown


def test_a_run_takes_one_method(run, folder, tmp_path):
    pytest.importorskip("pyarrow")
    options = ("--model", "digits", "--method", "clear", "--method", "rise", "--out", tmp_path / "out")
    assert "method must be a single one here, got clear, rise" in run("run", folder, *options, code=2).stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [("resnet50", "torchvision/resnet50"), ("ResNet-50", "torchvision/resnet50"), ("vgg-16", "torchvision/vgg16")],
)
def test_networks_without_a_family_are_recognised(monkeypatch, name, meant):
    class Zoo:
        @staticmethod
        def list_models():
            return ["resnet18", "resnet50", "vgg16"]

    monkeypatch.setitem(sys.modules, "torchvision.models", Zoo)
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        models.load_model(name)


def test_networks_are_recognised_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match="did you mean 'torchvision/resnet50'"):
        models.load_model("resnet50")
    with pytest.raises(InputError, match=r"got 'nonsense'$"):
        models.load_model("nonsense")


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "pyfast_xai", "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("pyfast-xai ")
    assert cli.program.__module__ == "pyfast_xai.cli"
