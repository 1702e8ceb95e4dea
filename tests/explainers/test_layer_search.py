"""Which layer is explained, and which cell of its map is which part of the image."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import (
    CAM,
    FEM,
    AblationCAM,
    CNNFixations,
    DeepFeatureFactorization,
    EigenCAM,
    ExcitationBackprop,
    GradCAM,
    GradCAMPlusPlus,
    GuidedGradCAM,
    LayerCAM,
    ScoreCAM,
    ShapleyCAM,
)
from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.explainers.common.axes import axes_of, layout_of
from pyfast_xai.explainers.common.layer_search import LayerSearch, last_features, sensitive_levels, token_grid
from pyfast_xai.explainers.common.targets import TargetByImage
from pyfast_xai.rules.gradient import GradientRules
from pyfast_xai.tape import record

SIZE = (32, 48)
PATCH = 8
GRID = (4, 6)


def coordinates(images=2, size=SIZE):
    """Pictures whose channels are the row, the column and the image that a pixel is of."""
    y, x = torch.meshgrid(torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij")
    return torch.stack([torch.stack([y, x, torch.full_like(y, n)]) for n in range(images)])


class Moves(nn.Module):
    """Averages patches, which leaves their coordinates in the channels, and then moves them as a function says."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(functional.avg_pool2d(x, PATCH))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def windows(x, size=2):
    """`[N, H / 2, W / 2, 4, C]`."""
    n, c, h, w = x.shape
    return x.view(n, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def unrolled(x):
    """Tokens in the order of their windows, the place in a window outermost."""
    return windows(x).permute(0, 3, 1, 2, 4).flatten(1, 3)


def of_windows(x, size=2):
    """Windows that were folded into the batch, put back to a map `[N, h, w, C]`."""
    n, c, h, w = x.shape
    folded = windows(x).flatten(0, 2) * 1.0  # [N * 6, 4, C]
    back = folded.view(n, h // size, w // size, size, size, c)
    return back.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)


HOLD = {
    "map": lambda x: x * 1,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "tokens": tokens,
    "transposed tokens": lambda x: tokens(x).mT,
    "transposed by a view": lambda x: x.reshape(len(x), 3, -1),
    "class token": lambda x: torch.cat([x.new_zeros(len(x), 1, 3), tokens(x)], 1),
    "registers behind": lambda x: torch.cat([tokens(x), x.new_zeros(len(x), 5, 3)], 1),
    "tokens at both ends": lambda x: torch.cat([x.new_zeros(len(x), 1, 3), tokens(x), x.new_zeros(len(x), 2, 3)], 1),
    "class token that is dropped": lambda x: torch.cat([x.new_zeros(len(x), 1, 3), tokens(x)], 1)[:, 1:],
    "class token that is split off": lambda x: torch.cat([x.new_zeros(len(x), 1, 3), tokens(x)], 1).split([1, 24], 1)[
        1
    ],
    "windows and back": of_windows,
    "windows in the order of windows": lambda x: windows(x).flatten(1, 3),
    "unrolled windows": unrolled,
    "heads and back": lambda x: tokens(x).view(len(x), 24, 3, 1).transpose(1, 2).transpose(1, 2).reshape(len(x), 24, 3),
    "batch and tokens in one and back": lambda x: (tokens(x).flatten(0, 1) * 1).view(len(x), 24, 3),
    "einsum": lambda x: torch.einsum("nchw->nhwc", x),
    "stacked columns": lambda x: x.transpose(2, 3).flatten(2).mT,  # column by column
    "moved": lambda x: x.movedim(1, -1),
    "rolled and padded": lambda x: functional.pad(x.roll(0, 2), (0, 0, 0, 0)),
    "mixed by attention": lambda x: (tokens(x) @ tokens(x).mT * 0 + torch.eye(24, dtype=x.dtype)) @ tokens(x),
    "one row an image more": lambda x: (x[:, None] * 1).squeeze(1),
    "patches of a view": lambda x: functional.unfold(x, 1).mT,
}


@pytest.mark.parametrize("policy", [None, GradientRules()], ids=["whole", "in parts"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", HOLD)
def test_every_cell_is_where_its_pixels_are(name, count, policy):
    images = coordinates(count)
    tape = record(Moves(HOLD[name]).eval(), images, policy=policy)
    layout = layout_of(axes_of(tape)[tape.outputs])
    assert layout is not None
    assert layout.grid == GRID
    expected = functional.avg_pool2d(images, PATCH).permute(0, 2, 3, 1)
    torch.testing.assert_close(layout.cells(tape.result), expected)


NO_MAP = {
    "windows in the batch": lambda x: windows(x).flatten(0, 2),
    "windows beside": lambda x: windows(x).flatten(1, 2),
    "heads in the batch": lambda x: tokens(x).view(len(x), 24, 3, 1).transpose(1, 2).flatten(0, 1),
    "heads beside": lambda x: tokens(x).view(len(x), 24, 3, 1).transpose(1, 2),
    "rows in the batch": lambda x: x.transpose(1, 2).flatten(0, 1),
    "one window": lambda x: windows(x)[:, 0, 0],
    "the mean over windows": lambda x: windows(x).mean((1, 2)),
    "half of the rows": lambda x: x[:, :, :2],
    "the average": lambda x: x.mean((2, 3)),
    "two grids": lambda x: torch.cat([tokens(x), tokens(functional.avg_pool2d(x, 2))], 1),
    "queries": lambda x: torch.ones(24, 24, dtype=x.dtype)[:12] @ tokens(x),
    "channels that are as many as tokens": lambda x: x.new_ones(24, 3) @ x.mean((2, 3)).mT,
    "attention": lambda x: tokens(x) @ tokens(x).mT,
    "shuffled tokens": lambda x: tokens(x)[:, torch.randperm(24)],
}


@pytest.mark.parametrize("policy", [None, GradientRules()], ids=["whole", "in parts"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", NO_MAP)
def test_parts_of_images_are_no_maps(name, count, policy):
    tape = record(Moves(NO_MAP[name]).eval(), coordinates(count), policy=policy)
    dims = axes_of(tape)[tape.outputs]
    assert tuple(dim.size for dim in dims) == tape.outputs.shape
    assert layout_of(dims) is None


# Networks, small ones of every kind


class Net(nn.Module):
    """Patches, a body, and a way to read it."""

    def __init__(self, read, width=16, classes=5, norm=True):
        super().__init__()
        self.patch, self.norm, self.read = nn.Conv2d(3, width, 8, 8), nn.LayerNorm(width), read
        self.cls, self.probe = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 1, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True)
        self.attention, self.fc = nn.MultiheadAttention(width, 4, batch_first=True), nn.Linear(width, classes)
        self.fc_of_pixels = nn.Linear(width, width)
        self.head, self.shrink = nn.Conv2d(width, classes, 1), nn.Conv2d(width, width, 2, 2, groups=width)

    def forward(self, x):
        return self.read(self, self.patch(x))

    def head_of_pixels(self, x):
        return self.fc_of_pixels(x.movedim(1, -1)).movedim(-1, 1)


def class_token(net, x):
    t = torch.cat([net.cls.expand(len(x), -1, -1), tokens(x)], 1)
    return net.norm(net.block(t))


def class_attention(net, x):
    t = tokens(x)
    t = t + net.block(t)
    cls = net.cls.expand(len(x), -1, -1)
    cls = cls + net.attention(cls, t, t, need_weights=False)[0]
    return net.fc(net.norm(torch.cat([cls, t], 1))[:, 0])


def heads(net, x):
    t = net.norm(tokens(x))
    return net.fc(net.attention(net.probe.expand(len(x), -1, -1), t, t)[0][:, 0])


def coarser_keys(net, x):
    """Keys and values are of a coarser map, as in CvT and PVT."""
    t = net.block(torch.cat([net.cls.expand(len(x), -1, -1), tokens(x)], 1))
    coarse = tokens(net.shrink(t[:, 1:].mT.unflatten(2, x.shape[2:])))
    return net.fc(net.norm(t[:, :1] + net.attention(t[:, :1], coarse, coarse)[0])[:, 0])


def streams(net, x):
    """Pixels and patches run beside each other, as in TNT, so that nothing but the first map passes all."""
    t = net.norm(tokens(x))
    for _ in range(2):
        x = x + net.head_of_pixels(x).relu()
        t = t + net.block(t + tokens(x))
    return net.fc(t.mean(1))


def windowed(net, x):
    n, c, h, w = x.shape
    folded = net.block(windows(x).flatten(0, 2))
    back = folded.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return net.fc(back.mean((1, 2)))


READS = {
    "mean of tokens": lambda net, x: net.fc(net.norm(tokens(x)).mean(1)),
    "pool of transposed tokens": lambda net, x: net.fc(
        functional.adaptive_avg_pool1d(net.norm(tokens(x)).mT, 1).flatten(1)
    ),
    "class token": lambda net, x: net.fc(class_token(net, x)[:, 0]),
    "class attention": class_attention,
    "attention pooling": heads,
    "attention to a coarser map": coarser_keys,
    "two streams": streams,
    "windows": windowed,
    "convolution": lambda net, x: net.head(x.relu()).mean((2, 3)),
    "average": lambda net, x: net.fc(x.relu().mean((2, 3))),
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("classes", [5, 16, 24])  # as many as channels, as many as tokens
@pytest.mark.parametrize("method", [EigenCAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, ExcitationBackprop])
@pytest.mark.parametrize("name", READS)
def test_a_map_of_the_image_for_each_image(name, method, classes, images, caplog):
    model = Net(READS[name], classes=classes).eval()
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        result = method(model)(torch.randn(images, 3, *SIZE))
    assert result.signed_map.shape == (images, *GRID)
    assert result.heatmap.shape == (images, *SIZE)
    assert (result.signed_map.abs().amax((1, 2)) > 0).all()
    assert not any("nothing of the target arrives" in message for message in caplog.messages)


def test_the_last_of_two_streams_is_the_layer():
    tape = record(Net(streams).eval(), torch.randn(2, 3, *SIZE))
    assert [last_features(tape)] == sensitive_levels(tape) == ["add_5"]


@pytest.mark.parametrize("name", READS)
def test_as_many_classes_as_channels_are_the_same_layer(name):
    images = torch.randn(2, 3, *SIZE)
    for find in (last_features, sensitive_levels):
        names = {str(find(record(Net(READS[name], classes=classes).eval(), images))) for classes in (5, 16, 24)}
        assert len(names) == 1


SEGMENTS = {
    "logits": lambda net, x: net.head(x.relu()),
    "logits that are resized": lambda net, x: functional.interpolate(net.head(x.relu()), scale_factor=8.0),
    "probabilities": lambda net, x: net.head(x.relu()).softmax(1),
    "a dictionary": lambda net, x: {"out": functional.interpolate(net.head(x.relu()), scale_factor=2.0)},
    "two heads that are added": lambda net, x: sum(net.head(part) for part in [x.relu()] * 2),
}


@pytest.mark.parametrize("classes", [5, 16])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segmentation_is_explained_in_front_of_its_head(name, classes):
    model, images = Net(SEGMENTS[name], classes=classes).eval(), torch.randn(2, 3, *SIZE)

    def goal(out):
        return (out["out"] if isinstance(out, dict) else out)[:, 2].mean((1, 2))

    tape = record(model, images)
    assert tape.find(last_features(tape)).shape == (2, 16, *GRID)
    assert last_features(tape) == "relu"
    with torch.no_grad():
        features = model.patch(images).relu()
    weight = model.head.weight.detach()[2, :, 0, 0]
    if name in ("logits", "logits that are resized"):
        expected = torch.einsum("c,nchw->nhw", weight, features) / features[0, 0].numel()
        torch.testing.assert_close(GradCAM(model)(images, goal).signed_map, expected, rtol=1e-4, atol=1e-6)
    assert EigenCAM(model)(images).signed_map.shape == (2, *GRID)


def test_features_that_are_returned_are_a_layer():
    """A backbone has no head; what it returns is its last map."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    assert last_features(record(backbone, torch.randn(1, 3, 16, 16))) == "2.relu"
    states = Net(lambda net, x: class_token(net, x)).eval()
    assert last_features(record(states, torch.randn(1, 3, *SIZE))) == "norm.layer_norm"


class Detector(nn.Module):
    """Two levels with heads whose numbers of all positions are put in one row."""

    def __init__(self, transposed):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.SiLU())
        self.heads, self.transposed = nn.ModuleList([nn.Conv2d(8, 14, 1), nn.Conv2d(12, 14, 1)]), transposed

    def forward(self, x):
        fine = self.body(x)
        coarse = self.down(fine)
        out = torch.cat([head(p).flatten(2) for head, p in zip(self.heads, (fine, coarse), strict=True)], 2)
        out = torch.cat([out[:, :4] * 8, out[:, 4:].sigmoid()], 1)
        return out.mT if self.transposed else out


class Queries(Net):
    def forward(self, x):
        t = self.block(tokens(self.patch(x)))
        q = self.attention(self.probe.expand(len(x), 9, -1), t, t)[0]
        return {"logits": self.fc(q), "boxes": self.fc(q)[..., :4].sigmoid()}


@pytest.mark.parametrize("transposed", [False, True])
def test_detectors_are_explained_at_their_features(transposed):
    model, images = Detector(transposed).eval(), torch.randn(2, 3, *SIZE)
    tape = record(model, images)
    assert last_features(tape) == "down.1.silu"
    for kind in (EigenCAM, FEM, ScoreCAM, AblationCAM):
        assert kind(model).names(tape) == ["body.1.silu", "down.1.silu"]
    assert DeepFeatureFactorization(model)(images).signed_map.shape == (2, 4, 6)
    assert GradCAM(model).names(tape) == ["body.1.silu", "down.1.silu"]
    queries = Queries(None).eval()
    assert last_features(record(queries, images)) == "block.add_1"
    for target in (lambda out: out["logits"].flatten(1).amax(1), lambda out: out["boxes"][:, 0, 0]):
        assert GradCAM(queries)(images, target).signed_map.shape == (2, *GRID)


class Pyramid(nn.Module):
    """Two levels that exchange what they know, and heads of boxes and of classes with several layers each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU())
        self.fine, self.coarse = (nn.Sequential(nn.Conv2d(16, 8, 3, 1, 1), nn.SiLU()) for _ in range(2))
        self.boxes, self.classes = (
            nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, n, 1)) for _ in range(2)])
            for n in (4, 5)
        )

    def forward(self, x):
        first = self.body(x)
        second = self.down(first)
        fine = self.fine(torch.cat([first, nn.functional.interpolate(second, first.shape[2:])], 1))
        coarse = self.coarse(torch.cat([second, nn.functional.avg_pool2d(fine, 2)], 1))
        heads = zip(self.boxes, self.classes, (fine, coarse), strict=True)
        levels = [torch.cat([box(p), of_class(p).sigmoid()], 1).flatten(2) for box, of_class, p in heads]
        return torch.cat(levels, 2)  # [N, 9, 8 * 12 + 4 * 6]


