"""pytorch-grad-cam's classes here and there; and where it is wrong."""

import inspect

import numpy as np
import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn import functional

from pyfast_xai.compat import grad_cam as ours
from pyfast_xai.compat.grad_cam import projection
from pyfast_xai.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # pytorch-grad-cam's own
SCALED = 2e-6  # maps are float32 in [0, 1), resized by OpenCV there


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("pytorch_grad_cam")


@pytest.fixture(scope="module")
def targets():
    return pytest.importorskip("pytorch_grad_cam.utils.model_targets")


def same(actual, expected, tolerance=SCALED):
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert expected.max() > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# None of these is overwritten by what follows, which the peer does not see.
LAYERS = {
    "one": lambda m: [m.relu2],
    "two": lambda m: [m.relu1, m.relu2],
    "three in any order": lambda m: [m.relu2, m.relu1, m.pool],
}


def by_class(library, classes):
    return [library.ClassifierOutputTarget(c) for c in classes]


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("chosen", [None, [1, 4, 0]], ids=case_id)
@pytest.mark.parametrize("aug_smooth", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_methods(method, layers, chosen, aug_smooth, inplace, theirs, targets, build, unchanged):
    model, images = build("Plain", torch.float32, inplace=inplace), torch.randn(3, 3, 21, 18)
    own_targets, their_targets = (None, None) if chosen is None else (by_class(ours, chosen), by_class(targets, chosen))
    with unchanged(model, images):
        actual = getattr(ours, method)(model, LAYERS[layers](model))(images, own_targets, aug_smooth)
    with getattr(theirs, method)(model, LAYERS[layers](model)) as cam:
        same(actual, cam(images, their_targets, aug_smooth), 1e-5)


def test_a_layer_that_is_overwritten_counts_as_it_was(theirs, build):
    """There, on a CPU, the activation is that after the rectifier and the gradient that before it."""
    plain, inplace = build("Plain", torch.float32), build("Plain", torch.float32, inplace=True)
    inplace.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    for method in ("GradCAM", "GradCAMPlusPlus", "EigenCAM"):
        actual = [getattr(ours, method)(m, [m.conv2])(images, None) for m in (plain, inplace)]
        assert np.array_equal(*actual)
    with theirs.GradCAM(inplace, [inplace.conv2]) as cam:
        assert abs(cam(images, None) - ours.GradCAM(inplace, [inplace.conv2])(images, None)).max() > 0.01


def test_float64_in_and_float32_out(theirs, targets, build):
    model, images = build("Plain"), torch.randn(3, 3, 21, 18, dtype=torch.float64)
    for method in ("GradCAM", "GradCAMPlusPlus"):
        actual = getattr(ours, method)(model, [model.relu2])(images, by_class(ours, [1, 4, 0]))
        with getattr(theirs, method)(model, [model.relu2]) as cam:
            same(actual, cam(images, by_class(targets, [1, 4, 0])))


@pytest.mark.parametrize("size", [(9, 9), (40, 33), (7, 50)], ids=case_id)
def test_maps_are_resized_as_opencv_does(size, theirs, targets, build):
    model, images = build("Plain", torch.float32), torch.randn(2, 3, *size)
    actual = ours.GradCAM(model, [model.pool])(images, by_class(ours, [1, 4]))
    with theirs.GradCAM(model, [model.pool]) as cam:
        same(actual, cam(images, by_class(targets, [1, 4])))


def test_volumes(theirs, targets, build):
    model, volume = build("Volume", torch.float32), torch.randn(2, 1, 6, 8, 10)
    for method in ("GradCAM", "GradCAMPlusPlus", "EigenCAM"):
        settings = {"sign": "lapack"} if method == "EigenCAM" else {}
        actual = getattr(ours, method)(model, [model.relu], **settings)(volume, by_class(ours, [1, 4]))
        with getattr(theirs, method)(model, [model.relu]) as cam:
            same(actual, cam(volume, by_class(targets, [1, 4])), 1e-5)


def eigen(library, model, layers, images, **settings):
    with library.EigenCAM(model, layers, **settings) as cam:
        return cam(images, None)


@pytest.mark.parametrize("layers", LAYERS)
def test_eigen_cam_with_the_sign_of_lapack(layers, theirs, build, unchanged):
    model, images = build("Plain", torch.float32), torch.randn(5, 3, 21, 18)
    with unchanged(model, images):
        actual = eigen(ours, model, LAYERS[layers](model), images, sign="lapack")
    same(actual, eigen(theirs, model, LAYERS[layers](model), images), 1e-5)


def test_eigen_cam_but_for_the_sign(theirs):
    peer = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations")
    activations = torch.randn(6, 8, 7, 9).relu().numpy()
    activations[2, 1, 3, 3] = np.nan
    before = activations.copy()
    expected = peer.get_2d_projection(activations)
    for sign in ("fixed", "lapack"):
        actual = ours.get_2d_projection(activations, sign)
        agree = np.sign((actual * expected).sum((1, 2)))
        scale = abs(expected).max((1, 2))[:, None, None]
        np.testing.assert_allclose(actual * agree[:, None, None] / scale, expected / scale, atol=1e-4)
        if sign == "lapack":
            assert (agree > 0).all()
    assert np.array_equal(activations, before, equal_nan=True)


def test_eigen_cam_is_right_side_up_where_the_peer_is_upside_down():
    """A bright square on a dark ground, over and over: the square is what the map must show."""
    generator = torch.Generator().manual_seed(0)
    lapack = []
    for _ in range(40):
        direction = torch.rand(32, generator=generator)
        activation = 0.1 * torch.rand(1, 32, 14, 14, generator=generator)
        activation[0, :, 3:7, 5:9] += direction[:, None, None]
        for sign in ("fixed", "lapack"):
            result = ours.get_2d_projection(activation.numpy(), sign)[0]
            inside = result[3:7, 5:9].mean() > result.mean()
            if sign == "fixed":
                assert inside
            else:
                lapack.append(inside)
    assert not all(lapack), "the sign of this LAPACK is never wrong here, and the test shows nothing"


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus"])
def test_eigen_smooth(method, theirs, targets, build):
    model, images = build("Plain"), torch.randn(4, 3, 21, 18, dtype=torch.float64)
    chosen = [1, 4, 0, 2]

    class Turned(getattr(ours, method)):
        def get_cam_image(self, *args):
            return -super().get_cam_image(*args)

    up, down = (
        kind(model, [model.relu2])(images, by_class(ours, chosen), eigen_smooth=True)
        for kind in (getattr(ours, method), Turned)
    )
    with getattr(theirs, method)(model, [model.relu2]) as cam:
        expected = cam(images, by_class(targets, chosen), eigen_smooth=True)
    # Rounding alone turns the sign that LAPACK gives: each map is one of two.
    for one, other, peer in zip(up, down, expected, strict=True):
        assert min(abs(one - peer).max(), abs(other - peer).max()) < 1e-4
        assert abs(one - other).max() > 0.5


def test_a_smoothed_map_points_where_the_map_does_that_it_smooths():
    weighed = torch.randn(20, 8, 5, 6)
    summed = weighed.sum(1)
    for along in (summed, -summed):
        result = projection.project(weighed, "fixed", along)
        assert ((result * (along - along.mean((1, 2), keepdim=True))).sum((1, 2)) > 0).all()


def test_tokens_through_a_reshape_transform(theirs, targets):
    transforms = pytest.importorskip("pytorch_grad_cam.utils.reshape_transforms")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)
            self.first = nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x):
            x = self.patch(x).flatten(2).mT
            x = self.norm(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
            return self.fc((x.sigmoid() * x.mean(1, keepdim=True)).mean(1))

    model, images = Tokens().eval(), torch.randn(2, 3, 16, 12)

    def transform(tensor):
        return ours.vit_reshape_transform(tensor, 4, 3)

    for method in ("GradCAM", "GradCAMPlusPlus", "EigenCAM"):
        settings = {"sign": "lapack"} if method == "EigenCAM" else {}
        actual = getattr(ours, method)(model, [model.norm], transform, **settings)(images, by_class(ours, [1, 4]))
        cam = getattr(theirs, method)(model, [model.norm], lambda t: transforms.vit_reshape_transform(t, 4, 3))
        with cam:
            same(actual, cam(images, by_class(targets, [1, 4])), 1e-5)


def test_reshape_transforms():
    transforms = pytest.importorskip("pytorch_grad_cam.utils.reshape_transforms")
    tokens = torch.randn(2, 50, 6)
    for item, expected in (
        (ours.vit_reshape_transform(tokens, 7, 7), transforms.vit_reshape_transform(tokens, 7, 7)),
        (ours.swinT_reshape_transform(tokens[:, 1:]), transforms.swinT_reshape_transform(tokens[:, 1:])),
    ):
        assert torch.equal(item, expected)
    levels = {"0": torch.randn(1, 4, 16, 16), "pool": torch.randn(1, 4, 5, 5)}
    assert torch.equal(ours.fasterrcnn_reshape_transform(levels), transforms.fasterrcnn_reshape_transform(levels))


def test_a_layer_that_returns_a_dict(theirs, build):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return {"0": x, "pool": functional.max_pool2d(x, 2)}

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Pyramid()

        def forward(self, x):
            return self.backbone(x)["pool"].mean((2, 3))

    transforms = pytest.importorskip("pytorch_grad_cam.utils.reshape_transforms")
    model, images = Detector().eval(), torch.randn(2, 3, 18, 18)
    actual = ours.EigenCAM(model, [model.backbone], ours.fasterrcnn_reshape_transform, sign="lapack")(images, None)
    with theirs.EigenCAM(model, [model.backbone], transforms.fasterrcnn_reshape_transform) as cam:
        same(actual, cam(images, None), 1e-5)
    with pytest.raises(InputError, match="target_layers must return one tensor each"):
        ours.GradCAM(model, [model.backbone], ours.fasterrcnn_reshape_transform)(images, None)


OUTPUT_TARGETS = {
    "ClassifierOutputTarget": (2,),
    "ClassifierOutputSoftmaxTarget": (2,),
    "ClassifierOutputReST": (2,),
    "BinaryClassifierOutputTarget": (0,),
    "SoftmaxOutputTarget": (),
    "RawScoresOutputTarget": (),
    "FinerWeightedTarget": (1, [0, 3], 0.6),
}


@pytest.mark.parametrize("name", OUTPUT_TARGETS)
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=case_id)
def test_targets(name, shape, targets):
    output, arguments = torch.randn(*shape, dtype=torch.float64), OUTPUT_TARGETS[name]
    actual, expected = (getattr(library, name)(*arguments)(output) for library in (ours, targets))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_targets_of_segmentation_and_detection(targets):
    mask = np.random.default_rng(0).integers(0, 2, (6, 7)).astype(np.float32)
    scores = torch.randn(4, 6, 7)
    actual, expected = (library.SemanticSegmentationTarget(2, mask)(scores) for library in (ours, targets))
    torch.testing.assert_close(actual, expected)
    result = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20], [1, 1, 9, 9]], dtype=torch.float64),
        "labels": torch.tensor([1, 2, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64),
    }
    before = [
        np.array([1.0, 1, 9, 9]),
        np.array([6.0, 5, 20, 19]),
        np.array([0.0, 0, 2, 2]),
        np.array([5.0, 5, 20, 20]),
    ]
    for labels in ([1, 2, 1, 2], [1, 2, 1, 1]):
        actual, expected = (library.FasterRCNNBoxScoreTarget(labels, before)(result) for library in (ours, targets))
        torch.testing.assert_close(actual, expected)
        assert actual > 1
    assert ours.FasterRCNNBoxScoreTarget([1], before)({**result, "boxes": torch.zeros(0, 4)}) == 0


