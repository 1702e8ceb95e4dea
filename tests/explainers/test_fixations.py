import copy
import functools
import math

import numpy as np
import pytest
import torch
from oracles import fixations as slow
from torch import nn
from torch.nn import functional

from pyfast_xai import CNNFixations
from pyfast_xai.ops import Location
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence.points import marking
from pyfast_xai.tape import record

IMAGES, CLASSES = 3, 5
# Every location, each first-layer rule and both ways with signs; the first three are the variants.
SETTINGS = {
    "paper": {"location": "product", "first_fc": "all", "signed": False},
    "authors": {"location": "same", "first_fc": "argmax", "signed": False},
    "default": {"location": "center", "first_fc": "argmax", "signed": True},
    "activation": {"location": "activation", "first_fc": "all", "signed": True},
}


def conv_of(p, x, layer):
    return p.conv(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def fc_of(rule, x, layer):
    return rule(x, layer.weight, layer.bias)


class Vgg(nn.Module):
    shape = (3, 12, 8)

    def __init__(self, width=8):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(True)),
            *(nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, width), nn.Linear(width, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = torch.flatten(self.features(x), 1)
        x = functional.dropout(torch.relu_(self.fc1(x)), training=self.training)
        return self.fc3(self.fc2(x).relu())

    def slow_features(self, p, x):
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                x = conv_of(p, x, layer)
            else:
                x = p.relu(x) if isinstance(layer, nn.ReLU) else p.max_pool(x, 2)
        return x

    def slow(self, p, x):
        x = p.flatten(self.slow_features(p, x))
        x = p.relu(fc_of(p.fc_on_map, x, self.fc1))
        x = p.relu(fc_of(p.fc, x, self.fc2))
        return fc_of(p.fc, x, self.fc3)


class VggEqualWidths(Vgg):
    """The vector after the first layer is as long as the flattened map."""

    def __init__(self):
        super().__init__(width=24)


class VggByMatmul(Vgg):
    """The layers spelled as products: other operations, the same network."""

    def forward(self, x):
        x = self.features(x).flatten(1)
        x = (x @ self.fc1.weight.t() + self.fc1.bias).clamp(min=0)
        x = torch.addmm(self.fc2.bias, x, self.fc2.weight.t()).relu()
        return x.matmul(self.fc3.weight.mT) + self.fc3.bias


def norm(channels):
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(channels) < 0.3, -1.0, 1.0))
        layer.bias.normal_(0, 0.3)
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 1.5)
    return layer


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2, self.relu = norm(outputs), norm(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut, self.more = shortcut, outputs - inputs
        if shortcut == "projection":
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.shortcut == "projection":
            identity = self.down(x)
        elif self.shortcut == "pad":
            identity = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, self.more - 1))
        out += identity
        return self.relu(out)

    def slow(self, p, x):
        out = p.relu(p.norm(conv_of(p, x, self.conv1), self.bn1))
        out = p.norm(conv_of(p, out, self.conv2), self.bn2)
        identity = x
        if self.shortcut == "projection":
            identity = p.norm(conv_of(p, x, self.down[0]), self.down[1])
        elif self.shortcut == "pad":
            widths = ((1, self.more - 1), (0, 0), (0, 0))
            identity = p.move(p.move(x, lambda a: a[:, ::2, ::2]), lambda a: np.pad(a, widths))
        return p.relu(p.add(identity, out))


class Bottleneck(nn.Module):
    def __init__(self, channels, inner, stride, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), norm(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), norm(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), norm(outputs)
        self.project, self.bn = nn.Conv2d(channels, outputs, 1, stride, bias=False), norm(outputs)

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).relu_()
        out = self.bn3(self.conv3(out))
        return torch.relu(out.add_(self.bn(self.project(x))))

    def slow(self, p, x):
        out = p.relu(p.norm(conv_of(p, x, self.conv1), self.bn1))
        out = p.relu(p.norm(conv_of(p, out, self.conv2), self.bn2))
        out = p.norm(conv_of(p, out, self.conv3), self.bn3)
        return p.relu(p.add(p.norm(conv_of(p, x, self.project), self.bn), out))


class ResNet(nn.Module):
    shape = (3, 24, 24)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 5, 2, 2, bias=False), norm(6)
        self.blocks = nn.ModuleList([Basic(6, 6, 1, None), Basic(6, 8, 2, "projection"), Bottleneck(8, 4, 1, 8)])
        self.blocks.append(Basic(8, 12, 2, "pad"))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu_(self.bn1(self.conv1(x))), 3, 1, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.pool(x).flatten(1))

    def slow(self, p, x):
        x = p.max_pool(p.relu(p.norm(conv_of(p, x, self.conv1), self.bn1)), 3, 1, 1)
        for block in self.blocks:
            x = block.slow(p, x)
        return fc_of(p.fc, p.flatten(p.adaptive_pool(x, 1)), self.fc)


class DenseNet(nn.Module):
    shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([norm(4), norm(7), norm(5), norm(8), norm(11)])
        self.convs = nn.ModuleList([nn.Conv2d(i, 3, 3, padding=1, bias=False) for i in (4, 7, 5, 8)])
        self.transition_norm, self.transition = norm(10), nn.Conv2d(10, 5, 1, bias=False)
        self.fc = nn.Linear(11, CLASSES)

    def forward(self, x):
        features = [self.stem(x)]
        for i in (0, 1):
            features.append(self.convs[i](self.norms[i](torch.cat(features, 1)).relu_()))
        x = self.transition(functional.relu(self.transition_norm(torch.cat(features, 1))))
        x = functional.avg_pool2d(x, 2)
        for i in (2, 3):
            x = torch.cat((x, self.convs[i](functional.relu(self.norms[i](x), inplace=True))), dim=-3)
        return self.fc(functional.relu(self.norms[4](x)).mean((2, 3)))

    def slow(self, p, x):
        x = conv_of(p, x, self.stem)
        for i in (0, 1):
            x = p.cat([x, conv_of(p, p.relu(p.norm(x, self.norms[i])), self.convs[i])])
        x = p.avg_pool(conv_of(p, p.relu(p.norm(x, self.transition_norm)), self.transition), 2)
        for i in (2, 3):
            x = p.cat([x, conv_of(p, p.relu(p.norm(x, self.norms[i])), self.convs[i])])
        return fc_of(p.fc, p.flatten(p.adaptive_pool(p.relu(p.norm(x, self.norms[4])), 1)), self.fc)


