"""Captum's classes here and there, on networks on which Captum is right; and where it is not."""

import functools
import logging
import warnings

import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn import functional

from pyfast_xai import compat
from pyfast_xai.compat import captum as ours
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
ROUNDED = 1e-6  # Captum rounds the weights of a quadrature, and what Occlusion sums, to float32
pytestmark = pytest.mark.filterwarnings("ignore")  # Captum's own


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("captum.attr")


def same(actual, expected, tolerance=1e-12):
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other, tolerance)
        return
    assert isinstance(actual, torch.Tensor)
    assert not actual.requires_grad
    expected = expected.detach()
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0, "nothing is compared with nothing"
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance * float(expected.abs().max()))


SIMPLE = ["Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution"]
TARGETS = {
    "int": lambda: 2,
    "tensor of one": lambda: torch.tensor(3),
    "tensor of one in a row": lambda: torch.tensor([3]),
    "tensor": lambda: torch.tensor([1, 4, 0]),
    "list": lambda: [1, 4, 0],
    "tuple": lambda: (2,),
    "list of tuples": lambda: [(1,), (4,), (0,)],
}


@pytest.mark.parametrize("method", SIMPLE)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_for_every_kind_of_target(method, target, inplace, theirs, build, unchanged):
    model, images, target = build("Plain", inplace=inplace), torch.randn(3, 3, 10, 8, dtype=DOUBLE), TARGETS[target]()
    with unchanged(model, images):
        actual = getattr(ours, method)(model).attribute(images, target=target)
    same(actual, getattr(theirs, method)(model).attribute(images, target=target))


@pytest.mark.parametrize("method", SIMPLE)
@pytest.mark.parametrize("target", [(1, 4), [(1, 4), (3, 0)], (slice(1, 2), 3)], ids=case_id)
def test_gradients_of_outputs_of_more_dimensions(method, target, theirs, build):
    model, signal = build("Dense"), torch.randn(2, 2, 9, dtype=DOUBLE)
    same(
        getattr(ours, method)(model).attribute(signal, target),
        getattr(theirs, method)(model).attribute(signal, target),
    )


@pytest.mark.parametrize("method", SIMPLE)
def test_several_inputs_and_further_arguments(method, theirs, build, unchanged):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    extra = torch.rand(3, 1, dtype=DOUBLE)
    for more in (None, extra, (extra,)):
        with unchanged(model, *options):
            actual = getattr(ours, method)(model).attribute(options, [0, 3, 4], additional_forward_args=more)
        same(actual, getattr(theirs, method)(model).attribute(options, [0, 3, 4], additional_forward_args=more))
    # A tuple of one stays a tuple; arguments that are no tensors go along.
    model, images, more = build("Plain"), torch.randn(2, 3, 6, 6, dtype=DOUBLE), (None, 2.5)
    for inputs in (images, (images,)):
        same(
            getattr(ours, method)(model).attribute(inputs, 1, additional_forward_args=more),
            getattr(theirs, method)(model).attribute(inputs, 1, additional_forward_args=more),
        )


@pytest.mark.parametrize("method", SIMPLE)
@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 3, 5), (2, 3, 4, 5), (2, 1, 3, 4, 5)], ids=case_id)
def test_inputs_of_every_shape(method, shape, theirs):
    size = shape[-1] if len(shape) > 1 else 1

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.weight = nn.ReLU(), nn.Parameter(torch.rand(size, dtype=DOUBLE) + 0.5)

        def forward(self, x):
            return self.relu(x * self.weight).reshape(len(x), -1).sum(1)

    model, options = Rows(), torch.randn(*shape, dtype=DOUBLE)
    same(getattr(ours, method)(model).attribute(options), getattr(theirs, method)(model).attribute(options))
    if method == "Saliency":
        same(ours.Saliency(model).attribute(options, abs=False), theirs.Saliency(model).attribute(options, abs=False))


