"""LIME against scikit-learn and Captum on the same samples; what perturbations share is in test_occlusion."""

import builtins
import itertools
import math

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import LimeBase
from case_ids import case_id
from skimage import segmentation
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances, r2_score
from torch import nn

from pyfast_xai import LIME
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
SIZE = (12, 15)
SEGMENTS = torch.arange(20).view(4, 5).repeat_interleave(3, 0).repeat_interleave(3, 1)


class Net(nn.Module):
    """Remembers what it saw, once it is asked to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(120, 5)
        )
        self.seen = None

    def forward(self, x):
        if self.seen is not None:
            self.seen.append(x.clone())
        return self.layers(x)


@pytest.fixture
def net():
    return Net().eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE, dtype=DOUBLE)


def samples(net, explain, image):
    """Which superpixels each sample had, and the scores of all classes, `[m, F]` and `[m, 5]`."""
    net.seen = []
    explain(image)
    # Twice the image itself: recorded and asked.
    recorded, net.seen = torch.cat(net.seen)[2:], None
    whole = (recorded == image).all(1)
    left = torch.stack([whole[:, s == SEGMENTS].all(1) for s in range(20)], 1)
    with torch.no_grad():
        return left.numpy().astype(float), net(recorded).softmax(1).numpy()


def authors(left, scores, kernel_width=0.25, alpha=1.0):
    """`explain_instance` of lime_image from its distances on, `[classes, F]` and R squared."""
    distances = pairwise_distances(left, left[0].reshape(1, -1), metric="cosine").ravel()
    weights = np.sqrt(np.exp(-(distances**2) / kernel_width**2))
    result = []
    for column in scores.T:
        easy = Ridge(alpha=alpha, fit_intercept=True).fit(left, column, sample_weight=weights)
        result.append((easy.coef_, r2_score(column, easy.predict(left), sample_weight=weights)))
    return tuple(np.array(part) for part in zip(*result, strict=True))


@pytest.mark.parametrize("settings", [{}, {"kernel_width": 0.6, "alpha": 0.01}, {"kernel_width": 0.1, "alpha": 30}])
@pytest.mark.parametrize("count", [5, 120])
def test_equals_the_authors_on_the_same_samples(net, images, settings, count):
    explain = LIME(net, n_samples=count, feature_mask=SEGMENTS, seed=4, batch_size=16, **settings)
    left, scores = samples(net, explain, images[:1])
    assert left.shape == (count, 20)
    assert (left[0] == 1).all()
    weights, fit = authors(left, scores, **settings)
    result = explain(images[:1], [list(range(5))])
    expected = torch.from_numpy(weights)[:, SEGMENTS]
    torch.testing.assert_close(result.signed_map, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.heatmap, expected.clamp_min(0).float())
    torch.testing.assert_close(result.fit, torch.from_numpy(fit).float(), rtol=0, atol=1e-5)


def test_equals_captum_on_the_same_samples(net, images):
    explain = LIME(net, n_samples=60, feature_mask=SEGMENTS, baseline=0.0)
    left, _ = samples(net, explain, images[:1])
    rows = iter(torch.from_numpy(left)[:, None])

    def nearness(original, perturbed, interpretable, **_):
        cosine = torch.nn.functional.cosine_similarity(interpretable, torch.ones_like(interpretable))
        return torch.exp(-0.5 * ((1 - cosine) / 0.25) ** 2)

    captum = LimeBase(
        lambda x: net(x).softmax(1),
        SkLearnRidge(alpha=1.0),
        nearness,
        lambda original, **_: next(rows),
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda row, original, **_: original * row[0][SEGMENTS],
        to_interp_rep_transform=None,
    )
    with torch.no_grad():
        expected = captum.attribute(images[:1], target=3, n_samples=60)
    # Captum fits in float32.
    torch.testing.assert_close(
        explain(images[:1], 3).signed_map, expected[0].double()[SEGMENTS][None], rtol=0, atol=1e-6
    )


def test_samples_are_fair_coins(net, images):
    left, _ = samples(net, LIME(net, n_samples=400, feature_mask=SEGMENTS), images[:1])
    # 8000 draws, five standard errors of 0.0056.
    assert abs(left[1:].mean() - 0.5) < 0.028


def test_a_linear_model_has_its_own_weights(images):
    """Without a penalty to speak of, the regression finds what each superpixel adds."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 12 * 15, 2).double()

        def forward(self, x):
            return self.fc(x.flatten(1))

    net = Linear().eval()
    result = LIME(net, n_samples=200, feature_mask=SEGMENTS, baseline=0.3, alpha=1e-9, score="logit")(images, 1)
    added = ((images - 0.3) * net.fc.weight[1].view(3, *SIZE)).detach().sum(1)
    expected = torch.stack([torch.stack([item[s == SEGMENTS].sum() for s in range(20)])[SEGMENTS] for item in added])
    torch.testing.assert_close(result.signed_map, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.fit, torch.ones(2))


