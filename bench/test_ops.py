"""Every op at shapes of real networks: by each backend, beside plain PyTorch and beside what the machine can do.

All backends take turns in one process, after each was found to be right. The bound of a call is the longer of moving
its bytes once and doing its operations, at the rates of `roofline.py`; the share is how near its time comes.
"""

import functools
import importlib.metadata
import statistics
import time
import warnings

import pytest
import roofline
import torch
import trained
from turns import quotients, rest, spread, take_turns

import pyfast_xai
from pyfast_xai import onednn, ops
from pyfast_xai.images import load_image
from pyfast_xai.ops.registry import OPS
from pyfast_xai.proof.networks import Call, Sizes, calls, outcome, share, single_dtype_calls

SIZES = Sizes(images=8, matrices=8)
CALLS: list[Call] = [*calls("cpu", torch.float32, SIZES), *single_dtype_calls("cpu", SIZES)]
BUDGET = 3.0  # seconds for the rounds of a call
LEAST, MOST = 3, 60  # rounds


@pytest.fixture(scope="module")
def rates():
    return roofline.rates()


def version(backend):
    names = {"numba": "numba", "pytorch-grad-cam": "grad-cam", "reference": "torch"}
    return importlib.metadata.version(names[backend]) if backend in names else pyfast_xai.__version__


def rows_of(seconds, beside, common, rates):
    """A row for each that took turns with `beside`."""
    other = seconds[beside]
    for backend, item in seconds.items():
        if backend == beside:
            continue
        used, times = spread(item), quotients(other, item)
        row = {**common, "backend": backend, "version": version(backend), "beside": beside}
        row |= {"ms": 1e3 * used.median, "ms_low": 1e3 * used.low, "ms_high": 1e3 * used.high}
        row |= {"beside_ms": 1e3 * statistics.median(other), "rounds": len(item), **rates}
        row |= {"times": times.median, "low": times.low, "high": times.high}
        if "bytes" in common:
            row["share"], row["bound"] = share(common["bytes"], common["operations"], used.median, rates)
        yield row


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op}, {call.shape}")
def test_op(benchmark, op_rows, rates, call):
    arguments = call.arguments()
    backends = [name for name in ("reference", "numba", "cpp") if OPS[call.op].missing(name, "cpu") is None]
    expected = outcome(call, "reference", arguments)
    for backend in backends[1:]:  # Numba compiles here
        assert call.agree(outcome(call, backend, arguments), expected), backend

    def again():
        if call.reset is not None:
            call.reset(*arguments)

    runs = {name: functools.partial(call.kernel(name), *arguments) for name in backends}
    seconds = take_turns(benchmark, runs, rounds_for(runs.values()), settled=1, before=again)
    common = {"op": call.op, "shape": call.shape, "dtype": str(call.dtype).removeprefix("torch.")}
    common |= {"bytes": call.traffic, "operations": call.operations}
    op_rows.extend(rows_of(seconds, "reference", common, rates))


def rounds_for(runs):
    """So many that they fit the budget."""
    start = time.perf_counter()
    for run in runs:
        run()
    return max(LEAST, min(MOST, int(BUDGET / (time.perf_counter() - start))))


# The projection of Eigen-CAM by itself, on what layers of ResNet-50 say of two pictures.

NETWORK = "resnet50_abm_pruned_int8"
LAYERS = ("layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def activations():
    """Of each layer `[2, C, h, w]`, and whether the network has learnt anything."""
    known = (trained.folder() / "models.py").is_file()
    if known:
        network = trained.loaded(NETWORK)
        model, images = network.model, [network.preprocess(load_image(path))[0] for path in trained.photographs(2)]
    else:
        torch.manual_seed(0)
        models = pytest.importorskip("torchvision.models")
        model, images = models.resnet50(weights=None).eval(), torch.randn(2, 3, 224, 224).unbind()
    result = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda module, args, output, name=name: result.__setitem__(name, output))
    with torch.inference_mode():
        model(torch.stack(list(images)))
    return {name: item.clone(memory_format=torch.channels_last) for name, item in result.items()}, known


@pytest.mark.parametrize("layer", LAYERS)
def test_projection(benchmark, op_rows, rates, activations, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations")
    result, known = activations
    activation = result[layer]
    theirs = activation.contiguous().numpy()

    def project():
        matrices = activation.flatten(2).mT
        left, singular, _, _ = ops.leading_singular(matrices - matrices.mean(1, keepdim=True))
        return (left * singular[:, None])[..., 0].view(len(activation), *activation.shape[2:])

    actual, other = project(), torch.from_numpy(peer.get_2d_projection(theirs))
    sign = (actual * other).sum((1, 2), keepdim=True).sign()
    torch.testing.assert_close(actual * sign, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))

    runs = {"pytorch-grad-cam": lambda: peer.get_2d_projection(theirs), ops.report()[0].backend: project}
    seconds = take_turns(benchmark, runs, LEAST, settled=1, before=rest)
    images, channels, height, width = activation.shape
    shape = f"{layer} of {'a trained' if known else 'a random'} ResNet-50, {images} of {height * width}x{channels}"
    common = {"op": "leading_singular", "shape": shape, "dtype": "float32"}
    op_rows.extend(rows_of(seconds, "pytorch-grad-cam", common, rates))


# A convolution beside oneDNN's direct one, both with weights laid out before and a ReLU on the way out.

CONVOLVED = [call for call in CALLS if call.op == "winograd_conv2d"]


@pytest.mark.skipif(not onednn.available(), reason="beside oneDNN")
@pytest.mark.parametrize("call", CONVOLVED, ids=lambda call: call.shape)
def test_convolution(benchmark, op_rows, rates, call):
    maps, _, bias, *_ = call.arguments()
    channels, filters = maps.shape[1], len(bias)
    weight = torch.randn(filters, channels, 3, 3) / (3 * channels**0.5)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    direct = torch.ops.mkldnn._reorder_convolution_weight.default(weight, *geometry, maps.shape)
    minimal = ops.winograd_weight(weight)
    runs = {
        "oneDNN": lambda: torch.ops.mkldnn._convolution_pointwise(maps, direct, bias, *geometry, "relu", [], ""),
        "cpp": lambda: ops.winograd_conv2d(maps, minimal, bias, (1, 1), lower=0),
    }
    expected = runs["oneDNN"]()
    torch.testing.assert_close(runs["cpp"](), expected, rtol=0, atol=1e-5 * float(expected.max()))
    seconds = take_turns(benchmark, runs, rounds_for(runs.values()))
    common = {"op": call.op, "shape": call.shape, "dtype": "float32"}
    op_rows.extend(rows_of(seconds, "oneDNN", common, rates))