def at_one_level_each(out):
    """The score of a class at a cell of the fine level in one image, and of the coarse level in the other."""
    return torch.stack([out[0, 4 + 2, 40], out[1, 4 + 2, 8 * 12 + 9]])


class AtOneLevelEach(TargetByImage):
    """The same as a target of the two images in any order, as perturbation methods need it."""

    def __init__(self, rows=(0, 1)):
        self.of = torch.as_tensor(rows)

    def rows(self, rows):
        return AtOneLevelEach(self.of[rows])

    def __call__(self, out):
        return out[torch.arange(len(out)), 4 + 2, torch.tensor([40, 8 * 12 + 9])[self.of]]


def test_a_detector_is_explained_at_all_maps_that_enter_its_heads():
    """Of images whose detections come from different levels, none has an empty map: LayerCAM by hand, in float64."""
    torch.manual_seed(5)
    model = Pyramid().double().eval()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    explain = LayerCAM(model, gamma=None)
    assert explain.names(record(model, images)) == ["fine.1.silu", "coarse.1.silu"]
    result = explain(images, at_one_level_each)

    entering = []
    hooks = [part.register_forward_hook(lambda *call: entering.append(call[2])) for part in (model.fine, model.coarse)]
    score = at_one_level_each(model(images))
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(score.sum(), entering)
    assert not gradients[1][0].any()  # nothing of the detection on the fine level comes through the coarse one
    assert gradients[1][1].any()
    levels = []
    for level, gradient in zip(entering, gradients, strict=True):
        heat = (gradient.clamp_min(0) * level).sum(1, keepdim=True).clamp_min(0)
        heat = nn.functional.interpolate(heat, size=(32, 48), mode="bilinear", align_corners=False)[:, 0]
        levels.append(heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-300))
    torch.testing.assert_close(result.heatmap, torch.stack(levels).amax(0), rtol=0, atol=1e-12)
    assert (result.heatmap.amax((1, 2)) > 0.99).all()
    assert result.signed_map is None