def test_a_model_that_says_always_the_same(images):
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2) + 0 * x.mean((1, 2, 3))[:, None]

    result = LIME(Sure().eval(), n_samples=20, feature_mask=SEGMENTS)(images)
    assert result.signed_map.abs().max() < 1e-12
    assert result.fit.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("baseline", ["mean", 0.4, torch.tensor([[[1.0]], [[2.0]], [[3.0]]])], ids=case_id)
def test_what_is_left_out_has_the_baseline(net, images, baseline):
    net.seen = []
    LIME(net, n_samples=9, feature_mask=SEGMENTS, baseline=baseline)(images[:1])
    recorded, image, some = torch.cat(net.seen)[3:], images[0], False
    for s in range(20):
        actual = image[:, s == SEGMENTS]
        hidden = {
            str: actual.mean(1, keepdim=True),
            float: torch.full((3, 1), 0.4, dtype=DOUBLE),
            torch.Tensor: torch.tensor([[1.0], [2], [3]], dtype=DOUBLE),
        }[type(baseline)].expand_as(actual)
        for one in recorded[:, :, s == SEGMENTS]:
            gone = not torch.equal(one, actual)
            some |= gone
            if gone:
                torch.testing.assert_close(one, hidden, rtol=0, atol=1e-14)
    assert some


def test_segments_of_every_kind_are_the_same(net, images):
    explain = [
        LIME(net, n_samples=20, feature_mask=segments)
        for segments in (SEGMENTS, SEGMENTS.repeat(2, 1, 1), 7 * SEGMENTS - 3, lambda image: SEGMENTS.numpy())
    ]
    first, *others = [item(images, [[0, 1], [2, 3]]) for item in explain]
    assert first.feature_mask.shape == (4, 1, *SIZE)
    for other in others:
        assert torch.equal(other.signed_map, first.signed_map)
        assert torch.equal(other.feature_mask, first.feature_mask)
    assert first[1:3].feature_mask.shape == (2, 1, *SIZE)


def test_each_image_has_segments_of_its_own(net, images):
    both = torch.stack([SEGMENTS, SEGMENTS.flip(1) // 2])
    result = LIME(net, n_samples=20, feature_mask=both)(images)
    for n in range(2):
        alone = LIME(net, n_samples=20, feature_mask=both[n])(images[n : n + 1])
        torch.testing.assert_close(alone.signed_map[0], result.signed_map[n], rtol=0, atol=1e-12)
    options = []
    LIME(net, n_samples=2, feature_mask=lambda image: options.append(image.clone()) or SEGMENTS)(images)
    assert torch.equal(torch.stack(options), images)


def discs():
    y, x = torch.arange(64)[:, None], torch.arange(80)
    image = torch.full((1, 3, 64, 80), -1.0)
    image[0, 0, (y - 20) ** 2 + (x - 20) ** 2 < 150] = 2
    image[0, 1, (y - 40) ** 2 + (x - 60) ** 2 < 150] = 2
    return image + 0.01 * torch.randn(1, 3, 64, 80)


@pytest.mark.parametrize("settings", [{}, {"feature_mask": "slic", "n_superpixels": 30}], ids=case_id)
def test_superpixels_repeat_whatever_the_scale_of_the_pixels(settings):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3)).eval()
    image = discs()
    result = LIME(net, n_samples=4, **settings)(image)
    segments = result.feature_mask[0, 0]
    assert segments.unique().tolist() == list(range(int(segments.max()) + 1))
    assert torch.equal(LIME(net, n_samples=4, **settings)(image).feature_mask[0, 0], segments)
    # Colours as people see them, not as the model wants them.
    assert torch.equal(LIME(net, n_samples=4, **settings)(3 * image + 20).feature_mask[0, 0], segments)


def test_slic_follows_what_is_there():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3)).eval()
    image = discs()
    segments = LIME(net, n_samples=4, feature_mask="slic", n_superpixels=30)(image).feature_mask[0, 0]
    assert 15 <= segments.max() <= 45
    # Superpixels hardly mix a disc with the ground: their mean colours are as good as the pixels'.
    means = torch.stack([image[0][:, s == segments].mean(1) for s in range(int(segments.max()) + 1)], 1)
    error = (means[:, segments] - image[0]).square().mean()
    assert error < 0.1 * image[0].var(dim=(1, 2)).mean()


def test_quickshift_is_that_of_the_authors():
    image = (discs() + 2) / 5
    result = LIME(nn.Sequential(nn.Flatten(), nn.Linear(15360, 2)).eval(), n_samples=2, seed=3)(image).feature_mask[
        0, 0
    ]
    pixels = image[0].permute(1, 2, 0).double().numpy()
    expected = segmentation.quickshift(pixels, kernel_size=4, max_dist=200, ratio=0.2, rng=3)
    assert torch.equal(result, torch.from_numpy(expected))
    assert result.max() > 1


