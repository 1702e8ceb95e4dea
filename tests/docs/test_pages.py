"""Pages of the documentation: their code runs, and their figures are those of the tables they are taken from."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import pyfast_xai

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    *("index", "start", "which-layer"),
    *("howto/batches", "howto/detectors", "howto/segmenters", "howto/transformers", "howto/volumes"),
)
# No weights are fetched, and the smaller network does as well.
INSTEAD = {'"DEFAULT"': "None", "torchvision/resnet50": "torchvision/resnet18"}


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    image = pytest.importorskip("skimage.data").chelsea()
    Image.fromarray(image[:224, :224]).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL))
    for written, run in INSTEAD.items():
        code = code.replace(written, run)
    exec(compile(code, f"{page}.md", "exec"), {"__name__": page})


def table(page, section, first):
    """Returns the rows of the table of a section by its first or first two columns."""
    part = (DOCS / f"{page}.md").read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    head, _, *rows = next(lines[i:] for i, line in enumerate(lines) if line[0] == first)
    return [dict(zip(head, row, strict=True)) for row in rows]


def shown(rows, name, column):
    return rows[name][column].partition(" ±")[0]


@pytest.fixture(scope="module")
def results():
    places = {(row["network"], row["method"]): row for row in table("results", "Where explainers point", "network")}
    answers = {row["method"]: row for row in table("results", "What the model makes of it, and sanity", "network")}
    return places, answers


def method_name(row):
    name = row["method"].strip("*`")
    return "centre" if name == "the middle of the picture" else getattr(pyfast_xai, name).method


def test_figures_of_methods_are_those_measured(results):
    places, answers = results
    rows = table("which-method", "What was measured", "method")
    assert len(rows) == 13
    for row in rows:
        method = method_name(row)
        for column, measured in (
            ("points at small objects, % ↑", "pointing, %, small ↑"),
            ("box error, % ↓", "box error at the best threshold, % ↓"),
        ):
            pair = [shown(places, (network, method), measured) for network in ("SqueezeNet 1.1", "GoogLeNet")]
            assert row[column] == " / ".join(pair), (method, column)
        assert row["class sensitivity ↑"] == shown(answers, method, "class sensitivity ↑")
        assert row["likeness, random weights ↓"] == shown(answers, method, "likeness, random weights ↓")


def test_costs_of_methods_are_those_measured():
    page = (DOCS / "performance.md").read_text().split("\nBatch 8 (", 1)[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.split("\n\n")[1].splitlines()]
    column = lines[0].index("resnet50")
    measured = {line[0].removesuffix(", ten classes"): line[column] for line in lines[2:]}
    for row in table("which-method", "What was measured", "method"):
        assert row["cost in forwards, ResNet-50"] == measured.get(method_name(row), "")


@pytest.mark.parametrize(
    ("title", "network"),
    [
        ("ResNet-50", "resnet50"),
        ("SqueezeNet 1.1", "squeezenet1_1"),
        ("MobileNetV2", "mobilenet_v2"),
        ("EfficientNet-B0", "efficientnet_b0"),
    ],
)
def test_automatic_layers_are_those_of_the_page(title, network):
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, network)(weights=None).eval()
    tape = pyfast_xai.record(model, torch.zeros(1, 3, 224, 224))
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "which-layer.md").read_text().splitlines()
        if line.startswith("|")
    ]
    row = dict(zip(head, next(row for row in rows if row[0] == title), strict=True))
    for column, explainer in (("`EigenCAM`", "EigenCAM"), ("`ExcitationBackprop`", "ExcitationBackprop")):
        (name,) = getattr(pyfast_xai, explainer)(model).names(tape)
        assert name.startswith(re.search("`(.*)`", row[column])[1] + ".")
