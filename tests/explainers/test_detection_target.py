"""Detections as targets, against the formula written out for every detection in float64."""

import pytest
import torch
from small_detector import CLASSES, FORMS, SIZE, case, corners, overlap, slow_score

from pyfast_xai import (
    DeepLift,
    DetectionTarget,
    GradCAM,
    InputError,
    MeaningfulPerturbation,
    Occlusion,
    Saliency,
    ScoreCAM,
    SmoothGrad,
)


@pytest.mark.parametrize("form", FORMS)
def test_the_score_and_its_gradient(form):
    model, images, target = case(form)
    explanation = Saliency(model)(images, target)
    for n in range(3):
        leaf = images[n].clone().requires_grad_()
        score = slow_score(model, leaf, target.boxes[n], int(target.classes[n]))
        assert bool(score > 0)
        torch.testing.assert_close(target.rows(torch.tensor([n]))(model(images[n : n + 1])), score[None])
        (gradient,) = torch.autograd.grad(score, leaf)
        torch.testing.assert_close(explanation.attribution[n], gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_occlusion_is_the_drop_of_the_score_of_the_box_of_each_image(form):
    model, images, target = case(form)
    result = Occlusion(model, window=8, stride=8, batch_size=5)(images, target).signed_map
    for n in range(3):
        box, number = target.boxes[n], int(target.classes[n])
        before = slow_score(model, images[n], box, number)
        for top in range(0, SIZE[0], 8):
            for left in range(0, SIZE[1], 8):
                hidden = images[n].clone()
                hidden[:, top : top + 8, left : left + 8] = 0
                drop = float((before - slow_score(model, hidden, box, number)).detach())
                assert float(result[n, top, left]) == pytest.approx(drop, abs=1e-13)


@pytest.mark.parametrize(
    "explain",
    [
        lambda model, **settings: GradCAM(model, layer="features.3", **settings),
        lambda model, **settings: SmoothGrad(model, n_samples=3, **settings),
        lambda model, **settings: DeepLift(model, **settings),
        lambda model, **settings: ScoreCAM(model, layer="features.3", **settings),
        lambda model, **settings: MeaningfulPerturbation(model, n_iterations=3, progress=False, **settings),
    ],
    ids=["GradCAM", "SmoothGrad", "DeepLift", "ScoreCAM", "MeaningfulPerturbation"],
)
@pytest.mark.parametrize("form", FORMS)
def test_each_image_has_its_box_in_every_batch(explain, form):
    model, images, target = case(form)
    whole = explain(model)(images, target).heatmap
    torch.testing.assert_close(explain(model, batch_size=2)(images, target).heatmap, whole, rtol=0, atol=1e-6)
    for n in range(3):
        alone = explain(model)(images[n : n + 1], target.rows(torch.tensor([n]))).heatmap[0]
        torch.testing.assert_close(alone, whole[n], rtol=0, atol=1e-6)


def test_one_box_for_all_images_and_one_that_nothing_meets():
    model, images, _ = case("dicts")
    box = DetectionTarget([0, 0, 32, 24], 1)
    torch.testing.assert_close(box(model(images)), box.rows(torch.arange(3))(model(images)))
    away = DetectionTarget([[100, 100, 120, 120]] * 3, 1)
    assert away(model(images)).tolist() == [0, 0, 0]
    explanation = Saliency(model)(images, away)
    assert not explanation.attribution.any()
    assert explanation.logits is None
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert box(nothing).tolist() == [0]


def test_queries_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.YolosConfig(
        **sizes, image_size=[32, 48], patch_size=8, num_detection_tokens=5, num_labels=CLASSES
    )
    torch.manual_seed(0)
    model = transformers.YolosForObjectDetection(config).eval()
    images = torch.randn(2, 3, 32, 48)
    target = DetectionTarget([[4, 4, 40, 28], [10, 6, 30, 20]], [0, 2], size=(32, 48))
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    rows = []
    for n in range(2):
        boxes = corners(output.pred_boxes[n].detach()) * torch.tensor([48, 32, 48, 32])
        at = torch.tensor([overlap(target.boxes[n], box) for box in boxes])
        rows.append((at * output.logits[n].softmax(-1)[:, target.classes[n]]).max())
    (gradient,) = torch.autograd.grad(torch.stack(rows).sum(), leaf)
    result = Saliency(model)(images, target).attribution
    torch.testing.assert_close(result, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_bad_input():
    with pytest.raises(InputError, match=r"boxes must be \[4\] or \[N, 4\], got \[3\]"):
        DetectionTarget([1, 2, 3], 0)
    with pytest.raises(InputError, match="boxes must be corners"):
        DetectionTarget([5, 5, 3, 9], 0)
    with pytest.raises(InputError, match=r"classes must be one for each box, \[2\], got \[3\]"):
        DetectionTarget([[0, 0, 1, 1]] * 2, [1, 2, 3])
    with pytest.raises(InputError, match="classes must be indices"):
        DetectionTarget([0, 0, 1, 1], -1)
    model, images, target = case("queries")
    with pytest.raises(InputError, match="size must be the"):
        Saliency(model)(images, DetectionTarget(target.boxes, 0))
    with pytest.raises(InputError, match=r"classes must lie in \[0, 3\), got 7"):
        Saliency(model)(images, DetectionTarget(target.boxes, 7, size=SIZE))
    with pytest.raises(InputError, match="boxes must be one for each of 2 images, got 3"):
        Saliency(model)(images[:2], target)
    with pytest.raises(InputError, match="model must return detections"):
        target(torch.zeros(2, 5))
