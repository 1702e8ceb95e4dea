"""Segmenters as classifiers of a region: the mean written out, and every explainer on every kind of output."""

from types import SimpleNamespace

import pytest
import torch
from quick_settings import QUICK
from torch import nn
from torch.nn import functional

from pyfast_xai import METHODS, GradCAM, InputError, Saliency, SegmentationClassifier

DOUBLE = torch.float64


class Unet(nn.Module):
    """An encoder, a decoder with a skip, and what segmenters return."""

    def __init__(self, form="tensor", classes=4, attends=False):
        super().__init__()
        self.form, self.attends = form, attends
        self.down, self.low = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.head, self.other = nn.Conv2d(14, 8, 3, 1, 1), nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)

    def forward(self, x, shift=None):
        fine = self.down(x).relu()
        coarse = self.low(fine).relu()
        if self.attends:
            tokens = coarse.flatten(2).mT
            mixed = tokens + 9 * functional.scaled_dot_product_attention(
                tokens, tokens, tokens - tokens.mean(1, keepdim=True)
            )
            scores = self.head(mixed.mT.unflatten(2, coarse.shape[2:]))
        else:
            scores = self.head(self.up(torch.cat([functional.interpolate(coarse, fine.shape[2:]), fine], 1)).relu())
        scores = functional.interpolate(scores, x.shape[2:], mode="bilinear")
        if shift is not None:
            scores = scores + shift.view(-1, 1, 1, 1)
        aux = functional.interpolate(self.other(coarse), x.shape[2:])
        return {
            "tensor": lambda: scores,
            "out and aux": lambda: {"out": scores, "aux": aux},
            "aux and out": lambda: {"aux": aux, "out": scores},
            "tuple": lambda: (coarse.mean((2, 3)), scores),
            "logits": lambda: SimpleNamespace(loss=None, logits=scores),
        }[self.form]()


FORMS = ("tensor", "out and aux", "aux and out", "tuple")


def case(form="tensor", attends=False, **settings):
    torch.manual_seed(0)
    return Unet(form, attends=attends, **settings).to(DOUBLE).eval(), torch.rand(2, 3, 16, 20, dtype=DOUBLE)


REGION = torch.zeros(16, 20, dtype=torch.bool)
REGION[3:9, 5:14] = True


def plain(model, images):
    scores = model(images)
    return scores if isinstance(scores, torch.Tensor) else scores["out"]


def test_outputs_are_means_over_the_region():
    model, images = case()
    scores = model(images)
    with torch.no_grad():
        torch.testing.assert_close(SegmentationClassifier(model)(images), scores.mean((2, 3)))
        of_region = SegmentationClassifier(model, REGION)(images)
        torch.testing.assert_close(of_region, scores[:, :, REGION].mean(2))
        weights = torch.rand(2, 16, 20, dtype=DOUBLE)
        expected = torch.einsum("nchw,nhw->nc", scores, weights) / weights.sum((1, 2))[:, None]
        torch.testing.assert_close(SegmentationClassifier(model)(images, region=weights), expected)
        classifier = SegmentationClassifier(model)
        areas = classifier.predicted(images)
        assert torch.equal(areas, scores.argmax(1))
        result = classifier(images, region=areas)
        for n in range(2):
            for k in range(4):
                inside = areas[n] == k
                mean = scores[n, k][inside].mean() if inside.any() else scores.new_zeros(())
                torch.testing.assert_close(result[n, k], mean)


def test_regions_of_another_size():
    model, images = case()
    scores = model(images)
    with torch.no_grad():
        large = REGION.repeat_interleave(2, 0).repeat_interleave(2, 1)
        expected = scores[:, :, REGION].mean(2)
        torch.testing.assert_close(SegmentationClassifier(model, large)(images), expected)
        numbered = torch.where(large, 2, -1)
        torch.testing.assert_close(SegmentationClassifier(model, numbered)(images)[:, 2], expected[:, 2])


def test_one_class():
    model, images = case(classes=1)
    classifier = SegmentationClassifier(model)
    areas = classifier.predicted(images)
    assert torch.equal(areas, torch.where(model(images)[:, 0] > 0, 0, -1))
    explain = GradCAM(classifier, outputs="independent logits")
    assert explain(images, 0, region=areas).heatmap.shape == (2, 16, 20)


