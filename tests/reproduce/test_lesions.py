"""Table 3 of FGVis on orange pictures with a dark spot each."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation
from pyfast_xai.reproduce import Data, lesions

SPOTS = [(12, 14, 27, 29), (60, 10, 75, 25), (14, 60, 29, 75), (66, 64, 81, 79), (20, 16, 35, 31), (62, 60, 77, 75)]


@pytest.fixture
def fundus(root, monkeypatch):
    """Six pictures of four parts; the spot of even ones is called a haemorrhage."""
    monkeypatch.setattr(lesions, "ROWS", 2)
    monkeypatch.setattr(lesions, "FOLDS", 3)
    folder = root / "fundus_codras"
    folder.mkdir()
    (folder / "retinal.names").write_text("optic_disc\nhard_exudates\nhaemorrhage\n")
    generator = np.random.default_rng(0)
    for i, (x1, y1, x2, y2) in enumerate(SPOTS):
        pixels = np.full((96, 128, 3), (200, 120, 60)) + generator.integers(-5, 6, (96, 128, 3))
        pixels[y1 : y2 + 1, x1 : x2 + 1] = (60, 20, 20)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
        shares = [(x1 + x2 + 1) / 256, (y1 + y2 + 1) / 192, (x2 - x1 + 1) / 128, (y2 - y1 + 1) / 96]
        (folder / f"{i}.txt").write_text(" ".join(map(str, [2 - i % 2, *shares])) + "\n0 0.1 0.1 0.1 0.1")
    return Data(root, names=("squeezenet1_1",))


def test_boxes_are_those_of_the_files(fundus):
    entries = sorted(fundus.fundus(), key=lambda entry: entry.path)
    assert torch.allclose(entries[1].boxes[0], torch.tensor(SPOTS[1]).float(), atol=1e-3)
    assert entries[1].kinds == ["hard_exudates", "optic_disc"]
    with pytest.raises(InputError, match="data must hold IDRiD's fundus pictures with boxes at fundus_codras"):
        Data(fundus.root / "fundus_codras").fundus()


def test_parts_hold_the_lesions_that_lie_in_them_by_half(tmp_path, monkeypatch):
    monkeypatch.setattr(lesions, "ROWS", 2)
    pixels = np.full((80, 120, 3), 200, np.uint8)
    pixels[:, 80:] = 0  # beyond the retina
    Image.fromarray(pixels).save(tmp_path / "x.png")
    boxes = torch.tensor([[2.0, 2, 11, 11], [36, 50, 45, 55], [38, 2, 59, 11]])
    kinds = ["haemorrhage", "hard_exudates", "haemorrhage"]
    tiles = lesions.tiles_of(Annotation(tmp_path / "x.png", None, boxes, kinds), 7)
    assert [(tile.picture, tile.image.size) for tile in tiles] == [(7, (40, 40))] * 4
    held = [{kind: boxes.tolist() for kind, boxes in tile.lesions.items() if len(boxes)} for tile in tiles]
    assert held == [
        {"haemorrhage": [[2, 2, 11, 11]]},
        {"haemorrhage": [[0, 2, 19, 11]]},
        {},
        {"hard_exudates": [[0, 10, 5, 15]]},
    ]
    assert lesions._explained(tiles) == {(7, "haemorrhage"): 0, (7, "hard_exudates"): 3}


def test_spots_are_proposed(fundus, monkeypatch):
    fitted = []
    with_classes = lesions.with_classes

    def recorded(model, layer, features, present):
        fitted.append(len(features))
        return with_classes(model, layer, features, present)

    monkeypatch.setattr(lesions, "with_classes", recorded)
    state = torch.get_rng_state()
    outcome = lesions.table_3(fundus)
    assert torch.equal(torch.get_rng_state(), state)
    # Two of six pictures are held out, four parts each.
    assert fitted == [16, 16, 16]
    assert outcome.rows[0] == ["paper, DiaretDB1", "FGVis", "-", "100 / 90.5", "94.7 / 81.6", "-"]
    figures = {row[1]: row for row in outcome.rows if row[0] == "squeezenet1_1"}
    quarter, _, half, *_, count = figures["FGVis"][-1].split()
    assert count == "6"
    assert float(quarter) >= float(half)
    assert float(quarter) > 60
    # All propose the same area.
    assert figures["FGVis"][2] == figures["Grad-CAM"][2] == figures["centre"][2]
    assert [figures["FGVis"][column].split()[-1] for column in (3, 4)] == ["3", "3"]
    assert "squeezenet1_1" in outcome.pictures