class Inception(nn.Module):
    shape = (3, 15, 15)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 7, 2, 3)
        self.one, self.reduce, self.three = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.row, self.column = nn.Conv2d(4, 3, (1, 3), padding=(0, 1)), nn.Conv2d(3, 2, (3, 1), padding="same")
        self.after_max, self.after_mean = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(13, CLASSES)

    def forward(self, x):
        x = functional.max_pool2d(self.stem(x).relu(), 3, 2, ceil_mode=True)
        branches = [
            self.one(x).relu(),
            self.three(self.reduce(x).relu()).relu(),
            self.column(self.row(x).relu()).relu(),
            self.after_max(functional.max_pool2d(x, 3, 1, 1)).relu(),
            self.after_mean(functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).relu(),
        ]
        x = functional.adaptive_avg_pool2d(torch.cat(branches, 1), (1, 1))
        return self.fc(x.view(len(x), -1))

    def slow(self, p, x):
        x = p.max_pool(p.relu(conv_of(p, x, self.stem)), 3, 2, ceil_mode=True)
        row = p.relu(p.conv(x, self.row.weight, self.row.bias, padding=(0, 1)))
        branches = [
            p.relu(conv_of(p, x, self.one)),
            p.relu(conv_of(p, p.relu(conv_of(p, x, self.reduce)), self.three)),
            p.relu(p.conv(row, self.column.weight, self.column.bias, padding=(1, 0))),
            p.relu(conv_of(p, p.max_pool(x, 3, 1, 1), self.after_max)),
            p.relu(conv_of(p, p.avg_pool(x, 3, 1, 1, count_include_pad=False), self.after_mean)),
        ]
        return fc_of(p.fc, p.flatten(p.adaptive_pool(p.cat(branches), 1)), self.fc)


class MobileNet(nn.Module):
    """Depthwise convolution, linear bottlenecks that are added, squeeze-and-excitation."""

    shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, 2, 1, bias=False), norm(4)
        self.expand, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), norm(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), norm(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project, self.bn3 = nn.Conv2d(8, 4, 1, bias=False), norm(4)
        self.head, self.fc = nn.Conv2d(4, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = functional.relu6(self.bn(self.stem(x)))
        out = functional.hardswish(self.bn1(self.expand(x)))
        out = functional.relu6(self.bn2(self.depthwise(out)), inplace=True)
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(out, 1))))
        x = x + self.bn3(self.project(functional.hardsigmoid(gate) * out))
        x = functional.silu(self.head(x))
        return self.fc(x.mean(dim=[2, 3], keepdim=True).flatten(1))

    def slow(self, p, x):
        x = p.same(p.norm(conv_of(p, x, self.stem), self.bn), functional.relu6)
        out = p.same(p.norm(conv_of(p, x, self.expand), self.bn1), functional.hardswish)
        out = p.same(p.norm(conv_of(p, out, self.depthwise), self.bn2), functional.relu6)
        with torch.no_grad():
            pooled = torch.from_numpy(out.value).mean((1, 2), keepdim=True)[None]
            gate = functional.hardsigmoid(self.excite(functional.relu(self.squeeze(pooled))))[0].numpy()
        x = p.add(x, p.norm(conv_of(p, p.gate(out, gate), self.project), self.bn3))
        x = p.same(conv_of(p, x, self.head), functional.silu)
        return fc_of(p.fc, p.flatten(p.adaptive_pool(x, 1)), self.fc)


class SqueezeNet(nn.Module):
    """The classifier is a convolution and an average: all positive positions of the class start."""

    shape = (3, 14, 14)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, 2)
        self.squeeze, self.left, self.right = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        x = self.squeeze(self.stem(x).relu_()).relu_()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return functional.adaptive_avg_pool2d(self.classifier(x).relu(), (1, 1)).flatten(1)

    def slow_map(self, p, x):
        x = p.relu(conv_of(p, p.relu(conv_of(p, x, self.stem)), self.squeeze))
        x = p.cat([p.relu(conv_of(p, x, self.left)), p.relu(conv_of(p, x, self.right))])
        return p.relu(conv_of(p, x, self.classifier))

    def slow(self, p, x):
        return p.class_scores(self.slow_map(p, x))


class SqueezeNetByMean(SqueezeNet):
    def forward(self, x):
        x = self.squeeze(self.stem(x).relu()).relu()
        x = self.classifier(torch.cat([self.left(x).relu(), self.right(x).relu()], 1)).relu()
        return functional.avg_pool2d(x, x.shape[-1]).squeeze(-1).squeeze(-1)


class FullyConvolutional(nn.Module):
    """The first fully connected layer is a convolution that covers the map, the second one a 1x1 convolution."""

    shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 4, 4), nn.Conv2d(5, 8, 4)
        self.conv3 = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x).relu()).relu()).reshape(len(x), CLASSES)

    def slow(self, p, x):
        x = p.flatten(p.relu(conv_of(p, x, self.conv1)))
        x = p.relu(p.fc_on_map(x, self.conv2.weight.flatten(1), self.conv2.bias))
        return p.fc(x, self.conv3.weight.flatten(1), self.conv3.bias)


