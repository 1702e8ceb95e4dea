"""A model that keeps tensors of its own making can be trained after an explanation, as if there had been none."""

import contextlib
import copy
import importlib.util

import pytest
import torch
from torch import nn

from pyfast_xai import EigenCAM, GradCAM, Occlusion, Saliency
from pyfast_xai.compat import captum
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.tape import record


class Detector(nn.Module):
    """As a YOLO head: anchors and strides are made for a size of the map, and kept."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.shape = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 6, 1), None

    def forward(self, x):
        y = self.head(self.body(x).relu())
        if self.shape != y.shape:
            self.shape = y.shape
            self.anchors, self.strides = torch.arange(y.shape[-1]) + 0.5, torch.full((1, 1, *y.shape[2:]), 8.0)
        return torch.cat([(y[:, :4] * self.strides) + self.anchors, y[:, 4:].sigmoid()], 1).mean((2, 3))


class Attention(nn.Module):
    """As LeViT: attention biases are gathered for a device, and kept in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.body, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)
        self.biases = nn.Parameter(torch.randn(1, 5))
        self.register_buffer("places", torch.randint(5, (16, 16)))
        self.cache = {}

    def forward(self, x):
        tokens = self.body(x).flatten(2).mT
        if self.training:
            self.cache.clear()
            biases = self.biases[:, self.places]
        else:
            key = str(x.device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.places]
            biases = self.cache[key]
        mixed = (self.mix(tokens) @ tokens.mT + biases).softmax(-1) @ tokens
        return self.head(mixed.mean(1))


class Holder:
    """A plain object."""


class Nested(nn.Module):
    """Keeps tensors in lists, tuples, dicts, plain objects, buffers that come late, and views of all of them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.kept = []

    def forward(self, x):
        y = self.body(x)
        if not self.kept:
            made = [torch.full((), 2.0), torch.ones(8, 1, 1), torch.linspace(0, 1, y.shape[-1])]
            self.kept.append(made[0])
            self.pair = (made[1], {"deep": [(made[2], made[2][1:])]})
            self.holder = Holder()
            self.holder.tensor = made[1].view(1, 8, 1, 1)
            self.register_buffer("late", made[2].clone(), persistent=False)
            self.weight = self.head.weight.detach().clone()
        y = y * self.kept[0] * self.pair[0] * self.pair[1]["deep"][0][0] * self.holder.tensor + self.late
        self.last = y
        return self.head(y.relu().mean((2, 3))) + self.weight.sum()


class Adapted(nn.Module):
    """As a layer that peft wraps: the weights below are frozen, an adapter of low rank beside them learns."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.head.requires_grad_(False)
        self.merged = None

    def forward(self, x):
        features = self.body(x).relu().mean((2, 3))
        if not self.training and self.merged is None:
            self.merged = self.head.weight + self.up.weight @ self.down.weight
        if self.training:
            self.merged = None
            return self.head(features) + self.up(self.down(features))
        return nn.functional.linear(features, self.merged, self.head.bias)


class Hooked(nn.Module):
    """What the user's own forward hook has stored is used later."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.body.scale = torch.ones(())
        self.body.register_forward_hook(lambda body, args, output: setattr(body, "scale", output.detach().amax()))

    def forward(self, x):
        return self.head(self.body(x).relu().mean((2, 3))) * self.body.scale


KINDS = [Detector, Attention, Nested, Adapted, Hooked]


def images_of():
    return torch.rand(2, 3, 16, 16)


def tensors_within(thing, recorded=None):
    """Every tensor that a model holds, however deep."""
    recorded = {} if recorded is None else recorded
    if id(thing) in recorded:
        return []
    recorded[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    else:
        parts = [vars(thing)] if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    return [tensor for part in parts for tensor in tensors_within(part, recorded)]


def fails_in_the_middle(model, images):
    def fail(module, args, output):
        raise ZeroDivisionError

    last = [module for module in model.modules() if not list(module.children())][-1]
    with contextlib.suppress(ZeroDivisionError), contextlib.ExitStack() as stack:
        stack.callback(last.register_forward_hook(fail).remove)
        Saliency(model)(images, output_of)


def output_of(output):
    """One number an image, of whatever a model returns."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.flatten(1).float().mean(1)


