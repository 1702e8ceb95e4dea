"""Detections as targets, against the formula written out for every detection in float64."""

from pathlib import Path

import pytest
import torch
from import_file import import_file
from PIL import Image
from small_detector import CLASSES, FORMS, SIZE, case, corners, overlap, slow_score

from pyfast_xai import (
    CRP,
    DRISE,
    RISE,
    AblationCAM,
    DeepLift,
    DetectionTarget,
    GradCAM,
    InputError,
    IntegratedGradients,
    KernelShap,
    LayerCAM,
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


WAY_OUT = "explain a box and a class that the model detects, as DetectionTarget.strongest(model(images)) takes them"
REASONED = {
    "Saliency": Saliency,
    "SmoothGrad": lambda model: SmoothGrad(model, n_samples=2),
    "IntegratedGradients": lambda model: IntegratedGradients(model, n_steps=2),
    "CRP": lambda model: CRP(model, layer="features.2", channels=[range(8), range(8)]),
    "GradCAM": lambda model: GradCAM(model, layer="features.3"),
    "Occlusion": lambda model: Occlusion(model, window=8, stride=8, batch_size=2),
    "DRISE": lambda model: DRISE(model, n_masks=4, cells=4, batch_size=2),
}


@pytest.mark.parametrize("explain", REASONED.values(), ids=REASONED)
def test_a_map_of_zeros_of_a_box_that_nothing_meets_says_so(explain, caplog):
    model, images, first = case("anchors")
    away = torch.tensor([[100.0, 100, 120, 120]]).double()
    boxes = torch.stack([first.boxes, torch.cat([first.boxes[:2], away])], 1)
    target = DetectionTarget(boxes, torch.stack([first.classes, first.classes], 1), n_classes=CLASSES)
    with caplog.at_level("WARNING", logger="pyfast_xai"):
        heatmap = explain(model)(images, target).heatmap
    zero = heatmap.flatten(1).any(1).logical_not().nonzero().flatten().tolist()
    rows = 2 if explain is REASONED["CRP"] else 1  # a row for each of its conditions
    assert zero == [*range(5 * rows, 6 * rows)]
    (message,) = [record.getMessage() for record in caplog.records if " is zero" in record.getMessage()]
    assert message.endswith(f"of row {5 * rows} is zero: no detection overlaps its box; {WAY_OUT}")


def test_a_map_of_zeros_of_a_class_that_nothing_at_the_box_has_says_so(caplog):
    model, images, _ = case("dicts")
    target = DetectionTarget([0, 0, 32, 24], CLASSES + 4)
    with caplog.at_level("WARNING", logger="pyfast_xai"):
        assert not Saliency(model)(images, target).heatmap.any()
    assert (
        f"the attribution of row 0 is zero: no detection that overlaps its box has its class; {WAY_OUT}" in caplog.text
    )
    assert "probability that has reached" not in caplog.text


SEVERAL = {
    "Saliency": Saliency,
    "SmoothGrad": lambda model: SmoothGrad(model, n_samples=2),
    "IntegratedGradients": lambda model: IntegratedGradients(model, n_steps=2),
    "DeepLift": DeepLift,
    "GradCAM": lambda model: GradCAM(model, layer="features.3"),
    "LayerCAM": lambda model: LayerCAM(model, layer=["features.1", "features.3"]),
    "ScoreCAM": lambda model: ScoreCAM(model, layer="features.3"),
    "AblationCAM": lambda model: AblationCAM(model, layer="features.3"),
    "Occlusion": lambda model: Occlusion(model, window=8, stride=8),
    "RISE": lambda model: RISE(model, n_masks=8, cells=4),
    "DRISE": lambda model: DRISE(model, n_masks=8, cells=4),
    "KernelShap": lambda model: KernelShap(model, feature_mask=2, n_samples=12),
    "MeaningfulPerturbation": lambda model: MeaningfulPerturbation(model, n_iterations=2, progress=False),
}


@pytest.mark.parametrize("explain", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("form", FORMS)
def test_several_boxes_an_image_are_rows_of_one_explanation(form, explain):
    """K boxes an image, in one pass, are the explanations of each box by itself; the gradient is that written out."""
    model, images, first = case(form)
    boxes = torch.stack([first.boxes, first.boxes.flip(0), torch.tensor([[0.0, 0, 32, 24]] * 3).double()], 1)
    classes = torch.stack([first.classes, first.classes.flip(0), first.classes], 1)
    settings = {"size": first.size, "n_classes": first.n_classes}
    target = DetectionTarget(boxes, classes, **settings)
    assert target(model(images)).shape == (3, 3)
    if form == "dicts" and explain is SEVERAL["AblationCAM"]:
        with pytest.raises(InputError, match="must be replayable above the layer"):
            explain(model)(images, target)
        return
    whole = explain(model)(images, target)
    assert whole.heatmap.shape == (9, *SIZE)
    for k in range(3):
        alone = explain(model)(images, DetectionTarget(boxes[:, k], classes[:, k], **settings))
        torch.testing.assert_close(whole.heatmap[k::3], alone.heatmap, rtol=1e-5, atol=1e-6)
    if explain is Saliency:
        leaf = images[1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(slow_score(model, leaf, boxes[1, 2], int(classes[1, 2])), leaf)
        torch.testing.assert_close(whole.attribution[1 * 3 + 2], gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_the_strongest_detections_of_each_image(form):
    model, images, first = case(form)
    output = model(images)
    settings = {"size": first.size, "n_classes": first.n_classes}
    one, three = (DetectionTarget.strongest(output, count=count, **settings) for count in (None, 3))
    assert three.boxes.shape == (3, 3, 4)
    torch.testing.assert_close(three.boxes[:, 0], one.boxes)
    assert torch.equal(three.classes[:, 0], one.classes)
    scores = three(output)
    assert scores.shape == (3, 3)
    assert bool((scores >= three.probabilities.amax(-1) - 1e-12).all())  # a box overlaps itself wholly
    assert DRISE(model, n_masks=4, cells=4)(images, three).heatmap.shape == (9, *SIZE)
    with pytest.raises(InputError, match=r"output must have 99 detections for every image, got .* for image 0"):
        DetectionTarget.strongest(output, count=99, **settings)


@pytest.mark.parametrize("count", [None, 2])
def test_detr_and_rt_detr_of_transformers(count):
    """Saliency of the strongest detections, against autograd of the formula; both kinds of probabilities."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "layer_type": "basic"}
    small = {"d_model": 16, "num_labels": CLASSES, "use_timm_backbone": False, "use_pretrained_backbone": False}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    detr = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            **{**small, **heads, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "num_queries": 6},
            backbone_config=transformers.ResNetConfig(**stages, out_features=["stage4"]),
            decoder_ffn_dim=16,
        )
    )
    rt_detr = transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            **{**small, **heads, "encoder_hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1},
            backbone_config=transformers.RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"]),
            encoder_in_channels=[8, 8, 8],
            decoder_in_channels=[16, 16, 16],
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=6,
        )
    )
    images = torch.randn(2, 3, 64, 96)
    for model, activation in ((detr.eval(), "softmax"), (rt_detr.eval(), "sigmoid")):
        with torch.no_grad():
            target = DetectionTarget.strongest(model(images), count=count, size=(64, 96), activation=activation)
        leaf = images.clone().requires_grad_()
        output = model(leaf)
        probabilities = output.logits.softmax(-1) if activation == "softmax" else output.logits.sigmoid()
        each = count or 1
        for k in range(each):
            rows = []
            for n in range(2):
                box, number = (part.view(2, each, -1)[n, k] for part in (target.boxes, target.classes))
                found = corners(output.pred_boxes[n].detach()) * torch.tensor([96, 64, 96, 64])
                at = torch.tensor([overlap(box, item) for item in found])
                rows.append((at * probabilities[n, :, int(number)]).max())
            (gradient,) = torch.autograd.grad(torch.stack(rows).sum(), leaf, retain_graph=True)
            result = Saliency(model)(images, target).attribution[k::each]
            torch.testing.assert_close(result, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        heat = LayerCAM(model)(images, target).heatmap
        assert heat.shape == (2 * each, 64, 96)
        assert (heat.flatten(1).amax(1) > 0).all()


@pytest.fixture
def example():
    return import_file(Path(__file__).parents[2] / "examples" / "detections.py")


def test_the_example_finds_its_digits_and_explains_each_in_its_cell(example):
    model, cells = example.DigitsOnAPage().eval(), example.make_scenes(6, seed=12)
    page = torch.cat([torch.cat(list(cells.images[row : row + 3]), 2) for row in (0, 3)], 1)[None]
    target = DetectionTarget.strongest(model(page), count=6)
    heat = LayerCAM(model, layer="features")(page, target).heatmap
    found = {}
    for box, number, row in zip(target.boxes[0].int().tolist(), target.classes[0].tolist(), heat, strict=True):
        x0, y0, x1, y1 = box
        assert float(row[y0 : y1 + 1, x0 : x1 + 1].sum() / row.sum()) > 0.9
        found[y0 // 96 * 3 + x0 // 96] = number
    correct = sum(found[place] == label for place, label in enumerate(cells.labels.tolist()))
    assert correct >= 5
    assert example.of_digits(6).size[0] > 3 * 288


def test_the_example_takes_a_detector_of_transformers(example, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.YolosConfig(
        **sizes, image_size=[32, 48], patch_size=8, num_detection_tokens=5, num_labels=CLASSES
    )
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path)
    transformers.YolosImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    Image.new("RGB", (60, 40), "green").save(tmp_path / "street.jpg")
    assert example.of_transformers(str(tmp_path / "street.jpg"), str(tmp_path), 2, "softmax").size[0] > 2 * 288


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
    with pytest.raises(InputError, match=r"boxes must be \[4\], \[N, 4\] or \[N, K, 4\], got \[3\]"):
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
