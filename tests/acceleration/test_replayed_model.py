"""Replays in a model's place: the same numbers up to rounding, never out of date, never where they would be wrong."""

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast_xai
from pyfast_xai import onednn, ops
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.acceleration.weight_samples import WeightSamples
from pyfast_xai.errors import InputError
from pyfast_xai.rules import evidence
from pyfast_xai.rules.gradient import GradientRules
from pyfast_xai.rules.gradient.bounds import Bounding, bounds_of
from pyfast_xai.rules.gradient.table import GRADIENT, Rule
from pyfast_xai.tape import record
from pyfast_xai.tape.graph import key

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-13}


class Residual(nn.Module):
    """Batch norm behind convolutions with and without bias, one of which is read twice; negative scales."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm_wide = nn.BatchNorm2d(8, affine=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.norm_twice = nn.BatchNorm2d(8)
        self.aside = nn.Linear(8, 3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = x + functional.relu(self.norm_wide(self.wide(x)))
        read_twice = self.twice(x)
        x = torch.relu(self.norm_twice(read_twice) + read_twice)
        pooled = x.mean((2, 3))
        self.aside(pooled)
        return self.fc(pooled)


@pytest.fixture(params=DTYPES, ids=case_id)
def dtype(request):
    return request.param


def settled(model):
    """With statistics and scales of both signs, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model(dtype):
    torch.manual_seed(0)
    return settled(Residual()).to(dtype)


@pytest.fixture
def images(dtype):
    torch.manual_seed(1)
    return torch.randn(4, 3, 9, 7, dtype=dtype)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * DTYPES[b.dtype])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("policy", [None, evidence.policy, GradientRules()], ids=["none", "evidence", "response"])
def test_the_outputs_are_the_models(model, images, policy, layout):
    accelerated = ReplayedModel(model)
    for batch in (images, images.flip(0) * 2, images[:, :, 1:], images[:1]):
        batch = batch.contiguous(memory_format=layout)
        before = batch.clone()
        close(accelerated.record(batch, policy=policy).result, model(batch))
        assert torch.equal(batch, before)


def test_batch_norm_is_folded_where_nothing_else_reads_the_convolution(model, images):
    ops = {node.name: key(node.op) for node in ReplayedModel(model).record(images)}
    assert ops["twice.conv2d"] == ops["norm.batch_norm"] == ops["norm_wide.batch_norm"] == "aten::conv2d"
    assert ops["norm_twice.batch_norm"] == "aten::batch_norm"
    assert not {"stem.conv2d", "wide.conv2d"} & ops.keys()
    plain = {node.name: key(node.op) for node in ReplayedModel(model, fold=False).record(images)}
    assert plain["norm.batch_norm"] == "aten::batch_norm"


@pytest.mark.parametrize("policy", [None, evidence.policy, GradientRules()], ids=["none", "evidence", "response"])
def test_dropout_in_place_on_a_flattened_map_keeps_no_batch_norm_from_folding(images, policy):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = settled(nn.Sequential(*layers, nn.Dropout(0.5, inplace=True), nn.Linear(4, 3))).to(images.dtype)
    accelerated = ReplayedModel(model)
    for batch in (images, images.flip(0)):
        tape = accelerated.record(batch, policy=policy)
        close(tape.result, model(batch))
    assert "aten::batch_norm" not in [key(node.op) for node in tape]