@pytest.mark.parametrize("method", ["Saliency", "InputXGradient", "IntegratedGradients"])
def test_functions_and_what_is_bound_to_a_model(method, theirs, build, unchanged):
    model, images = build("Plain"), torch.randn(2, 3, 6, 6, dtype=DOUBLE)

    def closes_over(x):
        return model(x).softmax(1)

    bends = {
        "function": lambda x: x.square().sum((2, 3)).sin(),
        "closure": closes_over,
        "bound": model.forward,
        "partial": functools.partial(model, scale=3.0),
    }
    for function in bends.values():
        with unchanged(model, images):
            actual = getattr(ours, method)(function).attribute(images, target=1)
        expected = getattr(theirs, method)(function).attribute(images, target=1)
        same(actual, expected, ROUNDED if method == "IntegratedGradients" else 1e-12)


def test_one_tensor_given_twice_has_the_whole_gradient_in_both_places(theirs):
    options = torch.randn(3, 4, dtype=DOUBLE)

    def product(a, b):
        return (a * b.exp()).sum(1)

    same(
        ours.Saliency(product).attribute((options, options)),
        theirs.Saliency(product).attribute((options, options)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=case_id)
@pytest.mark.parametrize("method", [*SIMPLE, "GuidedGradCam", "IntegratedGradients"])
def test_results_have_the_dtype_of_the_inputs(method, dtype, build):
    model, images = build("Plain", dtype), torch.randn(2, 3, 8, 8).to(dtype)
    more = [model.relu2] if method == "GuidedGradCam" else []
    result = getattr(ours, method)(model, *more).attribute(images, target=1)
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert result.isfinite().all()


LAYERS = {
    "convolution": lambda m: m.conv2,
    "rectifier": lambda m: m.relu2,
    "first rectifier": lambda m: m.relu1,
    "pool": lambda m: m.pool,
    "vector": lambda m: m.fc,
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_grad_cam_at_every_layer_with_every_setting(layer, at_input, relu, summed, inplace, theirs, build, unchanged):
    model, images = build("Plain", inplace=inplace), torch.randn(3, 3, 10, 8, dtype=DOUBLE)
    settings = {
        "attribute_to_layer_input": at_input,
        "relu_attributions": relu,
        "attr_dim_summation": summed,
        "grad_kwargs": {"allow_unused": True},
    }
    with unchanged(model, images):
        actual = ours.LayerGradCam(model, LAYERS[layer](model)).attribute(images, [1, 4, 0], **settings)
    same(actual, theirs.LayerGradCam(model, LAYERS[layer](model)).attribute(images, [1, 4, 0], **settings))


def test_grad_cam_of_a_layer_of_two_tensors_and_of_three_dimensions(theirs, build):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    for at_input in (False, True):
        same(
            ours.LayerGradCam(model, model.both).attribute(options, 2, attribute_to_layer_input=at_input),
            theirs.LayerGradCam(model, model.both).attribute(options, 2, attribute_to_layer_input=at_input),
        )
    model, volume = build("Volume"), torch.randn(2, 1, 4, 5, 6, dtype=DOUBLE)
    same(
        ours.LayerGradCam(model, model.conv).attribute(volume, 2),
        theirs.LayerGradCam(model, model.conv).attribute(volume, 2),
    )


def test_grad_cam_of_tokens_that_have_no_gradient(theirs):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.fc(self.embed(tokens).tanh().mean(1))

    model, tokens = Words().double(), torch.randint(0, 7, (3, 5))
    same(
        ours.LayerGradCam(model, model.embed).attribute(tokens, 1),
        theirs.LayerGradCam(model, model.embed).attribute(tokens, 1),
    )


def test_grad_cam_at_a_layer_that_runs_twice_and_inside_a_function(theirs, build):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).tanh()).exp().mean((2, 3))

    model, images = Twice().double(), torch.randn(2, 3, 6, 6, dtype=DOUBLE)
    for function in (model, lambda x: model(x).sin()):
        same(
            ours.LayerGradCam(function, model.conv).attribute(images, 1),
            theirs.LayerGradCam(function, model.conv).attribute(images, 1),
        )


