import json
import logging
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyfast_xai import demo
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.models import load_model, read_weights

torchvision = pytest.importorskip("torchvision")
SMALL = "torchvision/squeezenet1_1"


@pytest.fixture
def network():
    return torchvision.models.squeezenet1_1(weights=None, num_classes=4)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_digits():
    loaded = load_model("digits")
    assert not loaded.model.training
    assert same(loaded.model, demo.load())
    assert loaded.labels == list("0123456789")
    assert loaded.preprocess.shape == (96, 96)
    assert loaded.preprocess.mean == (0, 0, 0)
    scenes = demo.make_scenes(8, seed=0)
    assert (loaded.model(scenes.images).argmax(1) == scenes.labels).sum() >= 6


def test_random_weights_are_said_aloud(caplog):
    with caplog.at_level(logging.WARNING, logger="pyfast_xai"):
        loaded = load_model(SMALL, num_classes=3)
    assert "torchvision/squeezenet1_1 has RANDOM weights" in caplog.text
    assert not loaded.model.training
    assert loaded.model(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    # Outputs that mean nothing have no names.
    assert loaded.labels is None
    assert loaded.preprocess == Preprocess(224, 256)


def test_names_and_sizes_come_from_the_published_weights(network, tmp_path):
    full = torchvision.models.squeezenet1_1(weights=None)
    save_file(full.state_dict(), tmp_path / "own.safetensors")
    loaded = load_model(SMALL, tmp_path / "own.safetensors")
    assert same(loaded.model, full)
    assert len(loaded.labels) == 1000
    assert loaded.labels[0] == "tench"
    resnet = torchvision.models.get_model_weights("resnet50")
    assert resnet.IMAGENET1K_V2.transforms().resize_size == [232]
    # A file that was downloaded is known by its name.
    model = torchvision.models.resnet50(weights=None)
    for weights in resnet:
        path = tmp_path / weights.url.rsplit("/", 1)[1]
        torch.save(model.state_dict(), path)
        assert load_model("torchvision/resnet50", path).preprocess.resize == weights.transforms().resize_size[0]


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "_orig_mod.", "epoch", "half"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weight_files(tmp_path, network, wrap, kind):
    state = network.state_dict()
    if wrap.endswith("."):
        state = {wrap + key: tensor for key, tensor in state.items()}
    if wrap == "half":
        network.half()
        state = network.state_dict()
        network.float()
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        boxed = {"epoch": {"epoch": 3, "model": state}, "state_dict": {"state_dict": state}, "model": {"model": state}}
        torch.save(boxed.get(wrap, state), path)
    loaded = load_model(SMALL, path, num_classes=4)
    assert same(loaded.model, network)
    assert loaded.labels is None


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "weights.safetensors", "weights"])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_pickle_is_refused_and_not_run(tmp_path, name, save):
    mark, path = tmp_path / "it ran", tmp_path / name
    save({"weight": torch.zeros(3), "trap": Trap(mark)}, path)
    with pytest.raises(InputError) as caught:
        load_model(SMALL, path)
    assert not mark.exists()
    assert "must be safetensors or a saved state dict" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sparse_weights_are_refused(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"must hold dense tensors, got one of layout torch\.sparse_coo at 'b'"):
        read_weights(tmp_path / "w.pt")


def test_pickled_module_is_refused(tmp_path, network):
    torch.save(network, tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"a pickle with more than tensors \(Unsupported global.*SqueezeNet"):
        load_model(SMALL, tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "something else"),
        (b"text", "something else"),
        ([1, 2], "must hold named tensors and nothing else, got a list"),
        ({}, "must hold named tensors and nothing else"),
        ({"a": torch.ones(1), "b": 3}, "must hold named tensors and nothing else"),
        (torch.ones(3), "must hold named tensors and nothing else, got a Tensor"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.0.bias"), "must fit torchvision/squeezenet1_1, got no tensor 'features.0.bias'"),
        (lambda s: s.update(stray=torch.ones(2)), "got a tensor 'stray' it does not have"),
        (lambda s: s.update({"features.0.bais": s.pop("features.0.bias")}), "close names are 'features.0.bais'"),
        (lambda s: s.update({"features.0.bias": torch.ones(3)}), r"'features.0.bias' of shape \[3\] instead of \[64\]"),
        (
            lambda s: s.update({"features.0.bias": torch.ones(64).char()}),
            "of dtype torch.int8 instead of",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, network, change, message):
    state = network.state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=message) as caught:
        load_model(SMALL, tmp_path / "weights.pt", num_classes=4)
    assert "\n" not in str(caught.value)


