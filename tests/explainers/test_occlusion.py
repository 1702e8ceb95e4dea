"""Occlusion against Captum, and what perturbation methods share."""

import itertools
import subprocess
import sys

import pytest
import torch
from captum.attr import Occlusion as Captum
from torch import nn
from torch.nn import functional

from pyfast_xai import (
    HSIC,
    LIME,
    RISE,
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    MeaningfulPerturbation,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
    Sobol,
)
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
BLOCKS = torch.arange(9).view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)[:, :11]  # of 12 x 11 pixels
REFERENCES = torch.arange(2 * 3 * 12 * 11, dtype=DOUBLE).view(2, 3, 12, 11).cos()
QUICK = {
    Occlusion: {"window": (5, 4), "stride": (3, 2)},
    RISE: {"n_masks": 13, "cells": 3},
    LIME: {"n_samples": 13, "feature_mask": BLOCKS},
    FeatureAblation: {"feature_mask": BLOCKS},
    FeaturePermutation: {"feature_mask": BLOCKS, "references": REFERENCES},
    KernelShap: {"feature_mask": BLOCKS, "n_samples": 20},
    ShapleyValueSampling: {"feature_mask": BLOCKS, "n_samples": 2},
    ShapleyValues: {"feature_mask": BLOCKS // 2},
    HSIC: {"feature_mask": BLOCKS, "n_samples": 12},
    Sobol: {"feature_mask": BLOCKS, "n_designs": 8},
    MeaningfulPerturbation: {"n_iterations": 3, "scale": 4, "smooth": 2, "blur": 3},
}
every_method = pytest.mark.parametrize("method", QUICK, ids=lambda method: method.method)


def small(dtype=DOUBLE):
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 6 * 5, 5)]
    return nn.Sequential(*layers).eval().to(dtype)


@pytest.fixture
def net():
    return small()


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 11, dtype=DOUBLE)


def captum(net, images, target, window, stride, baseline=0, softmax=True):
    requests = (lambda x: net(x).softmax(1)) if softmax else net
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # It divides in float32 whatever the model computes in.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return Captum(requests).attribute(images, window, stride, target=target, baselines=baseline)


GEOMETRIES = [
    ((3, 3, 3), (3, 2, 2)),
    ((3, 5, 4), (3, 3, 4)),
    ((3, 12, 1), (3, 5, 1)),
    ((3, 12, 11), (3, 1, 1)),
    ((1, 4, 5), (1, 3, 2)),
    ((2, 4, 5), (1, 4, 5)),
    ((2, 7, 3), (2, 6, 3)),
]


@pytest.mark.parametrize(("window", "stride"), GEOMETRIES)
@pytest.mark.parametrize("score", ["probability", "logit"])
def test_equals_captum(net, images, window, stride, score):
    actual = Occlusion(net, window=window, stride=stride, score=score, batch_size=5)(images, [0, 3, 4])
    expected = captum(net, images, torch.tensor([0, 3, 4]), window, stride, softmax=score == "probability")
    torch.testing.assert_close(actual.attribution, expected, rtol=0, atol=1e-13)
    if window[0] == 3:
        torch.testing.assert_close(actual.signed_map, expected[:, 0], rtol=0, atol=1e-13)
    torch.testing.assert_close(actual.heatmap, actual.signed_map.clamp_min(0).float())


def test_baselines(net, images):
    def against(baseline, expected):
        actual = Occlusion(net, window=5, stride=3, baseline=baseline, blur=2)(images, 1).attribution
        other = captum(net, images, 1, (3, 5, 5), (3, 3, 3), expected)
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-13)

    whole = torch.randn(1, 3, 12, 11, dtype=DOUBLE)
    against(0.7, 0.7)
    against(whole, whole)
    against(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), torch.tensor([1.0, 2, 3])[:, None, None].expand(1, 3, 12, 11))
    against("mean", images.mean((2, 3), keepdim=True).expand_as(images))
    from pyfast_xai.explainers.common.baselines import blurred

    against("blur", blurred(images, 2))


def test_blur_is_a_gaussian():
    from scipy.ndimage import gaussian_filter

    from pyfast_xai.explainers.common.baselines import blurred

    image = torch.randn(1, 2, 40, 50, dtype=DOUBLE)
    expected = [torch.from_numpy(gaussian_filter(one.numpy(), 2, mode="mirror", truncate=3)) for one in image[0]]
    torch.testing.assert_close(blurred(image, 2.0)[0], torch.stack(expected), rtol=0, atol=1e-12)