@pytest.mark.parametrize("layer", ["convolution", "rectifier", "first rectifier", "pool"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("at_input", [False, True])
def test_guided_grad_cam(layer, mode, at_input, theirs, build, unchanged):
    model, images = build("Plain"), torch.randn(3, 3, 10, 8, dtype=DOUBLE)
    settings = {"target": [1, 4, 0], "interpolate_mode": mode, "attribute_to_layer_input": at_input}
    with unchanged(model, images):
        actual = ours.GuidedGradCam(model, LAYERS[layer](model)).attribute(images, **settings)
    same(actual, theirs.GuidedGradCam(model, LAYERS[layer](model)).attribute(images, **settings))


def test_guided_grad_cam_that_does_not_fit_an_input_is_empty_with_a_warning(build):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    with pytest.warns(UserWarning, match="its attribution is empty"):
        result = ours.GuidedGradCam(model, model.conv).attribute(options, 2)
    assert [tuple(item.shape) for item in result] == [(3, 3, 7, 7), (0,)]


def test_interpolate(theirs):
    maps = torch.randn(2, 1, 3, 4)
    for size, mode in (((7, 9), "nearest"), ((7, 9), "bilinear"), (8, "area")):
        same(
            ours.LayerAttribution.interpolate(maps, size, mode),
            theirs.LayerAttribution.interpolate(maps, size, mode),
            0,
        )


METHODS = ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [None, 1, 5, 100])
def test_integrated_gradients(method, batch, theirs, build, unchanged):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    settings = {
        "baselines": (0.5, torch.randn(1, 7, dtype=DOUBLE)),
        "target": [0, 3, 4],
        "additional_forward_args": torch.rand(3, 1, dtype=DOUBLE),
        "n_steps": 12,
        "method": method,
        "internal_batch_size": batch,
        "return_convergence_delta": True,
    }
    with unchanged(model, *options):
        actual, delta = ours.IntegratedGradients(model).attribute(options, **settings)
    expected, expected_delta = theirs.IntegratedGradients(model).attribute(options, **settings)
    same(actual, expected, ROUNDED)
    torch.testing.assert_close(delta, expected_delta.detach(), rtol=0, atol=ROUNDED)
    assert delta.abs().max() > 10 * ROUNDED
    actual = ours.IntegratedGradients(model, multiply_by_inputs=False).attribute(options, target=2)
    same(actual, theirs.IntegratedGradients(model, multiply_by_inputs=False).attribute(options, target=2), ROUNDED)


KINDS = ["smoothgrad", "smoothgrad_sq", "vargrad"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [None, 1, 2, 9])
@pytest.mark.parametrize("method", ["Saliency", "GuidedBackprop", "IntegratedGradients"])
def test_noise_tunnel_draws_the_same_noise(kind, batch, method, theirs, build):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    settings = {
        "nt_type": kind,
        "nt_samples": 5,
        "nt_samples_batch_size": batch,
        "stdevs": (0.5, 0.1),
        "target": [0, 3, 4],
        "additional_forward_args": torch.rand(3, 1, dtype=DOUBLE),
    }
    deltas = method == "IntegratedGradients"
    if deltas:
        baselines = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(1, 7, dtype=DOUBLE))
        settings |= {"n_steps": 6, "return_convergence_delta": True, "baselines": baselines}
    result = []
    for library in (ours, theirs):
        torch.manual_seed(7)
        result.append(library.NoiseTunnel(getattr(library, method)(model)).attribute(options, **settings))
    actual, expected = result
    if deltas:
        torch.testing.assert_close(actual[1], expected[1].detach(), rtol=0, atol=ROUNDED)
        actual, expected = actual[0], expected[0]
    same(actual, expected, ROUNDED if deltas else 1e-12)


def test_noise_tunnel_draws_baselines(theirs, build):
    import numpy as np

    model, images = build("Plain"), torch.randn(2, 3, 6, 6, dtype=DOUBLE)
    result = []
    for library in (ours, theirs):
        torch.manual_seed(7)
        np.random.seed(7)
        tunnel = library.NoiseTunnel(library.IntegratedGradients(model))
        result.append(
            tunnel.attribute(
                images,
                nt_samples=3,
                stdevs=0.2,
                draw_baseline_from_distrib=True,
                baselines=torch.linspace(-1, 1, 540, dtype=DOUBLE).view(5, 3, 6, 6),
                target=1,
                n_steps=4,
            )
        )
    same(*result, ROUNDED)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("strides", [None, 2, (3, 2, 1)], ids=case_id)
