"""LeGrad and the metrics of torch-cam here and there, in float64."""

import inspect

import pytest
import torch
from torch import nn

from pyfast_xai.compat import torchcam as ours
from pyfast_xai.compat.torchcam import metrics as our_metrics
from pyfast_xai.errors import InputError

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchcam.methods")


@pytest.fixture(scope="module")
def their_metrics():
    return pytest.importorskip("torchcam.metrics")


@pytest.fixture(scope="module")
def transformer():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(24, 8, 3, 2, 16, 32, num_classes=5).to(DOUBLE).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


IMAGES = torch.randn(3, 3, 24, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def last(model):
    return [model.encoder.layers[-1]]


def every(model):
    return list(model.encoder.layers)


@pytest.mark.parametrize("layers", [last, every])
@pytest.mark.parametrize("chosen", [2, [1, 4, 0]], ids=["class", "classes"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_legrad(layers, chosen, frozen, transformer, theirs):
    transformer.requires_grad_(not frozen)
    result, expected = [], []
    for library, into in ((ours, result), (theirs, expected)):
        with library.LeGrad(transformer, layers(transformer)) as extractor:
            scores = transformer(IMAGES)
            into += [extractor(chosen, scores, retain_graph=True)[0], extractor(chosen, scores, normalized=False)[0]]
    transformer.requires_grad_(True)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-14)
    assert result[0].shape == (3, 3, 3)
    assert not transformer.encoder.layers[0].self_attention._forward_hooks
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_legrad_with_a_head_and_a_grid(transformer, theirs):
    def head(tokens):
        return transformer.heads(tokens[:, 0])

    settings = {"score_projection": head, "prefix_tokens": 1, "grid_shape": (1, 9)}
    result, expected = [], []
    for library, into in ((ours, result), (theirs, expected)):
        with library.LeGrad(transformer, "encoder.layers.encoder_layer_1", **settings) as extractor:
            transformer(IMAGES)
            into += extractor(1)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda m: ours.LeGrad(m, []), "target_layer must be at least one block", id="none"),
        pytest.param(lambda m: ours.LeGrad(m, m.heads), "must have an nn.MultiheadAttention", id="no attention"),
        pytest.param(lambda m: ours.LeGrad(m, every(m), prefix_tokens=-1), "prefix_tokens must not be", id="prefix"),
        pytest.param(lambda m: ours.LeGrad(m, every(m), grid_shape=(0, 9)), "grid_shape must be positive", id="grid"),
        pytest.param(lambda m: ours.LeGrad(nn.Sequential(m), "0"), "score_projection must be given", id="head"),
    ],
)
def test_what_legrad_refuses(make, words, transformer):
    with pytest.raises(InputError, match=words):
        make(transformer)


def test_legrad_needs_gradients_and_a_grid_that_fits(transformer):
    with ours.LeGrad(transformer, every(transformer), grid_shape=(2, 4)) as extractor:
        with torch.no_grad():
            transformer(IMAGES)
        with pytest.raises(RuntimeError, match="the forward must run with gradients enabled"):
            extractor(1)
        transformer(IMAGES)
        with pytest.raises(InputError, match="grid_shape must hold 9 tokens"):
            extractor(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 144, 5)
    return nn.Sequential(*layers).to(DOUBLE).eval()


def soft(answers):
    return answers.softmax(-1)