class Shuffle(nn.Module):
    """Grouped and dilated convolutions, channel shuffle, local response norm, group norm, uneven adaptive windows."""

    shape = (4, 17, 15)

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 12, 3, (2, 1), (0, 2), (1, 2), groups=3)
        self.conv3, self.norm = nn.Conv2d(12, 8, 2, dilation=3, groups=2), nn.GroupNorm(2, 8)
        nn.init.uniform_(self.norm.weight, -1, 1)
        self.fc = nn.Linear(8 * 3 * 4, CLASSES)

    def forward(self, x):
        x = functional.local_response_norm(self.conv1(x).relu(), 3)
        x = self.conv2(x).relu()
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        x = self.norm(self.conv3(x)).relu()
        return self.fc(functional.adaptive_max_pool2d(x, (3, 4)).flatten(1))

    def slow(self, p, x):
        x = p.same(p.relu(conv_of(p, x, self.conv1)), functools.partial(functional.local_response_norm, size=3))
        x = p.relu(conv_of(p, x, self.conv2))
        x = p.move(x, lambda a: a.reshape(3, 4, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape))
        x = p.relu(p.norm(conv_of(p, x, self.conv3), self.norm))
        return fc_of(p.fc_on_map, p.flatten(p.adaptive_pool(x, (3, 4), "max")), self.fc)


class Pools(nn.Module):
    """Windows that are cut at the border, dilated, uneven."""

    shape = (3, 19, 17)

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(24, CLASSES)
        self.bn = norm(6)

    def forward(self, x):
        x = functional.max_pool2d(self.conv1(x).relu(), 3, 2, 1, ceil_mode=True)
        x = functional.max_pool2d(x, 2, 1, padding=1, dilation=2)
        x = functional.avg_pool2d(self.bn(self.conv2(x)), (3, 2), (1, 2), (1, 0), ceil_mode=True).relu()
        return self.fc(functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1))

    def slow(self, p, x):
        x = p.max_pool(p.relu(conv_of(p, x, self.conv1)), 3, 2, 1, ceil_mode=True)
        x = p.max_pool(x, 2, 1, 1, dilation=2)
        x = p.relu(p.avg_pool(p.norm(conv_of(p, x, self.conv2), self.bn), (3, 2), (1, 2), (1, 0), ceil_mode=True))
        return fc_of(p.fc_on_map, p.flatten(p.adaptive_pool(x, 2)), self.fc)


