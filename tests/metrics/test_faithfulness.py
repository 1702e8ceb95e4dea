import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import nn

from pyfast_xai import InputError, render
from pyfast_xai.metrics import (
    auc,
    color_swap,
    deletion,
    drop_increase,
    imputation,
    insertion,
    noisy_linear_imputation,
    road,
    strong_features,
)
from pyfast_xai.metrics.perturbation import blur


class Net(nn.Module):
    """A small network whose answer depends on where things are."""

    def __init__(self, classes=7, channels=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.head = nn.Linear(128, classes)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return 4 * self.head(self.body(x).flatten(1))


def network(**settings):
    model = Net(**settings).eval()
    model.body[1].running_mean.normal_()
    return model


class Brightness(nn.Module):
    """Probability of class 1: how much of an image is left, in percent of its pixels' sum."""

    def forward(self, x):
        share = x.sum((1, 2, 3)) / 100
        return torch.stack([1 - share, share], 1)


def rise_evaluator(model, images, maps, mode, step, baseline, target=None):
    """RISE's `CausalMetric`, one image at a time in NumPy."""
    curves = []
    for i, (image, explanation) in enumerate(zip(images.numpy(), maps.numpy(), strict=True)):
        channels, pixels = image.shape[0], image[0].size
        predict = lambda x: model(torch.from_numpy(x)[None]).softmax(1).detach().numpy()[0]  # noqa: E731
        c = int(predict(image).argmax()) if target is None else target[i]
        other = baseline(image)
        start, finish = (image.copy(), other) if mode == "del" else (other.copy(), image)
        order = np.flip(np.argsort(explanation.reshape(-1)))
        scores = []
        for k in range(math.ceil(pixels / step) + 1):
            scores.append(predict(start)[c])
            coords = order[step * k : step * (k + 1)]
            start.reshape(channels, pixels)[:, coords] = finish.reshape(channels, pixels)[:, coords]
        curves.append(scores)
    curves = np.array(curves)
    return curves, (curves.sum(1) - curves[:, 0] / 2 - curves[:, -1] / 2) / (curves.shape[1] - 1)


def rise_blur(image):
    """`gkern` of 11 pixels and sigma 5, a dense convolution of each channel padded with zeros."""
    dot = np.zeros((11, 11))
    dot[5, 5] = 1
    kernel = gaussian_filter(dot, 5).astype("float32")
    weight = torch.zeros(len(image), len(image), 11, 11)
    weight[range(len(image)), range(len(image))] = torch.from_numpy(kernel)
    return torch.conv2d(torch.from_numpy(image)[None], weight, padding=5)[0].numpy()


# Deletion and insertion


@pytest.mark.parametrize("size", [(20, 20), (9, 31)])
@pytest.mark.parametrize("step", [37, 64, 5000])
@pytest.mark.parametrize("mode", ["del", "ins"])
def test_curves_equal_the_evaluator_of_rise(size, step, mode):
    model, images, maps = network(), torch.randn(3, 3, *size), torch.rand(3, *size)
    game, baseline = (deletion, np.zeros_like) if mode == "del" else (insertion, rise_blur)
    expected, area = rise_evaluator(model, images, maps, mode, step, baseline)
    curve = game(model, images, maps, step=step, batch_size=7)
    assert curve.scores.shape == (3, math.ceil(size[0] * size[1] / step) + 1)
    np.testing.assert_allclose(curve.scores, expected, atol=1e-5)
    np.testing.assert_allclose(curve.auc, area, atol=1e-5)


def test_the_default_step_is_that_of_rise():
    model, images, maps = network(), torch.randn(1, 3, 224, 224), torch.rand(1, 224, 224)
    curve = deletion(model, images, maps)
    assert curve.scores.shape == (1, 29)
    assert torch.equal(curve.scores, deletion(model, images, maps, step=224 * 8).scores)
    expected, area = rise_evaluator(model, images, maps, "del", 224 * 8, np.zeros_like)
    np.testing.assert_allclose(curve.scores, expected, atol=1e-5)
    np.testing.assert_allclose(curve.auc, area, atol=1e-5)
    assert curve.changed[[0, 1, 28]].tolist() == pytest.approx([0, 1 / 28, 1])


def test_blur_is_that_of_rise():
    images = torch.randn(2, 3, 30, 41)
    expected = np.stack([rise_blur(image) for image in images.numpy()])
    np.testing.assert_allclose(blur(images), expected, atol=1e-6)


def test_any_target_and_any_baseline_for():
    model, images, maps = network(), torch.randn(4, 3, 16, 16), torch.rand(4, 16, 16)
    target = torch.tensor([1, 2, 3, 0])
    grey = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected, _ = rise_evaluator(model, images, maps, "del", 50, lambda x: np.zeros_like(x) + grey.numpy(), target)
    for baseline in (grey, lambda x: torch.zeros_like(x) + grey):
        curve = deletion(model, images, maps, target, step=50, baseline=baseline)
        np.testing.assert_allclose(curve.scores, expected, atol=1e-5)
    expected, _ = rise_evaluator(model, images, maps, "ins", 50, np.zeros_like, [2] * 4)
    np.testing.assert_allclose(insertion(model, images, maps, 2, step=50, baseline="zero").scores, expected, atol=1e-5)


def test_deletion_of_a_case_worked_by_hand():
    # Four pixels hold all there is, 40, 30, 20 and 10 percent of it.
    images = torch.zeros(1, 1, 4, 5)
    images[0, 0, 1, :4] = torch.tensor([40.0, 30, 20, 10])
    curve = deletion(Brightness().eval(), images, images[:, 0], 1, step=1)
    assert curve.scores[0, :6].tolist() == pytest.approx([1, 0.6, 0.3, 0.1, 0, 0], abs=1e-6)
    assert float(curve.auc) == pytest.approx((0.5 + 0.6 + 0.3 + 0.1) / 20)
    worst = deletion(Brightness().eval(), images, -images[:, 0], 1, step=1)
    assert worst.scores[0, -5:].tolist() == pytest.approx([1, 0.9, 0.7, 0.4, 0], abs=1e-6)
    inserted = insertion(Brightness().eval(), images, images[:, 0], 1, step=1, baseline="zero")
    assert float(inserted.auc) == pytest.approx(1 - float(curve.auc))


def test_equal_values_go_in_reading_order():
    images = torch.ones(1, 1, 10, 10)
    left = deletion(Brightness().eval(), images, torch.zeros(1, 10, 10), 1, step=10).scores
    assert left[0].tolist() == pytest.approx(np.linspace(1, 0, 11))
    images[0, 0, 0] = 0
    assert float(
        deletion(Brightness().eval(), images, torch.zeros(1, 10, 10), 1, step=10).scores[0, 1]
    ) == pytest.approx(0.9)


def test_random_maps_fall_along_the_diagonal_and_the_best_map_falls_faster():
    images = torch.zeros(20, 1, 20, 20)
    images[:, :, 5:10, 5:9] = 5.0
    random = deletion(Brightness().eval(), images, torch.rand(20, 20, 20), 1, step=4)
    perfect = deletion(Brightness().eval(), images, images[:, 0], 1, step=4)
    assert float(random.auc.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(perfect.auc.mean()) == pytest.approx(2.5 / 100, abs=1e-6)
    assert float(insertion(Brightness().eval(), images, images[:, 0], 1, step=4, baseline="zero").auc.mean()) > 0.95


def test_auc_is_the_trapezoid_rule():
    scores = torch.rand(3, 29)
    expected = np.trapezoid(scores.numpy(), dx=1 / 28, axis=1)
    np.testing.assert_allclose(auc(scores), expected, rtol=1e-5)
    assert auc(torch.ones(5)) == 1


def test_models_are_asked_in_batches_of_the_size_that_was_given():
    model = network()
    for compared in (5, 0):  # with unchanged images, on the first call only
        model.sizes.clear()
        deletion(model, torch.randn(5, 3, 12, 12), torch.rand(5, 12, 12), step=20, batch_size=6)
        assert max(model.sizes) <= 6
        assert sum(model.sizes) == 5 + 5 * 9 + compared


class Formats(nn.Module):
    """Keeps the memory formats of its images; one that depends on them gives other results, or fails."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.kind, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 7), kind, []

    def forward(self, x):
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        self.last.append(channels_last)
        if self.kind == "views":
            x = x.view(len(x), -1).view(x.shape)
        y = self.linear(self.conv(x).relu().mean((2, 3)))
        return -y if channels_last and self.kind == "differs" else y


@pytest.mark.parametrize("kind", ["any", "views", "differs"])
def test_images_are_in_channels_last_where_the_model_computes_the_same(kind):
    model, images, maps = Formats(kind).eval(), torch.randn(5, 3, 12, 12), torch.rand(5, 12, 12)
    scores = deletion(model, images, maps, 3, step=20, batch_size=6).scores
    assert model.last[0]
    assert all(model.last[2:]) if kind == "any" else not any(model.last[1:])
    # float64 is not changed, and needs no other order of sums.
    model.double().last.clear()
    expected = deletion(model, images.double(), maps.double(), 3, step=20, batch_size=6).scores
    assert not any(model.last)
    torch.testing.assert_close(scores.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert float(expected.std()) > 1e-3


# Average drop


def test_drop_and_increase_by_hand():
    images = torch.full((3, 1, 10, 10), 0.8)
    images[2] = 0.2
    maps = torch.ones(3, 10, 10)
    maps[0, :4] = 0
    maps[1, 0, 0], maps[1, 1, 1] = 0.5, 0
    result = drop_increase(Brightness().eval(), images, maps, 1)
    # The third map is constant, and shows nothing.
    assert result.drop.tolist() == pytest.approx([0.4, 0.015, 1.0], abs=1e-6)
    assert result.increase.tolist() == [False] * 3
    result = drop_increase(Brightness().eval(), images, maps, 0)
    assert result.drop.tolist() == [0, 0, 0]
    assert result.increase.tolist() == [True] * 3


def test_drop_equals_pytorch_grad_cam():
    peer = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, images, maps = network(), torch.randn(6, 3, 16, 16), torch.rand(6, 16, 16)
    classes = [targets.ClassifierOutputSoftmaxTarget(i) for i in range(6)]
    scaled = render.normalize(maps).numpy()
    result = drop_increase(model, images, maps, list(range(6)))
    with torch.no_grad():
        before = model(images).softmax(1)[range(6), range(6)].numpy()
    # The peer's is a difference, the paper's a share of what was there.
    dropped = peer.DropInConfidence()(images, scaled[:, None], classes, model)
    np.testing.assert_allclose(result.drop, dropped / before, atol=1e-5)
    np.testing.assert_array_equal(
        result.increase, peer.IncreaseInConfidence()(images, scaled[:, None], classes, model) > 0
    )


# ROAD


def direct_imputation(image, missing):
    """The sparse system of Rong et al., written row by row and solved directly."""
    channels, height, width = image.shape
    cells = {tuple(yx): k for k, yx in enumerate(np.argwhere(missing))}
    matrix, right = lil_matrix((len(cells), len(cells))), np.zeros((len(cells), channels))
    for (y, x), k in cells.items():
        total = 0
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            at = (y + dy, x + dx)
            if (dy, dx) == (0, 0) or not (0 <= at[0] < height and 0 <= at[1] < width):
                continue
            weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
            total += weight
            if at in cells:
                matrix[k, cells[at]] = -weight
            else:
                right[k] += weight * image[(slice(None), *at)]
        matrix[k, k] = total
    made = image.copy()
    made[:, missing] = spsolve(matrix.tocsc(), right).reshape(len(cells), channels).T
    return made


@pytest.mark.parametrize("size", [(20, 20), (7, 33), (1, 12), (37, 50)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_imputation_solves_the_system(size, share):
    images = torch.randn(3, 2, *size)
    missing = torch.rand(3, *size) < share
    missing[0] = False
    missing[1, :, 2:] = True
    missing[2].view(-1)[0] = False
    made = noisy_linear_imputation(images, missing, noise=0)
    assert torch.equal(made[0], images[0])
    assert torch.equal(made[1, :, :, :2][:, ~missing[1, :, :2]], images[1, :, :, :2][:, ~missing[1, :, :2]])
    for item, image, mask in zip(made[1:], images[1:], missing[1:], strict=True):
        np.testing.assert_allclose(item, direct_imputation(image.double().numpy(), mask.numpy()), atol=1e-3)


@pytest.mark.parametrize("hole", [(0, 60), (40, 200), (3, 223)])
def test_steps_of_the_imputation_hardly_depend_on_the_size_of_the_hole(hole, monkeypatch):
    images, missing = torch.randn(1, 1, 224, 224), torch.zeros(1, 224, 224, dtype=torch.bool)
    missing[:, hole[0] : hole[1], hole[0] : hole[1]] = True
    precondition, sizes = imputation._preconditioned, []

    def counted(residual, grids):
        sizes.append(residual.shape[-1])
        return precondition(residual, grids)

    monkeypatch.setattr(imputation, "_preconditioned", counted)
    made = noisy_linear_imputation(images, missing, noise=0)
    assert sizes.count(224) <= 30
    # The filled pixel is the mean of its neighbours.
    spread = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1.0]])[None, None] / 12
    inside = slice(max(hole[0], 1), min(hole[1], 223))
    expected = nn.functional.conv2d(made, spread, padding=1)
    torch.testing.assert_close(made[..., inside, inside], expected[..., inside, inside], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (33, 50), (61, 9)])
def test_the_preconditioner_of_the_imputation_is_symmetric_and_positive(size):
    missing = (torch.rand(1, 1, *size) < 0.9).double()
    missing[..., size[0] // 2 :, :] = 1
    grids = imputation._grids(missing)
    assert len(grids) > 1
    one, other = (missing * torch.randn(2, 1, *size, dtype=torch.float64) for _ in range(2))
    there, back = (imputation._preconditioned(residual, grids) for residual in (one, other))
    torch.testing.assert_close((one * back).sum((1, 2, 3)), (there * other).sum((1, 2, 3)))
    assert ((one * there).sum((1, 2, 3)) > 0).all()
    assert not there[(missing == 0).expand_as(there)].any()


def test_imputation_of_one_image_does_not_depend_on_the_others():
    images, missing = torch.randn(5, 3, 24, 24), torch.rand(5, 24, 24) < 0.6
    missing[3, 4:, :] = True
    whole = noisy_linear_imputation(images, missing)
    for i in range(5):
        torch.testing.assert_close(noisy_linear_imputation(images[i : i + 1], missing[i : i + 1])[0], whole[i])


def test_noise_is_as_loud_as_was_asked_and_on_missing_pixels_only():
    images, missing = torch.ones(1, 3, 60, 60), torch.zeros(1, 60, 60, dtype=torch.bool)
    missing[:, 10:50, 10:50] = True
    made = noisy_linear_imputation(images, missing, noise=0.1)
    assert torch.equal(made[:, :, ~missing[0]], images[:, :, ~missing[0]])
    added = made[:, :, missing[0]] - 1
    assert float(added.std()) == pytest.approx(0.1, rel=0.05)
    assert float(added.mean()) == pytest.approx(0, abs=0.01)
    assert torch.equal(made, noisy_linear_imputation(images, missing, noise=0.1))
    assert not torch.equal(made, noisy_linear_imputation(images, missing, noise=0.1, seed=1))


@pytest.mark.filterwarnings("ignore")  # the peer hands tensors to NumPy
def test_imputation_equals_pytorch_grad_cam():
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    image = torch.randn(3, 40, 56)
    for share in (0.1, 0.5, 0.9):
        missing = torch.rand(40, 56) < share
        expected = peer.NoisyLinearImputer(noise=0)(image, (~missing).float())
        made = noisy_linear_imputation(image[None], missing[None], noise=0)
        torch.testing.assert_close(made[0], expected, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")  # likewise
def test_road_equals_pytorch_grad_cam(monkeypatch):
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    monkeypatch.setattr(peer.NoisyLinearImputer.__init__, "__defaults__", (0.0, peer.neighbors_weights))
    model, images = network(), torch.randn(3, 3, 20, 24)
    # Multiples of 1/512 and their differences from one are exact, so the peer orders them alike both ways.
    maps = torch.stack([torch.randperm(480) for _ in range(3)]).view(3, 20, 24) / 512
    classes = [targets.ClassifierOutputSoftmaxTarget(i) for i in (4, 0, 2)]
    result = road(model, images, maps, [4, 0, 2], noise=0, batch_size=5)
    for column, percentile in enumerate((10, 20, 30, 40, 50, 60, 70, 80, 90)):
        for results, kind in ((result.most, peer.ROADMostRelevantFirst), (result.least, peer.ROADLeastRelevantFirst)):
            expected = kind(percentile)(images, maps.numpy(), classes, model)
            np.testing.assert_allclose(results[:, column], expected, atol=1e-4)
    combined = peer.ROADCombined()(images, maps.numpy(), classes, model)
    np.testing.assert_allclose(result.combined, combined, atol=1e-4)


def test_road_tells_a_good_map_from_a_bad_one():
    images = torch.zeros(4, 1, 24, 24)
    images[:, :, 6:10, 6:10] = 6.0
    good, bad = (road(Brightness().eval(), images, m, 1) for m in (images[:, 0], -images[:, 0]))
    assert (good.combined > 0.5).all()
    assert (bad.combined < -0.5).all()
    random = road(Brightness().eval(), images, torch.rand(4, 24, 24), 1)
    assert float(random.combined.mean().abs()) < 0.2


# Colour


class Hue(nn.Module):
    """The class of an image is its strongest channel."""

    def forward(self, x):
        return x.mean((2, 3))


def test_swapped_colours_change_a_class_of_one_colour():
    images = torch.rand(6, 3, 8, 8) + 3 * nn.functional.one_hot(torch.arange(6) % 3)[:, :, None, None]
    result = color_swap(Hue().eval(), images, torch.tensor([0, 1, 2, 0, 1, 0]))
    assert result.correct.tolist() == [True] * 5 + [False]
    assert not result.unchanged[:5].any()
    assert result.share == 0
    assert result.unchanged.shape == (6, 2)
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert color_swap(network(), grey).share == 1
    same = color_swap(Hue().eval(), images, swaps=[(0, 1, 2)])
    assert same.share == 1


def test_the_default_swaps_are_the_two_of_the_paper_in_bgr_and_in_rgb():
    model, images = network(), torch.randn(30, 3, 12, 12)
    with torch.no_grad():
        before = model(images).argmax(1)
        b, g, r = images.unbind(1)
        expected = [model(torch.stack(x, 1)).argmax(1) == before for x in ((r, b, g), (g, r, b))]
    assert torch.equal(color_swap(model, images).unchanged, torch.stack(expected, 1))

    class Reversed(nn.Module):
        def forward(self, x):
            return model(x.flip(1))

    saved = color_swap(Reversed().eval(), images.flip(1)).unchanged
    assert torch.equal(saved.sum(1), torch.stack(expected, 1).sum(1))


def test_colours_are_swapped_before_they_are_normalised():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    model, colors = network(), torch.rand(20, 3, 12, 12)
    images = (colors - shift) / scale
    with torch.no_grad():
        expected = model((colors[:, [1, 2, 0]] - shift) / scale).argmax(1) == model(images).argmax(1)
    assert torch.equal(color_swap(model, images, swaps=[(1, 2, 0)], mean=mean, std=std).unchanged[:, 0], expected)


# Strong features


def test_strong_features_are_kept_and_removed():
    # Class 0 lives in the left half, class 1 in the right one.
    class Halves(nn.Module):
        def forward(self, x):
            return torch.stack([x[..., :5].sum((1, 2, 3)), x[..., 5:].sum((1, 2, 3))], 1)

    images = torch.zeros(4, 1, 10, 10)
    images[:, :, 4:6, 2:4] = 3.0
    images[:, :, 4:6, 7] = 1.0
    responses = images[:, 0].clone()
    responses[3] = -1
    result = strong_features(Halves().eval(), images, responses, torch.tensor([0, 0, 1, 0]))
    assert result.full.tolist() == [True, True, False, True]
    assert result.only.tolist() == [True, True, False, True]
    # Nothing is removed where nothing is strong.
    assert result.without.tolist() == [False, False, True, True]
    wide = strong_features(Halves().eval(), images, responses, torch.tensor([1] * 4), dilation=4)
    assert wide.without.tolist() == [False, False, False, False]
    grey = strong_features(Halves().eval(), images, responses, torch.tensor([0] * 4), fill=-1.0)
    assert grey.only[:3].all()


# All of them

IMAGES, MAPS = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)


@pytest.mark.parametrize("call", [deletion, insertion, drop_increase, road])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heatmaps": MAPS[:1]}, r"heatmaps must have the size of the images, \[2, 8, 8\], got \[1, 8, 8\]"),
        ({"heatmaps": torch.rand(2, 4, 4)}, r"heatmaps must have the size of the images, \[2, 8, 8\], got \[2, 4, 4\]"),
        ({"heatmaps": MAPS * math.nan}, r"heatmaps must be finite, got NaN or infinity in map 0 \(2 of 2\)"),
        ({"images": IMAGES * math.inf}, r"images must be finite, got NaN or infinity in image 0 \(2 of 2\)"),
        ({"images": IMAGES[0]}, r"images must have shape \[N, C, H, W\], got \[3, 8, 8\]"),
        ({"target": 7}, r"target must lie in \[0, 7\), got 7"),
        ({"target": lambda output: output[:, 0]}, r"target must be None, an int or N ints, got function"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"model": network().train()}, r"model must be in evaluation mode"),
        ({"model": print}, r"model must be a torch.nn.Module, got builtin_function_or_method"),
        ({"model": nn.Conv2d(3, 4, 3).eval()}, r"model must return \[N, classes\], got \[2, 4, 6, 6\]"),
    ],
)
def test_bad_input_is_told_in_a_sentence(call, change, message):
    options = {"model": network(), "images": IMAGES, "heatmaps": MAPS, **change}
    with pytest.raises(InputError, match=message):
        call(**options)


@pytest.mark.parametrize("call", [drop_increase, road])
def test_one_map_and_one_class_an_image(call):
    with pytest.raises(
        InputError, match=r"heatmaps must have shape \[N, H, W\] and hold at least one map, got \[2, 1,"
    ):
        call(network(), IMAGES, MAPS[:, None])
    with pytest.raises(InputError, match=r"target must be one class an image, got shape \[2, 2\]"):
        call(network(), IMAGES, MAPS, [[0, 1], [1, 2]])


@pytest.mark.parametrize("call", [deletion, insertion])
def test_curves_of_several_classes(call):
    model, maps = network(), torch.rand(4, 8, 8)
    both = call(model, IMAGES, maps, [[0, 1], [5, 2]], step=9)
    one = call(model, IMAGES.repeat_interleave(2, 0), maps, [0, 1, 5, 2], step=9)
    torch.testing.assert_close(both.scores, one.scores)
    with pytest.raises(InputError, match=r"heatmaps must have the size of the images, \[4, 8, 8\], got \[2, 8, 8\]"):
        call(model, IMAGES, MAPS, [[0, 1], [5, 2]])
    with pytest.raises(InputError, match=r"heatmaps must have shape \[2, 3, 8, 8\], got \[2, 1, 8, 8\]"):
        call(model, IMAGES, MAPS[:, None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deletion(network(), IMAGES, MAPS, step=0), "step must be at least 1 pixel, got 0"),
        (lambda: deletion(network(), IMAGES, MAPS, baseline="noise"), "baseline must be 'zero', 'mean', 'blur', a t"),
        (lambda: deletion(network(), IMAGES, MAPS, baseline=torch.ones(5)), r"baseline must broadcast to \[2, 3, 8,"),
        (lambda: auc(torch.ones(1)), "scores must hold at least two points, got 1"),
        (lambda: road(network(), IMAGES, MAPS, percentiles=[100]), "percentiles must lie between 0 and 100, got 100"),
        (lambda: road(network(), IMAGES, MAPS, percentiles=[]), "percentiles must hold at least one, got none"),
        (lambda: noisy_linear_imputation(IMAGES, MAPS), r"missing must be a bool mask \[2, 8, 8\], got \[2, 8, 8\] of"),
        (lambda: noisy_linear_imputation(IMAGES, MAPS >= 0), "missing must leave a pixel of each image, got an image"),
        (lambda: color_swap(network(), IMAGES, swaps=[(0, 1)]), r"swaps must each hold the channels 0..2 once, got "),
        (lambda: color_swap(network(), IMAGES, mean=[0.5]), "mean must hold one number for each of 3 channels, got 1"),
        (lambda: color_swap(network(), IMAGES, torch.tensor([1])), r"labels must have shape \[2\], got \[1\]"),
        (
            lambda: strong_features(network(), IMAGES, MAPS[:1], torch.tensor([0, 1])),
            "responses must have the size of the images",
        ),
        (
            lambda: strong_features(network(), IMAGES, MAPS, torch.tensor([0, 1]), threshold=0),
            r"threshold must lie in \(0, 1\], got 0",
        ),
        (
            lambda: strong_features(network(), IMAGES, MAPS, torch.tensor([0, 7])),
            r"labels must lie in \[0, 7\), got 7",
        ),
    ],
)
def test_other_bad_input_is_told_in_a_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_order_of_images_does_not_matter():
    model, images, maps = network(), torch.randn(5, 3, 16, 16), torch.rand(5, 16, 16)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    for metric in (deletion, insertion, drop_increase, road):
        for here, there in zip(
            metric(model, images, maps), metric(model, images[shuffled], maps[shuffled]), strict=True
        ):
            if len(here) == 5:
                torch.testing.assert_close(there, here[shuffled])


@pytest.mark.parametrize("wrap", ["dict", "tuple", "softmax"])
def test_outputs_of_all_kinds_are_read(wrap):
    model, images, maps = network(), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16)

    class Wrapped(nn.Module):
        def forward(self, x):
            out = model(x)
            return {"dict": {"aux": None, "out": out}, "tuple": (out, x), "softmax": out.softmax(1)}[wrap]

    expected = deletion(model, images, maps, step=40)
    torch.testing.assert_close(deletion(Wrapped().eval(), images, maps, step=40).scores, expected.scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, images, maps = network().to(dtype), torch.randn(2, 3, 16, 16).to(dtype), torch.rand(2, 16, 16).to(dtype)
    for metric in (deletion, insertion, drop_increase, road):
        for value in metric(model, images, maps):
            assert value.isfinite().all()


def test_model_images_and_modes_stay_as_they_are():
    model, images, maps = network(), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy, state = images.clone(), torch.get_rng_state()
    for metric in (deletion, insertion, drop_increase, road):
        for value in metric(model, images, maps):
            assert not value.requires_grad
            assert not value.is_inference()
    color_swap(model, images)
    strong_features(model, images, maps, torch.tensor([0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(images, copy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_on_a_device_all_is_the_same():
    model, images, maps = network(), torch.randn(3, 3, 24, 24), torch.rand(3, 24, 24)
    for metric in (deletion, insertion, drop_increase, road):
        here = metric(model, images, maps)
        there = metric(network_on_device(model), images.cuda(), maps.cuda())
        for a, b in zip(here, there, strict=True):
            assert b.is_cuda
            torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=1e-3)


def network_on_device(model):
    copy = Net().eval()
    copy.load_state_dict(model.state_dict())
    return copy.cuda()
