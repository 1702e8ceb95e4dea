"""Every family of classifiers in torchvision, with random weights."""

import copy

import pytest
import torch
from case_ids import case_id

from pyfast_xai import (
    CLEAR,
    CNNFixations,
    DeconvNet,
    EigenCAM,
    ExcitationBackprop,
    FGVis,
    GradCAM,
    GuidedBackprop,
    Saliency,
)
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence.points import marking
from pyfast_xai.tape import record, replay

models = pytest.importorskip("torchvision.models")

# The smallest image each accepts, or nearly; higher than wide where a network takes it.
SIZES = {
    "alexnet": (71, 64),
    "convnext_tiny": (48, 32),
    "densenet121": (48, 32),
    "efficientnet_b0": (48, 32),
    "efficientnet_v2_s": (48, 32),
    "googlenet": (48, 32),
    "inception_v3": (90, 75),
    "maxvit_t": (224, 224),
    "mnasnet0_5": (48, 32),
    "mobilenet_v2": (48, 32),
    "mobilenet_v3_small": (48, 32),
    "regnet_x_400mf": (48, 32),
    "regnet_y_400mf": (48, 32),
    "resnet18": (48, 32),
    "resnet50": (48, 32),
    "resnext50_32x4d": (48, 32),
    "shufflenet_v2_x1_0": (48, 32),
    "squeezenet1_0": (48, 32),
    "swin_t": (64, 64),
    "swin_v2_t": (64, 64),
    "vgg11_bn": (48, 32),
    "vit_b_32": (224, 224),
    "wide_resnet50_2": (48, 32),
}


@pytest.fixture(scope="module", params=SIZES)
def network(request):
    torch.manual_seed(0)
    aux = request.param in ("googlenet", "inception_v3")
    settings = {"init_weights": False, "aux_logits": False} if aux else {}
    model = models.get_model(request.param, weights=None, num_classes=10, **settings).requires_grad_(False)
    if request.param == "vit_b_32":  # the last layer starts as zeros, of which nothing is evidence
        model.heads.head.weight.normal_()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:
        # Statistics of a batch: without them activations fade to subnormal numbers, which are slow. Of two small
        # images they would be so near zero that the network amplifies rounding.
        for module in norms:
            module.momentum = 1.0
        model.train()(torch.randn(8, 3, *SIZES[request.param]))
    return model.eval(), torch.randn(1, 3, *SIZES[request.param])