def test_the_weights_are_looked_at_once_an_explanation(images, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().to(images.dtype)
    explainer = pyfast_xai.EigenCAM(model).accelerate()
    for _ in range(5):
        explainer(images)
    looks = []
    unchanged = WeightSamples.unchanged
    watches = lambda samples: looks.append(len(samples._tensors)) or unchanged(samples)  # noqa: E731
    monkeypatch.setattr(WeightSamples, "unchanged", watches)
    explainer(images)
    assert sum(map(bool, looks)) == 1


def test_a_gradient_rule_that_is_registered_later_takes_effect(model, images, monkeypatch):
    explainer = pyfast_xai.Saliency(model).accelerate()
    for _ in range(4):
        explainer(images)
    monkeypatch.setitem(GRADIENT, "aten::relu", Rule(lambda ctx, self: ctx.propagate(self, ctx.grad * 0)))
    assert not explainer(images).attribution.any()


def test_folded_weights_carry_no_graph(model, images):
    tape = ReplayedModel(model.requires_grad_()).record(images)
    convolution = next(node for node in tape if node.name == "norm.batch_norm")
    assert not any(tensor.requires_grad for tensor in convolution.args[1:3])
    result = pyfast_xai.Saliency(model).accelerate()(images).attribution
    assert not result.requires_grad
    close(result, pyfast_xai.Saliency(model)(images).attribution)


class Rectified(nn.Module):
    """A convolution before each rectifier, and one that is read before and after."""

    def __init__(self):
        super().__init__()
        kinds = nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2), nn.Hardswish(), nn.SiLU(), nn.ELU()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), kind) for kind in kinds))
        self.read_twice = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        x = self.read_twice(4 * self.layers(x))
        return (x + torch.relu(x)).mean((2, 3))


class Heard(TorchDispatchMode):
    """Names of the operations that run, with what they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((op._schema.name.removeprefix("aten::").rstrip("_"), args))
        return op(*args, **(kwargs or {}))


def test_convolutions_rectify_where_only_the_result_is_seen(images):
    torch.manual_seed(2)
    model = Rectified().eval().requires_grad_(False)
    images = 3 * images.float()
    accelerated = ReplayedModel(model)
    for _ in range(4):  # the model runs beside these
        accelerated.record(images)
    with Heard() as messages:
        tape = accelerated.record(images)
    close(tape.result, model(images))
    rectifiers = ("relu", "relu6", "hardtanh", "hardswish", "silu", "elu")
    assert sorted(name for name, _ in messages.calls if name in rectifiers) == ["elu", "relu"]
    # The same model, recorded with a policy that saves every value.
    close(accelerated.record(images, policy=Bounding()).result, model(images))
    bounds = bounds_of(accelerated.record(images, policy=Bounding()))
    expected = bounds_of(record(model, images, policy=Bounding()))
    assert len(bounds) == len(expected) > 1
    for name, bound in bounds.items():
        close(bound, expected[name])


@pytest.mark.parametrize("layer", ["layers.0.0", "layers.0.1", "layers.4.0", "read_twice"])
def test_a_convolution_that_is_stopped_at_does_not_rectify(images, layer):
    torch.manual_seed(2)
    model = Rectified().eval().requires_grad_(False)
    images = 3 * images.float()
    close(ReplayedModel(model).record(images, until=layer).reached, record(model, images, until=layer).reached)


@pytest.mark.skipif(not onednn.available(), reason="weights are packed by oneDNN")
def test_weights_are_laid_out_for_one_image_and_for_several():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()).eval().requires_grad_(False)
    explainer = pyfast_xai.Saliency(model).accelerate()
    with Heard() as once_each:
        for images in (5, 1, 2, 3):
            explainer(torch.randn(images, 3, 7, 7))
    with Heard() as messages:
        for images in (5, 1, 2, 3, 5) * 2:
            explainer(torch.randn(images, 3, 7, 7))
    # Not for what came once.
    assert not [name for name, _ in once_each.calls if "reorder_convolution" in name]
    laid_out = [tuple(args[-1]) for name, args in messages.calls if "reorder_convolution" in name]
    forwards, adjoints = [(3, 7, 7), (8, 5, 5)], [(4, 5, 5), (8, 5, 5)]
    assert sorted(laid_out) == sorted((images, *maps) for images in (1, 2) for maps in forwards + adjoints)


@pytest.mark.skipif(not onednn.available(), reason="weights are packed by oneDNN")
def test_sizes_share_weights_that_are_laid_out_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.Flatten()).eval()
    accelerated = ReplayedModel(model.requires_grad_(False))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for size in range(8, 28):
        images = torch.randn(2, 16, size, size)
        for _ in range(3):
            close(accelerated.record(images).result, model(images))
    packed = {id(entry.result) for entry in accelerated._weights._entries.values()}
    assert len(packed) < 20, "two weights, twenty sizes"
    assert accelerated._weights.nbytes < 10 * weights + 100 * 512


class Wide(nn.Module):
    """Convolutions that Winograd's takes, by every padding and every end, beside others that it does not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=0), nn.ReLU6()),
            *(nn.Conv2d(32, 32, 3, padding=2), nn.Hardtanh(-0.5, 0.5)),
            *(nn.Conv2d(32, 16, 3, padding=(0, 1)), nn.SiLU()),
            *(nn.Conv2d(16, 16, 3, padding=3), nn.LeakyReLU()),
            *(nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 3, dilation=2), nn.Conv2d(16, 16, 3, groups=2)),
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))