class Moves(nn.Module):
    """Everything that only moves elements."""

    shape = (3, 12, 12)

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(5, 4, 3)
        self.conv3, self.fc = nn.Conv2d(10, 3, 3, padding=1, padding_mode="replicate"), nn.Linear(3 * 30, CLASSES)
        self.register_buffer("order", torch.tensor([3, 1, 0]))

    def forward(self, x):
        x = self.conv1(functional.pad(x, (1, 1, 2, 0), mode="reflect")).relu()
        x = torch.roll(x, (2, -3), (2, 3))
        x = functional.pixel_shuffle(x, 2)[:, :, 3:-4:2, 1:22:2].flip(-1)
        x = functional.interpolate(x, size=(14, 13), mode="nearest")
        left, right = x.chunk(2, 1)
        x = torch.stack([left, right, left], 2).flatten(1, 2)
        x = torch.cat([x, x.repeat(1, 2, 1, 1)[:, 4:6]], 1)
        x = self.conv2(functional.pad(x, (1, 0, 0, 2), mode="circular").narrow(2, 1, 9)).relu()
        low, high = torch.split(x, [1, 3], dim=1)
        x = torch.cat([high[:, self.order[1:]], low, x.select(1, 2).unsqueeze(1), x.permute(0, 1, 3, 2).mT], 1)
        x = functional.interpolate(torch.cat([x, x[:, :2]], 1), size=(10, 9), mode="bilinear")
        return self.fc(self.conv3(x).relu()[:, :, ::2, 1:-2].reshape(len(x), -1))

    def slow(self, p, x):
        move = p.move
        x = move(x, lambda a: np.pad(a, ((0, 0), (2, 0), (1, 1)), mode="reflect"))
        x = move(p.relu(conv_of(p, x, self.conv1)), lambda a: np.roll(a, (2, -3), (1, 2)))

        def pixel_shuffle(a):
            c, h, w = a.shape
            return a.reshape(c // 4, 2, 2, h, w).transpose(0, 3, 1, 4, 2).reshape(c // 4, 2 * h, 2 * w)

        x = move(x, lambda a: pixel_shuffle(a)[:, 3:-4:2, 1:22:2][:, :, ::-1])
        h, w = x.value.shape[1:]
        rows, columns = [i * h // 14 for i in range(14)], [i * w // 13 for i in range(13)]
        x = move(x, lambda a: a[:, rows][:, :, columns])
        x = move(x, lambda a: np.stack([a[:1], a[1:], a[:1]], 1).reshape(3, *a.shape[1:]))
        x = p.cat([x, move(x, lambda a: np.tile(a, (2, 1, 1))[4:6])])
        x = move(x, lambda a: np.pad(a, ((0, 0), (0, 2), (1, 0)), mode="wrap")[:, 1:10])
        x = p.relu(conv_of(p, x, self.conv2))
        x = p.cat([
            move(x, lambda a: a[1:][[1, 0]]),
            move(x, lambda a: a[:1]),
            move(x, lambda a: a[2:3]),
            x,
        ])  # fmt: skip
        x = p.interpolate(p.cat([x, move(x, lambda a: a[:2])]), (10, 9), "bilinear")
        x = move(x, lambda a: np.pad(a, ((0, 0), (1, 1), (1, 1)), mode="edge"))
        x = p.relu(p.conv(x, self.conv3.weight, self.conv3.bias))
        return fc_of(p.fc_on_map, p.flatten(move(x, lambda a: a[:, ::2, 1:-2])), self.fc)


class Captioner(nn.Module):
    """The image embedding is what the unit reads first, words follow; a word is scored at every step."""

    shape = (3, 8, 8)
    cells, layers, both_ways, batch_first = False, 1, False, True
    length = 4

    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 3, 2), nn.Linear(4 * 3 * 3, 7)
        self.words = nn.Parameter(torch.randn(self.length - 1, 7))
        if self.cells:
            self.cell = nn.LSTMCell(7, 6)
        else:
            self.lstm = nn.LSTM(7, 6, self.layers, batch_first=self.batch_first, bidirectional=self.both_ways)
        self.logits = nn.Linear(12 if self.both_ways else 6, CLASSES)

    def forward(self, x):
        image = self.embed(self.conv(x).relu().flatten(1))
        words = self.words.expand(len(x), -1, -1)
        if self.cells:
            h = c = x.new_zeros(len(x), 6)
            states = []
            for t in range(self.length):
                h, c = self.cell(image if t == 0 else words[:, t - 1], (h, c))
                states.append(h)
            return self.logits(torch.stack(states, 1))
        sequence = torch.cat([image.unsqueeze(1), words], 1)
        if not self.batch_first:
            sequence = sequence.transpose(0, 1)
        out, _ = self.lstm(sequence)
        return self.logits(out if self.batch_first else out.transpose(0, 1))

    def slow_states(self, p, x):
        x = p.flatten(p.relu(p.conv(x, self.conv.weight, self.conv.bias, stride=2)))
        read = [fc_of(p.fc_on_map, x, self.embed), *(p.constant(slow.array(word)) for word in self.words)]
        zero = p.constant(np.zeros(6))
        if self.cells:
            weights = [getattr(self.cell, f"{n}_{s}") for n in ("weight", "bias") for s in ("ih", "hh")]
            return p.lstm(read, *weights, zero)
        for layer in range(self.layers):
            ways = []
            for suffix in ("", "_reverse") if self.both_ways else ("",):
                names = [f"{n}_{s}_l{layer}{suffix}" for n in ("weight", "bias") for s in ("ih", "hh")]
                ways.append(p.lstm(read, *[getattr(self.lstm, n) for n in names], zero, backwards=bool(suffix)))
            read = [p.cat(pair) for pair in zip(*ways, strict=True)]
        return read

    def slow(self, p, x):
        return [fc_of(p.fc, state, self.logits) for state in self.slow_states(p, x)]


class CaptionerOfCells(Captioner):
    cells = True


class CaptionerTimeFirst(Captioner):
    batch_first = False


class CaptionerStacked(Captioner):
    layers = 2


class CaptionerBothWays(Captioner):
    layers, both_ways = 2, True


class Transformer(nn.Module):
    shape = (3, 12, 12)
    fused = True

    def __init__(self):
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 8, 3, 3), nn.Parameter(torch.randn(16, 8) / 2)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        nn.init.uniform_(self.norm1.weight, -1, 1)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, CLASSES)
        # Each token sees the one before it and those after it.
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).triu(-1))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        else:
            scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~self.mask, -math.inf)
            out = scores.softmax(-1) @ v
        x = x + self.project(out.transpose(1, 2).reshape(len(x), 16, 8))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))

    def slow(self, p, x):
        x = p.plus(p.move(conv_of(p, x, self.patches), lambda a: a.reshape(8, -1).T), slow.array(self.place))
        normed = p.layer_norm(x, self.norm1)
        q, k = ((normed.value @ slow.array(w).T + slow.array(b)).reshape(16, 2, 4)
                for w, b in zip(self.qkv.weight.split(8)[:2], self.qkv.bias.split(8)[:2], strict=True))  # fmt: skip
        v = p.fc_on_tokens(normed, self.qkv.weight[16:], self.qkv.bias[16:])
        heads = []
        for h in range(2):
            value = p.move(v, lambda a, h=h: a[:, 4 * h : 4 * h + 4])
            heads.append(p.attention(q[:, h], k[:, h], value, self.mask.numpy()))
        x = p.add(x, fc_of(p.fc_on_tokens, p.cat(heads, 1), self.project))
        inner = p.same(fc_of(p.fc_on_tokens, p.layer_norm(x, self.norm2), self.fc1), functional.gelu)
        x = p.add(x, fc_of(p.fc_on_tokens, inner, self.fc2))
        return fc_of(p.fc, p.mean_of_tokens(x), self.head)


class TransformerByMatmul(Transformer):
    fused = False


class RelativePositions(Transformer):
    """Attention with a mask that depends on the images, as relative positions make it of the queries."""

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = 4 * (q @ q.flip(2).transpose(-2, -1))
        if self.fused:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = (q @ k.transpose(-2, -1) / 2 + mask).softmax(-1) @ v
        return self.head(self.project(out.transpose(1, 2).reshape(len(x), 16, 8)).mean(1))


NETS = [
    *(Vgg, VggEqualWidths, VggByMatmul, ResNet, DenseNet, Inception, MobileNet, SqueezeNet, SqueezeNetByMean),
    *(FullyConvolutional, Shuffle, Pools, Moves, Transformer, TransformerByMatmul),
]
CAPTIONERS = [Captioner, CaptionerOfCells, CaptionerTimeFirst, CaptionerStacked, CaptionerBothWays]


@functools.cache
def case(kind, trained=False):
    """A network in float64 and images; trained means a few steps on random labels."""
    torch.manual_seed(1)
    model = kind().double().train()
    images = torch.randn(8, *kind.shape, dtype=torch.float64)
    if trained:
        labels = torch.randint(CLASSES, (8,))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(8):
            logits = model(images)
            logits = logits if logits.dim() == 2 else logits[:, -1]
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval().requires_grad_(False), images[:IMAGES]


