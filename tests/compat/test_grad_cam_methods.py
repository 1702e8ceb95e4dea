"""The methods beside Grad-CAM here and in pytorch-grad-cam; and where that is wrong."""

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn import functional

from pyfast_xai.compat import grad_cam as ours
from pyfast_xai.compat.grad_cam import metrics
from pyfast_xai.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # pytorch-grad-cam's own


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("pytorch_grad_cam")


@pytest.fixture(scope="module")
def targets():
    return pytest.importorskip("pytorch_grad_cam.utils.model_targets")


def by_class(library, classes):
    return [library.ClassifierOutputTarget(c) for c in classes]


class Flat(nn.Module):
    """Gradients differ from position to position, and what follows bends."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        self.fc1, self.act, self.fc2 = nn.Linear(8 * 80, 10), nn.GELU(), nn.Linear(10, 5)

    def forward(self, x):
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        return self.fc2(self.act(self.fc1(x.flatten(1))))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Flat().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 20, 16, generator=torch.Generator().manual_seed(1))


LAYERS = {"one": lambda m: [m.relu2], "two": lambda m: [m.relu1, m.relu2]}
RULES = ("HiResCAM", "LayerCAM", "XGradCAM", "GradCAMElementWise", "ShapleyCAM", "FEM", "KPCA_CAM")


# There, the second layer of ShapleyCAM finds the graph of the first freed.
PAIRS = [(method, layers) for method in (*RULES, "ScoreCAM") for layers in LAYERS]
PAIRS.remove(("ShapleyCAM", "two"))


@pytest.mark.parametrize(("method", "layers"), PAIRS)
def test_maps_are_the_same(method, layers, model, images, theirs, targets, unchanged):
    chosen = [1, 4, 0]
    with unchanged(model, images):
        result = getattr(ours, method)(model, LAYERS[layers](model))(images, by_class(ours, chosen))
    # Not as a context: that of ShapleyCAM raises as it ends.
    expected = getattr(theirs, method)(model, LAYERS[layers](model))(images, by_class(targets, chosen))
    assert result.dtype == expected.dtype
    assert expected.max() > 0
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["HiResCAM", "LayerCAM", "XGradCAM", "GradCAMElementWise"])
def test_smoothing_and_augmentation(method, model, images, theirs, targets):
    chosen = [1, 4, 0]
    result = getattr(ours, method)(model, [model.relu2])(images, by_class(ours, chosen), aug_smooth=True)
    with getattr(theirs, method)(model, [model.relu2]) as cam:
        np.testing.assert_allclose(result, cam(images, by_class(targets, chosen), aug_smooth=True), rtol=0, atol=2e-5)


def test_eigen_grad_cam_but_for_the_sign(model, images, theirs, targets):
    chosen = [1, 4, 0]
    result = ours.EigenGradCAM(model, [model.relu2], sign="lapack")(images, by_class(ours, chosen))
    with theirs.EigenGradCAM(model, [model.relu2]) as cam:
        expected = cam(images, by_class(targets, chosen))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
    fixed = ours.EigenGradCAM(model, [model.relu2])(images, by_class(ours, chosen))
    assert fixed.shape == result.shape


def test_seg_eigen_cam(model, images, theirs, targets):
    chosen = [1, 4, 0]
    for sign in ("fixed", "lapack"):
        result = ours.SegEigenCAM(model, [model.relu2], sign=sign)(images, by_class(ours, chosen))
        with theirs.SegEigenCAM(model, [model.relu2]) as cam:
            np.testing.assert_allclose(result, cam(images, by_class(targets, chosen)), rtol=0, atol=1e-4)


def test_random_cam_draws_as_there(model, images, theirs, targets):
    np.random.seed(4)
    result = ours.RandomCAM(model, [model.relu2])(images, by_class(ours, [1, 4, 0]))
    np.random.seed(4)
    with theirs.RandomCAM(model, [model.relu2]) as cam:
        np.testing.assert_allclose(result, cam(images, by_class(targets, [1, 4, 0])), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.5, "target_idx": 2}, {"comparison_categories": [1, 4, 7]}], ids=case_id
)
def test_finer_cam(settings, model, images, theirs):
    result = ours.FinerCAM(model, [model.relu2])(images, **settings)
    with theirs.FinerCAM(model, [model.relu2]) as cam:
        np.testing.assert_allclose(result, cam(images, **settings), rtol=0, atol=2e-5)
    layer = ours.FinerCAM(model, [model.relu2], base_method=ours.LayerCAM)(images)
    expected = theirs.FinerCAM(model, [model.relu2], base_method=theirs.LayerCAM)(images)
    np.testing.assert_allclose(layer, expected, rtol=0, atol=2e-5)


def test_refine_cam(model, images, theirs, targets):
    layers = [model.relu1, model.relu2]
    result = ours.RefineCAM(model, layers)(images, by_class(ours, [1, 4, 0]))
    expected = theirs.RefineCAM(model, layers)(images, by_class(targets, [1, 4, 0]))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"pool": "max", "smooth": False, "num_scales": 4}, id="max"),
        pytest.param({"pre_filter_ratio": 0.5, "theta": 0.2, "step_size": 20, "num_scales": 3}, id="filter"),
        pytest.param({"use_softmax_scores": False, "scales": [32, 50]}, id="logits"),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (40, 32)], ids=case_id)
def test_sess(settings, size, theirs, targets):
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(2, 3, *size)
    settings = {"num_scales": 5, **settings}
    result = ours.SESS(model, [model.relu], **settings)(images, by_class(ours, [1, 4]))
    with theirs.SESS(model, [model.relu], **settings) as cam:
        expected = cam(images, by_class(targets, [1, 4]))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-4)


# Ablation


class Positive(nn.Module):
    """Scores are positive and the least activation of every image is zero: there the peer is right."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)
        self.fc = nn.Linear(4 * 20, 5)

    def forward(self, x):
        return self.fc(functional.relu(self.last(self.relu(self.conv(x)))).flatten(1)).exp()


