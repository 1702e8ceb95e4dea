import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from pyfast_xai import EigenCAM, FGVis, GuidedBackprop, InputError, InputXGradient, Saliency, render
from pyfast_xai.metrics import (
    adversarial_evidence,
    adversarial_stability,
    class_sensitivity,
    cosine_similarity,
    deepfool,
    fgsm,
    max_sensitivity,
    parameter_randomization,
    rank_correlation,
    ssim,
)


def network(classes=6):
    torch.manual_seed(30)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(108, classes),
    ).eval()


class Linear(nn.Module):
    """Outputs are inner products of the image with fixed patterns."""

    def __init__(self, patterns):
        super().__init__()
        self.patterns = nn.Parameter(patterns)

    def forward(self, x):
        return x.flatten(1) @ self.patterns.flatten(1).T


# Similarities


def test_ranks_correlate_as_in_scipy():
    a, b = torch.randn(6, 13, 17), torch.randn(6, 13, 17)
    b[1] = a[1] ** 3
    b[2] = -a[2]
    a[3:], b[4:] = a[3:].round(), (2 * b[4:] + a[4:]).round()  # many equal values
    a[5, :10] = 0
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-5)
    assert float(rank_correlation(a, b)[1]) == pytest.approx(1)
    assert float(rank_correlation(a, b)[2]) == pytest.approx(-1)


def test_ranks_of_constant_maps_correlate_with_nothing():
    a, b = torch.ones(2, 5, 5), torch.rand(2, 5, 5)
    assert rank_correlation(a, b).tolist() == [0, 0]
    assert cosine_similarity(0 * a, b).tolist() == [0, 0]


def test_cosine_by_hand():
    a, b = torch.tensor([[[3.0, 4]], [[1, 0]]]), torch.tensor([[[4.0, 3]], [[-2, 0]]])
    assert cosine_similarity(a, b).tolist() == pytest.approx([24 / 25, -1])
    assert cosine_similarity(1e-20 * a, 1e-15 * b).tolist() == pytest.approx([24 / 25, -1])


@pytest.mark.parametrize(("size", "sigma"), [((11, 11), 1.5), ((40, 33), 1.5), ((33, 40), 2.5)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_equals_scikit_image(size, sigma, data_range):
    a = torch.rand(4, *size) * data_range
    b = (a + 0.3 * data_range * torch.rand(4, *size)).clamp(0, data_range)
    b[3] = a[3]
    settings = {"gaussian_weights": True, "sigma": sigma, "use_sample_covariance": False, "data_range": data_range}
    expected = [structural_similarity(x, y, **settings) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(ssim(a, b, data_range=data_range, sigma=sigma), expected, atol=2e-5)
    assert float(ssim(a, b, data_range=data_range, sigma=sigma)[3]) == pytest.approx(1)


def test_ssim_of_constant_maps():
    zero, one = torch.zeros(1, 12, 12), torch.ones(1, 12, 12)
    assert ssim(one, one) == 1
    assert float(ssim(zero, one)) == pytest.approx(1e-4, rel=0.01)


# The class


def test_class_sensitivity_by_hand():
    patterns = torch.zeros(4, 1, 4, 4)
    patterns[0, 0, 0, 0], patterns[1, 0, 0, 1], patterns[2, 0, 0, 0], patterns[3] = 1, 5, -2, 0
    explain = Saliency(Linear(patterns).eval())
    images = torch.rand(4, 1, 4, 4)
    targets = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 3]])
    assert class_sensitivity(explain, images, targets).tolist() == pytest.approx([0, math.sqrt(2), 2, 1])


def test_a_method_without_classes_is_not_sensitive_to_them():
    model, images = network(), torch.randn(3, 3, 20, 20)
    targets = torch.tensor([[0, 1], [2, 3], [4, 5]])
    eigen = EigenCAM(model)
    assert class_sensitivity(lambda x, _: eigen(x), images, targets).tolist() == [0, 0, 0]
    saliency, guided = (class_sensitivity(m(model), images, targets) for m in (Saliency, GuidedBackprop))
    assert (saliency > 0.3).all()
    assert saliency.mean() > guided.mean()  # Nie et al., Fig. 7


# Parameter randomisation


def test_randomization_of_all_layers_makes_gradients_unlike_and_leaves_the_model():
    model, images = network(), torch.randn(4, 3, 20, 20)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result = parameter_randomization(model, Saliency, images)
    assert result.layers == ["7", "3", "2", "0"]
    assert set(result.similarity) == {"rank", "ssim", "cosine"}
    for values in result.similarity.values():
        assert values.shape == (4, 4)
        assert (values < 1).all()
    assert result.similarity["rank"][-1].abs().max() < 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks
    repeated = parameter_randomization(model, Saliency, images)
    assert all(torch.equal(repeated.similarity[name], value) for name, value in result.similarity.items())