@pytest.mark.parametrize("form", [*FORMS, "logits"])
def test_every_form_of_output_is_the_same(form):
    model, images = case(form)
    expected, _ = case()
    with torch.no_grad():
        ours, theirs = (SegmentationClassifier(one, REGION)(images) for one in (model, expected))
    assert torch.equal(ours, theirs)


def test_another_output():
    model, images = case("out and aux")
    with torch.no_grad():
        expected = model(images)["aux"].mean((2, 3))
        assert torch.equal(SegmentationClassifier(model, output="aux")(images), expected)
        with pytest.raises(InputError, match="output must name an entry of what the model returns, dict, got 'main'"):
            SegmentationClassifier(model, output="main")(images)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_detections])
def test_every_explainer_explains_a_class_in_a_region(name):
    """A row depends on its image and its region alone, and a dict with more outputs changes nothing."""
    method = METHODS[name]
    attends = method.needs_attention
    results = []
    for form in ("tensor", "aux and out"):
        model, images = case(form, attends)
        if name == "cam":  # which needs an average of what a linear layer reads
            classifier = SegmentationClassifier(
                nn.Sequential(model.down, nn.ReLU(), nn.Conv2d(6, 4, 1, dtype=DOUBLE)).eval()
            )
            results.append(method(classifier)(images, [1, 2]))
            continue
        regions = torch.stack([REGION, REGION.flip(0)])
        explain = method(SegmentationClassifier(model), **QUICK.get(name, {}))
        results.append(explain(images, [1, 2], region=regions))
        if name != "feature-permutation":  # which compares with the other images
            alone = explain(images[1:], [2], region=regions[1:])
            torch.testing.assert_close(alone.heatmap, results[-1].heatmap[1:], rtol=1e-6, atol=1e-9)
    first, second = results
    assert first.heatmap.shape == (2, 16, 20)
    assert any(field is not None and field.any() for field in (first.heatmap, first.attribution, first.signed_map))
    torch.testing.assert_close(first.heatmap, second.heatmap, rtol=1e-6, atol=1e-9)
    assert first.target is None or first.target.tolist() == [1, 2]


def test_the_gradient_of_a_region():
    model, images = case("out and aux")
    images.requires_grad_()
    plain(model, images)[:, 3][:, REGION].mean(1).sum().backward()
    result = Saliency(SegmentationClassifier(model, REGION))(images, 3)
    torch.testing.assert_close(result.attribution, images.grad, rtol=0, atol=1e-14)


def test_the_layer_is_that_of_a_function_as_target():
    model, images = case("out and aux")
    of_function = GradCAM(model)(images, lambda output: output["out"][:, 3][:, REGION].mean(1))
    result = GradCAM(SegmentationClassifier(model, REGION))(images, 3)
    torch.testing.assert_close(result.signed_map, of_function.signed_map, rtol=0, atol=1e-14)


def test_further_arguments_reach_the_model():
    model, images = case()
    shift = torch.tensor([0.0, 5.0], dtype=DOUBLE)
    classifier = SegmentationClassifier(model)
    torch.testing.assert_close(classifier(images, shift), classifier(images, shift=shift))
    torch.testing.assert_close(classifier(images, shift), classifier(images) + shift[:, None])
    assert GradCAM(classifier)(images, 1, shift, region=torch.stack([REGION] * 2)).heatmap.shape == (2, 16, 20)


def test_what_does_not_fit():
    model, images = case()
    with pytest.raises(InputError, match=r"region must have 2 axes as the images do.*got \[3, 16, 20\] for 2 images"):
        SegmentationClassifier(model, torch.rand(3, 16, 20))(images)
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(960, 3)).to(DOUBLE).eval()
    with pytest.raises(InputError, match=r"model must return scores \[N, classes, ...\].*got torch.float64\[1, 3\]"):
        GradCAM(SegmentationClassifier(vectors))(images, 1)


def test_a_network_of_torchvision():
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    images = torch.rand(1, 3, 64, 64)
    classifier = SegmentationClassifier(model)
    explanation = GradCAM(classifier)(images, 3, region=classifier.predicted(images) * 0 + 3)
    assert explanation.heatmap.shape == (1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(explanation.logits[0, 3], model(images)["out"][0, 3].mean(), rtol=1e-3, atol=1e-5)
