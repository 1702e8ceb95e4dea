"""Nothing between a recording and its gradients or points waits for a device: no number is read, no shape hangs on one.

On a device such a step would stop the host until everything before it has run, and could not be part of a CUDA graph.
It is seen here without a device, in two ways: a dispatch mode refuses every operation that reads, and tensors on
`meta` have no numbers to be read, nor may others be mixed with them.
"""

import device_waits
import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn import functional

from pyfast_xai import CNNFixations, ops
from pyfast_xai.explainers import EigenCAM, FGVis, eigen_cam
from pyfast_xai.explainers.common.output_gradients import one_hot, output_gradients_without_sync
from pyfast_xai.explainers.fgvis import GAMES, _Match
from pyfast_xai.explainers.fixations import VARIANTS
from pyfast_xai.kernels.reference.triplets import of_a_batch
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import Options, Points
from pyfast_xai.rules.evidence.points import marking
from pyfast_xai.rules.gradient import (
    DECONVNET,
    EXCITATION,
    GUIDED,
    LINEAR,
    NEAREST,
    GradientRules,
    backward_pass,
    derivative,
    excitation,
)
from pyfast_xai.tape import record, replay

WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask, written to": lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: torch.unique(x),
    "equal": lambda x: torch.equal(x, x + 1),
    "where": lambda x: torch.where(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long()),
}


@pytest.mark.parametrize("name", WAITING)
def test_waiting_is_noticed(name):
    """Otherwise the tests below would show nothing."""
    with pytest.raises(AssertionError, match="waits for the device"), device_waits.ForbidReads():
        WAITING[name](torch.randn(4))


def test_a_copy_to_the_device_is_noticed():
    with device_waits.ForbidUploads():
        for upload in (lambda: torch.ones(2).to("meta"), lambda: torch.ones(2, device="meta").copy_(torch.ones(2))):
            with pytest.raises(AssertionError, match="copies numbers to the device"):
                upload()
        assert (torch.where(torch.ones(2, device="meta") > 0, 1, 0.5) + 3).shape == (2,)


class Residual(nn.Module):
    """What the networks of the field are made of: folded rectifiers, a skip, a concatenation, pools, a gate."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2, 1)
        self.gate, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(10, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = functional.relu_(x + self.one(functional.relu6(x)))
        y = self.relu(self.two(x))
        y = y * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(y, 1)))
        x = torch.cat([functional.avg_pool2d(x, 2), y], 1)
        return self.fc(functional.dropout(x.mean((2, 3)), training=self.training))


class Plain(nn.Module):
    """A VGG in small, with the other rectifiers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.GELU(), nn.Conv2d(8, 8, 3, padding="same"), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(1), nn.Linear(128, 16), nn.ReLU(True), nn.Linear(16, 5)),
        )

    def forward(self, x):
        return self.features(x)