def test_without_scikit_image_there_is_a_remedy(net, images, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "skimage":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"'quickshift' needs scikit-image \(pip install scikit-image\)"):
        LIME(net, n_samples=4)(images)
    LIME(net, n_samples=4, feature_mask=SEGMENTS)(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 1}, "n_samples must be at least 2, got 1"),
        ({"feature_mask": "watershed"}, "feature_mask must be one of 'quickshift', 'slic', got 'watershed'"),
        ({"feature_mask": 0}, "feature_mask must be at least 1, got 0"),
        (
            {"feature_mask": SEGMENTS.T},
            r"feature_mask must have shape \[12, 15\], \[2, 12, 15\] or \[2, 3, 12, 15\], got \[15, 12\]",
        ),
        ({"feature_mask": SEGMENTS.double()}, "feature_mask must hold integers, got torch.float64"),
        pytest.param(
            {"feature_mask": lambda image: SEGMENTS[:3]},
            r"feature_mask must return \[12, 15\] or \[3, 12, 15\], got \[3, 15\]",
            id="segments of another shape",
        ),
        ({"n_superpixels": 0}, "n_superpixels must be at least 1, got 0"),
        ({"baseline": "own"}, "baseline must be one of 'blur', 'mean', got 'own'"),
        ({"kernel_width": 0}, "kernel_width must be positive, got 0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
    ],
    ids=case_id,
)
def test_bad_settings(net, images, settings, message):
    with pytest.raises(InputError, match=message):
        LIME(net, **settings)(images)


def test_samples_of_the_kernel_come_as_often_as_it_weighs_them(net):
    """GLIME: every subset of six superpixels, against its weight in LIME."""
    subsets = torch.tensor(list(itertools.product([0, 1], repeat=6)), dtype=DOUBLE)
    for width in (0.25, 0.1):
        weights = np.array([math.exp(-0.5 * ((1 - math.sqrt(each.mean())) / width) ** 2) for each in subsets.numpy()])
        chances = weights / weights.sum()
        drawn = LIME(net, sampling="kernel", kernel_width=width, n_samples=100_001, seed=3)._coalitions(6)
        present = drawn.rows(torch.arange(1, 100_001)).long()  # the first is the image itself
        counts = torch.bincount(present @ torch.tensor([32, 16, 8, 4, 2, 1]), minlength=64).numpy()
        spread = np.sqrt(100_000 * chances * (1 - chances))
        assert (np.abs(counts - 100_000 * chances) <= 4.5 * spread + 1).all()
        assert drawn.rows(torch.tensor([0])).all()


def test_samples_of_the_kernel_count_alike(net, images):
    explain = LIME(net, n_samples=80, feature_mask=SEGMENTS, sampling="kernel", kernel_width=0.1, alpha=0.5)
    left, scores = samples(net, explain, images[:1])
    assert left[1:].mean() > 0.6  # nearer to the image than by fair coins
    expected = [Ridge(alpha=0.5).fit(left, column) for column in scores.T]
    result = explain(images[:1], [list(range(5))])
    assert result.values.numpy() == pytest.approx(np.array([fit.coef_ for fit in expected]), abs=1e-10)
    fits = [fit.score(left, column) for fit, column in zip(expected, scores.T, strict=True)]
    assert result.fit.numpy() == pytest.approx(np.array(fits), abs=1e-5)


def values_of_seeds(net, images, sampling, count, **settings):
    """Values of one image and class by samples of several seeds, `[count, F]`."""
    explain = (LIME(net, n_samples=400, sampling=sampling, alpha=1e-14, seed=seed, **settings) for seed in range(count))
    return np.stack([each(images[:1], 2).values[0].numpy() for each in explain])


def test_samples_of_the_kernel_have_the_limit_of_lime(net, images):
    """Against the regression on all 64 subsets, as the kernel weighs them."""
    six = torch.arange(6).view(2, 3).repeat_interleave(6, 0).repeat_interleave(5, 1)
    subsets = torch.tensor(list(itertools.product([0, 1], repeat=6)), dtype=DOUBLE)
    means = torch.stack([images[0][:, six == k].mean(1) for k in range(6)])[six].movedim(-1, 0)
    shown = torch.stack([torch.where(each[six] > 0, images[0], means) for each in subsets])
    with torch.no_grad():
        scores = net(shown).softmax(1)[:, 2].numpy()
    weights = np.exp(-0.5 * ((1 - np.sqrt(subsets.mean(1).numpy())) / 0.1) ** 2)
    limit = Ridge(alpha=1e-14).fit(subsets.numpy(), scores, sample_weight=weights).coef_
    values = values_of_seeds(net, images, "kernel", 12, feature_mask=six, kernel_width=0.1)
    error = values.std(0, ddof=1) / math.sqrt(12)
    assert (np.abs(values.mean(0) - limit) < 5 * error).all()
    assert error.max() < 0.05 * np.abs(limit).max()


def test_samples_of_a_narrow_kernel_are_steadier(net, images):
    settings = {"feature_mask": SEGMENTS, "kernel_width": 0.05}
    kernel, uniform = (values_of_seeds(net, images, sampling, 12, **settings) for sampling in ("kernel", "uniform"))
    assert kernel.std(0).mean() < 0.6 * uniform.std(0).mean()


def test_a_sampling_that_does_not_exist(net):
    with pytest.raises(InputError, match=r"^sampling must be one of 'uniform', 'kernel', got 'local'$"):
        LIME(net, sampling="local")