def test_maps_of_what_was_not_randomised_stay():
    model, images = network(), torch.randn(2, 3, 20, 20)
    blind = parameter_randomization(model, lambda _: lambda x, __: x[:, 0], images, similarities=["rank"])
    assert blind.similarity["rank"].flatten().tolist() == pytest.approx([1] * 8)
    # The first layer's activations do not see the layers above.
    below = parameter_randomization(model, lambda m: EigenCAM(m, layer="0"), images, similarities=["cosine"])
    assert below.similarity["cosine"][:-1].flatten().tolist() == pytest.approx([1] * 6)
    assert (below.similarity["cosine"][-1] < 0.999).all()


def test_independent_randomization_puts_layers_back():
    model, images = network(), torch.randn(2, 3, 20, 20)
    chosen = {"layers": ["2", "0"], "similarities": ["rank"]}
    cascading = parameter_randomization(model, Saliency, images, **chosen).similarity["rank"]
    independent = parameter_randomization(model, Saliency, images, order="independent", **chosen).similarity["rank"]
    assert torch.equal(cascading[0], independent[0])
    assert not torch.equal(cascading[1], independent[1])
    forgotten = copy.deepcopy(model)
    torch.default_generator.manual_seed(1)
    forgotten[0].reset_parameters()
    top = model(images).argmax(1)
    expected = rank_correlation(Saliency(model)(images, top).heatmap, Saliency(forgotten)(images, top).heatmap)
    torch.testing.assert_close(independent[1], expected)


def test_layers_follow_the_calls_and_take_along_what_is_not_called():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)
            self.unused = nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.scale = nn.Parameter(torch.full((8,), 2.0))

        def forward(self, x):
            tokens = self.stem(x).flatten(2).transpose(1, 2) * self.scale
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

    model, images = Odd().eval(), torch.randn(2, 3, 12, 12)
    recorded = []

    def method(copied):
        recorded.append(copy.deepcopy(copied.state_dict()))
        return lambda x, _: x[:, 0]

    result = parameter_randomization(model, method, images, similarities=["rank"])
    assert result.layers == ["", "head", "attention", "stem"]
    changed = [[name for name in b if not torch.equal(a[name], b[name])] for a, b in itertools.pairwise(recorded)]
    # A parameter that is the same everywhere has no spread to draw from.
    assert changed[0] == []
    assert changed[1] == ["head.weight", "head.bias"]
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= set(changed[2])
    assert changed[3] == ["stem.weight", "stem.bias"]


# Noise


def test_max_sensitivity_of_a_linear_method_by_hand():
    images = torch.rand(3, 1, 4, 4) + 1
    result = max_sensitivity(lambda x, _: 3 * x, images, radius=0.1, samples=50)
    generator = torch.Generator().manual_seed(0)
    noise = [(2 * torch.rand(1, 1, 4, 4, generator=generator) - 1) * 0.1 for _ in range(50)]
    expected = max(float(n.norm()) for n in noise) / images.flatten(1).norm(dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)
    assert max_sensitivity(lambda x, _: 0 * x + 1, images).tolist() == [0, 0, 0]


def test_max_sensitivity_equals_captum():
    captum = pytest.importorskip("captum.metrics")
    explain, images = InputXGradient(network()), torch.randn(3, 3, 12, 12)
    target = torch.tensor([0, 4, 2])
    generator = torch.Generator().manual_seed(5)
    noise = [(2 * torch.rand(1, 3, 12, 12, generator=generator) - 1) * 0.05 for _ in range(4)]
    shifts = torch.cat(noise).repeat(3, 1, 1, 1)  # captum repeats each image in turn
    expected = captum.sensitivity_max(
        lambda x, target: (explain(x[0] if isinstance(x, tuple) else x, target).attribution,),
        images,
        perturb_func=lambda x: x + shifts,
        n_perturb_samples=4,
        target=target,
    )
    result = max_sensitivity(explain, images, target, radius=0.05, samples=4, seed=5)
    torch.testing.assert_close(result, expected.flatten().float(), rtol=1e-4, atol=1e-6)


# Adversaries