@pytest.fixture
def wide():
    torch.manual_seed(3)
    return settled(Wide()).eval().requires_grad_(False)


winograd = pytest.mark.skipif(
    not onednn.available() or ops.registry.OPS["winograd_conv2d"].missing("cpp", "cpu") is not None,
    reason="convolutions are not packed, or the library is not compiled",
)


@winograd
def test_wide_convolutions_are_winograds(wide):
    images, explainer = torch.randn(2, 3, 31, 33), pyfast_xai.EigenCAM(wide, layer="layers.15").accelerate()
    for _ in range(4):  # the model runs beside these
        explainer(images)
    with Heard() as messages:
        explainer(images)
    # Four of nine: the first is narrow, the one before SiLU needs oneDNN, and three have other geometries.
    assert [name for name, _ in messages.calls].count("pyfast_xai::winograd_conv2d") == 4
    with ops.backend("reference"), Heard() as messages:
        explainer(images)
    assert "pyfast_xai::winograd_conv2d" not in [name for name, _ in messages.calls]


@winograd
@pytest.mark.parametrize("size", [(2, 3, 31, 33), (1, 3, 14, 14), (9, 3, 13, 12)], ids=case_id)
def test_so_are_their_adjoints(wide, size):
    images = torch.randn(size)
    leaf = images.double().requires_grad_()
    copy.deepcopy(wide).double()(leaf).amax(1).sum().backward()
    fast = pyfast_xai.Saliency(wide).accelerate()
    with Heard() as messages:
        result = fast(images).attribution
    assert "pyfast_xai::winograd_conv2d" in [name for name, _ in messages.calls]
    torch.testing.assert_close(result.double(), leaf.grad, rtol=0, atol=1e-5 * float(leaf.grad.abs().max()))


@winograd
def test_winograds_weights_are_transformed_once(wide, monkeypatch):
    shapes, transform = [], ops.winograd_weight
    monkeypatch.setattr(ops, "winograd_weight", lambda weight: shapes.append(tuple(weight.shape)) or transform(weight))
    explainer = pyfast_xai.Saliency(wide).accelerate()
    for images in (4, 1, 4, 2):
        explainer(torch.randn(images, 3, 40, 40))
    forwards = [(32, 16, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3), (16, 32, 3, 3), (16, 16, 3, 3)]
    # That of the last, padded by 3, is a transposed convolution still.
    adjoints = [(16, 32, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3), (32, 16, 3, 3)]
    assert sorted(shapes) == sorted(forwards + adjoints)


def test_what_leads_nowhere_does_not_run(model, images):
    tape = ReplayedModel(model).record(images)
    assert "aside.linear" in {node.name for node in record(model, images)}
    assert "aside.linear" not in {node.name for node in tape}
    with pytest.raises(InputError, match=r"layer that an accelerated model does not fuse .* got 'aside'"):
        tape.find("aside")


def test_a_folded_module_is_found_by_the_name_of_its_batch_norm(model, images):
    tape = ReplayedModel(model).record(images)
    assert key(tape.producer(tape.find("norm")).op) == "aten::conv2d"
    assert tape.find("norm") is tape.find("norm.batch_norm")
    for name in ("stem", "stem.conv2d"):
        with pytest.raises(InputError, match=rf"layer that an accelerated model does not fuse .* got '{name}'"):
            tape.find(name)
    assert not {"stem", "stem.conv2d"} & set(tape.names())


