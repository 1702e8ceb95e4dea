"""Scores mean what they say, whatever a model returns: the kind of its outputs is decided for each row by itself."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from pyfast_xai import (
    CAM,
    CLEAR,
    LIME,
    RISE,
    CNNFixations,
    ExcitationBackprop,
    FGVis,
    GradCAM,
    InputError,
    MeaningfulPerturbation,
    Occlusion,
    Saliency,
    SmoothGrad,
)
from pyfast_xai.explainers.common.outputs import OutputKinds, is_probability, kinds_of
from pyfast_xai.explainers.common.targets import logits_in, logits_of
from pyfast_xai.metrics import deletion, drop_increase, fgsm, insertion
from pyfast_xai.tape import record


class Squash(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(*end, classes=5, channels=3, scale=1.0):
    torch.manual_seed(0)
    body = (nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(8, classes)
    with torch.no_grad():
        head.weight.mul_(scale)
        if classes == 1:  # what is seen speaks for the output
            head.weight.abs_()
    return nn.Sequential(*body, head, *end).eval()


def pictures(count=3, seed=0):
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    images[:, :, :8] *= 5
    return images


SINGLE = {
    "a column": network(classes=1),
    "no column": network(nn.Flatten(0), classes=1),
    "negative": network(Squash(lambda x: x - 20), classes=1),
    "a sigmoid": network(nn.Sigmoid(), classes=1),
}


@pytest.fixture(params=SINGLE)
def single(request):
    return SINGLE[request.param]


PERTURB = {
    "occlusion": lambda model, **own: Occlusion(model, window=4, stride=4, **own),
    "rise": lambda model, **own: RISE(model, n_masks=64, **own),
    "lime": lambda model, **own: LIME(model, n_samples=64, feature_mask=_squares(), **own),
    "meaningful-perturbation": lambda model, **own: MeaningfulPerturbation(model, n_iterations=5, scale=4, **own),
}


def _squares():
    return torch.arange(16).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)


@pytest.mark.parametrize("method", PERTURB)
def test_a_single_output_is_explained(single, method):
    result = PERTURB[method](single)(pictures())
    assert (result.heatmap.amax((1, 2)) > 0).all()
    if result.signed_map is not None:
        assert (result.signed_map.amax((1, 2)) > result.signed_map.amin((1, 2))).all()
    with torch.no_grad():
        assert torch.allclose(result.score, single(pictures()).flatten(), atol=1e-5)
    assert result.target.tolist() == [0, 0, 0]


def test_occlusion_of_a_single_output_is_the_drop_of_the_output(single):
    images = pictures()
    hidden = images.clone()
    hidden[:, :, :4, :4] = 0
    with torch.no_grad():
        drop = (single(images) - single(hidden)).flatten()
    result = Occlusion(single, window=4, stride=4)(images)
    assert torch.allclose(result.signed_map[:, 0, 0], drop, atol=1e-5)


def test_metrics_of_a_single_output_follow_the_output(single):
    images, maps = pictures(), torch.rand(3, 16, 16)
    for metric in (deletion, insertion):
        curve = metric(single, images, maps)
        with torch.no_grad():
            ends = single(images).flatten(), single(torch.zeros_like(images)).flatten()
        first = ends[0] if metric is deletion else curve.scores[:, 0]
        assert torch.allclose(curve.scores[:, 0], first, atol=1e-5)
        assert curve.scores.std(1).min() > 0
    assert torch.isfinite(drop_increase(single, images, maps).drop).all()


def test_captions_of_values_are_no_percentages():
    images = pictures(2)
    assert Saliency(SINGLE["a sigmoid"])(images).captions()[0].endswith("%")
    for name in ("a column", "no column", "negative"):
        result = Saliency(SINGLE[name])(images)
        assert result.outputs == ["values", "values"]
        assert result.captions()[0] == f"class 0 {float(result.score[0]):.3g}"


@pytest.mark.parametrize("explainer", [Saliency, GradCAM, CAM, ExcitationBackprop, CLEAR, CNNFixations, SmoothGrad])
def test_outputs_without_a_column_are_one_class(explainer):
    column, flat = SINGLE["a column"], SINGLE["no column"]
    result, expected = explainer(flat)(pictures()), explainer(column)(pictures())
    assert torch.equal(result.heatmap, expected.heatmap)
    assert result.logits.shape == (3,)
    assert expected.logits.shape == (3, 1)


def test_a_binary_logit_is_a_probability_where_the_user_says_so():
    model = SINGLE["a column"]
    images = pictures()
    result = Occlusion(model, window=4, stride=4, outputs="independent logits")(images)
    with torch.no_grad():
        assert torch.allclose(result.score, model(images).sigmoid()[:, 0], atol=1e-6)
    assert result.outputs == ["independent logits"] * 3
    assert result.captions()[0].endswith("%")


def test_games_need_probabilities():
    model = SINGLE["a column"]
    with pytest.raises(InputError, match=r"^outputs must say .*'independent logits'.* got 'values'"):
        FGVis(model, n_iterations=2)(pictures())
    result = FGVis(model, n_iterations=5, outputs="independent logits")(pictures())
    assert (result.mask < 1).any()
    with torch.no_grad():
        assert torch.allclose(result.after, model(result.perturbed).sigmoid()[:, 0], atol=1e-5)


INDEPENDENT = {
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "in place": Squash(lambda x: x.sigmoid_()),
    "parts": Squash(lambda x: torch.cat([x[:, :2].sigmoid(), x[:, 2:].sigmoid()], 1)),
    "turned": Squash(lambda x: x.sigmoid().view(-1, 5, 1)[..., 0].clone()),
    "times": Squash(lambda x: x.sigmoid() * x.flip(1).sigmoid() * 0.5),
    "clamped": Squash(lambda x: x.clamp(0, 1)),
    "largest": Squash(lambda x: torch.stack([x, x + 1], 2).sigmoid().amax(2)),
    "mean": Squash(lambda x: torch.stack([x, x + 1], 2).sigmoid().mean(2)),
}


@pytest.mark.parametrize("end", INDEPENDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_that_do_not_exclude_each_other_are_no_softmax(end, dtype):
    model = network(INDEPENDENT[end], scale=10).to(dtype)
    images = pictures().to(dtype)
    with torch.no_grad():
        right = model(images)[:, 3].float()
    for explain in (Saliency(model), Occlusion(model, window=4, stride=4)):
        result = explain(images, 3)
        assert torch.allclose(result.score, right, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert result.outputs == ["probabilities"] * 3
    curve = deletion(model, images, torch.rand(3, 16, 16), 3)
    assert torch.allclose(curve.scores[:, 0], right, atol=1e-6)


def test_what_only_happens_to_lie_between_0_and_1_is_a_logit():
    model = network(Squash(lambda x: x.sigmoid() * 3 - 1))
    with torch.no_grad():
        right = model(pictures()).softmax(1)
    result = Saliency(model)(pictures())
    assert result.outputs == ["logits"] * 3
    assert torch.allclose(result.score, right.amax(1), atol=1e-6)


@pytest.mark.parametrize(
    ("program", "lies"),
    [
        (lambda x: x.softmax(1), True),
        (lambda x: x.sigmoid().pow(2), True),
        (lambda x: x.sigmoid() * 2, False),
        (lambda x: x.sigmoid() + x.sigmoid(), False),
        (lambda x: torch.cat([x.sigmoid(), torch.full_like(x, 7)], 1), False),
        (lambda x: x.sigmoid() * torch.tensor([1.0, 2.0, 3.0]), False),
        (lambda x: x.sigmoid().pow(-1), False),
        (lambda x: x.clamp(0, 2), False),
        (lambda x: x.clamp(min=0), False),
        (lambda x: x.relu(), False),
        (lambda x: x * 1, False),
    ],
)
def test_probabilities_are_told_by_the_operations_that_made_them(program, lies):
    tape = record(Squash(program), torch.randn(2, 3))
    assert is_probability(tape, logits_of(tape)[0]) is lies


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_row_of_probabilities_is_known_in_every_dtype(dtype, classes):
    logits = torch.randn(200, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    rows = logits.softmax(1).to(dtype)
    assert kinds_of(rows).names(200) == ["probabilities"] * 200
    assert kinds_of(logits.to(dtype)).names(200) == ["logits"] * 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype):
    """Of a model that returns probabilities for some images, and something else for others."""

    images = torch.cat([pictures(6), pictures(6, seed=1)]).to(dtype)
    with torch.no_grad():
        between = network(scale=4).to(dtype)(images)[:, 0].sort().values[5:7].mean()

    def mixed(x):
        shares = x.exp() / x.exp().sum(1, keepdim=True)
        return torch.where(x[:, :1] > between, shares, x)

    model = network(Squash(mixed), scale=4).to(dtype)
    together = Saliency(model)(images)
    assert 0 < together.outputs.count("probabilities") < 12
    alone = [Saliency(model)(image[None]) for image in images]
    assert [one.outputs[0] for one in alone] == together.outputs
    assert torch.allclose(together.score, torch.cat([one.score for one in alone]), atol=1e-2)
    spread = deletion(model, images, torch.rand(12, 16, 16)).scores[:, 0]
    assert torch.allclose(spread, together.score, atol=1e-2)


@pytest.mark.parametrize(
    ("outputs", "function"),
    [
        ("logits", lambda x: x.softmax(1)),
        ("independent logits", lambda x: x.sigmoid()),
        ("probabilities", lambda x: x),
        ("values", lambda x: x),
    ],
)
@pytest.mark.parametrize("method", ["saliency", *PERTURB])
def test_the_user_has_the_last_word(outputs, function, method):
    model, images = network(), pictures()
    make = Saliency if method == "saliency" else PERTURB[method]
    result = make(model, outputs=outputs)(images, [[0, 1], [2, 3], [4, 0]])
    with torch.no_grad():
        right = function(model(images)).gather(1, torch.tensor([[0, 1], [2, 3], [4, 0]]))
    assert torch.allclose(result.score, right.flatten(), atol=1e-5)
    assert result.outputs == [outputs] * 6


def test_a_kind_that_does_not_exist():
    with pytest.raises(InputError, match=r"^outputs must be one of 'auto', 'logits', .* got 'softmax'$"):
        Saliency(network(), outputs="softmax")


@pytest.mark.parametrize("kind", ["logits", "independent logits", "probabilities"])
def test_logarithms_are_those_of_the_scores(kind):
    outputs = torch.rand(4, 3, dtype=torch.float64)
    kinds = OutputKinds(kind, torch.tensor([True, False, True, False]) if kind == "logits" else None)
    assert torch.allclose(kinds.log_scores(outputs).exp(), kinds.scores(outputs))
    rows = torch.tensor([3, 3, 0])
    assert torch.allclose(kinds.log_scores(outputs[:3], rows).exp(), kinds.scores(outputs[:3], rows))
    assert OutputKinds.named(kinds.names(4), outputs.device).names(4) == kinds.names(4)


def test_adversarial_steps_follow_the_score():
    for end, outputs in ((nn.Sigmoid(), 0), (None, None)):
        model = network(*([end] if end else []), classes=1 if outputs is None else 5)
        images = pictures()
        with torch.no_grad():
            before, after = model(images)[:, 0], model(fgsm(model, images, 0, epsilon=0.01))[:, 0]
        assert (after < before).all()


# Several outputs


class Several(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.other, self.pick = nn.Linear(8, 5), nn.Linear(8, 3), pick

    def forward(self, x):
        maps = self.body[:2](x)
        features = self.body[2:](maps)
        return self.pick(maps, features, self.head(features), self.other(features))


Named = namedtuple("Named", "features logits")


@pytest.mark.parametrize(
    "pick",
    [
        lambda maps, features, logits, other: logits,
        lambda maps, features, logits, other: (features, logits),
        lambda maps, features, logits, other: (logits, features),
        lambda maps, features, logits, other: (maps, logits),
        lambda maps, features, logits, other: [maps, features, logits],
        lambda maps, features, logits, other: {"embedding": features, "scores": logits},
        lambda maps, features, logits, other: {"other": other, "logits": logits},
        lambda maps, features, logits, other: Named(features, logits),
        lambda maps, features, logits, other: (logits, logits.softmax(1)),
    ],
)
def test_class_scores_are_found_among_several_outputs(pick):
    torch.manual_seed(0)
    model = Several(pick).eval()
    plain = Several(lambda maps, features, logits, other: logits).eval()
    plain.load_state_dict(model.state_dict())
    for make in (Saliency, CNNFixations, lambda model: Occlusion(model, window=4, stride=4)):
        result, expected = make(model)(pictures()), make(plain)(pictures())
        assert torch.equal(result.heatmap, expected.heatmap)
        assert torch.equal(result.target, expected.target)
        assert torch.allclose(result.logits, expected.logits)
    maps = torch.rand(3, 16, 16)
    assert torch.allclose(deletion(model, pictures(), maps).scores, deletion(plain, pictures(), maps).scores)


def test_two_outputs_that_may_be_class_scores_are_asked_about():
    model = Several(lambda maps, features, logits, other: (logits, other)).eval()
    with pytest.raises(InputError, match=r"^model must return one tensor of class scores, got \[3, 5\] and \[3, 3\]"):
        Saliency(model)(pictures())
    with pytest.raises(InputError, match=r"^model must return one tensor of class scores"):
        logits_in(model(pictures()))
    result = Saliency(model)(pictures(), lambda output: output[1][:, 0])
    assert result.logits is None


def test_logits_are_on_the_explanation():
    model = network()
    with torch.no_grad():
        right = model(pictures())
    for make in (Saliency, GradCAM, CLEAR, CNNFixations, *PERTURB.values(), lambda m: FGVis(m, n_iterations=1)):
        result = make(model)(pictures(), [[0, 1], [2, 3], [4, 0]])
        assert torch.allclose(result.logits, right.repeat_interleave(2, 0), atol=1e-6)
        assert not result.logits.is_inference()
        assert not result.logits.requires_grad