def accelerated(model, images):
    explain = Saliency(model).accelerate()
    explain(images, output_of)
    explain(images, output_of)


WAYS = {
    "record": lambda model, images: record(model, images),
    "saliency": lambda model, images: Saliency(model)(images, output_of),
    "accelerated": accelerated,
    "forward": lambda model, images: Saliency(model).forward(images),
    "occlusion": lambda model, images: Occlusion(model, window=8, stride=8)(images, output_of),
    "captum": lambda model, images: captum.Saliency(lambda x: output_of(model(x))).attribute(images),
    "metrics": lambda model, images: Scorer(model, images)(images + 1, torch.arange(len(images))),
    "exception": fails_in_the_middle,
}
LAYERED = {
    "eigen-cam": lambda model, images: EigenCAM(model, layer="body")(images),
    "grad-cam": lambda model, images: GradCAM(model, layer="body")(images, output_of),
}


def step(model, images):
    """Gradients of an evaluation-mode forward, and of a step of training after it."""
    leaf = images.clone().requires_grad_()
    result = [*torch.autograd.grad(output_of(model(leaf)).sum(), leaf)]
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    output_of(model(images)).sum().backward()
    result += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    model.eval()
    return result


def explain_and_train(model, images, way):
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        untouched(images)  # a forward that is none of ours
    way(model, images)
    assert not [tensor for tensor in tensors_within(model) if tensor.is_inference()]
    for result, expected in zip(step(model, images), step(untouched, images), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", [*WAYS, *LAYERED])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode], ids=["plain", "inference"])
def test_a_model_trains_after_an_explanation(kind, way, mode):
    model, images = kind().eval(), images_of()

    def explained(model, images):
        with mode():
            {**WAYS, **LAYERED}[way](model, images)

    explain_and_train(model, images, explained)


def available(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


YOLOS = ["yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov10n", "yolo11n", "yolo26n"]


@available("ultralytics")
@pytest.mark.parametrize("name", YOLOS)
@pytest.mark.parametrize("way", ["saliency", "accelerated", "forward", "exception"])
def test_a_yolo_can_be_differentiated_after_an_explanation(name, way, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))
    from ultralytics import YOLO

    model, images = YOLO(f"{name}.yaml").model.float().eval(), torch.rand(1, 3, 64, 64)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    WAYS[way](model, images)
    assert not [tensor for tensor in tensors_within(model) if tensor.is_inference()]
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    output_of(output[0] if name != "yolov8n-cls" else output).sum().backward()
    assert leaf.grad.isfinite().all()
    model.train()
    output_of(model(images)).sum().backward()


@available("timm")
@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformerv2_s0", "efficientvit_m0"])
def test_a_model_of_timm_trains_after_an_explanation(name):
    import timm

    model, images = timm.create_model(name, num_classes=10).eval(), torch.rand(1, 3, 224, 224)
    for way in ("saliency", "forward"):
        WAYS[way](model, images)
    assert not [tensor for tensor in tensors_within(model) if tensor.is_inference()]
    leaf = images.clone().requires_grad_()
    output_of(model(leaf)).sum().backward()
    assert leaf.grad.isfinite().all()
    model.train()
    output_of(model(images.expand(2, -1, -1, -1))).sum().backward()


@available("peft")
@available("accelerate")
def test_a_model_that_peft_wraps_trains_after_an_explanation():
    import peft

    base = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["3", "5"], init_lora_weights=False)).eval()
    for way in ("saliency", "accelerated", "forward", "exception"):
        explain_and_train(copy.deepcopy(model), images_of(), WAYS[way])
