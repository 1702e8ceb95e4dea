"""`compat.captum.metrics` against the installed Captum, with the same perturbations."""

import pytest
import torch
from torch import nn

from pyfast_xai import InputError
from pyfast_xai.compat.captum import IntegratedGradients, Saliency, metrics

theirs = pytest.importorskip("captum.metrics")


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(180, 4)).double().eval()


class Two(nn.Module):
    """Two inputs and a further argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(6, 4).double(), nn.Linear(5, 4).double()

    def forward(self, one, other, scale):
        return self.first(one).tanh() * scale + self.second(other).sin()


MODEL = network()
IMAGES = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAPS = Saliency(MODEL).attribute(IMAGES, target=[0, 2, 1], abs=False)
TARGETS = [
    pytest.param(1, id="int"),
    pytest.param([0, 2, 1], id="list"),
    pytest.param(torch.tensor([3, 0, 1]), id="tensor"),
]


def noise(inputs):
    move = 0.1 * torch.randn_like(inputs)
    return move, inputs - move


def both(call):
    results = []
    for library in (metrics, theirs):
        torch.manual_seed(9)
        results.append(call(library))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    return results[0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("most", [None, 7])
def test_infidelity(target, normalize, most):
    settings = {"target": target, "normalize": normalize, "max_examples_per_batch": most, "n_perturb_samples": 5}
    assert both(lambda library: library.infidelity(MODEL, noise, IMAGES, MAPS, **settings)).shape == (3,)


@pytest.mark.parametrize("multiply", [False, True])
@pytest.mark.parametrize("baselines", [None, 0.25, "rows"])
def test_decorated_perturbations(multiply, baselines):
    base = IMAGES.flip(0) if baselines == "rows" else baselines

    def call(library):
        if base is None:
            perturb = library.infidelity_perturb_func_decorator(multiply)(lambda inputs: inputs.round(decimals=1))
        else:
            perturb = library.infidelity_perturb_func_decorator(multiply)(
                lambda inputs, base: torch.where(torch.rand_like(inputs) > 0.5, inputs, base)
            )
        return library.infidelity(MODEL, perturb, IMAGES, MAPS, baselines=base, target=2)

    both(call)


def test_two_inputs_and_further_arguments():
    generator = torch.Generator().manual_seed(4)
    inputs = tuple(torch.rand(3, size, dtype=torch.float64, generator=generator) for size in (6, 5))
    scale = torch.rand(3, 1, dtype=torch.float64, generator=generator)

    def perturb(inputs):
        moves = tuple(0.1 * torch.randn_like(one) for one in inputs)
        return moves, tuple(one - move for one, move in zip(inputs, moves, strict=True))

    both(
        lambda library: library.infidelity(
            Two(), perturb, inputs, inputs, additional_forward_args=scale, target=[0, 1, 2], n_perturb_samples=4
        )
    )
    explain = IntegratedGradients(Two()).attribute
    settings = {
        "additional_forward_args": scale,
        "target": [0, 1, 2],
        "baselines": (inputs[0] / 3, inputs[1] / 2),
        "n_steps": 3,
    }
    both(lambda library: library.sensitivity_max(explain, inputs, n_perturb_samples=4, **settings))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("norm", ["fro", 1, float("inf")])
@pytest.mark.parametrize("most", [None, 7])
def test_sensitivity_max(target, norm, most):
    settings = {"norm_ord": norm, "max_examples_per_batch": most, "n_perturb_samples": 5, "target": target}
    explain = Saliency(MODEL).attribute
    assert both(lambda library: library.sensitivity_max(explain, IMAGES, perturb_radius=0.3, **settings)).shape == (3,)


def test_perturbations_without_a_radius():
    explain = Saliency(MODEL).attribute
    both(lambda library: library.sensitivity_max(explain, IMAGES, lambda inputs: inputs.round(decimals=1), target=1))


def test_a_batch_that_holds_no_row_is_warned_of():
    with pytest.warns(UserWarning, match=r"max_examples_per_batch must lie in \[3, 30\], the rows once and"):
        metrics.infidelity(MODEL, noise, IMAGES, MAPS, target=1, max_examples_per_batch=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.infidelity(MODEL, noise, IMAGES, MAPS[:, :1], target=1),
            "attributions must have the shape",
        ),
        (lambda: metrics.infidelity(MODEL, noise, IMAGES, (MAPS, MAPS), target=1), "attributions must be one for each"),
        (lambda: metrics.infidelity(MODEL, lambda x: (x[:, 0], x), IMAGES, MAPS, target=1), "perturb_func must return"),
        (
            lambda: metrics.infidelity(MODEL, lambda x: ((x, x), x), IMAGES, MAPS, target=1),
            "perturb_func must return",
        ),
    ],
)
def test_what_does_not_fit_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", ["infidelity", "sensitivity_max"])
def test_rows_that_are_plain_numbers(name):
    """A function of numbers `[N]`, not of `[N, ...]`."""
    one, other = (torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))

    def product(one, other):
        return one.sin() * other

    def halved(inputs):
        return tuple(0.5 * tensor for tensor in inputs), tuple(0.5 * tensor for tensor in inputs)

    results = []
    for library in (metrics, theirs):
        if name == "infidelity":
            results.append(library.infidelity(product, halved, (one, other), (other, one)))
        else:
            explain = IntegratedGradients(product).attribute
            results.append(library.sensitivity_max(explain, (one, other), lambda inputs, radius: halved(inputs)[1]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert results[0].shape == (4,)


def test_baselines_to_draw_from_are_left_alone():
    """Two, for an explanation of three images."""
    baselines = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    seen = []

    def explain(inputs, baselines):
        seen.append(baselines)
        return inputs.sin() if isinstance(inputs, torch.Tensor) else inputs[0].sin()

    metrics.sensitivity_max(explain, IMAGES, baselines=baselines, n_perturb_samples=2)
    assert len(seen) == 2
    assert all(torch.equal(one, baselines) for one in seen)