def test_where_a_window_falls_alone_is_its_drop_to_the_letter(net, images):
    """A pixel that one window covers has its drop; one that two cover the mean of both."""
    actual = Occlusion(net, window=(6, 11), stride=(5, 11))(images, 2).signed_map

    def drop(top):
        hidden = images.clone()
        hidden[:, :, top : top + 6] = 0
        return (net(images).softmax(1) - net(hidden).softmax(1))[:, 2].detach()

    for row, expected in {0: drop(0), 5: (drop(0) + drop(5)) / 2, 7: drop(5), 11: drop(10)}.items():
        torch.testing.assert_close(actual[:, row, 3], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("size", "windows"), [(224, 625), (16, 225), (6, 36)])
def test_default_windows_follow_the_size(size, windows):
    output = []
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    Occlusion(net, batch_size=625, progress=lambda progress: output.append((progress.done, progress.total)))(
        torch.randn(1, 1, size, size)
    )
    assert output == [(windows, windows)]


# What all four promise.


@every_method
def test_does_not_depend_on_the_batch(net, images, method):
    make = [method(net, **QUICK[method], batch_size=batch) for batch in (1, 4, 64)]
    first, *others = [explain(images, [[0, 1], [2, 2], [4, 3]]) for explain in make]
    alone = [make[1](images[n : n + 1], [pair]) for n, pair in enumerate([[0, 1], [2, 2], [4, 3]])]
    for other in others:
        torch.testing.assert_close(other.heatmap, first.heatmap, rtol=1e-5, atol=1e-6)
        if first.signed_map is not None:
            torch.testing.assert_close(other.signed_map, first.signed_map, rtol=0, atol=1e-12)
    for n, item in enumerate(alone):
        torch.testing.assert_close(item.heatmap, first.heatmap[2 * n : 2 * n + 2], rtol=1e-5, atol=1e-6)
        if first.signed_map is not None:
            torch.testing.assert_close(item.signed_map, first.signed_map[2 * n : 2 * n + 2], rtol=0, atol=1e-12)