def test_targets_of_a_model_that_returns_a_list(theirs, targets, build):
    class Listed(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return [{"scores": row} for row in self.inside(x)]

    inside = build("Plain", torch.float32)
    model, images = Listed(inside), torch.randn(2, 3, 12, 12)
    chosen = [lambda actual: actual["scores"][1], lambda actual: actual["scores"][3:].sum()]
    actual = ours.GradCAM(model, [inside.relu2])(images, chosen)
    with theirs.GradCAM(model, [inside.relu2]) as cam:
        same(actual, cam(images, chosen))
    with pytest.raises(InputError, match="targets must be given for a model that returns list"):
        ours.GradCAM(model, [inside.relu2])(images, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "EigenCAM"])
def test_half_precision(method, dtype, build):
    """All of these raise TypeError there, in one dtype or both."""
    model, images = build("Plain", torch.float32), torch.randn(2, 3, 16, 16)
    expected = getattr(ours, method)(model, [model.relu2])(images, None)
    result = getattr(ours, method)(model.to(dtype), [model.relu2])(images.to(dtype), None)
    assert result.dtype == np.float32
    if method != "GradCAMPlusPlus":  # whose cubes of gradients lose too much to be compared
        assert abs(result - expected).mean() < 0.05
    assert result.max() > 0.9


