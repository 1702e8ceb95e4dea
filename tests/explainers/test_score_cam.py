"""Score-CAM, SS-CAM and IS-CAM against loops of the papers in float64, and against their peers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import ISCAM, SSCAM, InputError, ScoreCAM
from pyfast_xai.compat.grad_cam.pictures import scaled

DOUBLE = torch.float64


class Net(nn.Module):
    """The second channel of the first layer is dead, and the second layer is smaller than the image."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(5, 4, 3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(4 * 30, 5)
        with torch.no_grad():
            self.conv1.bias[1] = -100.0

    def forward(self, x):
        return self.fc(self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 10, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


TARGETS = [[1, 4], [0, 2]]


def activation_of(net, layer, images):
    saved = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, output: saved.append(output.detach()))
    with torch.no_grad():
        net(images)
    handle.remove()
    return saved[0]


def loop(net, layer, images, *, probability=False, normalised=True, samples=None):
    """Maps and heat maps, one image, target, sample and channel after the other."""
    maps, heats = [], []
    for image, targets, a in zip(images, TARGETS, activation_of(net, layer, images), strict=True):
        for target in targets:
            scores = []
            for k in range(len(a)):
                up = functional.interpolate(a[None, k : k + 1], image.shape[1:], mode="bilinear", align_corners=False)
                if up.max() == up.min():
                    scores.append(None)
                    continue
                mask = (up[0, 0] - up.min()) / (up.max() - up.min())
                result = []
                for change in (lambda k, mask: mask,) if samples is None else samples:
                    with torch.no_grad():
                        answer = net((image * change(k, mask))[None])[0]
                    result.append(float((answer.softmax(0) if probability else answer)[target]))
                scores.append(np.mean(result))
            total = sum(np.exp(s) for s in scores if s is not None)
            m = torch.zeros_like(a[0])
            for k, score in enumerate(scores):
                if score is not None:
                    m += (np.exp(score) / total if normalised else score) * a[k]
            maps.append(m)
            heats.append(
                functional.interpolate(
                    m.clamp_min(0)[None, None], image.shape[1:], mode="bilinear", align_corners=False
                )
            )
    return torch.stack(maps), torch.cat(heats)[:, 0]


SETTINGS = {
    "paper": ({}, {}),
    "official": (
        {"score": "probability", "channel_weights": "score"},
        {"probability": True, "normalised": False},
    ),
}


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("layer", ["relu1", "relu2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_loop_of_the_paper(net, images, layer, settings, batch_size):
    actual, slow = SETTINGS[settings]
    result = ScoreCAM(net, layer=layer, batch_size=batch_size, **actual)(images, TARGETS)
    maps, heats = loop(net, layer, images, **slow)
    torch.testing.assert_close(result.signed_map, maps, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.heatmap, heats, rtol=1e-9, atol=1e-12)
    assert result.target.tolist() == [1, 4, 0, 2]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_is_cam_goes_from_no_mask_to_the_whole_one(net, images, batch_size):
    shares = [lambda k, mask, share=i / 4: share * mask for i in range(1, 5)]
    result = ISCAM(net, layer="relu2", n_steps=4, batch_size=batch_size)(images, TARGETS)
    torch.testing.assert_close(result.signed_map, loop(net, "relu2", images, samples=shares)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_ss_cam_draws_noise_by_channel(net, images, batch_size):
    generator = torch.Generator().manual_seed(5)
    drawn = [[torch.randn(12, 10, generator=generator) for _ in range(5)] for _ in range(3)]
    noises = [lambda k, mask, item=item: mask + 0.5 * item[k].double() for item in drawn]
    explain = SSCAM(net, layer="relu1", n_samples=3, std=0.5, seed=5, batch_size=batch_size)
    result = explain(images, TARGETS)
    torch.testing.assert_close(result.signed_map, loop(net, "relu1", images, samples=noises)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_equals_pytorch_grad_cam_where_nothing_is_resized(net, images):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = [peer.utils.model_targets.ClassifierOutputTarget(c) for c in (1, 0)]
    with torch.no_grad():
        net.conv1.bias[1] = 0.0  # a dead channel takes its share of the softmax there
    with peer.ScoreCAM(net, [net.relu1]) as cam:
        expected = cam(images, targets)
    result = ScoreCAM(net, layer="relu1")(images, [1, 0]).signed_map
    np.testing.assert_allclose(scaled(scaled(result.clamp_min(0), (12, 10))).numpy(), expected, rtol=0, atol=1e-5)


def test_equals_torch_cam_where_nothing_is_resized(net, images):
    peer = pytest.importorskip("torchcam.methods")
    with torch.no_grad():
        net.conv1.bias[1] = 0.0
    with peer.ScoreCAM(net, "relu1") as extractor:
        (expected,) = extractor([1, 0], net(images), normalized=False)
    result = ScoreCAM(net, layer="relu1")(images, [1, 0]).signed_map
    torch.testing.assert_close(result.clamp_min(0), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [ScoreCAM, SSCAM, ISCAM])
def test_targets_share_the_forwards_and_flat_channels_take_none(net, images, kind):
    rows = []
    rounds = {SSCAM: {"n_samples": 2}, ISCAM: {"n_steps": 2}}.get(kind, {})
    handle = net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    explain = kind(net, layer="relu1", batch_size=4, **rounds)
    explain(images, TARGETS)
    rows.clear()
    explain(images, [[0, 1, 2, 3], [4, 3, 2, 1]])
    handle.remove()
    assert max(rows) <= 4
    rows = [count for count in rows if count > 1]  # of one image is the forward that finds the layers
    # The images run with and without a record; where the layer is read the forward does not reach its end.
    assert sum(rows) == 2 * len(images) + len(images) * 4 * (2 if rounds else 1)


def test_functions_are_targets_and_rows_do_not_depend_on_each_other(net, images):
    explain = SSCAM(net, layer="relu1", n_samples=2, batch_size=3)
    together = explain(images, lambda answer: answer[:, 1] - answer[:, 2])
    assert together.target is None
    for n in range(2):
        alone = explain(images[n : n + 1], lambda answer: answer[:, 1] - answer[:, 2])
        torch.testing.assert_close(together.signed_map[n], alone.signed_map[0], rtol=1e-9, atol=1e-12)


def test_several_layers_are_averaged(net, images):
    result = ScoreCAM(net, layer=["relu1", "relu2"])(images, 1)
    parts = [ScoreCAM(net, layer=layer)(images, 1).heatmap for layer in ("relu1", "relu2")]
    expected = torch.stack([item / item.amax((1, 2), keepdim=True).clamp_min(1e-300) for item in parts]).mean(0)
    torch.testing.assert_close(result.heatmap, expected)
    assert result.signed_map is None


def test_progress_counts_masked_images(net, images):
    recorded = []
    ScoreCAM(net, layer="relu1", batch_size=4, progress=lambda step: recorded.append((step.done, step.total)))(images)
    assert recorded == [(4, 8), (8, 8)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda net: ScoreCAM(net, channel_weights="sum"), "channel_weights must be one of", id="weights"),
        pytest.param(lambda net: ScoreCAM(net, score="loss"), "score must be one of", id="score"),
        pytest.param(lambda net: SSCAM(net, std=0.0), "std must be positive", id="std"),
        pytest.param(lambda net: SSCAM(net, n_samples=0), "n_samples must be at least 1", id="samples"),
        pytest.param(lambda net: ISCAM(net, n_steps=0), "n_steps must be at least 1", id="steps"),
    ],
)
def test_bad_settings(net, make, words):
    with pytest.raises(InputError, match=words):
        make(net)