@pytest.fixture
def _unfused():
    """A fused transformer encoder rounds in another order; recording never uses it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.usefixtures("_unfused")
def test_replay_gives_the_output_bit_for_bit(network):
    model, images = network
    tape = record(model, images, policy=evidence.policy)
    assert torch.equal(tape.result, model(images))
    # No value of the recorded image is left on the tape.
    other = images.flip(3) + 0.5
    assert torch.equal(replay(tape, other), model(other))


@pytest.mark.usefixtures("_unfused")
def test_an_accelerated_model_gives_the_output_up_to_rounding(network, caplog):
    model, images = network
    exact = copy.deepcopy(model).double()
    # With the statistics of what the batch norms have seen, also mirrored and negated, as replays are audited: farther
    # off a random EfficientNetV2 amplifies the rounding of a plain forward to a sixth of its output.
    options = images.flip(2)
    expected = exact(options.double())
    largest = float(expected.abs().max())

    difference = (ReplayedModel(exact).record(options.double()).result - expected).abs().max()
    assert difference <= 1e-11 * largest

    # Some of these networks amplify rounding: as far from the truth as the model itself is, within a small factor. One
    # call may be lucky, so that it counts how far the model is at several images that are the same but for rounding.
    layouts = (torch.contiguous_format, torch.channels_last)
    drawn = torch.Generator().manual_seed(0)
    near = [options, *(options * (1 + torch.randn(options.shape, generator=drawn) * 2**-24) for _ in range(3))]
    rounding = max(
        float((model(image.contiguous(memory_format=layout)).double() - exact(image.double())).abs().max())
        for image in near
        for layout in layouts
    )
    accelerated = ReplayedModel(model)
    accelerated.record(images)
    for layout in layouts:
        result = accelerated.record(options.contiguous(memory_format=layout)).result.double()
        assert (result - expected).abs().max() <= 5 * max(rounding, 1e-6 * largest)
    assert not caplog.messages


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_fixations_lie_in_the_image(network, variant):
    model, images = network
    explanation = CNNFixations(model, variant=variant)(images)
    with marking():  # as on a device
        (marked,) = CNNFixations(model, variant=variant)(images).points
    assert torch.equal(marked, explanation.points[0])
    size = images.shape[2:]
    assert explanation.heatmap.shape == (1, *size)
    assert explanation.heatmap.isfinite().all()
    (points,) = explanation.points
    assert len(points)
    assert explanation.heatmap.max() > 0
    assert (points >= 0).all()
    assert (points < torch.tensor(size)).all()


def test_eigen_cam_is_a_finite_map_of_the_size_of_the_image(network):
    model, images = network
    explanation = EigenCAM(model)(images)
    assert explanation.heatmap.shape == (1, *images.shape[2:])
    assert explanation.heatmap.isfinite().all()
    assert explanation.heatmap.min() >= 0
    assert explanation.heatmap.max() > 0


def gradient_by_autograd(model, images, chosen):
    leaf = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        return torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)[0]


@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
def test_saliency_is_the_gradient_of_autograd(network, dtype):
    model, images = network
    if images.shape[3] == 32:
        # Maps one pixel wide are channels_last and contiguous at once, where batch norm rounds in another order.
        images = torch.randn(1, 3, 96, 64)
    model, images = copy.deepcopy(model).to(dtype), images.to(dtype)
    explanation = Saliency(model)(images)
    if dtype == torch.float32:
        # In the layout of the recording: in another layout sums round differently, and rectifiers near zero flip.
        with torch.no_grad():
            formats = [images.contiguous(memory_format=torch.channels_last), images]
            images = min(formats, key=lambda run: float((model(run) - explanation.logits).abs().max()))
    expected = gradient_by_autograd(model, images, explanation.target)
    if dtype == torch.float64 and not isinstance(model, (models.ConvNeXt, models.MaxVit, models.SwinTransformer)):
        assert torch.equal(explanation.attribution, expected)
    elif dtype == torch.float64:  # a strided convolution onto a few pixels: its adjoint adds up in another order
        torch.testing.assert_close(explanation.attribution, expected, rtol=0, atol=1e-13 * expected.abs().max().item())
    else:
        torch.testing.assert_close(explanation.attribution, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@pytest.mark.parametrize("method", [DeconvNet, GuidedBackprop])
def test_attributions_are_finite(network, method):
    model, images = network
    explanation = method(model)(images, [[1, 3]])
    assert explanation.attribution.shape == (2, *images.shape[1:])
    assert explanation.attribution.isfinite().all()
    assert explanation.heatmap.max() > 0


@pytest.mark.parametrize("game", ["deletion", "generation"])
def test_fgvis_plays_on_every_family(network, game):
    model, images = network
    result = FGVis(model, game=game, n_iterations=2, progress=False)(images)
    assert result.mask.isfinite().all()
    assert ((result.mask >= 0) & (result.mask <= 1)).all()
    assert result.perturbed.isfinite().all()


def test_clear_finds_a_class_everywhere(network):
    model, images = network
    # The random DenseNet answers with 1e17, of which responses overflow in float32.
    explanation = CLEAR(copy.deepcopy(model).double(), candidates=3)(images.double())
    assert explanation.dominant_class.shape == (1, *images.shape[2:])
    assert ((explanation.dominant_class >= 0) & (explanation.dominant_class < 10)).all()
    assert explanation.signed_map.isfinite().all()


def test_class_activation_maps_and_excitation_on_every_family(network):
    model, images = network
    model, images = copy.deepcopy(model).double(), images.double()
    cam = GradCAM(model)(images, [[1, 3]])
    assert cam.heatmap.shape == (2, *images.shape[2:])
    assert cam.signed_map.isfinite().all()
    assert cam.signed_map.abs().amax() > 0
    wins = ExcitationBackprop(model)(images, [[1, 3]]).signed_map
    assert (wins >= 0).all()
    # Signed features hand nothing to what is negative: a part of the probability may be lost, none is gained.
    assert (wins.sum((1, 2)) <= 1 + 1e-9).all()
    assert wins.amax() > 0