def test_fgsm_moves_every_pixel_and_the_class():
    model, images = network(), torch.randn(8, 3, 20, 20)
    top = model(images).argmax(1)
    chance = model(images).softmax(1).gather(1, top[:, None])
    moved = fgsm(model, images, epsilon=0.05)
    torch.testing.assert_close((moved - images).abs().amax((1, 2, 3)), torch.full((8,), 0.05))
    assert (model(moved).softmax(1).gather(1, top[:, None]) < chance).all()
    least = model(images).argmin(1)
    toward = fgsm(model, images, least, epsilon=0.05, toward=True)
    after, before = (model(x).softmax(1).gather(1, least[:, None]) for x in (toward, images))
    assert (after > before).all()


def test_fgsm_of_a_linear_model_by_hand():
    patterns = torch.randn(2, 1, 3, 3)
    images = torch.zeros(1, 1, 3, 3)
    expected = -0.5 * (patterns[0] - patterns[1]).sign()
    assert torch.equal(fgsm(Linear(patterns).eval(), images, 0, epsilon=0.5)[0], expected)


def test_deepfool_steps_to_the_nearest_border_of_a_linear_model():
    patterns = torch.randn(5, 1, 4, 4)
    model, images = Linear(patterns).eval(), torch.randn(6, 1, 4, 4)
    outputs = model(images).detach()
    moved = deepfool(model, images)
    assert (model(moved).argmax(1) != outputs.argmax(1)).all()
    for image, item, made in zip(images, outputs, moved, strict=True):
        top = int(item.argmax())
        distances = [float((item[top] - item[k]) / (patterns[top] - patterns[k]).norm()) for k in range(5) if k != top]
        assert float((made - image).norm()) == pytest.approx(1.02 * min(distances), rel=1e-2)


def test_deepfool_fools_a_network_and_leaves_it():
    model, images = network(), torch.randn(8, 3, 20, 20)
    before = copy.deepcopy(model.state_dict())
    top = model(images).argmax(1)
    moved = deepfool(model, images)
    assert (model(moved).argmax(1) != top).all()
    assert ((moved - images).flatten(1).norm(dim=1) < 0.3 * images.flatten(1).norm(dim=1)).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = deepfool(model, images[3:4])
    torch.testing.assert_close(alone[0], moved[3], atol=1e-4, rtol=1e-3)


def test_attacks_work_under_inference_mode_and_with_frozen_parameters():
    model = network().requires_grad_(False)
    with torch.inference_mode():
        images = torch.randn(2, 3, 12, 12)
        assert fgsm(model, images, epsilon=0.1).shape == images.shape
        assert deepfool(model, images, iterations=2).shape == images.shape


def test_stability_compares_maps_of_images_and_adversaries():
    model, images = network(), torch.randn(4, 3, 20, 20)
    adversarial = fgsm(model, images, epsilon=0.02)
    result = adversarial_stability(Saliency(model), images, adversarial, 2)
    maps = [Saliency(model)(x, 2).heatmap for x in (images, adversarial)]
    torch.testing.assert_close(result["rank"], rank_correlation(*maps))
    torch.testing.assert_close(result["ssim"], ssim(*map(render.normalize, maps)))
    torch.testing.assert_close(result["cosine"], cosine_similarity(*maps))
    same = adversarial_stability(Saliency(model), images, images, similarities=["rank"])
    assert same["rank"].tolist() == pytest.approx([1] * 4)


def test_adversarial_evidence_by_hand():
    patterns = torch.randn(4, 1, 5, 5)
    model, images = Linear(patterns).eval(), torch.randn(6, 1, 5, 5)
    requests = []

    def generate(x, target):
        requests.append(target)
        made = patterns[target].clone()
        made[::2] = x[::2]
        return made

    result = adversarial_evidence(model, generate, images)
    outputs = model(images)
    least, second = outputs.sort(1).indices[:, :2].unbind(1)
    # A zero image gives equal outputs, of which the first is taken.
    assert torch.equal(result.target, torch.where(least == 0, second, least))
    assert torch.equal(requests[0], result.target)
    assert not result.generated[::2].any()
    assert torch.equal(result.generated, model(generate(images, result.target)).argmax(1) == result.target)


def test_fgvis_with_its_defence_generates_less_than_without():
    model, images = network(), torch.randn(6, 3, 12, 12)
    settings = {"game": "generation", "sparsity": 0, "n_iterations": 15, "stop_at": "class", "progress": False}
    rate = {
        defence: adversarial_evidence(model, FGVis(model, defence=defence, **settings), images).generated.float().mean()
        for defence in ("none", "gradient")
    }
    assert rate["gradient"] <= rate["none"]