METRICS = {
    "drop": ("ClassificationMetric", {}),
    "areas": ("DeletionInsertionMetric", {"steps": 7, "batch_size": 5}),
    "blurred": ("DeletionInsertionMetric", {"steps": 3, "baseline": lambda x: x.mean((2, 3), keepdim=True)}),
    "tensor": ("DeletionInsertionMetric", {"steps": 600, "baseline": torch.ones(3, 1, 1), "batch_size": 2000}),
}
CALLS = {
    "largest": {},
    "class": {"class_idx": 2},
    "classes": {"class_idx": [1, 4, 0]},
    "function": {"targets": lambda own: own[1] - own[2]},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric, call, model, theirs, their_metrics):
    name, settings = METRICS[metric]
    results = []
    for library, metrics in ((ours, our_metrics), (theirs, their_metrics)):
        with library.LayerCAM(model, "1") as extractor:
            measured = getattr(metrics, name)(extractor, soft, **settings)
            measured.update(IMAGES, **CALLS[call])
            measured.update(IMAGES[:1].flip(3)) if call != "classes" else None
            results.append((measured.summary(), measured.total, measured.nan_count))
    (result, *counts), (expected, *there) = results
    assert counts == there
    for key, value in expected.items():
        # There the fractions of the areas are float32.
        assert result[key] == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_maps_with_nan_are_left_out(model, their_metrics):
    class Broken(ours.LayerCAM):
        @classmethod
        def fuse_cams(cls, cams, target_shape=None):
            fused = super().fuse_cams(cams, target_shape)
            fused[0] = torch.nan
            return fused

    with Broken(model, "1") as extractor:
        for metrics in (our_metrics, their_metrics):
            measured = metrics.ClassificationMetric(extractor)
            measured.update(IMAGES)
            assert (measured.total, measured.nan_count) == (2, 1)
            measured.reset()
            measured.update(IMAGES[:1])
            assert (measured.total, measured.nan_count) == (0, 1)
            with pytest.raises(AssertionError, match="update"):
                measured.summary()


def test_baselines_of_images_whose_maps_have_nan_are_left_out(model):
    images = torch.randn(2, 3, 24, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    baselines = torch.randn(2, 3, 24, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))

    class Extractor(ours.GradCAM):
        def __call__(self, *args, **kwargs):
            (maps,) = super().__call__(*args, **kwargs)
            if len(maps) == 2:
                maps[0] = float("nan")
            return [maps]

    summaries = []
    for part in (slice(None), slice(1, 2)):
        with Extractor(model, "0") as extractor:
            metric = our_metrics.DeletionInsertionMetric(extractor, steps=3, baseline=baselines[part])
            metric.update(images[part], class_idx=1)
            summaries.append(metric.summary())
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "classes", "error", "words"),
    [
        ((2, 3, 24, 24), [1], ValueError, "class_idx must have one class for each of 2 images"),
        ((2, 3, 24, 24), [1, 0.5], TypeError, "class_idx must hold ints"),
        ((2, 3, 24, 24), [False, 1], TypeError, "class_idx must hold ints"),
        ((2, 3), 1, ValueError, "1D, 2D or 3D maps"),
    ],
)
def test_images_and_classes_that_do_not_fit_metrics(shape, classes, error, words, model):
    with ours.GradCAM(model, "0") as extractor, pytest.raises(error, match=words):
        our_metrics.ClassificationMetric(extractor).update(torch.rand(shape, dtype=DOUBLE), classes)


def test_bad_settings_of_metrics(model):
    with ours.LayerCAM(model, "1") as extractor:
        with pytest.raises(InputError, match="steps must be at least 1, got 0"):
            our_metrics.DeletionInsertionMetric(extractor, steps=0)
        with pytest.raises(TypeError, match="batch_size must be an int, got float"):
            our_metrics.DeletionInsertionMetric(extractor, batch_size=2.5)
        with pytest.raises(InputError, match="class_idx or targets must be given, not both"):
            our_metrics.ClassificationMetric(extractor).update(IMAGES, 1, targets=lambda own: own[0])
        with pytest.raises(InputError, match="baseline must broadcast to the images"):
            our_metrics.DeletionInsertionMetric(extractor, baseline=torch.ones(7)).update(IMAGES)


def test_every_metric_is_here_with_its_signature(their_metrics):
    for name, kind in vars(their_metrics).items():
        if inspect.isclass(kind) and kind.__module__ == "torchcam.metrics" and not name.startswith("_"):
            own = inspect.signature(getattr(our_metrics, name))
            assert list(own.parameters) == list(inspect.signature(kind).parameters)