@every_method
def test_targets_together_equal_each_alone(net, images, method):
    explain = method(net, **QUICK[method])
    both = explain(images, [[0, 1], [2, 2], [4, 3]])
    assert both.target.tolist() == [0, 1, 2, 2, 4, 3]
    assert both.images.shape == (6, 3, 12, 11)
    for k, target in enumerate(([0, 2, 4], [1, 2, 3])):
        one = explain(images, target)
        torch.testing.assert_close(one.heatmap, both.heatmap[k::2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.score, both.score[k::2])
    expected = net(images).softmax(1).gather(1, torch.tensor([[0, 1], [2, 2], [4, 3]]))
    torch.testing.assert_close(both.score, expected.detach().flatten().float())


@every_method
def test_several_targets_share_their_forwards(net, images, method):
    """All but those that optimise something for each."""
    recorded = []
    handle = net.register_forward_hook(lambda actual, inputs, output: recorded.append(len(output)))
    explain = method(net, **{**QUICK[method], **({"initial_mask": 1.0} if method is MeaningfulPerturbation else {})})
    explain(images, 1)
    one, recorded[:] = sum(recorded), []
    explain(images, [[0, 1, 2, 3]] * 3)
    handle.remove()
    if method is MeaningfulPerturbation:
        # Recorded and asked before, which both are once; then three steps and a last look for each row.
        assert (one, sum(recorded)) == (6 + 3 * 4, 6 + 12 * 4)
    else:
        assert sum(recorded) == one


@pytest.mark.parametrize("method", [method for method in QUICK if method is not HSIC], ids=lambda method: method.method)
@pytest.mark.parametrize("score", ["probability", "logit"])
def test_a_model_that_looks_at_one_quadrant(method, score):
    class Quadrant(nn.Module):
        def forward(self, x):
            brightness = x[:, :, :8, :8].mean((1, 2, 3))
            return torch.stack([brightness, -brightness], 1)

    settings = {
        Occlusion: {"window": 4, "stride": 4},
        RISE: {"n_masks": 4000, "cells": 4, "batch_size": 500},
        LIME: {"n_samples": 200, "feature_mask": 4},
        FeatureAblation: {"feature_mask": 4},
        FeaturePermutation: {"feature_mask": 4, "references": torch.zeros(1, 3, 16, 16, dtype=DOUBLE)},
        KernelShap: {"feature_mask": 2, "n_samples": 14},
        ShapleyValueSampling: {"feature_mask": 4, "n_samples": 3},
        ShapleyValues: {"feature_mask": 2},
        Sobol: {"feature_mask": 4},
        MeaningfulPerturbation: {
            "n_iterations": 60,
            "scale": 4,
            "smooth": 0,
            "jitter": 0,
            "baseline": 0.0,
            "initial_mask": 0.9,
            "tv": 0,
        },
    }[method]
    if method is LIME:
        settings["baseline"] = 0.0
    images = 1 + 0.1 * torch.rand(2, 3, 16, 16, dtype=DOUBLE)
    heat = method(Quadrant().eval(), score=score, **settings)(images, 0).heatmap
    within, outside = heat[:, :8, :8], heat.clone()
    outside[:, :8, :8] = 0
    assert (within.mean((1, 2)) > 0.01).all()
    if method is RISE:
        # Masks reach over the border by as much as they are interpolated, and their average is never at zero.
        assert (within.amin((1, 2)) > heat[:, 11:, 11:].amax((1, 2))).all()
    elif method is LIME:
        # The penalty leaves a little of the nonlinear rest everywhere.
        assert (outside.amax((1, 2)) < 0.1 * within.amin((1, 2))).all()
    else:
        assert outside.amax() < (1e-3 if method is MeaningfulPerturbation else 1e-12)


@every_method
def test_a_seed_repeats_and_the_random_numbers_of_the_process_are_left_alone(net, images, method):
    state = torch.get_rng_state()
    settings = {"initial_mask": "random", "noise": 0.1} if method is MeaningfulPerturbation else {}
    explain = method(net, **QUICK[method], **settings)
    first = explain(images).heatmap
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(explain(images).heatmap, first)
    if method not in (Occlusion, FeatureAblation, ShapleyValues):  # which draw nothing
        assert not torch.equal(method(net, **QUICK[method], **settings, seed=1)(images).heatmap, first)


@every_method
def test_a_function_of_the_output(net, images, method):
    settings = QUICK[method]
    margin = method(net, **settings)(images, lambda output: output[:, 0] - output[:, 1])
    assert margin.target is None
    assert margin.score is None
    if method in (HSIC, Sobol):
        plain = method(net, score="logit", **settings)(images, 2).signed_map
        assert torch.equal(method(net, **settings)(images, lambda output: output[:, 2]).signed_map, plain)
    elif method is not MeaningfulPerturbation:
        # Linear in the scores, each of them.
        zero, one = (method(net, score="logit", **settings)(images, k).signed_map for k in (0, 1))
        torch.testing.assert_close(margin.signed_map, zero - one, rtol=0, atol=1e-12)
    else:
        plain = method(net, score="logit", **{**settings, "initial_mask": 1.0})
        torch.testing.assert_close(plain(images, lambda output: output[:, 2]).mask, plain(images, 2).mask)
    for wrong, came in ((lambda output: output, r"\[3, 5\]"), (lambda output: output.sum(), r"\[\]"), (len, "int")):
        with pytest.raises(InputError, match=rf"one number an image, \[3\], got {came}"):
            method(net, **settings)(images, wrong)


@every_method
def test_probabilities_are_taken_as_they_are(net, images, method):
    with_softmax = nn.Sequential(net, nn.Softmax(1)).eval()
    one, other = (method(model, **QUICK[method])(images) for model in (net, with_softmax))
    torch.testing.assert_close(one.heatmap, other.heatmap, rtol=1e-5, atol=1e-6)


@every_method
def test_outputs_that_nest(net, images, method):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, factor=1.0, *, shift=0.0):
            return {"features": x.mean(), "logits": self.net(x * factor) + shift, "sizes": [x.shape]}

    one = method(net, **QUICK[method])(images * 2)
    other = method(Nested().eval(), **QUICK[method])(images * 2, None, 1.0, shift=torch.zeros(5, dtype=DOUBLE))
    assert torch.equal(one.heatmap, other.heatmap)


@every_method
def test_a_model_with_a_memory_and_one_that_draws_are_recorded_each_time(images, method):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(functional.dropout(x, 0.2, training=True)) * self.calls

    model, state = Odd().eval(), torch.get_rng_state()
    explain = method(model, **QUICK[method])
    # Each forward is the first, with the same draws.
    assert torch.equal(explain(images).heatmap, explain(images).heatmap)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


