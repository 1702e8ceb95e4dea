"""The peers on trained networks and photographs, where a folder of them is at hand."""

import pytest
import torch

from pyfast_xai.compat import captum as own_captum
from pyfast_xai.compat import grad_cam as own_grad_cam
from pyfast_xai.reproduce import Data

# Networks whose rectifiers are modules of their own, so that Captum sees them all; and their last map.
NETWORKS = {"squeezenet1_1": "features.12", "googlenet_abm_pruned_int8": None}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request, real_data):
    data = Data(real_data, count=4, names=(request.param,))
    loaded = next(data.networks(()))
    images = data.inputs(data.imagenet(), loaded.preprocess).double()
    model = loaded.model.double()
    layer = NETWORKS[request.param]
    if layer is None:
        layer = [name for name, module in model.named_modules() if type(module).__name__ == "Inception"][-1]
    return model, images, model.get_submodule(layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution"])
def test_captum(case, name):
    attr = pytest.importorskip("captum.attr")
    model, images, _ = case
    target = model(images).argmax(1)
    expected = getattr(attr, name)(model).attribute(images.clone().requires_grad_(), target=target)
    result = getattr(own_captum, name)(model).attribute(images, target=target)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_captum_layer_grad_cam(case):
    attr = pytest.importorskip("captum.attr")
    model, images, layer = case
    expected = attr.LayerGradCam(model, layer).attribute(images.clone().requires_grad_(), target=7)
    result = own_captum.LayerGradCam(model, layer).attribute(images, target=7)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "settings"), [("GradCAM", {}), ("GradCAMPlusPlus", {}), ("EigenCAM", {"sign": "lapack"})]
)
def test_grad_cam(case, name, settings):
    peer = pytest.importorskip("pytorch_grad_cam")
    model, images, layer = case
    model, images = model.float(), images.float()
    try:
        with getattr(peer, name)(model, [layer]) as explain:
            expected = explain(images, targets=None)
        with getattr(own_grad_cam, name)(model, [layer], **settings) as explain:
            result = explain(images, targets=None)
    finally:
        model.double()
    assert abs(result - expected).max() < 2e-5