@pytest.mark.parametrize("layer", ["stem", "norm", "twice.conv2d", "fc"])
def test_it_stops_where_the_model_stops(model, images, layer):
    accelerated = ReplayedModel(model)
    for batch in (images, images + 1):
        close(accelerated.record(batch, until=layer).reached, record(model, batch, until=layer).reached)


EXPLAINERS = {
    "saliency": pyfast_xai.Saliency,
    "deconvnet": pyfast_xai.DeconvNet,
    "guided": pyfast_xai.GuidedBackprop,
    "fixations": pyfast_xai.CNNFixations,
    "signed": lambda model: pyfast_xai.CNNFixations(model, variant="paper"),
    "clear": lambda model: pyfast_xai.CLEAR(model, candidates=3),
    "eigen-cam": pyfast_xai.EigenCAM,
    "eigen-cam below": lambda model: pyfast_xai.EigenCAM(model, layer="norm"),
    "eigen-cam on a folded convolution": lambda model: pyfast_xai.EigenCAM(model, layer="stem"),
    "grad-cam": pyfast_xai.GradCAM,
    "grad-cam below": lambda model: pyfast_xai.GradCAM(model, layer="norm_wide"),
    "excitation": lambda model: pyfast_xai.ExcitationBackprop(model, layer="norm"),
    "integrated": pyfast_xai.IntegratedGradients,
    "fgvis": lambda model: pyfast_xai.FGVis(model, n_iterations=5),
    "fgvis forward": lambda model: pyfast_xai.FGVis(model, n_iterations=5, defence="forward"),
    "rise": lambda model: pyfast_xai.RISE(model, n_masks=20),
}


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_explanations_are_the_same(model, images, explainer):
    plain, fast = EXPLAINERS[explainer](model), EXPLAINERS[explainer](model).accelerate()
    for batch in (images, images.flip(0), images[:, :, :, 1:]):
        expected, result = plain(batch), fast(batch)
        torch.testing.assert_close(result.heatmap, expected.heatmap, rtol=1e-6, atol=1e-9)
        if expected.points is not None:
            assert all(torch.equal(a, b) for a, b in zip(result.points, expected.points, strict=True))


def test_nothing_of_the_model_is_changed(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    fast = pyfast_xai.GuidedBackprop(model).accelerate()
    fast(images), fast(images)
    assert {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()} == saved
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _write_in_place(model):
    model.norm.weight.mul_(-1)


def _swap_data(model):
    model.wide.weight.data = model.wide.weight.data + 1


def _new_parameter(model):
    model.fc.weight = nn.Parameter(model.fc.weight * 2, requires_grad=False)


def _new_buffer(model):
    model.norm.running_var = model.norm.running_var * 4


def _new_module(model):
    model.twice = nn.Sequential(model.twice, nn.Tanh()).eval()


def _hook(model):
    model.norm_twice.register_forward_hook(lambda module, args, output: output * 3)


def _training_mode(model):
    model.norm_wide.train()


CHANGES = [_write_in_place, _swap_data, _new_parameter, _new_buffer, _new_module, _hook, _training_mode]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_noticed(model, images, change):
    accelerated = ReplayedModel(model)
    before = accelerated.record(images).result
    change(model)
    expected = record(model, images).result
    assert not torch.allclose(before, expected)
    close(accelerated.record(images).result, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda explainer: pickle.loads(pickle.dumps(explainer))])
def test_a_copy_replays_the_copy(model, images, copied):
    fast = pyfast_xai.EigenCAM(model, layer="norm_wide").accelerate()
    fast(images)
    other = copied(fast)
    assert other.accelerated
    other.model.norm_wide.running_var.mul_(torch.linspace(1, 9, 8))
    result = other(images).signed_map
    close(result, pyfast_xai.EigenCAM(other.model, layer="norm_wide")(images).signed_map)
    assert not torch.allclose(result, fast(images).signed_map)