class Tokens(nn.Module):
    """Attention over patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.encoder(self.patches(x).flatten(2).mT).mean(1))


NETWORKS = [Residual, Plain, Tokens]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


@pytest.fixture(params=["refusing", "meta", "meta, by plain PyTorch"])
def without_reading(request, monkeypatch):
    """A device on which nothing can be read, and the context for the steps that must not read."""
    if request.param != "refusing":  # meta, which autocast does not know
        for module in (derivative, excitation):
            monkeypatch.setattr(module, "node_device", lambda node: "cpu")
        make = torch.tensor

        def tensor(*args, device=None, **kwargs):
            if device is not None and torch.device(device).type == "meta":
                raise AssertionError("torch.tensor copies numbers to the device")
            return make(*args, device=device, **kwargs)

        monkeypatch.setattr(torch, "tensor", tensor)
    # Else the ops tell meta tensors their shapes only; so they run.
    with ops.backend("reference" if request.param.endswith("PyTorch") else "auto"):
        yield ("cpu", device_waits.ForbidReads) if request.param == "refusing" else ("meta", device_waits.ForbidUploads)


def arrange(network, device, targets=2):
    model = network().eval().to(device)
    images = torch.randn(2, 3, 16, 16, device=device)
    classes = torch.zeros(2, targets, dtype=torch.int64, device=device)
    return model, images, classes


def gradient(policy, model, images, classes):
    """The step itself: a recording, a seed, and the way back."""
    tape = record(model, images, policy=policy)
    (arrived,) = backward_pass(policy, tape, {tape.outputs: one_hot(classes, tape.result)}, [tape.inputs[0]])
    assert arrived.shape == (classes.shape[1], *images.shape)
    assert arrived.device == images.device
    return arrived


OVERLAYS = {
    "saliency": {},
    "guided": GUIDED,
    "deconvnet": DECONVNET,
    "clear": LINEAR | NEAREST,
    "excitation": EXCITATION,
}


@every_network
@pytest.mark.parametrize("method", OVERLAYS)
def test_a_dense_reading_reads_no_number(without_reading, network, method):
    device, context = without_reading
    arranged = arrange(network, device)
    with context():
        gradient(GradientRules(OVERLAYS[method]), *arranged)


GAME = {
    "defended": {},
    "forward": {"defence": "forward", "stop_at": "class"},
    "as in the paper": {"defence": "none", "sparsity": 0.1, "normalize": False, "similarity": "softmax"},
    "preserving": {"game": "preservation"},
}


@every_network
@pytest.mark.parametrize("settings", GAME)
def test_an_iteration_of_fgvis_reads_no_number(without_reading, network, settings):
    """Bounds of the image, then forward, gradient, judgement and step, again and again on the same tensors."""
    device, context = without_reading
    model, images, classes = arrange(network, device, targets=1)
    explainer = FGVis(model, patience=1, **GAME[settings])
    match = _Match.initial(
        GAMES[explainer.game],
        images,
        torch.zeros_like(images),
        classes[:, 0],
        torch.full((2,), 0.5, device=device),
        torch.zeros(2, dtype=torch.bool, device=device),
        sparsity=None,
    )
    state = [(id(tensor), tensor.shape, tensor.dtype) for tensor in match]
    explainer.record(images)  # the first call on a CPU is compared with the model in the other memory format
    with context():
        bounds = explainer._bounds(match, (), {})
        for _ in range(3):
            assert explainer._iterate(match, bounds, "logits", (), {}).shape == (2,)
    assert [(id(tensor), tensor.shape, tensor.dtype) for tensor in match] == state


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("settings", [{}, {"component": [2, 1], "center": True}, {"solver": "subspace"}], ids=case_id)
def test_eigen_cam_reads_one_tensor_in_the_end(monkeypatch, settings, served):
    looked = []
    monkeypatch.setattr(
        eigen_cam, "_log_diagnostics", lambda names, diagnostics: looked.extend(zip(names, diagnostics, strict=True))
    )
    explainer = EigenCAM(nn.Identity().eval(), **settings)
    with ops.backend(served):
        maps = explainer.project(torch.empty(2, 40, 6, 5, device="meta"), (24, 20), "layer")
    assert maps.shape == (2, len(explainer.components), 6, 5)
    ((name, doubt),) = looked
    assert (name, doubt.shape, doubt.device.type) == ("layer", (2,), "meta")


@pytest.mark.parametrize("solver", ops.Solver, ids=lambda solver: solver.name)
def test_singular_triplets_of_a_batch_are_found_without_a_number_read(solver):
    with device_waits.ForbidReads():
        left, singular, *_ = of_a_batch(torch.randn(3, 40, 30), 2, solver, 2, 0)
    assert (left.shape, singular.shape) == ((3, 40, 2), (3, 2))


def test_what_a_step_starts_from_reads_no_number(without_reading):
    device, context = without_reading
    model, images, classes = arrange(Residual, device)
    with context():
        tape = record(model, images, policy=GradientRules())
        for options in (None, classes, classes + 99):
            seeds = output_gradients_without_sync(tape, options)
            assert seeds.grads[tape.outputs].shape == (seeds.target.shape[1], 2, 5)


@every_network
def test_a_replay_reads_no_number(without_reading, network):
    device, context = without_reading
    model, images, _ = arrange(network, device)
    with context():
        tape = record(model, images)
        assert tape.not_replayable is None
        assert replay(tape, images).shape == (2, 5)


def test_many_targets_share_a_walk_without_a_number_read(without_reading):
    """As CLEAR does: retained, again and again."""
    device, context = without_reading
    model, images, _ = arrange(Residual, device)
    with context():
        policy = GradientRules({**GUIDED, **NEAREST})
        tape = record(model, images, policy=policy)
        for k in (1, 5, 3):
            seeds = torch.ones(k, 2, 5, device=device)
            assert backward_pass(policy, tape, {tape.outputs: seeds}, tape.inputs[:1], retain=True)[0].shape[0] == k


class Words(nn.Module):
    """Steps of an LSTM over rows of a map, one way and back."""

    def __init__(self):
        super().__init__()
        self.conv, self.lstm = nn.Conv2d(3, 2, 5, 3), nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        rows = self.conv(x).relu().transpose(1, 2).flatten(2)
        return self.fc(self.lstm(rows)[0][:, 1])


def trace(explain, model, images, classes):
    """CNN-Fixations from the recording to the sorted list of pixels."""
    tape = record(model, images, policy=evidence.policy)
    starts = torch.arange(len(images), device=images.device) * tape.outputs.shape[1] + classes[:, 0]
    return explain._pixels(tape, {tape.outputs: Points(starts)}, images.shape)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("network", [*NETWORKS, Words], ids=lambda network: network.__name__)
def test_a_trace_reads_no_number(without_reading, network, variant):
    device, context = without_reading
    model, images, classes = arrange(network, device)
    explain = CNNFixations(model, variant=variant)
    # By the shapes that the kernels promise, and on meta step by step as plain PyTorch, too. On the CPU that reads its
    # points to check them.
    for served in ("auto",) if device == "cpu" else ("auto", "reference"):
        with context(), device_waits.ForbidUploads(), marking(), ops.backend(served):
            pixels = trace(explain, model, images, classes)
        assert pixels.device == images.device
        assert pixels.dim() == 1
        assert len(pixels) <= 2 * (3 if explain.duplicates else 1) * 16 * 16


@pytest.mark.parametrize("name", ["densenet121", "resnet18", "swin_t"])
def test_a_trace_of_a_network_of_the_field_reads_no_number(name):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None).eval().to("meta")
    images, classes = torch.zeros(2, 3, 96, 96, device="meta"), torch.zeros(2, 1, dtype=torch.int64, device="meta")
    with ops.backend("reference"):
        assert len(trace(CNNFixations(model, variant="authors"), model, images, classes)) <= 2 * 1024


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("network", [*NETWORKS, Words], ids=lambda network: network.__name__)
def test_what_a_trace_finds_is_the_same_while_it_is_watched(network, variant):
    model, images, classes = arrange(network, "cpu")
    explain = CNNFixations(model, variant=variant)
    expected = trace(explain, model, images, classes)
    with device_waits.ForbidReads(), marking():
        watched = trace(explain, model, images, classes)
    assert torch.equal(watched[watched < 2 * 16 * 16], expected)
    assert len(expected)


class Deep(nn.Module):
    """Blocks that each take a branch, a skip and a concatenation."""

    def __init__(self, blocks):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1) for _ in range(blocks)])
        self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = x + torch.cat([conv(x), x[:, :4]], 1)
        return self.fc(x.mean((2, 3)))


def test_lists_do_not_grow_with_depth():
    """Points that part and meet again are no more than they were, whatever the shapes would allow."""
    lengths = []
    for blocks in (1, 20):
        model, images, classes = arrange(lambda blocks=blocks: Deep(blocks), "meta")
        tape = record(model, images, policy=evidence.policy)
        starts = {tape.outputs: Points(classes[:, 0])}
        lengths.append(len(evidence.walk(tape, starts, tape.inputs[0], Options(signed=True))))
    # The fully connected layer makes 8 of each; an input has 2 * 3 * 16 * 16 places for either sign.
    assert lengths == [2 * 8, 2 * 8]


def test_what_a_walk_gives_is_the_same_while_it_is_watched():
    model, images, classes = arrange(Residual, "cpu")
    expected = gradient(GradientRules(GUIDED), model, images, classes)
    with device_waits.ForbidReads():
        watched = gradient(GradientRules(GUIDED), model, images, classes)
    assert torch.equal(watched, expected)
    assert expected.any()
