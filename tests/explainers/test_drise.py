"""D-RISE against a loop over masks and detections in float64; masks and formats of outputs have tests of their own."""

import copy
import pickle

import pytest
import torch
from oracles.rise import slow_masks
from small_detector import DOUBLE, FORMS, SIZE, case, corners, overlap

from pyfast_xai import DRISE, DetectionTarget, InputError

MASKS, CELLS = 23, 5


def slow_detections(model, image):
    """Returns box, probabilities of the classes and objectness of each detection in an image."""
    shares, logits = model.numbers(image[None])
    boxes = corners(shares[0] * torch.tensor(SIZE).flip(0).repeat(2))
    for box, row in zip(boxes, logits[0], strict=True):
        if model.form == "queries":
            whole = row.softmax(0)
            yield box, whole[:-1], float(1 - whole[-1])
        elif model.form == "anchors":
            yield box, row[:-1].sigmoid(), float(row[:-1].sigmoid().max())
        else:
            scores = row[:-1].sigmoid()
            best = logits[0, :, :-1].sigmoid().amax(1)
            if model.form == "end to end" or scores.max() > best.mean():
                yield box, (scores == scores.max()).to(DOUBLE), float(scores.max())


def slow_similarity(model, image, box, vector):
    best = 0.0
    for other, row, objectness in slow_detections(model, image):
        cosine = float(vector @ row / (vector.norm() * row.norm()))
        best = max(best, overlap(box, other) * cosine * objectness)
    return best


def slow_map(model, image, box, vector):
    masks = torch.from_numpy(slow_masks(MASKS, CELLS, 0.5, SIZE, 3))
    weights = [slow_similarity(model, image * mask, box, vector) for mask in masks]
    return sum(weight * mask for weight, mask in zip(weights, masks, strict=True)) / MASKS / 0.5


@pytest.mark.parametrize("batch", [4, 50])
@pytest.mark.parametrize("form", FORMS)
def test_a_box_and_a_class_that_is_certain(form, batch):
    model, images, target = case(form)
    result = DRISE(model, n_masks=MASKS, cells=CELLS, seed=3, batch_size=batch)(images, target)
    with torch.no_grad():
        for n in range(3):
            vector = torch.nn.functional.one_hot(target.classes[n], 3).to(DOUBLE)
            expected = slow_map(model, images[n], target.boxes[n], vector)
            assert expected.max() > 0
            torch.testing.assert_close(result.signed_map[n], expected, rtol=0, atol=1e-13)
    assert result.target is None


@pytest.mark.parametrize("form", ["anchors", "end to end", "dicts", "queries"])
def test_the_strongest_detection_of_each_image(form):
    model, images, _ = case(form)
    if form == "anchors":  # whose further numbers are none of the classes
        model.register_forward_hook(lambda actual, inputs, output: output[0][:, :-1])
    result = DRISE(model, n_masks=MASKS, cells=CELLS, seed=3)(images)
    with torch.no_grad():
        for n in range(3):
            box, vector, _ = max(
                slow_detections(model, images[n]), key=lambda one: one[2] if form != "queries" else one[1].max()
            )
            torch.testing.assert_close(
                result.signed_map[n], slow_map(model, images[n], box, vector), rtol=0, atol=1e-13
            )


def test_copies_and_bad_targets():
    model, images, target = case("dicts")
    explain = DRISE(model, n_masks=5, cells=CELLS)
    for other in (copy.deepcopy(explain), pickle.loads(pickle.dumps(explain))):
        assert torch.equal(other(images, target).heatmap, explain(images, target).heatmap)
    for wrong in (1, lambda output: output[0]["scores"]):
        with pytest.raises(InputError, match="target must be a DetectionTarget or None for d-rise, got"):
            explain(images, wrong)
    with pytest.raises(InputError, match=r"probabilities must be one row for each box, \[1, 'C'\], got \[2, 3\]"):
        DetectionTarget([[0, 0, 1, 1]], 0, torch.ones(2, 3))
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}]
    with pytest.raises(InputError, match="output must have a detection for every image, got none for image 0"):
        DetectionTarget.strongest(nothing)
