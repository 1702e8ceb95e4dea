"""Explanations of adversarial images."""

import torch

from pyfast_xai import GradCAM, metrics
from pyfast_xai.reproduce import stability


def test_figures_are_those_of_the_pictures_that_change(data, monkeypatch):
    monkeypatch.setattr(stability, "STABLE", {"Grad-CAM": GradCAM})
    loaded = next(data.networks(()))
    images = data.inputs(data.imagenet(), loaded.preprocess)
    moved = metrics.deepfool(loaded.model, images)
    moved[0] = images[0]  # keeps its class
    monkeypatch.setattr(
        stability.metrics, "deepfool", lambda model, part: moved[: len(part)] if len(part) == 3 else moved[3:]
    )
    with torch.no_grad():
        changed = loaded.model(images).argmax(1) != loaded.model(moved).argmax(1)
    assert 0 < int(changed.sum()) < len(images)
    (row,) = stability.adversarial(data).rows
    before, after = (GradCAM(loaded.model)(x[changed]) for x in (images, moved))
    alike = metrics.cosine_similarity(before.heatmap, after.heatmap).mean()
    assert row[2] == f"{int(changed.sum())} of 4"
    assert row[3].startswith(f"{float(alike):.2f} ±")
    truth = [entry.boxes for entry, is_changed in zip(data.imagenet(), changed, strict=True) if is_changed]
    placed = torch.cat([loaded.preprocess.boxes_in(box[None], (40, 40)) for box in after.boxes()])
    error = 100 * float(metrics.localization_error(placed, truth))
    assert row[6].startswith(f"{error:.1f} ±")


def test_an_attack_that_changes_nothing_has_no_figures(data, monkeypatch):
    monkeypatch.setattr(stability.metrics, "deepfool", lambda model, images: images)
    outcome = stability.adversarial(data)
    assert [row[1:3] for row in outcome.rows] == [[method, "0 of 4"] for method in stability.STABLE]
    assert all(cell == "-" for row in outcome.rows for cell in row[3:])
    assert outcome.pictures == {}