def test_threads_share_it(model, images):
    plain, fast = pyfast_xai.Saliency(model), pyfast_xai.Saliency(model).accelerate()
    batches = [images[: 1 + n % 3] * (n + 1) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        result = list(pool.map(fast, batches))
    for batch, explanation in zip(batches, result, strict=True):
        close(explanation.attribution, plain(batch).attribution)


def test_images_that_require_a_gradient(model, images):
    result = pyfast_xai.Saliency(model).accelerate()(images.clone().requires_grad_())
    close(result.attribution, pyfast_xai.Saliency(model)(images).attribution)


class Decides(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class DecidesUnseen(nn.Module):
    """By numbers that left PyTorch."""

    def forward(self, x):
        return x.mean((2, 3)) if x.numpy().sum() > 0 else x.amax((2, 3))


class Draws(nn.Module):
    def forward(self, x):
        return functional.dropout(x, training=True).mean((2, 3))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x.mean((2, 3)) * self.seen


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Decides, "takes a decision from the data"),
        (DecidesUnseen, "hands data to other code, such as NumPy"),
        (Draws, "draws random numbers"),
        (Counts, "the model writes to its own state"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32], indirect=True)
def test_what_cannot_be_replayed_runs_as_it_is(images, caplog, kind, reason):
    model = kind().eval()
    accelerated = ReplayedModel(model)
    images = images - images.mean() + 0.1
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        for batch in (images, -images, images[:2]):
            torch.manual_seed(3)
            result = accelerated.record(batch).result
            torch.manual_seed(3)
            assert torch.equal(result, record(model, batch).result)
    (output,) = caplog.messages
    assert output.startswith("accelerate: the model runs without replays: ")
    assert reason in output


def test_views_that_are_written_to(dtype, images):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.norm(self.conv(x))
            x[:, :2].mul_(2)
            x[:, :, 1:3] = x[:, :, :2]
            return x.flatten(1)

    torch.manual_seed(0)
    model = settled(Writes()).to(dtype)
    accelerated = ReplayedModel(model)
    for batch in (images, images.flip(0)):
        assert torch.equal(accelerated.record(batch).result, model(batch))


def test_a_model_that_needs_the_layout_it_knows(dtype, images):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4 * 63, 3)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.fc(x.view(len(x), -1))

    torch.manual_seed(0)
    model = settled(Views()).to(dtype)
    plain, fast = pyfast_xai.GuidedBackprop(model), pyfast_xai.GuidedBackprop(model).accelerate()
    for batch in (images, images.flip(0)):
        close(fast(batch).attribution, plain(batch).attribution)


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True)
def test_precisions_are_told_apart(model, images):
    accelerated = ReplayedModel(model)
    exact = accelerated.record(images).result
    with torch.autocast("cpu", torch.bfloat16):
        short = accelerated.record(images).result
        torch.testing.assert_close(short, record(model, images).result, rtol=0.1, atol=0.1)
    assert short.dtype == torch.bfloat16
    assert torch.equal(accelerated.record(images).result, exact)


def test_further_arguments(dtype, images):
    class Weighs(nn.Module):
        def forward(self, x, weight, *, mode="mean"):
            return getattr((x * weight).flatten(2), mode)(2)

    model = Weighs().eval()
    accelerated = ReplayedModel(model)
    weight = torch.rand(4, 1, 1, 1, dtype=dtype)
    for mode in ("mean", "sum", "mean"):
        for weights in (weight, weight * 2):
            result = accelerated.record(images, weights, mode=mode).result
            assert torch.equal(result, model(images, weights, mode=mode))


def test_gradients_are_autograds(model, images):
    """The stem's output is rectified in place, and a second reading of the same replay saves anew."""
    fast = pyfast_xai.Saliency(model).accelerate()
    for batch in (images, images.flip(0)):
        leaf = batch.clone().requires_grad_()
        model(leaf).amax(1).sum().backward()
        close(fast(batch).attribution, leaf.grad)