def test_eigen_cam_of_a_detector_is_the_mean_over_its_pyramid():
    torch.manual_seed(5)
    model = Pyramid().double().eval()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    entering = []
    hooks = [part.register_forward_hook(lambda *call: entering.append(call[2])) for part in (model.fine, model.coarse)]
    model(images)
    for hook in hooks:
        hook.remove()
    levels = []
    for level in entering:
        rows = level.detach().flatten(2).mT
        left, size, _ = torch.linalg.svd(rows, full_matrices=False)
        heat = left[..., 0] * size[:, :1]
        sign = (heat * rows.square().sum(2)).sum(1, keepdim=True).sign()
        heat = (heat * sign).unflatten(1, level.shape[2:])[:, None]
        heat = nn.functional.interpolate(heat, size=(32, 48), mode="bilinear", align_corners=False)[:, 0].clamp_min(0)
        levels.append(heat / heat.amax((1, 2), keepdim=True))
    result = EigenCAM(model)(images)
    torch.testing.assert_close(result.heatmap.double(), torch.stack(levels).mean(0), rtol=0, atol=1e-6)
    assert result.signed_map is None


@pytest.mark.parametrize("kind", [ScoreCAM, AblationCAM, ShapleyCAM])
def test_channels_of_a_detector_are_weighed_at_every_level(kind):
    torch.manual_seed(5)
    model = Pyramid().double().eval()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    explain = kind(model)
    assert explain.names(record(model, images)) == ["fine.1.silu", "coarse.1.silu"]
    levels = [kind(model, layer=name)(images, AtOneLevelEach()).heatmap for name in ("fine", "coarse")]
    scaled = [level / level.amax((1, 2), keepdim=True).clamp_min(1e-300) for level in levels]
    assert scaled[0][0].any()
    assert scaled[1][1].any()
    torch.testing.assert_close(explain(images, AtOneLevelEach()).heatmap, sum(scaled) / 2, rtol=0, atol=1e-12)