@pytest.mark.parametrize("batch_size", [4, 32])
def test_ablation_cam_where_the_peer_is_right(batch_size, images, theirs, targets, unchanged):
    torch.manual_seed(5)
    model = Positive().eval()
    assert (model.relu(model.conv(images)).flatten(2).amin(2) == 0).any(1).all()
    with unchanged(model, images):
        result = ours.AblationCAM(model, [model.relu], batch_size=batch_size)(images, by_class(ours, [1, 4, 0]))
    with theirs.AblationCAM(model, [model.relu], batch_size=batch_size) as cam:
        expected = cam(images, by_class(targets, [1, 4, 0]))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-4)


def test_a_negative_score_does_not_turn_ablation_cam_upside_down(images, theirs, targets):
    """There the drop is divided by the score, so that what speaks for the class is cut off."""
    torch.manual_seed(5)
    model = Small().eval()
    with torch.no_grad():
        model.fc.bias.fill_(-10.0)
    result, raised = (
        ours.AblationCAM(model, [model.relu])(images, by_class(ours, [1, 4, 0])),
        ours.GradCAM(model, [model.relu])(images, by_class(ours, [1, 4, 0])),
    )
    with theirs.AblationCAM(model, [model.relu]) as cam:
        expected = cam(images, by_class(targets, [1, 4, 0]))

    def agree(one, other):
        return np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(one, other, strict=True)])

    assert agree(result, raised) > agree(expected, raised)


def test_an_ablation_layer_says_how_channels_lie(images):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.norm(self.patch(x).flatten(2).mT).mean(1))

    model = Tokens().eval()

    def laid_out(tokens):
        return ours.swinT_reshape_transform(tokens, 5, 4)

    result = ours.AblationCAM(model, [model.norm], laid_out, ablation_layer=ours.AblationLayerVit())(images, None)
    assert result.shape == (3, 20, 16)
    with pytest.raises(InputError, match="ablation_layer must be an AblationLayer, got Linear"):
        ours.AblationCAM(model, [model.norm], ablation_layer=model.fc)
    part = ours.AblationCAM(model, [model.norm], laid_out, ours.AblationLayerVit(), ratio_channels_to_ablate=0.5)
    assert np.abs(part(images, None) - result).max() > 1e-3


# FullGrad


class Biased(nn.Module):
    """Biases of convolutions and batch norms, rectified in place, and a convolution that does not run."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.fc = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.fc(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


def test_full_grad(images, theirs, targets, unchanged, capsys):
    torch.manual_seed(0)
    model, chosen = Biased().eval(), [1, 4, 0]
    with unchanged(model, images):
        result = ours.FullGrad(model, [])(images, by_class(ours, chosen))
    with theirs.FullGrad(model, []) as cam:
        expected = cam(images, by_class(targets, chosen))
        expected_smooth = cam(images, by_class(targets, chosen), eigen_smooth=True)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
    model.unused = nn.Conv2d(3, 3, 1)  # there as many gradients as biases are asserted
    np.testing.assert_array_equal(ours.FullGrad(model, [])(images, by_class(ours, chosen)), result)
    smooth = ours.FullGrad(model, [], sign="lapack")(images, by_class(ours, chosen), eigen_smooth=True)
    np.testing.assert_allclose(smooth, expected_smooth, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="model must have a Conv2d or BatchNorm2d with a bias"):
        ours.FullGrad(nn.Sequential(nn.Flatten(), nn.Linear(960, 5)), [])


# Names and signatures

# docs/migration/grad_cam.md says why.
ABSENT = {
    *("AblationLayerFasterRCNN", "GuidedBackpropReLU", "GuidedBackpropReLUasModule", "sliding_window", "sobel_cam"),
    "window_starts",
}


@functools.cache
def peers_names():
    """Every public class and function of pytorch-grad-cam by its name."""
    package = pytest.importorskip("pytorch_grad_cam")
    result = {}
    for info in pkgutil.walk_packages(package.__path__, "pytorch_grad_cam."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            continue  # one that needs what is not installed
        for name, value in vars(module).items():
            actual = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == info.name
            if actual and not name.startswith("_"):
                result[name] = value
    return result


def test_every_name_is_here():
    here = {*ours.__all__, *metrics.__all__}
    assert set(peers_names()) - here == ABSENT
    page = (Path(__file__).parents[2] / "docs" / "migration" / "grad_cam.md").read_text()
    assert all(f"`{name}`" in page for name in ABSENT)


@pytest.mark.parametrize("name", sorted(set(ours.__all__)))
def test_signatures(name):
    peer = peers_names().get(name)
    if peer is None:
        pytest.fail(f"{name} stands for nothing in pytorch-grad-cam")
    actual, there = (list(inspect.signature(kind).parameters.values()) for kind in (getattr(ours, name), peer))
    actual = [p for p in actual if p.kind is not p.KEYWORD_ONLY or p.name in {q.name for q in there}]
    assert [p.name for p in actual][: len(there)] == [p.name for p in there]