@pytest.mark.parametrize("baselines", [None, 0.5, "row", "all"])
def test_occlusion(at_once, strides, baselines, theirs, build, unchanged):
    model, images = build("Plain"), torch.randn(2, 3, 6, 5, dtype=DOUBLE)
    baselines = {"row": images[:1].flip(3), "all": images.flip(2)}.get(baselines, baselines)
    settings = {
        "sliding_window_shapes": (3, 2, 2),
        "strides": strides,
        "baselines": baselines,
        "target": [1, 4],
        "perturbations_per_eval": at_once,
    }
    with unchanged(model, images):
        actual = ours.Occlusion(model).attribute(images, **settings)
    same(actual, theirs.Occlusion(model).attribute(images, **settings), ROUNDED)


@pytest.mark.parametrize("at_once", [1, 4])
def test_occlusion_of_several_inputs(at_once, theirs, build):
    model = build("TwoInputs")
    options = (torch.randn(3, 3, 7, 7, dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE))
    settings = {
        "sliding_window_shapes": ((1, 3, 4), (2,)),
        "strides": ((1, 3, 2), 1),
        "baselines": (0.5, torch.randn(1, 7, dtype=DOUBLE)),
        "target": [0, 3, 4],
        "additional_forward_args": torch.rand(3, 1, dtype=DOUBLE),
        "perturbations_per_eval": at_once,
    }
    same(
        ours.Occlusion(model).attribute(options, **settings),
        theirs.Occlusion(model).attribute(options, **settings),
        ROUNDED,
    )


def test_occlusion_of_integers_and_of_functions_that_give_numbers(theirs):
    options = torch.arange(24).view(2, 3, 4)

    def total(x):
        return float(x.double().square().sum())

    for function in (total, lambda x: x.double().square().sum((1, 2))):
        for baseline in (1, 0.5):
            same(
                ours.Occlusion(function).attribute(options, (2, 3), baselines=baseline),
                theirs.Occlusion(function).attribute(options, (2, 3), baselines=baseline),
                ROUNDED,
            )
    # Captum cannot divide what came as integers.
    drops = ours.Occlusion(lambda x: x.sum((1, 2))).attribute(options, (3, 4), baselines=1)
    assert torch.equal(drops, (options.sum((1, 2)) - 12.0)[:, None, None].expand(2, 3, 4))
    with pytest.raises(AssertionError, match="perturbations_per_eval must be 1"):
        ours.Occlusion(lambda x: x.double().sum()).attribute(options, (2, 3), perturbations_per_eval=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=case_id)
def test_occlusion_hands_the_model_what_it_takes(dtype, build):
    model, images = build("Plain", dtype), torch.randn(2, 3, 4, 4).to(dtype)
    recorded = set()

    def watched(x):
        recorded.add(x.dtype)
        return model(x)

    result = ours.Occlusion(watched).attribute(images, (3, 2, 2), baselines=0.1, target=1)
    assert recorded == {dtype}
    assert result.dtype == torch.promote_types(dtype, torch.float32)


class Says(nn.Module):
    """Returns no tensor."""

    def forward(self, x):
        return 3


SAYS = Says()


def test_occlusion_says_how_far_it_is(build, capsys):
    images = torch.randn(1, 3, 4, 4, dtype=DOUBLE)
    ours.Occlusion(build("Plain")).attribute(images, (3, 2, 2), target=0, show_progress=True)
    output = capsys.readouterr().err
    assert "Occlusion attribution: 10%" in output
    assert output.endswith("Occlusion attribution: 100% 10/10\n")


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class PreActivation(nn.Module):
    """The input of a rectifier also feeds a skip."""

    def __init__(self, relu):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), relu

    def forward(self, x):
        x = self.conv1(x)
        return self.relu(x + self.conv2(self.relu(x))).mean((2, 3))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("relu", [nn.ReLU(), Called(functional.relu), Called(torch.Tensor.relu)])
def test_guided_backprop_is_right_where_captum_is_not(relu, theirs):
    model, images = PreActivation(relu).double(), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    actual = ours.GuidedBackprop(model).attribute(images, 1)
    wrong = theirs.GuidedBackprop(model).attribute(images, 1)
    model.relu = Called(_Guided.apply)
    leaf = images.clone().requires_grad_()
    same(actual, torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0])
    assert (wrong - actual).abs().max() > 1e-2 * actual.abs().max()


def test_no_warning_is_given_and_none_is_needed(build):
    images = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.GuidedBackprop(build("Plain")).attribute(images, 1)