def test_two_levels_of_one_grid_are_one():
    """A pyramid whose last stage keeps the resolution: both levels are computed from the map in front of them."""

    class Flat(Pyramid):
        def forward(self, x):
            shared = self.down(self.body(x))
            levels = [self.fine(torch.cat([shared, shared], 1)), self.coarse(torch.cat([shared, shared], 1))]
            heads = zip(self.boxes, self.classes, levels, strict=True)
            numbers = [torch.cat([box(p), of_class(p).sigmoid()], 1) for box, of_class, p in heads]
            return torch.cat([part.flatten(2) for part in numbers], 2)

    model, images = Flat().eval(), torch.randn(2, 3, 32, 48)
    for kind in (EigenCAM, LayerCAM):
        explain = kind(model)
        assert len(explain.names(record(model, images))) == 1
        assert explain(images, lambda out: out[:, 5, 4]).signed_map.shape == (2, 4, 6)


def test_a_backbone_that_returns_its_maps_is_no_detector():
    class Backbone(Pyramid):
        def forward(self, x):
            first = self.body(x)
            return {"fine": first, "coarse": self.down(first)}

    model, images = Backbone().eval(), torch.randn(2, 3, 32, 48)
    assert EigenCAM(model)(images).signed_map.shape == (2, 4, 6)