def test_the_map_stays_a_tensor_where_that_is_wanted(build):
    model, images = build("Plain", torch.float32), torch.randn(2, 3, 16, 16)
    cam = ours.GradCAM(model, [model.relu2])
    maps = cam.maps(images, by_class(ours, [1, 2]))
    assert isinstance(maps, torch.Tensor)
    assert not maps.requires_grad
    assert np.array_equal(maps.numpy(), cam(images, by_class(ours, [1, 2])))
    torch.testing.assert_close(cam.outputs, model(images))


def test_training_flags_and_own_ideas_of_eval_are_left_alone(build, unchanged):
    model, images = build("Plain", torch.float32), torch.randn(2, 3, 16, 16)
    expected = ours.GradCAM(model, [model.relu2])(images, None)

    def starts_a_training(*args):
        raise AssertionError("eval was called")

    model.relu1.train()
    model.train()
    model.eval = starts_a_training
    with unchanged(model, images):
        result = ours.GradCAM(model, [model.relu2])(images, None)
        ours.GuidedBackpropReLUModel(model)(images)
    assert np.array_equal(result, expected)


def test_every_image_needs_its_target(build):
    """There images without one come back blank."""
    model, images = build("Plain", torch.float32), torch.randn(3, 3, 16, 16)
    with pytest.raises(InputError, match="targets must be one for each of 3 images, got 1"):
        ours.GradCAM(model, [model.relu2])(images, by_class(ours, [1]))


