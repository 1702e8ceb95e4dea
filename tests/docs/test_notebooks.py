"""The notebooks run from top to bottom, and what they draw is no blank picture."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from import_file import import_file
from PIL import Image

NOTEBOOKS = Path(__file__).parents[2] / "docs/notebooks"


@pytest.fixture(scope="module")
def run():
    return import_file(NOTEBOOKS / "run.py", "run_notebooks")


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs(name, run, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    if "data-set" in name:
        pytest.importorskip("pyarrow")
        pytest.importorskip("duckdb")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    shown = list(run.outputs(NOTEBOOKS / f"{name}.ipynb"))
    pictures = [np.asarray(Image.open(io.BytesIO(output.picture)).convert("L")) for output in shown if output.picture]
    assert pictures
    assert all(picture.std() > 10 for picture in pictures)


def test_there_are_six_without_outputs():
    cells = [json.loads(path.read_text())["cells"] for path in NOTEBOOKS.glob("*.ipynb")]
    assert len(cells) == 6
    assert not any(cell.get("outputs") for notebook in cells for cell in notebook)