def test_a_row_of_which_nothing_arrives_at_any_level_is_said(caplog):
    model, images = Pyramid().eval(), torch.randn(2, 3, 32, 48)
    LayerCAM(model)(images, lambda out: torch.stack([out[0, 5, 40], out[1, 5, 40] * 0]))
    assert "the map of row 1 is zero" in caplog.text


def test_scores_of_classes_that_read_several_maps_are_explained_at_the_last():
    class TwoScales(Pyramid):
        def forward(self, x):
            first = self.body(x)
            second = self.down(first)
            return torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1) @ torch.ones(16, 3)

    model, images = TwoScales().eval(), torch.randn(2, 3, 32, 48)
    assert GradCAM(model)(images, lambda out: out[:, 1]).signed_map.shape == (2, 4, 6)


def test_what_is_another_input_does_not_count():
    class WithText(Net):
        def forward(self, x, text):
            words = self.block(text)  # [N, 7, 16], as many rows as images and later than they
            return self.fc(self.norm(tokens(self.patch(x))).mean(1) + words.mean(1))

    model, images, text = WithText(None).eval(), torch.randn(2, 3, *SIZE), torch.randn(2, 24, 16)
    assert last_features(record(model, images, text)) == "norm.layer_norm"
    for method in (EigenCAM, GradCAM, ExcitationBackprop):
        assert method(model)(images, None, text).signed_map.shape == (2, *GRID)


