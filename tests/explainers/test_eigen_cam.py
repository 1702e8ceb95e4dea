import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import FEM, DeepFeatureFactorization, EigenCAM
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import eigen_cam


def slow_map(activation, component=1, center=False):
    """Eq. 3 for one image: `[C, h, w]` -> `[h, w]`, up to sign, in float64."""
    matrix = np.asarray(activation, dtype=np.float64).reshape(activation.shape[0], -1).T
    if center:
        matrix = matrix - matrix.mean(0)
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    return (matrix @ right[component - 1]).reshape(activation.shape[1:])


def up_to_sign(ours, theirs):
    ours = ours.double().numpy()
    return min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) / np.abs(theirs).max()


class Features(nn.Module):
    """Returns what it was built with; images only choose the batch size."""

    def __init__(self, activation):
        super().__init__()
        self.layer = nn.Identity()
        self.register_buffer("activation", activation)

    def forward(self, x):
        return self.layer(self.activation[: len(x)] + 0 * x.sum((1, 2, 3)).view(-1, *[1] * (self.activation.dim() - 1)))


def explain(activation, size=32, **settings):
    model = Features(activation).eval()
    return EigenCAM(model, layer="layer", **settings)(torch.randn(len(activation), 3, size, size))


def photograph_like(images, channels, side):
    """Non-negative maps with a bright object: what a ReLU leaves."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    blob = torch.exp(-((x - 0.3) ** 2 + (y + 0.2) ** 2) * 6)
    loads = torch.rand(images, channels, 1, 1)
    return (blob * loads + 0.3 * torch.randn(images, channels, side, side)).relu()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("method", ["gram", "subspace"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("channels", "side"), [(64, 7), (20, 14), (33, 9), (512, 7)])
def test_equals_the_singular_vectors_of_numpy(method, center, channels, side):
    activation = photograph_like(3, channels, side)
    maps = explain(activation, solver=method, center=center, power_iterations=12).signed_map
    for item, theirs in zip(maps, activation, strict=True):
        assert up_to_sign(item, slow_map(theirs, center=center)) < 1e-5


@pytest.mark.usefixtures("backend")
def test_components_are_rows_image_by_image():
    activation = photograph_like(2, 16, 6)
    explanation = explain(activation, component=[2, 1])
    assert explanation.signed_map.shape == (4, 6, 6)
    assert explanation.heatmap.shape == (4, 32, 32)
    for row, (image, component) in enumerate([(0, 2), (0, 1), (1, 2), (1, 1)]):
        assert up_to_sign(explanation.signed_map[row], slow_map(activation[image], component)) < 1e-4
    torch.testing.assert_close(explain(activation, component=2).signed_map, explanation.signed_map[::2])


def test_uncentred_map_of_rectified_features_is_nowhere_negative():
    maps = explain(photograph_like(4, 32, 7)).signed_map
    assert (maps >= -1e-5 * maps.amax()).all()
    assert (maps.amax((1, 2)) > 0).all()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("flip", [1, -1])
def test_the_object_is_bright_whatever_the_sign_of_the_features(center, flip):
    activation = flip * photograph_like(8, 32, 9)
    maps = explain(activation, center=center).signed_map
    strong = activation.square().sum(1) > activation.square().sum(1).mean((1, 2), keepdim=True)
    for item, where in zip(maps, strong, strict=True):
        assert item[where].mean() > item[~where].mean()


def test_peak_lies_on_the_object():
    peaks = explain(photograph_like(6, 64, 15), size=60).peak()
    assert ((peaks - torch.tensor([24, 39])).abs() <= 8).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_dtypes_of_activations(dtype, tolerance):
    activation = photograph_like(2, 24, 7).to(dtype)
    model = Features(activation).eval()
    explanation = EigenCAM(model, layer="layer")(torch.randn(2, 3, 32, 32, dtype=dtype))
    assert up_to_sign(explanation.signed_map[0], slow_map(activation[0].double())) < tolerance
    assert explanation.heatmap.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", ["first", "last", "tokens", "class token", "grid"])
def test_layouts(layout):
    activation = photograph_like(2, 24, 6)
    expected = explain(activation).signed_map
    tokens = activation.flatten(2).mT
    options, settings = {
        "first": (activation.contiguous(memory_format=torch.channels_last), {}),
        "last": (activation.permute(0, 2, 3, 1).contiguous(), {}),
        "tokens": (tokens, {}),
        "class token": (torch.cat([torch.randn(2, 1, 24), tokens], 1), {}),
        "grid": (torch.cat([torch.randn(2, 1, 24), tokens[:, :12]], 1), {"tokens": (2, 6)}),
    }[layout]
    maps = explain(options, **settings).signed_map
    if layout == "grid":
        expected = explain(activation[:, :, :2]).signed_map
    torch.testing.assert_close(maps, expected)


def test_smallest_maps():
    one_cell = explain(torch.rand(2, 5, 1, 1) + 0.1)
    torch.testing.assert_close(one_cell.signed_map.flatten(), one_cell.heatmap[:, 0, 0])
    assert (one_cell.heatmap > 0).all()
    one_channel = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(explain(one_channel).signed_map, one_channel[:, 0])


def test_constant_and_zero_maps():
    constant = explain(torch.ones(1, 3, 4, 4))
    torch.testing.assert_close(constant.heatmap, torch.full((1, 32, 32), 3**0.5))
    zero = explain(torch.zeros(2, 3, 4, 4))
    assert (zero.heatmap == 0).all()
    assert zero.boxes().isnan().all()
    # A constant map has no variance to explain.
    assert explain(torch.ones(1, 3, 4, 4), center=True).heatmap.abs().max() < 1e-5


def test_a_bad_activation_is_named():
    activation = torch.rand(3, 4, 5, 5)
    activation[1, 2, 3, 3] = float("nan")
    with pytest.raises(InputError, match=r"activations of layer 'layer' must be finite, got .* for image 1"):
        explain(activation)


def test_more_components_than_there_are():
    with pytest.raises(InputError, match="component must be at most 3"):
        explain(torch.rand(1, 3, 4, 4), component=4)


def test_unresolved_components_are_said(caplog):
    activation = torch.randn(1, 1100, 40, 40)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        explain(activation, component=3, solver="subspace", power_iterations=0)
    assert "raise power_iterations" in caplog.text


def test_several_layers_are_averaged_at_equal_scale():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU()).eval()
    images = torch.randn(2, 3, 20, 20)
    one, two = (EigenCAM(model, layer=name)(images).heatmap for name in ("1", "4"))
    both = EigenCAM(model, layer=["1", "4"])(images)
    expected = (one / one.amax((1, 2), keepdim=True) + two / two.amax((1, 2), keepdim=True)) / 2
    torch.testing.assert_close(both.heatmap, expected)
    assert both.signed_map is None


def test_the_classifier_never_runs():
    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError("the forward went on")

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Fails()).eval()
    explainer, images = EigenCAM(model, layer="1"), torch.randn(1, 3, 9, 9)
    stopped = explainer(images)
    assert stopped.heatmap.isfinite().all()
    with explainer.run_whole_model():
        assert torch.equal(explainer(images).heatmap, stopped.heatmap)


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("method", [EigenCAM, FEM, DeepFeatureFactorization])
def test_run_whole_model_the_outputs_come_from_the_same_forward(method, accelerate):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 9, 3), nn.ReLU(inplace=True)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)).eval()
    explainer, images, forwards = method(model, accelerate=accelerate), torch.randn(4, 3, 12, 12), []
    stopped = explainer(images)
    assert stopped.logits is None
    for _ in range(3):
        with explainer.run_whole_model():
            whole = explainer(images)
        torch.testing.assert_close(whole.heatmap, stopped.heatmap)
        torch.testing.assert_close(whole.logits, model(images).detach())
        assert whole.outputs == ["logits"] * 4
        assert whole.target is None
    assert explainer(images).logits is None
    record = explainer.record
    explainer.record = lambda *args, **kwargs: forwards.append(kwargs.get("until")) or record(*args, **kwargs)
    with explainer.run_whole_model():
        explainer(images)
    assert forwards == [None]


def test_several_layers_and_components_run_whole_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))
    explainer = EigenCAM(model.eval(), layer=["1", "3"], component=[1, 2])
    images = torch.randn(2, 3, 12, 12)
    stopped = explainer(images)
    with explainer.run_whole_model():
        whole = explainer(images)
    torch.testing.assert_close(whole.heatmap, stopped.heatmap)
    torch.testing.assert_close(whole.logits, model(images).detach().repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)], "1.relu"),
        ([nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(32, 5)], "1.relu"),
        # The classes have a map of their own; the features are below it.
        ([nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], "1.relu"),
        ([], "1.relu"),
    ],
)
def test_the_automatic_layer(head, expected):
    from pyfast_xai.explainers.common.layer_search import last_features
    from pyfast_xai.tape import record

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head).eval()
    images = torch.randn(2, 3, 12, 12)
    assert last_features(record(model, images)) == expected
    torch.testing.assert_close(EigenCAM(model)(images).signed_map, EigenCAM(model, layer="1")(images).signed_map)


def test_no_automatic_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).eval()
    with pytest.raises(InputError, match="layer must be named"):
        EigenCAM(model)(torch.randn(1, 3, 3, 3))


def test_a_detector_backbone_with_images_of_any_size():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())

        def forward(self, x):
            low = self.stem(x)
            return {"p2": low, "p3": self.body(low)}

    explainer = EigenCAM(Backbone().eval())
    for size in ((32, 48), (50, 21)):
        assert explainer(torch.randn(2, 3, *size)).heatmap.shape == (2, *size)


@pytest.mark.usefixtures("backend")
def test_a_row_does_not_depend_on_the_batch():
    activation = photograph_like(5, 40, 8)
    together = explain(activation)
    for i in range(5):
        torch.testing.assert_close(
            explain(activation[i : i + 1]).signed_map[0], together.signed_map[i], rtol=1e-5, atol=1e-6
        )


def test_equals_grad_cam_where_its_sign_is_right():
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 24, 24)
    with grad_cam.EigenCAM(model, [model[3]]) as peer:
        theirs = peer(images, targets=None)
    explanation = EigenCAM(model, layer="3", center=True)(images)
    ours = explanation.signed_map
    agreed = 0
    for item, their in zip(ours, theirs, strict=True):
        for sign in (1, -1):
            positive = (sign * item).clamp_min(0)
            positive = positive - positive.min()
            scaled = (positive / (1e-7 + positive.max()))[None, None]
            up = torch.nn.functional.interpolate(scaled, (24, 24), mode="bilinear", align_corners=False)[0, 0]
            up = (up - up.min()) / (1e-7 + (up - up.min()).max())
            agreed += np.abs(up.numpy() - their).max() < 1e-4
    assert agreed == 4


@pytest.mark.parametrize("settings", [{"component": 0}, {"solver": "svd"}, {"layout": "middle"}, {"layer": []}])
def test_settings_that_do_not_exist(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        EigenCAM(nn.Identity(), **settings)


def test_layers_are_judged_together(caplog):
    fine, doubtful, spoiled = torch.tensor([-1.0, 1e-6]), torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 0.0]).double()
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        eigen_cam._log_diagnostics(["one"], [fine])
        assert not caplog.messages
        with pytest.raises(InputError, match=r"activations of layer 'three' must be finite, got .* for image 2"):
            eigen_cam._log_diagnostics(["one", "two", "three"], [fine, doubtful, spoiled])
    assert caplog.messages == ["eigen-cam: the components of layer 'two' are known to 5e-01 of the largest only; raise "
                               "power_iterations"]  # fmt: skip


def test_run_whole_model_is_of_one_thread():
    """The block of one thread may end in the middle of another's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    explainer, images = EigenCAM(model, layer="1"), torch.rand(2, 3, 12, 12)
    entered, left = threading.Event(), threading.Event()

    def other():
        with explainer.run_whole_model():
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with explainer.run_whole_model():
        thread.start()
        assert entered.wait(60)
    left.set()
    thread.join()
    assert explainer(images).logits is None
    with explainer.run_whole_model():
        assert explainer(images).logits.shape == (2, 4)