def test_a_model_without_rectifiers_is_told_once(caplog):
    method = ours.GuidedBackprop(nn.Linear(3, 2))
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        method.attribute(torch.randn(2, 3), 1)
        method.attribute(torch.randn(2, 3), 1)
    assert [record.getMessage() for record in caplog.records] == [
        "GuidedBackprop found no rectifier in the model: this is its plain gradient"
    ]


def test_gradients_of_parameters_frozen_and_of_callers_without_gradients(theirs, build):
    model, images = build("Plain").requires_grad_(False), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    expected = theirs.GuidedBackprop(model).attribute(images.clone(), 1)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            same(ours.GuidedBackprop(model).attribute(images, 1), expected)


BAD = {
    "a target for more dimensions": (lambda m, x: ours.Saliency(m).attribute(x, (1, 2)), r"target must index"),
    "a list too short": (lambda m, x: ours.Saliency(m).attribute(x, [1]), r"one entry for each of 2 rows"),
    "floats": (lambda m, x: ours.Saliency(m).attribute(x, [1.0, 2.0]), r"ints or tuples of ints, got float"),
    "a target of text": (lambda m, x: ours.Saliency(m).attribute(x, "cat"), r"target must be None, an int"),
    "no target": (lambda m, x: ours.Saliency(m).attribute(x), r"one number of each row of the output, got \[2, 5\]"),
    "inputs in a list": (lambda m, x: ours.Saliency(m).attribute([x], 1), r"tuple of tensors, got list"),
    "integers": (
        lambda m, x: ours.Saliency(lambda y: y.double().sum((1, 2))).attribute(x.long(), 1),
        r"floating-point",
    ),
    "no model": (lambda m, x: ours.GuidedBackprop(lambda y: y), r"model must be a torch.nn.Module"),
    "no layer": (lambda m, x: ours.LayerGradCam(m, "conv2"), r"layer must be a torch.nn.Module, got str"),
    "another model's layer": (
        lambda m, x: ours.LayerGradCam(m, nn.ReLU()).attribute(x, 1),
        r"layer must run in the forward pass, got ReLU",
    ),
    "a layer that returns no tensor": (
        lambda m, x: ours.LayerGradCam(lambda y: y.sum((1, 2, 3)) + SAYS(y), SAYS).attribute(x),
        r"layer must depend on the inputs, got Says, which does not",
    ),
    "a graph": (
        lambda m, x: ours.LayerGradCam(m, m.fc).attribute(x, 1, grad_kwargs={"create_graph": True}),
        r"grad_kwargs must be of .*, got create_graph",
    ),
    "a rule that does not exist": (
        lambda m, x: ours.IntegratedGradients(m).attribute(x, target=1, method="simpson"),
        r"method must be one of 'riemann_left'.*got 'simpson'",
    ),
    "a baseline of another shape": (
        lambda m, x: ours.IntegratedGradients(m).attribute(x, torch.zeros(3, 1, 1, 1), target=1),
        r"baselines must broadcast to the input, \[2, 3, 8, 8\], got \[3, 1, 1, 1\]",
    ),
    "a kind of noise": (lambda m, x: ours.NoiseTunnel(ours.Saliency(m)).attribute(x, "grad"), r"nt_type must be"),
    "a window too large": (lambda m, x: ours.Occlusion(m).attribute(x, (3, 9, 9), target=1), r"must fit in the input"),
    "a stride too large": (
        lambda m, x: ours.Occlusion(m).attribute(x, (3, 2, 2), (3, 3, 3), target=1),
        r"strides must be at most the window, \[3, 2, 2\], got \[3, 3, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_sentence(case, build, unchanged):
    call, message = BAD[case]
    model, images = build("Plain"), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    # Captum asserts; code that catches that still does, where both refuse.
    with unchanged(model, images), pytest.raises(InputError, match=message) as caught:
        call(model, images)
    assert "\n" not in str(caught.value)
    if "layer must" not in message or "got str" in message:
        assert isinstance(caught.value, AssertionError)


def test_an_exception_in_the_model_comes_through_and_leaves_nothing(build, unchanged):
    model, images = build("Plain"), torch.randn(2, 3, 8, 8, dtype=DOUBLE)

    def broken(x):
        model.relu1(model.conv1(x))
        raise ZeroDivisionError("from the middle")

    for method in (ours.Saliency(broken), ours.LayerGradCam(broken, model.conv1), ours.Occlusion(broken)):
        more = {"sliding_window_shapes": (3, 2, 2)} if isinstance(method, ours.Occlusion) else {}
        with unchanged(model, images), pytest.raises(ZeroDivisionError, match="from the middle"):
            method.attribute(images, target=1, **more)


def test_futures_are_refused_and_names_are_words(build):
    with pytest.raises(NotImplementedError, match="attribute_future is not implemented for Saliency"):
        ours.Saliency(build("Plain")).attribute_future()
    assert ours.IntegratedGradients.get_name() == "Integrated Gradients"


def test_signatures_are_captums(theirs):
    import inspect

    modules = ("metrics", "visualization")  # whose functions are compared beside them
    for name in (name for name in ours.__all__ if name not in modules):
        for method in ("__init__", "attribute") if name != "LayerAttribution" else ("interpolate",):
            actual, expected = (
                inspect.signature(getattr(getattr(library, name), method)) for library in (ours, theirs)
            )
            described = [
                [(p.name, getattr(p.default, "__name__", p.default), p.kind) for p in s.parameters.values()]
                for s in (actual, expected)
            ]
            assert described[0] == described[1], (name, method)
    assert compat.__doc__ is not None


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mnasnet0_5"])
def test_networks_of_torchvision(name, theirs):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    model = model.eval().double()
    layer = {"resnet18": "layer4", "squeezenet1_1": "features", "mnasnet0_5": "layers"}[name]
    layer, images = model.get_submodule(layer), torch.randn(2, 3, 64, 64, dtype=DOUBLE)
    same(
        ours.GuidedGradCam(model, layer).attribute(images, [3, 7]),
        theirs.GuidedGradCam(model, layer).attribute(images, [3, 7]),
        1e-11,
    )
    same(
        ours.Deconvolution(model).attribute(images, [3, 7]),
        theirs.Deconvolution(model).attribute(images, [3, 7]),
        1e-11,
    )


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in data parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_looked_through(wrap, build, unchanged):
    model, images = build("Plain"), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    wrapped = WRAPPERS[wrap](model)
    layers = [model.conv2, torch.compile(model.conv2, backend="eager")]
    for make in (
        lambda m: ours.GuidedBackprop(m),
        *(lambda m, layer=layer: ours.GuidedGradCam(m, layer, device_ids=[0]) for layer in layers),
    ):
        expected = make(model).attribute(images, 1)
        for _ in range(2):  # the second time after the compiler has run
            with unchanged(model, images):
                same(make(wrapped).attribute(images, 1), expected, 0)
            wrapped(images)
    torch._dynamo.reset()


def test_a_model_that_takes_views_of_its_input_has_it_as_it_is():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 2, 3), 0

        def forward(self, x):
            return self.conv(x).mean((2, 3)) * x.view(len(x), -1).exp().mean(1, keepdim=True)

    model, images = Views().eval(), torch.randn(2, 3, 8, 8)
    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]
    torch.testing.assert_close(ours.Saliency(model).attribute(images, 1, abs=False), expected)


def test_what_is_followed_and_what_is_not():
    """As the page on migration says."""
    options = torch.randn(2, 3, dtype=DOUBLE)

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def without(x):
        with torch.no_grad():
            y = x.square()
        return (x * y).sum(1)

    for function, expected in (
        (lambda x: (x * x.detach()).sum(1), options),
        (lambda x: Through.apply(x).sum(1), 3 * options**2),
        (without, 3 * options**2),
    ):
        torch.testing.assert_close(ours.Saliency(function).attribute(options, abs=False), expected)


def test_an_input_without_influence_has_no_gradient():
    result = ours.Saliency(lambda a, b: a.square().sum(1)).attribute((torch.randn(2, 3), torch.randn(2, 4)))
    assert result[0].abs().max() > 0
    assert torch.equal(result[1], torch.zeros(2, 4))


def test_occlusion_puts_back_what_a_model_writes(unchanged):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=DOUBLE))

        def forward(self, x):
            self.calls += 1
            return x.sum((1, 2, 3)) * self.calls

    model, images = Counts(), torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    with unchanged(model, images):
        result = ours.Occlusion(model).attribute(images, (3, 1, 1))
    torch.testing.assert_close(result, images.sum(1, keepdim=True).expand(2, 3, 4, 4))