def test_counters_that_old_files_lack(tmp_path):
    model = torchvision.models.mobilenet_v2(weights=None, num_classes=2)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    assert same(load_model("torchvision/mobilenet_v2", tmp_path / "old.safetensors", 2).model, model)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("heads", [True, False])
def test_auxiliary_heads_are_dropped(tmp_path, name, heads):
    actual = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=heads, num_classes=3)
    torch.save(actual.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(f"torchvision/{name}", tmp_path / "weights.pt", 3).model
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), actual.eval()(images))
    assert not [key for key in loaded.state_dict() if key.lower().startswith("aux")]


def test_published_googlenet_transforms_its_input(tmp_path):
    actual = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    published = torchvision.models.GoogLeNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    for name, transforms in ((published, True), ("own.pth", False)):
        torch.save(actual.state_dict(), tmp_path / name)
        assert load_model("torchvision/googlenet", tmp_path / name).model.transform_input is transforms


def test_densenet_file_with_the_old_names(tmp_path):
    actual = torchvision.models.densenet121(weights=None, num_classes=2)
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): t for key, t in actual.state_dict().items()}
    assert old.keys() != actual.state_dict().keys()
    torch.save(old, tmp_path / "old.pth")
    assert same(load_model("torchvision/densenet121", tmp_path / "old.pth", 2).model, actual)


def test_named_weights_are_fetched_as_tensors_only(monkeypatch, network):
    requests = []

    def fetch(self, **settings):
        requests.append((self.name, settings))
        return torchvision.models.squeezenet1_1(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights, "get_state_dict", fetch)
    for name in ("DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        assert len(load_model(SMALL, name).labels) == 1000
    assert {name for name, _ in requests} == {"IMAGENET1K_V1"}
    assert all(settings["weights_only"] and settings["check_hash"] for _, settings in requests)


def test_detector_fetches_no_backbone(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    loaded = load_model("torchvision/lraspp_mobilenet_v3_large", num_classes=2)
    assert loaded.model(torch.rand(1, 3, 64, 64))["out"].shape == (1, 2, 64, 64)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "import torch\n"
        "def small():\n    return torch.nn.Conv2d(3, 2, 3)\n"
        "def broken():\n    raise RuntimeError('first line\\nsecond line')\n"
        "def needs(width):\n    return None\n"
        "def wrong():\n    return 3\n"
        "ready = torch.nn.Linear(4, 2)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "own_networks"
    sys.modules.pop("own_networks", None)


def test_callable_of_a_module(module, tmp_path):
    before = list(sys.path)
    loaded = load_model(f"{module}:small")
    assert isinstance(loaded.model, nn.Conv2d)
    assert not loaded.model.training
    assert loaded.name == "own_networks:small"
    assert sys.path == before
    actual = nn.Conv2d(3, 2, 3)
    save_file(actual.state_dict(), tmp_path / "own.safetensors")
    assert same(load_model(f"{module}:small", "own.safetensors").model, actual)
    assert isinstance(load_model(f"{module}:ready").model, nn.Linear)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("broken", "callable without arguments, got RuntimeError: first line"),
        ("needs", "callable without arguments, got TypeError"),
        ("wrong", "must give a torch.nn.Module, got int"),
        ("number", "must be callable, got int"),
        ("absent", "has no attribute 'absent'"),
        ("", "model must be"),
    ],
)
def test_callable_that_gives_no_module(module, attribute, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(f"{module}:{attribute}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "weights", "count", "message"),
    [
        ("resnet50", None, None, "model must be 'digits', 'torchvision/<name>'.*got 'resnet50'"),
        ("torchvision/resnet5", None, None, "got 'resnet5'; close names are 'resnet50'"),
        ("no_such_package:net", None, None, "No module named 'no_such_package'"),
        (":net", None, None, "model must be"),
        ("digits", "no such file", None, "weights must be a file, got 'no such file'"),
        ("digits", None, 5, "num_classes must be None for 'digits'"),
        (SMALL, "V7", None, "must be one of a file, DEFAULT, IMAGENET1K_V1, got 'V7'"),
    ],
)
def test_names_that_do_not_exist(spec, weights, count, message):
    with pytest.raises(InputError, match=message):
        load_model(spec, weights, count)


def test_nothing_is_imported_that_was_not_named(tmp_path):
    import subprocess

    code = (
        "import json, sys; from pyfast_xai.models import load_model; load_model('digits');"
        "print(json.dumps([m for m in ('torchvision', 'timm', 'matplotlib', 'sklearn') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