def test_the_layer_depends_on_what_is_explained():
    """Tokens and the token that is pooled of them: the pooled one reads the others only in front of the block."""
    model = Net(lambda net, x: {"tokens": (t := class_token(net, x)), "pooled": t[:, 0]}).eval()
    images = torch.randn(2, 3, *SIZE)
    explain = GradCAM(model)
    pooled = explain(images, lambda out: out["pooled"][:, 3])
    assert (pooled.signed_map != 0).all()
    (known,) = explain._record._known._entries.values()
    assert known.places[0].name == "cat"
    explain(images, lambda out: out["tokens"][:, 1:, 3].mean(1))
    assert known.places[0].name == "norm.native_layer_norm"
    repeated = explain(images, lambda out: out["pooled"][:, 3])
    torch.testing.assert_close(repeated.signed_map, pooled.signed_map)
    # Against autograd.
    model, leaf = model.double(), images.double().requires_grad_()
    t = torch.cat([model.cls.expand(2, -1, -1), tokens(model.patch(leaf))], 1)
    grad = torch.autograd.grad(model.norm(model.block(t))[:, 0, 3].sum(), t)[0][:, 1:]
    expected = torch.einsum("nc,ntc->nt", grad.mean(1), t[:, 1:].detach()).unflatten(1, GRID)
    result = GradCAM(model)(images.double(), lambda out: out["pooled"][:, 3]).signed_map
    torch.testing.assert_close(result, expected)


def test_stepping_back_is_said(caplog):
    """A function that reads one token of many: no operation on the tape tells that the others count for nothing."""
    model, images = Net(lambda net, x: class_token(net, x)).eval(), torch.randn(2, 3, *SIZE)
    explain = GradCAM(model)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        for _ in range(2):
            assert (explain(images, lambda out: out[:, 0, 3]).signed_map != 0).all()
    assert caplog.messages == [
        "grad-cam: nothing of the target arrives at layer 'norm.native_layer_norm': 'cat' is explained, the last one "
        "at which something does"
    ]


def test_a_zero_map_gives_its_reason(caplog):
    dead = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    dead.eval()[2].bias.data.fill_(-100)
    images = torch.rand(2, 3, 10, 10)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        assert not GradCAM(dead, layer="1")(images).signed_map.any()
        negative = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        negative.eval()[4].weight.data.fill_(-1)
        assert not GradCAM(negative)(images).heatmap.any()
        scored = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=2.0)).eval()
        scored[2].bias.data.fill_(-100)
        assert not ExcitationBackprop(scored)(images, lambda out: out[:, 0].mean((1, 2))).signed_map.any()
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "nothing of the target arrives at layer '1': the map of an image may be zero",
        "the map of row 0 is nowhere positive, so that its heat map is zero; `signed_map` has the rest",
        "nothing of the target arrives at any layer, so that the maps are zero: it ends at '3.upsample_nearest2d'",
    ]