@every_method
def test_half_precision(method):
    net, images = small(torch.float16), torch.randn(2, 3, 12, 11).half()
    single = small(torch.float32)
    single.load_state_dict(net.state_dict())
    one, other = method(net, **QUICK[method])(images, 1), method(single, **QUICK[method])(images.float(), 1)
    assert one.heatmap.dtype == torch.float32
    if one.signed_map is not None:
        # Scores of half a precision, 2**-11, which RISE adds up.
        torch.testing.assert_close(one.signed_map, other.signed_map, rtol=0, atol=4e-3)


@every_method
def test_progress_is_told_and_a_bar_leaves_the_output_alone(net, images, method, capsys):
    output = []
    method(
        net, **QUICK[method], batch_size=4, progress=lambda progress: output.append((progress.done, progress.total))
    )(images)
    total = output[-1][1]
    assert {total for _, total in output} == {total}
    assert output[-1][0] == total
    assert all(before < after for (before, _), (after, _) in itertools.pairwise(output))
    method(net, **QUICK[method], progress=True)(images)
    assert capsys.readouterr().out == ""


@every_method
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "loss"}, "score must be one of 'probability', 'logit', got 'loss'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_all(net, method, settings, message):
    with pytest.raises(InputError, match=message):
        method(net, **settings)


@every_method
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, r"target must lie in \[0, 5\), got 5"),
        ([0, 1], "one entry for each of 3 images"),
        ("cat", "got str: a name needs the argument labels"),
    ],
)
def test_bad_targets(net, images, method, target, message):
    with pytest.raises(InputError, match=message):
        method(net, **QUICK[method])(images, target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": (1, 2, 3, 4)}, "window must have 2 sizes in pixels for images with as many axes, got 4"),
        ({"stride": (2, 0)}, "stride must be at least 1, got 0"),
        ({"window": 13}, r"window must fit in the images, \[3, 12, 11\], got \[3, 13, 13\]"),
        ({"window": 3, "stride": 4}, r"stride must be at most the window, \[3, 3, 3\], got \[3, 4, 4\]"),
        ({"baseline": "black"}, "baseline must be one of 'blur', 'mean', got 'black'"),
        ({"baseline": None}, "baseline must be one of 'blur', 'mean', got None"),
        ({"baseline": float("nan")}, "baseline must be finite, got nan"),
        (
            {"baseline": torch.zeros(2, 1, 1)},
            r"baseline must broadcast to the images, \[3, 3, 12, 11\], got \[2, 1, 1\]",
        ),
        ({"blur": 0}, "blur must be positive, got 0"),
    ],
)
def test_bad_settings(net, images, settings, message):
    with pytest.raises(InputError, match=message):
        Occlusion(net, **settings)(images)


def test_memory_does_not_grow_with_the_perturbations(net, images):
    """Nothing of the size of an image is kept for each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    sizes = []
    for few, many in ((RISE, "n_masks"), (LIME, "n_samples")):
        for count in (8, 80):
            with Largest() as largest:
                largest.size = 0
                few(net, **{**QUICK[few], many: count}, batch_size=8)(images)
            sizes.append(largest.size)
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]


def test_scikit_image_is_not_imported_where_it_is_not_needed():
    code = "import sys, pyfast_xai.explainers; print('skimage' in sys.modules, 'rich' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"


def class_one(output):
    """Returns the output of class 1, a target that is a function."""
    return output[:, 1]


def test_a_score_that_no_window_changes_is_said(caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    images = torch.ones(2, 3, 4, 4)
    images[1] = 0  # hidden by zeros it stays what it is
    zero = "occlusion: the map of row 1 is zero: no change of the image changes its score; larger or other changes may"
    for settings, target, more in (({}, 1, ", or score='logit'"), ({"score": "logit"}, 1, ""), ({}, class_one, "")):
        assert not Occlusion(model, window=2, stride=2, **settings)(images, target).signed_map[1].any()
        assert caplog.messages == [zero + more]
        caplog.clear()
    nn.init.constant_(model[1].weight, 0.1)
    nn.init.constant_(model[1].weight[1], -0.1)
    assert Occlusion(model, window=2, stride=2)(images[:1], 0).heatmap.any()
    assert not caplog.text
    assert not Occlusion(model, window=2, stride=2)(images[:1], 1).heatmap.any()
    assert "the heat map of row 0 is zero; `signed_map` has what speaks against its target" in caplog.text