def test_an_exception_is_not_swallowed(build):
    model = build("Plain", torch.float32)
    with pytest.raises(IndexError, match="mine"), ours.GradCAM(model, [model.relu2]):
        raise IndexError("mine")


def test_frozen_parameters_and_callers_without_gradients(build):
    model, images = build("Plain", torch.float32), torch.randn(2, 3, 16, 16)
    expected = ours.GradCAM(model, [model.relu2])(images, None)
    model.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert np.array_equal(ours.GradCAM(model, [model.relu2])(images, None), expected)


@pytest.mark.parametrize("chosen", [None, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_guided_backprop(chosen, inplace, theirs, build, unchanged):
    model, image = build("Plain", torch.float32, inplace=inplace), torch.randn(1, 3, 16, 12)
    with unchanged(model, image):
        actual = ours.GuidedBackpropReLUModel(model)(image, chosen)
    expected = theirs.GuidedBackpropReLUModel(model, device="cpu")(image.clone(), chosen)
    same(actual, expected, 1e-6 * float(abs(expected).max()))
    # A second time it is not twice as much, and the first result stays.
    first = actual.copy()
    assert np.array_equal(ours.GuidedBackpropReLUModel(model)(image, chosen), first)
    assert np.array_equal(actual, first)


def test_guided_backprop_of_a_batch_is_that_of_each_image(build):
    model, images = build("Plain"), torch.randn(3, 3, 16, 12, dtype=torch.float64)
    for chosen in (None, [1, 4, 0], 2):
        result = ours.GuidedBackpropReLUModel(model)(images, chosen)
        assert result.shape == (3, 16, 12, 3)
        for i, item in enumerate(result):
            one = chosen[i] if isinstance(chosen, list) else chosen
            np.testing.assert_allclose(item, ours.GuidedBackpropReLUModel(model)(images[i : i + 1], one), atol=1e-14)


def test_pictures(theirs):
    image = pytest.importorskip("pytorch_grad_cam.utils.image")
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    picture, mask = rng.random((9, 8, 3), dtype=np.float32), rng.random((9, 8), dtype=np.float32)
    mask[0] = np.linspace(0, 1, 8)
    for settings in ({}, {"use_rgb": True}, {"image_weight": 0.2}, {"colormap": cv2.COLORMAP_VIRIDIS, "use_rgb": True}):
        actual, expected = (library.show_cam_on_image(picture, mask, **settings) for library in (ours, image))
        assert actual.dtype == np.uint8
        assert np.array_equal(actual, expected)
    levels = np.linspace(0, 1, 256, dtype=np.float32)[None]
    black = np.zeros((1, 256, 3), dtype=np.float32)
    for use_rgb in (False, True):
        assert np.array_equal(
            ours.show_cam_on_image(black, levels, use_rgb), image.show_cam_on_image(black, levels, use_rgb)
        )
    for options in (rng.integers(0, 256, (9, 8, 3), dtype=np.uint8), picture, picture.astype(np.float64)):
        for settings in ({}, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}):
            torch.testing.assert_close(
                ours.preprocess_image(options, **settings),
                image.preprocess_image(options, **settings),
                rtol=0,
                atol=1e-7,
            )
    gradient = rng.standard_normal((9, 8, 3)).astype(np.float32)
    assert np.array_equal(ours.deprocess_image(gradient), image.deprocess_image(gradient))
    maps = rng.standard_normal((3, 5, 7)).astype(np.float32)
    for size in (None, (20, 11), (4, 3)):
        np.testing.assert_allclose(
            ours.scale_cam_image(maps, size), image.scale_cam_image(maps, size), rtol=0, atol=SCALED
        )
    volumes = rng.standard_normal((2, 4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(
        ours.scale_cam_image(volumes, (9, 8, 7)), image.scale_cam_image(volumes, (9, 8, 7)), rtol=0, atol=SCALED
    )


BAD = {
    "a sign": (lambda m, x: ours.EigenCAM(m, [m.relu1], sign="up"), "sign must be one of 'fixed', 'lapack', got 'up'"),
    "no layer": (lambda m, x: ours.GradCAM(m, []), "target_layers must be a list of modules"),
    "a layer by name": (lambda m, x: ours.GradCAM(m, ["relu1"]), "target_layers must be a list of modules"),
    "vectors": (lambda m, x: ours.GradCAM(m, [m.fc])(x, None), "target_layers must return maps"),
    "another model's": (lambda m, x: ours.GradCAM(m, [nn.ReLU()])(x, None), "layer must run in the forward pass"),
    "one image": (lambda m, x: ours.GradCAM(m, [m.relu1])(x[0], None), r"input_tensor must be \[N, C, H, W\]"),
    "a graph": (lambda m, x: ours.BaseCAM(m, [m.relu1], detach=False), "detach must be True"),
    "a class too many": (lambda m, x: ours.GuidedBackpropReLUModel(m)(x, 5), "target_category must lie below 5"),
    "another device": (lambda m, x: ours.GuidedBackpropReLUModel(m, "cuda"), "device must be that of the model, cpu"),
    "a bright picture": (
        lambda m, x: ours.show_cam_on_image(np.full((2, 2, 3), 2.0), np.zeros((2, 2))),
        r"img must be float in \[0, 1\], got a largest value of 2",
    ),
    "infinity": (
        lambda m, x: ours.get_2d_projection(np.full((1, 2, 2, 2), np.inf)),
        "activations must not be infinite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_sentence(case, build, unchanged):
    call, message = BAD[case]
    model, images = build("Plain", torch.float32), torch.randn(2, 3, 8, 8)
    with unchanged(model, images), pytest.raises(InputError, match=message) as caught:
        call(model, images)
    assert "\n" not in str(caught.value)


def test_signatures_are_theirs_and_no_more_than_a_keyword_is_added(theirs):
    for name in ("GradCAM", "GradCAMPlusPlus", "EigenCAM", "GuidedBackpropReLUModel"):
        for method in ("__init__", "__call__"):
            actual, expected = (
                [
                    p.name
                    for p in inspect.signature(getattr(getattr(library, name), method)).parameters.values()
                    if p.kind is p.POSITIONAL_OR_KEYWORD
                ]
                for library in (ours, theirs)
            )
            assert actual == expected, (name, method)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_networks_of_torchvision(name, theirs, targets):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    model = model.eval()
    layers = [{"resnet18": "layer4", "squeezenet1_1": "features"}[name]]
    layers = [model.get_submodule(layer) for layer in layers]
    images = torch.randn(2, 3, 64, 64)
    for method in ("GradCAM", "GradCAMPlusPlus", "EigenCAM"):
        settings = {"sign": "lapack"} if method == "EigenCAM" else {}
        actual = getattr(ours, method)(model, layers, **settings)(images, by_class(ours, [3, 7]))
        with getattr(theirs, method)(model, layers) as cam:
            same(actual, cam(images, by_class(targets, [3, 7])), 1e-3)
