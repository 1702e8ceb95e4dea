"""Captum's methods that hide and permute features: its numbers, in float64, from the same random state."""

import importlib
import warnings

import pytest
import torch
from torch import nn

from pyfast_xai import InputError
from pyfast_xai.compat import captum as ours
from pyfast_xai.compat.captum import linear_models

theirs = pytest.importorskip("captum.attr")
DOUBLE = torch.float64
GRID = (
    torch.arange(4)
    .view(1, 1, 2, 2)
    .repeat_interleave(5, 2)
    .repeat_interleave(3, 3)[:, :, :8]
    .repeat(1, 1, 1, 2)[..., :8]
)
GRID = GRID.contiguous()  # of 8 x 8 pixels
CHANNELS = torch.arange(3).view(1, 3, 1, 1)
APART = torch.cat([GRID, GRID.mT, GRID // 2], 1)
MASKS = {"grid": GRID, "channels": CHANNELS, "apart": APART, "for each row": torch.cat([APART, APART // 2, 3 - APART])}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, stride=2), nn.Sigmoid()
        self.flat, self.fc = nn.Flatten(), nn.Linear(72, 5)

    def forward(self, x, scale=1.0):
        return self.fc(self.flat(self.relu2(self.conv2(self.relu1(self.conv1(x)))))) * scale


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to(DOUBLE).eval()


def images(seed=1, count=3):
    return torch.randn(count, 3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    """Captum sums in float32 whatever the model computes in."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", DOUBLE)


def attributed(library, name, made, *args, seed=0, **settings):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(library, name)(*made).attribute(*args, **settings)


def agree(name, made, *args, atol=1e-12, check_dtype=True, **settings):
    expected = attributed(theirs, name, made, *args, **settings)
    result = attributed(ours, name, made, *args, **settings)
    assert type(result) is type(expected)
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=atol, check_dtype=check_dtype)
    return result


PERTURBATION = ("FeatureAblation", "FeaturePermutation", "ShapleyValueSampling", "ShapleyValues")
every_method = pytest.mark.parametrize("name", PERTURBATION)


def settings_of(name, **settings):
    if name == "FeaturePermutation":
        settings.pop("baselines", None)
    return settings | ({"n_samples": 3} if name == "ShapleyValueSampling" else {})


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("at_once", [1, 4])
@every_method
def test_masks(net, name, mask, at_once):
    settings = settings_of(name, feature_mask=MASKS[mask], perturbations_per_eval=at_once, target=[1, 3, 0])
    assert agree(name, [net], images(), **settings).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("baseline", [0.5, 2, images(7), images(8, 1)], ids=["float", "int", "each", "one for all"])
@pytest.mark.parametrize("name", ["FeatureAblation", "ShapleyValueSampling", "ShapleyValues"])
def test_baselines(net, name, baseline):
    agree(name, [net], images(), **settings_of(name, feature_mask=GRID, baselines=baseline, target=2))


@pytest.mark.parametrize("target", [None, 1, (2,), torch.tensor([0, 4, 2]), [(1,), (0,), (3,)]], ids=str)
@every_method
def test_targets(net, name, target):
    if target is None and name.startswith("Feature"):
        # Numbers for each row and class take the place of rows.
        agree(name, [lambda x: net(x).flatten()], images(), **settings_of(name, feature_mask=CHANNELS))
    else:
        agree(name, [net], images(), **settings_of(name, feature_mask=CHANNELS, target=target))


@every_method
def test_several_inputs_with_features_in_common(net, name):
    both = (images(), torch.randn(3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)))
    masks = (CHANNELS, torch.tensor([[2, 2, 3, 4]]))
    settings = settings_of(name, feature_mask=masks, baselines=(0.1, 0.2), target=1, perturbations_per_eval=2)
    result = agree(name, [lambda x, y: net(x) * y.sum(1, keepdim=True)], both, **settings)
    assert [one.shape for one in result] == [(3, 3, 8, 8), (3, 4)]


@every_method
def test_each_element_is_a_feature_without_a_mask(name):
    tensor = torch.randn(3, 5, dtype=DOUBLE)
    agree(name, [lambda x: x.cumprod(1).sin().sum(1)], tensor, **settings_of(name))


@every_method
def test_further_arguments(net, name):
    scale = torch.tensor([[1.0], [2.0], [3.0]], dtype=DOUBLE)
    settings = settings_of(name, feature_mask=GRID // 2, target=1, perturbations_per_eval=3)
    agree(name, [net], images(), additional_forward_args=scale, **settings)


@pytest.mark.parametrize("kind", [float, torch.Tensor])
@every_method
def test_one_number_for_the_batch(net, name, kind):
    def total(x):
        value = net(x)[:, 1].sum()
        return float(value) if kind is float else value

    if kind is float:
        pytest.MonkeyPatch().undo()
    agree(name, [total], images(), atol=1e-6, **settings_of(name, feature_mask=CHANNELS))


def test_whole_numbers_stay_so():
    x = torch.arange(12).view(3, 4)
    result = agree("FeatureAblation", [lambda x: x.sum(1)], x, feature_mask=torch.tensor([[0, 0, 1, 2]]))
    assert result.dtype == torch.int64


@pytest.mark.parametrize("name", ["FeatureAblation", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap"])
def test_truths_stay_so(name, exact_lasso):
    x = torch.tensor([[True, False, True], [False, True, True]])

    def count(x):
        assert x.dtype == torch.bool
        return x.sum(1).double()

    agree(name, [count], x, atol=1e-6, **settings_of(name, feature_mask=torch.tensor([[0, 1, 1]])))


def test_an_input_without_elements_leaves_the_others_alone():
    def twice(one, other):
        return one.sum(1) * 2 + other.sum()

    rows = torch.tensor([[1.0, -2.0, 3.0], [2.0, -1.0, 3.0]])
    settings = {"inputs": (rows, torch.tensor([])), "target": None}
    result, _ = ours.FeatureAblation(twice).attribute(**settings)
    torch.testing.assert_close(result, 2 * rows)
    torch.testing.assert_close(result, theirs.FeatureAblation(twice).attribute(**settings)[0])


def test_masks_of_each_row_below_noise(net):
    rows = torch.arange(64).view(8, 8) // 16
    mask = torch.stack([rows, rows.T, rows.flip(0)])[:, None].expand(3, 3, 8, 8)
    results = []
    for library in (ours, theirs):
        torch.manual_seed(0)
        explainer = library.NoiseTunnel(library.FeatureAblation(net))
        settings = {"target": 1, "feature_mask": mask, "nt_samples": 3, "stdevs": 0.1}
        results.append(explainer.attribute(images(), **settings))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["FeatureAblation", "FeaturePermutation", "ShapleyValueSampling"])
def test_futures(net, name):
    def later(x):
        future = torch.futures.Future()
        future.set_result(net(x))
        return future

    settings = settings_of(name, target=1, feature_mask=GRID)
    torch.manual_seed(0)
    result = getattr(ours, name)(later).attribute_future(images(), **settings).wait()
    torch.manual_seed(0)
    assert torch.equal(result, getattr(ours, name)(net).attribute(images(), **settings))
    with pytest.raises(InputError, match=r"forward_func must return a torch.futures.Future, got Tensor"):
        getattr(ours, name)(net).attribute_future(images(), **settings)


def test_a_permutation_of_the_callers_own(net):
    def reversed_rows(x, mask):
        return torch.where(mask, x.flip(0), x)

    agree("FeaturePermutation", [net, reversed_rows], images(), target=1, feature_mask=GRID)


def test_one_row_cannot_be_permuted(net, caplog):
    result = ours.FeaturePermutation(net).attribute(images(count=1), target=1, feature_mask=GRID)
    assert not result.any()
    assert "at least two rows" in caplog.text


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("baseline", [None, 0.3])
def test_features_of_a_layer(net, baseline, at_once):
    mask = torch.arange(8).view(1, 8, 1, 1) // 2
    settings = {"layer_mask": mask, "layer_baselines": baseline, "target": 1, "perturbations_per_eval": at_once}
    result = agree("LayerFeatureAblation", [net, net.conv2], images(), **settings)
    assert result.shape == (3, 8, 3, 3)
    agree("LayerFeatureAblation", [net, net.relu2], images(), attribute_to_layer_input=True, **settings)
    # Captum takes the target twice, and fails.
    scores = lambda x: net(x)[:, 1]  # noqa: E731
    permuted = {"layer_mask": mask, "perturbations_per_eval": at_once}
    agree("LayerFeaturePermutation", [scores, net.conv2], images(), **permuted)


def test_a_neuron(net):
    for settings in ({}, {"attribute_to_neuron_input": True, "baselines": 0.2, "perturbations_per_eval": 4}):
        neuron = (2, 1, 1)
        agree("NeuronFeatureAblation", [net, net.relu2], images(), neuron, feature_mask=GRID, **settings)
    agree("NeuronFeatureAblation", [net, net.fc], images(), 3, feature_mask=GRID)


def test_no_subset_goes_through_the_model_twice(net):
    rows = []

    def counted(x):
        rows.append(len(x))
        return net(x)

    ours.ShapleyValues(counted).attribute(images(), target=1, feature_mask=GRID, perturbations_per_eval=8)
    assert sum(rows) == 3 * 2**4
    rows.clear()
    ours.ShapleyValueSampling(counted).attribute(images(), target=1, feature_mask=GRID, n_samples=50)
    assert sum(rows) <= 3 * 2**4


# Its linear models are in float32.
ROUNDED = {"atol": 1e-6, "check_dtype": False}
LINEAR = ("Lime", "KernelShap")
every_linear_model = pytest.mark.parametrize("name", LINEAR)


def sure(net):
    """A function with scores that a penalty leaves something of."""
    return lambda x: 20 * net(x)


@pytest.fixture
def exact_lasso(monkeypatch):
    """Captum's default stops early."""
    lime = importlib.import_module("captum.attr._core.lime")
    model = lime.SkLearnLasso
    monkeypatch.setattr(lime, "SkLearnLasso", lambda alpha: model(alpha=alpha, tol=1e-12, max_iter=100_000))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("at_once", [1, 4])
@every_linear_model
def test_linear_models(net, exact_lasso, name, mask, at_once):
    """As many samples as identify the coefficients, so that no choice among solutions is left."""
    settings = {"feature_mask": MASKS[mask], "target": [1, 3, 0], "n_samples": 30, "perturbations_per_eval": at_once}
    result = agree(name, [sure(net)], images(), **ROUNDED, **settings)
    assert result.shape == (3, 3, 8, 8)
    assert result.any()
    rows = agree(name, [sure(net)], images(), **ROUNDED, return_input_shape=False, **settings)
    assert rows.shape == (3, int(MASKS[mask].max()) + 1)


@every_linear_model
def test_linear_models_of_few_samples(net, exact_lasso, name):
    """Of the many solutions of least squares the shortest."""
    mask = torch.arange(64).view(1, 1, 8, 8)
    agree(name, [sure(net)], images(), feature_mask=mask, target=1, n_samples=12, baselines=images(5), **ROUNDED)


@every_linear_model
def test_linear_models_of_several_inputs(net, exact_lasso, name):
    both = (images(count=2), torch.randn(2, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)))
    settings = {"feature_mask": (CHANNELS, torch.tensor([[2, 2, 3, 4]])), "baselines": (0.1, 0.2), "n_samples": 40}
    scale = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    result = agree(
        name,
        [lambda x, y, scale: 20 * net(x) * y.sum(1, keepdim=True) * scale],
        both,
        target=1,
        additional_forward_args=scale,
        **ROUNDED,
        **settings,
    )
    assert [one.shape for one in result] == [(2, 3, 8, 8), (2, 4)]


@every_linear_model
def test_linear_models_of_one_number_for_the_batch(net, exact_lasso, name):
    def total(x):
        return 20 * net(x)[:, 1].sum()

    assert agree(name, [total], images(), feature_mask=GRID, n_samples=30, **ROUNDED).shape == (1, 3, 8, 8)
    agree(name, [total], images(), feature_mask=GRID, n_samples=30, **ROUNDED, return_input_shape=False)


def test_a_mask_that_does_not_begin_at_zero(net):
    agree("KernelShap", [net], images(count=1), feature_mask=GRID + 3, target=1, n_samples=30, **ROUNDED)


def test_lime_of_the_callers_own(net):
    """Their models, weights and samples serve as they are."""
    models = importlib.import_module("captum._utils.models.linear_model")
    lime = importlib.import_module("captum.attr._core.lime")

    def samples(inputs, **kwargs):
        for _ in range(12):
            yield torch.rand(1, kwargs["num_interp_features"], dtype=DOUBLE).round()

    made = [
        sure(net),
        models.SkLearnRidge(alpha=0.5),
        lime.get_exp_kernel_similarity_function("euclidean", 9.0),
        samples,
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        result = ours.Lime(*made).attribute(images(count=1), target=1, feature_mask=GRID, n_samples=20)
    assert "perturb_func ended before n_samples=20" in [str(one.message) for one in caught]
    torch.testing.assert_close(
        result,
        attributed(theirs, "Lime", made, images(count=1), target=1, feature_mask=GRID, n_samples=20),
        rtol=0,
        **ROUNDED,
    )


@pytest.mark.parametrize("interpretable", [True, False])
def test_lime_base(net, interpretable):
    models = importlib.import_module("captum._utils.models.linear_model")

    def drawn(inputs, **kwargs):
        saved = torch.bernoulli(torch.full((1, 3), 0.5)).double()
        return saved if interpretable else inputs * saved[..., None, None]

    functions = [
        lambda inputs, sample, form, **kwargs: torch.exp(-form.sum()),
        drawn,
        interpretable,
        lambda form, inputs, **kwargs: inputs * form[..., None, None],
        lambda sample, inputs, **kwargs: (sample == inputs).all(3).all(2).double(),
    ]
    made = [net, models.SkLearnLinearRegression(), *functions]
    settings = {"target": 1, "n_samples": 25, "perturbations_per_eval": 4}
    agree("LimeBase", made, images(count=1), **ROUNDED, **settings)
    made[1] = linear_models.LinearRegression()
    exact = [net, models.SkLearnLinearRegression(), *functions]
    result, expected = (
        attributed(library, "LimeBase", model, images(count=1), **settings)
        for library, model in ((ours, made), (theirs, exact))
    )
    torch.testing.assert_close(result, expected, rtol=0, **ROUNDED)


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5])
def test_lasso_is_that_of_scikit_learn(alpha):
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y, w = torch.randn(40, 70, dtype=DOUBLE), torch.randn(40, dtype=DOUBLE), torch.rand(40, dtype=DOUBLE)
    x[:, 7] = 1.0
    model = linear_models.Lasso(alpha)
    model.fit([(x[:9], y[:9], w[:9]), (x[9:], y[9:], w[9:])])
    expected = sklearn.Lasso(alpha=alpha, tol=1e-14, max_iter=1_000_000).fit(x.numpy(), y.numpy(), w.numpy())
    torch.testing.assert_close(model.representation(), torch.from_numpy(expected.coef_)[None], rtol=0, **ROUNDED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_mask": GRID[0, 0, :3]}, r"feature_mask must broadcast to the input, \[3, 3, 8, 8\], got \[3, 8\]"),
        ({"feature_mask": (GRID, GRID)}, "feature_mask must be one for each of 1 inputs, got 2"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval must be an int of at least 1, got 0"),
    ],
    ids=["shape", "number", "at once"],
)
@every_method
def test_bad_arguments(net, name, settings, message):
    with pytest.raises(InputError, match=message):
        getattr(ours, name)(net).attribute(images(), **{"target": 1, "feature_mask": GRID, **settings})