@pytest.mark.parametrize("method", [FEM, LayerCAM], ids=lambda method: method.method)
@pytest.mark.parametrize("layers", ["0", ["0", "1"]], ids=["one layer", "fused"])
def test_the_one_map_that_is_nowhere_positive_is_named(method, layers, caplog):
    """Of two images the second has activations below zero alone, with positive weights of the class."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    for parameter in model.eval().parameters():
        nn.init.constant_(parameter, 0.0 if parameter.dim() == 1 else 1.0)
    images = torch.linspace(1, 2, 64).view(1, 1, 8, 8) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    settings = {"k": 1.0} if method is FEM else {}
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        explanation = method(model, layer=layers, **settings)(images)
    assert [bool(heatmap.any()) for heatmap in explanation.heatmap] == [True, False]
    alone = "the map of row 1 is nowhere positive, so that its heat map is zero; `signed_map` has the rest"
    fused = "the fused maps of row 1 are nowhere positive, so that their heat map is zero; one layer alone has a "
    fused += "`signed_map`"
    assert caplog.messages == [f"{method.method}: {alone if layers == '0' else fused}"]


# Grids of tokens whose network is not known


@pytest.mark.parametrize("extra", [0, 1, 2, 5])
@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(
    "grid",
    [(4, 10), (10, 4), (14, 16), (7, 8), (13, 15), (8, 12), (14, 14), (7, 7), (14, 18), (24, 32), (3, 5), (12, 9)],
)
def test_tokens_have_the_proportions_of_the_images(grid, patch, extra):
    size = (grid[0] * patch, grid[1] * patch)
    assert token_grid(grid[0] * grid[1] + extra, size, name="layer") == (*grid, extra)


def test_tokens_of_images_that_patches_do_not_cover():
    assert token_grid(6 * 11 + 1, (100, 190), name="layer") == (6, 11, 1)
    assert token_grid(7 * 12 + 1, (100, 190), name="layer") == (7, 12, 1)


def test_tokens_that_are_no_grid_are_asked_for():
    with pytest.raises(InputError, match=r"tokens must give the grid \(h, w\) of layer 'layer', whose 13 tokens"):
        token_grid(13, (16, 400), name="layer")
    with pytest.raises(InputError, match="whose 6 tokens may be 2 x 3 or 3 x 2 for images of 37 x 53"):
        token_grid(6, (37, 53), name="layer")


@pytest.mark.parametrize("grid", [(4, 10), (14, 16), (7, 8), (13, 15), (8, 12)])
@pytest.mark.parametrize("method", [EigenCAM, GradCAM, GradCAMPlusPlus])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_the_bright_patch_is_where_it_was_made_bright(grid, method, extra):
    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.mix, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            t = tokens(self.patch(x))
            t = torch.cat([t.new_zeros(len(t), extra, 8), t], 1) if extra else t
            return self.fc(self.mix(t).relu().mean(1))

    images = torch.zeros(2, 3, *(4 * n for n in grid))
    images[0, :, -4:, :4] = images[1, :, :4, -4:] = 9  # bottom left, top right
    for layer in ("auto", "mix"):
        result = method(Vit().eval(), layer=layer)(images, 1).signed_map
        assert result.shape == (2, *grid)
        peaks = [divmod(int((item - item.median()).abs().argmax()), grid[1]) for item in result]
        assert peaks == [(grid[0] - 1, 0), (0, grid[1] - 1)]


# Naming a layer


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head, self.score = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        fine = self.fine(x).relu()
        return self.score(sum(self.head(level).relu().mean((2, 3)) for level in (fine, self.coarse(fine).relu())))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method", [EigenCAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, ExcitationBackprop])
def test_a_layer_that_runs_twice(method, fast):
    model, images = Twice().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def shape(layer):
        explainer = method(model, layer=layer)
        return (explainer.accelerate() if fast else explainer)(images).signed_map.shape[1:]

    assert shape("head") == shape("head@1") == shape("head@-1") == shape(model.head) == (4, 4)
    assert shape("head@0") == shape("head@-2") == (8, 8)
    with pytest.raises(InputError, match=r"layer must name one of the calls 0 to 1 of 'head', got 'head@2'"):
        shape("head@2")
    with torch.no_grad():
        activation = model.head(model.fine(images).relu())
    first = EigenCAM(model, layer="head@0").project(activation, (16, 16))[:, 0]
    torch.testing.assert_close(EigenCAM(model, layer="head@0")(images).signed_map, first)


def test_fixations_start_at_the_last_call_of_a_layer():
    model, images = Twice().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def points(layer, index):
        return [item.tolist() for item in CNNFixations(model, neuron=(layer, index), radius_share=0)(images).points]

    assert points("head", (2, 1, 1)) == points("head@1", (2, 1, 1)) == points(model.head, (2, 1, 1))
    assert points("head", (2, 1, 1)) != points("head@0", (2, 1, 1))
    with pytest.raises(InputError):
        points("head", (2, 7, 7))  # the first call has such a neuron, the last has not


@pytest.mark.parametrize("method", [EigenCAM, GradCAM, ExcitationBackprop])
def test_modules_are_layers(method):
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    model, images = model.eval(), torch.randn(2, 3, 9, 9)
    expected = method(model, layer="0.1")(images).signed_map
    for layer in (model[0][-1], [model[0][-1]], [model[0]][-1]):
        torch.testing.assert_close(method(model, layer=layer)(images).signed_map, expected)
    torch.testing.assert_close(method(nn.DataParallel(model), layer=model[0][-1])(images).signed_map, expected)
    both = method(model, layer=[model[0][0], "0.1"])(images)
    torch.testing.assert_close(both.heatmap, method(model, layer=["0.0", "0.1"])(images).heatmap)
    for stranger in (nn.ReLU(), 3):
        with pytest.raises(InputError, match="layer must be a module of the model"):
            method(model, layer=stranger if isinstance(stranger, nn.Module) else [stranger])


@pytest.mark.parametrize("method", [EigenCAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, ExcitationBackprop, CAM])
def test_the_argument_of_others_is_known(method):
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    with pytest.raises(InputError, match=r"got target_layers: did you mean layer\?"):
        method(model, target_layers=[model[-1]])


def test_a_layer_with_other_rows_than_images_is_refused():
    model, images = Net(windowed).eval(), torch.randn(2, 3, *SIZE)
    for method in (EigenCAM, GradCAM, ExcitationBackprop):
        with pytest.raises(InputError, match=r"one (map|row) an image"):
            method(model, layer="block")(images)


def test_an_explanation_with_other_rows_than_images_is_refused():
    class Wrong(EigenCAM):
        def _explain(self, images, target, args, kwargs):
            result = super()._explain(images, target, args, kwargs)
            result.heatmap = result.heatmap[:1]
            return result

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).eval()
    with pytest.raises(
        InputError, match="model must keep one row an image, got 1 of heatmap, 2 of signed_map, 2 of images for 2"
    ):
        Wrong(model)(torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("method", [EigenCAM, GradCAM, GradCAMPlusPlus, ExcitationBackprop])
def test_acceleration_looks_at_the_same_layer(method):
    """The last map is a batch norm, which is folded into the convolution in front of it."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5),
    ).double().eval()  # fmt: skip
    model[3].running_mean.normal_(), model[3].running_var.uniform_(0.1, 3)
    model[3].weight.data.normal_(), model[3].bias.data.normal_()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for layer in ("auto", "3"):
        plain, fast = method(model, layer=layer), method(model, layer=layer).accelerate()
        for _ in range(2):
            torch.testing.assert_close(fast(images, 1).signed_map, plain(images, 1).signed_map, rtol=1e-9, atol=1e-12)