IMAGES = torch.rand(2, 3, 12, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cosine_similarity(torch.ones(2, 3), torch.ones(3, 2)),
            r"a and b must have the same shape \[N, \.\.\.",
        ),
        (lambda: rank_correlation(IMAGES * math.nan, IMAGES), "a and b must be finite, got NaN or infinity"),
        (lambda: ssim(IMAGES, IMAGES), r"a and b must both have shape \[N, H, W\], got \[2, 3, 12, 12\]"),
        (lambda: ssim(torch.ones(1, 8, 30), torch.ones(1, 8, 30)), "a and b must be at least 11 x 11 for sigma 1.5"),
        (
            lambda: class_sensitivity(Saliency(network()), IMAGES, torch.tensor([0, 1])),
            r"targets must be integers of shape \[2, 2\], got \[2\]",
        ),
        (
            lambda: class_sensitivity(lambda x, _: x[:1], IMAGES, torch.zeros(2, 2).long()),
            r"explain must return a row for each of 2 images, got \[1, 3, 12, 12\]",
        ),
        (lambda: max_sensitivity(lambda x, _: x / 0, IMAGES), "explain must return finite maps, got NaN or infinity"),
        (
            lambda: max_sensitivity(lambda x, _: x, IMAGES, radius=0),
            "radius and samples must be positive, got 0 and 10",
        ),
        (
            lambda: max_sensitivity(lambda x, _: x, IMAGES, [1, 2, 3]),
            r"target must be an int or one for each of 2 images, got \[3\] of torch.int64",
        ),
        (
            lambda: parameter_randomization(network(), Saliency, IMAGES, order="bottom-up"),
            "order must be 'cascading' or 'independent', got 'bottom-up'",
        ),
        (
            lambda: parameter_randomization(network(), Saliency, IMAGES, layers=["1"]),
            "layers must name modules with parameters, got '1'",
        ),
        (
            lambda: parameter_randomization(nn.Flatten().eval(), Saliency, IMAGES),
            "model must have layers with parameters to randomise, got none",
        ),
        (
            lambda: parameter_randomization(network(), Saliency, IMAGES, similarities=["hog"]),
            "similarities must be among 'cosine', 'rank', 'ssim', got 'hog'",
        ),
        (
            lambda: adversarial_stability(Saliency(network()), IMAGES, IMAGES, similarities="rank"),
            "similarities must be a list of names, got the string 'rank'",
        ),
        (
            lambda: adversarial_stability(Saliency(network()), IMAGES, IMAGES[:1]),
            r"adversarial must have shape \[2, 3, 12, 12\], got \[1, 3, 12, 12\]",
        ),
        (
            lambda: deepfool(network(), IMAGES, candidates=1),
            "candidates must be at least 2 and iterations 1, got 1 and",
        ),
        (lambda: deepfool(network(1), IMAGES), "model must tell at least two classes apart, got 1"),
        (lambda: fgsm(network(), IMAGES, 6, epsilon=0.1), r"target must lie in \[0, 6\), got 6"),
        (
            lambda: adversarial_evidence(network(), lambda x, _: x[:1], IMAGES),
            r"generate must return images \[2, 3, 12, 12\], got \[1, 3, 12, 12\]",
        ),
    ],
)
def test_bad_input_is_told_in_a_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_order_of_images_does_not_matter():
    model, images, shuffled = network(), torch.randn(5, 3, 20, 20), torch.tensor([3, 0, 4, 1, 2])
    explain = Saliency(model)
    target, targets = torch.arange(5), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])
    for metric, options in ((max_sensitivity, target), (class_sensitivity, targets)):
        torch.testing.assert_close(
            metric(explain, images[shuffled], options[shuffled]), metric(explain, images, options)[shuffled]
        )
    here, there = (parameter_randomization(model, Saliency, x, t) for x, t in (
        (images, target), (images[shuffled], target[shuffled])
    ))  # fmt: skip
    for name, values in here.similarity.items():
        torch.testing.assert_close(there.similarity[name], values[:, shuffled])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_on_a_device_all_is_the_same():
    images = torch.randn(3, 3, 24, 24)
    here, there = (
        parameter_randomization(m, Saliency, x) for m, x in ((network(), images), (network().cuda(), images.cuda()))
    )
    for name, values in here.similarity.items():
        assert there.similarity[name].is_cuda
        torch.testing.assert_close(there.similarity[name].cpu(), values, atol=1e-3, rtol=1e-3)
    moved = deepfool(network().cuda(), images.cuda())
    assert moved.is_cuda
    assert (network()(moved.cpu()).argmax(1) != network()(images).argmax(1)).all()