@functools.cache
def expected(kind, trained, setting):
    """For each image the predicted class and the positions (channel, y, x) of its points, by the slow algorithm."""
    model, images = case(kind, trained)
    result = []
    for image in images:
        p = slow.Slow(**SETTINGS[setting])
        start = p.image(image)
        logits = model.slow(p, start)
        # The two spellings are one network.
        np.testing.assert_allclose(logits.value, model(image[None])[0], rtol=1e-9, atol=1e-12)
        label = int(np.argmax(logits.value))
        result.append((label, slow.trace(logits, [(label,)], start)))
    return result


def pixels(result):
    return {(y, x) for _, y, x in result}


def as_sets(explanation):
    return [{tuple(point) for point in points.tolist()} for points in explanation.points]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_points_are_those_of_the_slow_algorithm(kind, trained, setting):
    model, images = case(kind, trained)
    explanation = CNNFixations(model, radius_share=0, duplicates=False, **SETTINGS[setting])(images)
    slowly = expected(kind, trained, setting)
    assert explanation.target.tolist() == [label for label, _ in slowly]
    assert as_sets(explanation) == [pixels(result) for _, result in slowly]
    # A pixel is there once.
    assert [len(item) for item in explanation.points] == [len(pixels(result)) for _, result in slowly]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [Vgg, ResNet, SqueezeNet], ids=lambda kind: kind.__name__)
def test_duplicates_are_the_channels_of_a_pixel(kind, setting):
    model, images = case(kind)
    explanation = CNNFixations(model, radius_share=0, duplicates=True, **SETTINGS[setting])(images)
    for item, (_, result) in zip(explanation.points, expected(kind, False, setting), strict=True):
        assert sorted(map(tuple, item.tolist())) == sorted((y, x) for _, y, x in result)


def test_a_mask_of_attention_that_depends_on_the_images():
    torch.manual_seed(1)
    fused = RelativePositions().double().eval()
    spelled_out = copy.deepcopy(fused)
    spelled_out.fused = False
    images = torch.randn(6, 3, 12, 12, dtype=torch.float64)
    result, expected = (CNNFixations(model)(images).points for model in (fused, spelled_out))
    assert any(map(len, expected))
    assert all(map(torch.equal, result, expected))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_a_row_does_not_depend_on_the_batch(kind):
    model, images = case(kind, True)
    explain = CNNFixations(model)
    together = explain(images)
    for n in range(IMAGES):
        alone = explain(images[n : n + 1])
        assert torch.equal(alone.points[0], together.points[n])
        torch.testing.assert_close(alone.heatmap[0], together.heatmap[n])


@functools.cache
def expected_of_captioner(kind, trained, setting):
    """For each image the pixels of word 2 at each step, and those of the largest element of the last state."""
    model, images = case(kind, trained)
    result = []
    for image in images:
        p = slow.Slow(**SETTINGS[setting])
        start = p.image(image)
        words, last = model.slow(p, start), model.slow_states(p, start)[-1]
        np.testing.assert_allclose([word.value for word in words], model(image[None])[0], rtol=1e-9, atol=1e-12)
        largest = int(np.argmax(last.value))
        traced = [*(slow.trace(word, [(2,)], start) for word in words), slow.trace(last, [(largest,)], start)]
        result.append([pixels(item) for item in traced])
    return result


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("time", [0, 3])
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("kind", CAPTIONERS, ids=lambda kind: kind.__name__)
def test_a_word_is_traced_through_the_gates_of_an_lstm(kind, trained, time, setting):
    model, images = case(kind, trained)
    explanation = CNNFixations(model, neuron=("logits", (time, 2)), radius_share=0, **SETTINGS[setting])(images)
    assert as_sets(explanation) == [result[time] for result in expected_of_captioner(kind, trained, setting)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [Captioner, CaptionerStacked, CaptionerBothWays], ids=lambda kind: kind.__name__)