def test_cam_reads_transposed_tokens():
    model, images = (
        Net(READS["pool of transposed tokens"]).double().eval(),
        torch.randn(2, 3, *SIZE, dtype=torch.float64),
    )
    with torch.no_grad():
        features = model.norm(tokens(model.patch(images)))
    expected = (features @ model.fc.weight.detach()[1]).unflatten(1, GRID)
    torch.testing.assert_close(CAM(model)(images, 1).signed_map, expected)


# The families people use


TORCHVISION = {
    "swin_t": (7, 7), "maxvit_t": (7, 7), "vit_b_32": (7, 7), "convnext_tiny": (7, 7), "resnet18": (7, 7),
    "densenet121": (7, 7), "squeezenet1_1": (13, 13), "shufflenet_v2_x0_5": (7, 7), "efficientnet_b0": (7, 7),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_families_of_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    tape = record(models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224))
    search = LayerSearch(tape)
    for layer in (search.last(), search.last(read=True)):
        assert layer.layout.grid == TORCHVISION[name]


TIMM = {
    "cait_xxs24_224": (14, 14), "crossvit_tiny_240": (20, 20), "pit_ti_224": (7, 7), "davit_tiny": (7, 7),
    "hiera_tiny_224": (7, 7), "swin_tiny_patch4_window7_224": (7, 7), "mixer_s32_224": (7, 7), "levit_128s": (4, 4),
    "xcit_nano_12_p16_224": (14, 14), "volo_d1_224": (14, 14), "coatnet_nano_rw_224": (7, 7),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_families_of_timm(name):
    timm = pytest.importorskip("timm")
    size = int(name.rsplit("_", 1)[1]) if name.rsplit("_", 1)[1].isdigit() else 224
    tape = record(timm.create_model(name, pretrained=False).eval(), torch.randn(1, 3, size, size))
    assert LayerSearch(tape).last(read=True).layout.grid == TIMM[name]


def test_swin_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, patch_size=2, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=4
    )
    model, images = transformers.SwinForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
    for method in (EigenCAM, GradCAM):
        assert method(model)(images).signed_map.shape == (2, 4, 4)


@pytest.mark.filterwarnings("ignore:torch")  # quantization is deprecated, and in use
def test_a_head_with_packed_weights_is_a_layer():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = EigenCAM(body)(images).heatmap
    quantized = torch.ao.quantization.quantize_dynamic(body, {nn.Linear}, dtype=torch.qint8).eval()
    torch.testing.assert_close(EigenCAM(quantized)(images).heatmap, expected)
    with pytest.raises(UnsupportedOpError, match="quantized::linear_dynamic, which ran in '4'"):
        GradCAM(quantized)(images, 1)