def test_the_largest_element_of_the_last_state_is_traced(kind, setting):
    """Section III-D."""
    model, images = case(kind, True)
    explanation = CNNFixations(model, neuron=("lstm", (kind.length - 1,)), radius_share=0, **SETTINGS[setting])(images)
    assert as_sets(explanation) == [result[-1] for result in expected_of_captioner(kind, True, setting)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_largest_element_of_the_last_state_of_cells_is_traced(setting):
    model, images = case(CaptionerOfCells, True)
    name = f"cell.lstm_cell_{CaptionerOfCells.length - 1}"
    explanation = CNNFixations(model, neuron=(name, "max"), radius_share=0, **SETTINGS[setting])(images)
    assert as_sets(explanation) == [result[-1] for result in expected_of_captioner(CaptionerOfCells, True, setting)]


# Points that are absent and stay in the list, as on a device


def assert_same_points(explain, images, *args):
    """The same explanation where absent points are left out and where they stay in the list."""
    left_out = explain(images, *args)
    with marking():
        marked = explain(images, *args)
    assert torch.equal(marked.heatmap, left_out.heatmap)
    assert [item.tolist() for item in marked.points] == [item.tolist() for item in left_out.points]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_absent_points_may_stay_in_the_list(kind, setting):
    """Also that there is room for all points wherever they meet: the union of too many raises."""
    model, images = case(kind, True)
    for duplicates in (False, True):
        assert_same_points(CNNFixations(model, radius_share=0, duplicates=duplicates, **SETTINGS[setting]), images)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", [VggByMatmul, ResNet, SqueezeNet, Pools], ids=lambda kind: kind.__name__)
def test_absent_points_may_stay_in_the_list_of_every_backend(kind):
    model, images = case(kind, True)
    assert_same_points(CNNFixations(model, radius_share=0, **SETTINGS["default"]), images)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("time", [0, 3])
@pytest.mark.parametrize("kind", CAPTIONERS, ids=lambda kind: kind.__name__)
def test_absent_points_may_stay_in_the_list_of_a_word(kind, time, setting):
    model, images = case(kind, True)
    assert_same_points(CNNFixations(model, neuron=("logits", (time, 2)), radius_share=0, **SETTINGS[setting]), images)


def test_absent_points_of_several_targets_of_crops_and_of_none_may_stay_in_the_list(caplog):
    model, images = case(Vgg, True)
    explain = CNNFixations(model, radius_share=0, **SETTINGS["paper"])
    assert_same_points(explain, images, torch.tensor([[0, 4], [2, 2], [3, 1]]))
    assert_same_points(CNNFixations(model, stop_layer="features.4", radius_share=0, **SETTINGS["default"]), images)
    model, images = case(SqueezeNet, True)
    for duplicates in (False, True):
        explain = CNNFixations(model, crops=9, radius_share=0, duplicates=duplicates, **SETTINGS["authors"])
        assert_same_points(explain, images)
    assert_same_points(CNNFixations(Constants().eval()), torch.randn(2, 3, 6, 6))
    assert caplog.text.count("no evidence of 2 of 2 rows") == 2


# Other neurons than classes, other layers than the image


def slowly(model, images, setting, neuron):
    """Pixels of each image by a function of (slow algorithm, image) that gives an activation and points on it."""
    result = []
    for image in images:
        p = slow.Slow(**SETTINGS[setting])
        start = p.image(image)
        result.append(pixels(slow.trace(*neuron(p, start), start)))
    return result


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_neuron_of_any_layer_is_a_start(setting):
    model, images = case(Vgg)

    def vector(p, x):
        return fc_of(p.fc_on_map, p.flatten(model.slow_features(p, x)), model.fc1), [(3,)]

    def neuron_of_map(p, x):
        return model.slow_features(p, x), [(1, 2, 0)]

    def strongest_of_channel(p, x):
        x = model.slow_features(p, x)
        return x, [(2, *np.unravel_index(np.argmax(x.value[2]), x.value.shape[1:]))]

    def strongest_of_layer(p, x):
        x = model.slow_features(p, x)
        return x, [np.unravel_index(np.argmax(x.value), x.value.shape)]

    starts = [
        (("fc1", 3), vector),
        (("fc1", (3,)), vector),
        (("features", (1, 2, 0)), neuron_of_map),
        (("features.7", (2,)), strongest_of_channel),
        ((model.features, 2), strongest_of_channel),
        (("features", "max"), strongest_of_layer),
    ]
    for start, neuron in starts:
        explanation = CNNFixations(model, neuron=start, radius_share=0, **SETTINGS[setting])(images)
        assert as_sets(explanation) == slowly(model, images, setting, neuron)


def test_the_forward_stops_at_the_start():
    model, images = case(Vgg)
    ran = []
    hook = model.fc2.register_forward_hook(lambda *_: ran.append(True))
    try:
        explainer = CNNFixations(model, neuron=("fc1", 0))
        explainer(images)  # a first forward of one image shows how often fc1 runs
        before = len(ran)
        explainer(images)
    finally:
        hook.remove()
    assert len(ran) == before


def test_the_target_and_score_of_a_start_are_the_neuron_and_its_activation():
    model, images = case(Vgg)
    explanation = CNNFixations(model, neuron=("features", (1, 2, 0)))(images)
    shape = model.features(images).shape
    assert explanation.target.tolist() == [int(np.ravel_multi_index((1, 2, 0), shape[1:]))] * IMAGES
    torch.testing.assert_close(explanation.score, model.features(images)[:, 1, 2, 0].float())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layer", [1, 4, 7])
def test_points_on_a_layer_are_scaled_to_the_middle_of_its_cells(layer, setting):
    model, images = case(Vgg)
    explanation = CNNFixations(model, stop_layer=f"features.{layer}", radius_share=0, **SETTINGS[setting])(images)
    for image, item, label in zip(images, as_sets(explanation), explanation.target, strict=True):
        p = slow.Slow(**SETTINGS[setting])
        x = p.image(image)
        layers = [x]
        for module in model.features:
            if isinstance(module, nn.Conv2d):
                x = conv_of(p, x, module)
            else:
                x = p.relu(x) if isinstance(module, nn.ReLU) else p.max_pool(x, 2)
            layers.append(x)
        x = p.relu(fc_of(p.fc_on_map, p.flatten(x), model.fc1))
        logits = fc_of(p.fc, p.relu(fc_of(p.fc, x, model.fc2)), model.fc3)
        at = layers[layer + 1]
        result = slow.trace(logits, [(int(label),)], at)
        cell = [size / own_size for size, own_size in zip(image.shape[1:], at.value.shape[1:], strict=True)]
        assert item == {(math.floor((y + 0.5) * cell[0]), math.floor((x + 0.5) * cell[1])) for _, y, x in result}


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_of_several_targets_are_image_by_image(setting):
    model, images = case(Vgg, True)
    targets = torch.tensor([[0, 4], [2, 2], [3, 1]])
    explanation = CNNFixations(model, radius_share=0, **SETTINGS[setting])(images, targets)
    assert explanation.target.tolist() == targets.flatten().tolist()
    probability = model(images).softmax(1).gather(1, targets).flatten().float()
    torch.testing.assert_close(explanation.score, probability)
    rows = []
    for image, item in zip(images, targets.tolist(), strict=True):
        rows += [slowly(model, [image], setting, lambda p, x, k=k: (model.slow(p, x), [(k,)]))[0] for k in item]
    assert as_sets(explanation) == rows
    assert torch.equal(explanation.images, images.repeat_interleave(2, 0))


@pytest.mark.parametrize("variant", ["paper", "authors", "default"])
def test_variants_are_their_settings(variant):
    model, images = case(Vgg)
    explanation = CNNFixations(model, variant=variant, radius_share=0, duplicates=False)(images)
    assert as_sets(explanation) == [pixels(result) for _, result in expected(Vgg, False, variant)]
    radius, share = {"paper": (0.10, 0.05), "authors": (0.10, 0.05), "default": (0.15, 0.10)}[variant]
    written_out = CNNFixations(
        model, **SETTINGS[variant], radius_share=radius, min_neighbour_share=share, duplicates=variant == "authors"
    )
    for item, other in zip(
        CNNFixations(model, variant=variant)(images).points, written_out(images).points, strict=True
    ):
        assert torch.equal(item, other)


def test_start_at_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    torch.manual_seed(0)
    model, images = Twice().double().eval(), torch.randn(2, 3, 10, 10, dtype=torch.float64)

    def first(p, x):
        return conv_of(p, x, model.conv), [(1, 4, 5)]

    def second(p, x):
        return conv_of(p, p.relu(first(p, x)[0]), model.conv), [(1, 4, 5)]

    for name, neuron in [("conv", second), ("conv@0", first), ("conv.conv2d", first), ("conv.conv2d_1", second)]:
        explanation = CNNFixations(model, neuron=(name, (1, 4, 5)), radius_share=0, variant="paper")(images)
        assert as_sets(explanation) == slowly(model, images, "paper", neuron)


# What is made of the points


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("duplicates", [False, True])
def test_result_holds_supported_points_their_density_and_hull(duplicates):
    model, images = case(Vgg, True)
    radius, share, sigma = 0.2, 0.15, 0.08
    explain = CNNFixations(
        model,
        duplicates=duplicates,
        radius_share=radius,
        min_neighbour_share=share,
        sigma_share=sigma,
        **SETTINGS["paper"],
    )
    explanation = explain(images)
    size = tuple(images.shape[2:])
    dropped = 0
    for n, (_, result) in enumerate(expected(Vgg, True, "paper")):
        points = [(y, x) for _, y, x in result] if duplicates else list(pixels(result))
        saved = slow.keep_supported(points, size, radius, share)
        dropped += len(points) - len(saved)
        assert sorted(map(tuple, explanation.points[n].tolist())) == sorted(saved)
        heat = slow.density(saved, size, sigma * math.hypot(*size))
        # The heat map is float32.
        np.testing.assert_allclose(explanation.heatmap[n].numpy(), heat, rtol=1e-5, atol=1e-5)
        rows, columns = zip(*saved, strict=True)
        assert explanation.boxes("hull")[n].tolist() == [min(columns), min(rows), max(columns), max(rows)]
    assert dropped


def test_points_that_all_lie_alone_are_no_outliers():
    model, images = case(Vgg)
    explain = functools.partial(CNNFixations, model, min_neighbour_share=0.99)
    every, alone = explain(radius_share=0)(images).points, explain(radius_share=0.01)(images).points
    assert min(map(len, every)) > 1
    assert all(map(torch.equal, alone, every))


class Constants(nn.Module):
    """What it answers of comes from its parameters."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(1, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.maximum(self.parameter, 0 * x.flatten(1)[:, :4].relu()))


def test_no_evidence_is_an_empty_set_and_a_warning(caplog):
    model, images = Constants().eval(), torch.randn(2, 3, 6, 6)
    with caplog.at_level("WARNING", logger="pyfast_xai"):
        explanation = CNNFixations(model)(images)
        CNNFixations(model, neuron=("fc", 1))(images)
    for another in ("another class or a neuron nearer to the image", "another neuron"):
        assert (
            "no evidence of 2 of 2 rows reached the image (the first is row 0); the trace ended in constants of the "
            f"model: explain {another}, or take a method that reads gradients, as integrated-gradients"
        ) in caplog.text
    assert [item.shape for item in explanation.points] == [(0, 2), (0, 2)]
    assert explanation.heatmap.shape == (2, 6, 6)
    assert not explanation.heatmap.any()
    assert explanation.boxes().isnan().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("duplicates", [False, True])
def test_crops_are_traced_where_they_agree(duplicates, target):
    """Five crops are traced, ten (with the mirror images) give the class, crops with another class are left out."""
    torch.manual_seed(3)
    model, images = SqueezeNet().double().eval().requires_grad_(False), torch.randn(6, 3, 17, 19, dtype=torch.float64)
    # No class is the usual one.
    maps = []
    hook = model.classifier.register_forward_hook(lambda *call: maps.append(call[2].mean((0, 2, 3))))
    model(images)
    hook.remove()
    model.classifier.bias -= maps[0] - 0.05
    side, setting = 14, "authors"
    explanation = CNNFixations(model, crops=side, radius_share=0, duplicates=duplicates, **SETTINGS[setting])(
        images, target
    )
    left_out = 0
    for n, image in enumerate(images):
        corners = [(0, 0), (0, 5), (3, 0), (3, 5), (1, 2)]
        crops = [image[:, y : y + side, x : x + side] for y, x in corners]
        scores = [model(crop[None])[0] for crop in crops]
        mirrored = [model(crop.flip(2)[None])[0] for crop in crops]
        mean = sum(item.softmax(0) for item in scores + mirrored) / 10
        recorded = [int(item.argmax()) for item in scores]
        label = target
        if target is None:
            label = int(mean.argmax())
            label = label if label in recorded else recorded[4]
        assert explanation.target[n] == label
        # The score is kept in float32.
        assert explanation.score[n].item() == pytest.approx(mean[label].item(), rel=1e-6)
        points = []
        for (y, x), crop, item in zip(corners, crops, recorded, strict=True):
            if target is None and item != label:
                left_out += 1
                continue
            p = slow.Slow(**SETTINGS[setting])
            start = p.image(crop)
            result = slow.trace(model.slow(p, start), [(label,)], start)
            points += [(row + y, column + x) for _, row, column in result]
        assert sorted(map(tuple, explanation.points[n].tolist())) == sorted(points if duplicates else set(points))
    assert (left_out > 0) == (target is None)


# The walk itself, for inputs that are no images


class Volume(nn.Module):
    def __init__(self, rank):
        super().__init__()
        conv, self.pool, self.mean = (
            (nn.Conv1d, nn.MaxPool1d(2, 2, 1), nn.AvgPool1d(2)),
            (nn.Conv3d, nn.MaxPool3d(2, 2, 1), nn.AvgPool3d(2)),
        )[rank // 2]
        self.conv1, self.conv2 = conv(2, 4, 3, stride=2, padding=1, dilation=1), conv(4, 6, 3, padding=2, dilation=2)
        self.conv3, self.fc = conv(6, 4, 1, groups=2), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.pool(self.conv1(x).relu())
        x = self.mean(self.conv2(x).relu())
        return self.fc(self.conv3(x).relu().flatten(2).mean(-1))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("rank", "size"), [(1, (37,)), (3, (8, 9, 10))])
def test_sequences_and_volumes(rank, size, setting):
    torch.manual_seed(2)
    model, inputs = Volume(rank).double().eval(), torch.randn(2, 2, *size, dtype=torch.float64)
    settings = dict(SETTINGS[setting])
    options = evidence.Options(location=Location[settings.pop("location").upper()], **settings)
    tape = record(model, inputs, policy=evidence.policy)
    labels = tape.result.argmax(1)
    starts = {tape.outputs: evidence.Points(torch.arange(2) * CLASSES + labels)}
    index = evidence.walk(tape, starts, tape.inputs[0], options).index
    result = {tuple(map(int, np.unravel_index(i, inputs.shape))) for i in index.tolist()}
    theirs = set()
    for n, signal in enumerate(inputs):
        p = slow.Slow(**SETTINGS[setting])
        start = p.image(signal)
        x = p.max_pool(p.relu(conv_of(p, start, model.conv1)), 2, 2, 1)
        x = p.relu(conv_of(p, p.avg_pool(p.relu(conv_of(p, x, model.conv2)), 2), model.conv3))
        logits = fc_of(p.fc, p.flatten(p.adaptive_pool(x, 1)), model.fc)
        theirs |= {(n, *point) for point in slow.trace(logits, [(int(labels[n]),)], start)}
    assert result == theirs


def test_double_precision_decides_a_pool_window():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 2, 1], x[0, 0, 1, 2] = 1, 1 - 1e-12
    tape = record(nn.MaxPool2d(4), x, policy=evidence.policy)
    points = evidence.walk(tape, {tape.outputs: evidence.Points(torch.tensor([0]))}, tape.inputs[0], evidence.Options())
    assert points.index.tolist() == [9]


@pytest.mark.parametrize("location", ["product", "activation", "center", "same"])
def test_a_negative_scale_asks_for_the_least_channel(location):
    conv, bn = nn.Conv2d(2, 1, 1, bias=False).double(), nn.BatchNorm2d(1).double()
    with torch.no_grad():
        conv.weight[:] = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
        bn.weight.fill_(-1)
    model, x = nn.Sequential(conv, bn).eval(), torch.ones(1, 2, 1, 1, dtype=torch.float64)
    tape = record(model, x, policy=evidence.policy)
    options = evidence.Options(location=Location[location.upper()])
    points = evidence.walk(tape, {tape.outputs: evidence.Points(torch.tensor([0]))}, tape.inputs[0], options)
    assert points.index.tolist() == [1]


class Residual(nn.Module):
    """The delta is the skip with its two channels exchanged."""

    def __init__(self, spelling):
        super().__init__()
        self.conv, self.spelling = nn.Conv2d(2, 2, 1, bias=False), spelling
        with torch.no_grad():
            self.conv.weight[:] = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(2, 2, 1, 1)

    def forward(self, x):
        delta = self.conv(x)
        if self.spelling == "in place":
            delta += x
            return delta
        return x + delta if self.spelling == "skip first" else delta + x


@pytest.mark.parametrize("negative", [None, torch.tensor([True])])
@pytest.mark.parametrize("spelling", ["skip first", "delta first", "in place"])
@pytest.mark.parametrize(("skip", "delta"), [(1.0, 1.0), (0.0, 0.0), (1.0, 2.0), (2.0, -1.0), (-1.0, -2.0)])
def test_the_larger_branch_is_taken_and_a_tie_goes_to_the_skip_path(skip, delta, spelling, negative):
    model = Residual(spelling).eval()
    x = torch.tensor([skip, delta]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    tape = record(model, x, policy=evidence.policy)
    points = evidence.Points(torch.tensor([0]), negative)
    reached = evidence.walk(tape, {tape.outputs: points}, tape.inputs[0], evidence.Options()).index.tolist()
    takes_skip = skip >= delta if negative is None else skip <= delta
    assert reached == [0 if takes_skip else 2]


def test_a_position_wanted_high_and_low_is_one_point():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1, bias=False)
            nn.init.constant_(self.fc.weight, 1.0)

        def forward(self, x):
            x = x.flatten(1)
            return self.fc(torch.cat([x, 3 - x], 1))

    x = torch.ones(1, 1, 1, 1)
    explanation = CNNFixations(Both().eval(), variant="paper", duplicates=True, radius_share=0)(x)
    assert explanation.points[0].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("kinds", "one", "other"),
    [
        ((Vgg, ResNet, MobileNet, Transformer), "paper", "authors"),
        ((Vgg, ResNet, MobileNet, Transformer), "paper", "default"),
        ((MobileNet, Transformer), "authors", "default"),  # the others have rectified maps and padding of half a kernel
    ],
    ids=["paper-authors", "paper-default", "authors-default"],
)
def test_settings_differ_on_these_networks(kinds, one, other):
    """Otherwise the comparisons above would show little."""
    for kind in kinds:
        assert expected(kind, True, one) != expected(kind, True, other), kind


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_these_networks_have_evidence(kind):
    assert any(result for _, result in expected(kind, True, "default"))
