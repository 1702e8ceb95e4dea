import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from import_file import import_file
from PIL import Image
from torch import nn

from pyfast_xai import CLEAR, EigenCAM, GradCAM, Saliency
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.serve import Explained

QUICK = [name for name, method in METHODS.items() if not (method.slow or method.needs_attention)]
EXAMPLES = Path(__file__).parent.parent / "examples"


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double().eval()


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = network(), torch.tensor(0)

    def forward(self, x):
        self.calls = self.calls + 1  # a tensor that a model keeps does not change where its layers are
        return self.net(x)


def batch(n, seed=0):
    return torch.rand(n, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", QUICK)
def test_answers_and_reasons_are_those_of_model_and_explainer(method):
    model, images = network(), batch(3)
    logits, explanation = Explained(model, method)(images)
    expected = METHODS[method](model)(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(explanation.heatmap, expected.heatmap)
    assert explanation.method == expected.method == method
    assert not logits.requires_grad
    assert not logits.is_inference()


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        *((name, 1) for name in ("saliency", "guided-backprop", "grad-cam", "grad-cam++", "cam", "clear")),
        *((name, 1) for name in ("excitation-backprop", "fixations")),
        ("eigen-cam", 2),
    ],
)
def test_one_forward_for_both_where_the_method_runs_the_whole_model(method, forwards):
    model = Counted().eval()
    explained = Explained(model, method)
    explained(batch(2))  # layers are looked for in the first call
    before = int(model.calls)
    explained(batch(2, seed=1))
    assert int(model.calls) - before == forwards


def test_the_first_output_of_a_batch_of_one():
    model = network()
    logits, explanation = Explained(model, GradCAM)(batch(1))
    assert torch.equal(logits, model(batch(1)))
    assert len(explanation) == 1


@pytest.mark.parametrize("method", [*QUICK, "integrated-gradients"])
def test_threads_get_what_one_after_the_other_would(method):
    model = network()
    inputs = [batch(1 + n % 3, seed=n) for n in range(16)]
    alone = [METHODS[method](model)(images) for images in inputs]
    explained = Explained(model, METHODS[method](model))
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(explained, inputs))
    for images, (logits, explanation), expected in zip(inputs, result, alone, strict=True):
        assert torch.equal(logits, model(images))
        assert torch.equal(explanation.heatmap, expected.heatmap)


def test_several_targets_an_image():
    model, images = network(), batch(2)
    targets = torch.tensor([[0, 3, 1], [4, 2, 0]])
    logits, explanation = Explained(model, "saliency")(images, targets)
    assert logits.shape == (2, 5)
    assert explanation.target.tolist() == [0, 3, 1, 4, 2, 0]
    assert torch.equal(explanation.heatmap, Saliency(model)(images, targets).heatmap)
    assert torch.allclose(explanation.score, logits.softmax(1).float().gather(1, targets).flatten())


def test_the_model_stays_as_it_is():
    model = network()
    before, attributes = copy.deepcopy(model.state_dict()), {name: dict(vars(m)) for name, m in model.named_modules()}
    explained = Explained(model)
    explained(batch(2))
    with pytest.raises(InputError):
        explained(batch(2)[0])
    assert all(torch.equal(before[name], item) for name, item in model.state_dict().items())
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert explained.model is model
    assert not explained.training
    assert [name.removeprefix("model.") for name in explained.state_dict()] == list(model.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_explains_its_own_model(copied):
    explained = Explained(network(), EigenCAM)
    twin = copied(explained)
    assert twin.explainer.model is twin.model is not explained.model
    with torch.no_grad():
        twin.model[-1].bias += 1
    images = batch(2)
    torch.testing.assert_close(twin(images)[0], explained(images)[0] + 1)


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(InputError, match=r"^explainer must be one of fixations, .* got 'magic'$"):
        Explained(network(), "magic")
    with pytest.raises(InputError, match=r"^explainer must be made for the model, got a clear of another one$"):
        Explained(network(), CLEAR(network()))
    with pytest.raises(InputError, match="evaluation mode"):
        Explained(network()).train()(batch(1))


def example(name):
    return import_file(EXAMPLES / f"{name}.py")


def encoded(size=(40, 32), kind="PNG"):
    sink = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(sink, kind)
    return sink.getvalue()


@pytest.fixture
def client():
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    pytest.importorskip("multipart")
    testing = pytest.importorskip("fastapi.testclient")
    from pyfast_xai.images import Preprocess
    from pyfast_xai.models import LoadedModel

    module = example("serve_fastapi")
    loaded = LoadedModel(network().float(), Preprocess(24), ["ant", "bee", "cat", "dog", "elk"], "tiny")
    with testing.TestClient(module.app_for(loaded, "grad-cam", most_bytes=20_000)) as client:
        yield client, loaded


def test_a_server_answers_with_class_box_and_overlay(client):
    import base64

    client, loaded = client
    answer = client.post("/explain", files={"image": ("a.png", encoded(), "image/png")})
    assert answer.status_code == 200
    output = answer.json()
    recorded, _ = loaded.preprocess(Image.open(io.BytesIO(encoded())).convert("RGB"))
    shares = loaded.model(recorded[None]).detach().softmax(1)[0]
    assert output["class"] == loaded.labels[int(shares.argmax())]
    assert output["score"] == pytest.approx(float(shares.max()), abs=1e-5)
    x1, y1, x2, y2 = output["box"]
    assert 0 <= x1 <= x2 < 40
    assert 0 <= y1 <= y2 < 32
    overlay = Image.open(io.BytesIO(base64.b64decode(output["overlay"])))
    assert (overlay.format, overlay.size) == ("PNG", (24, 24))


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"", 400, "must"),
        (b"no picture at all", 400, "got something else"),
        (encoded()[:80], 400, "must be a whole picture"),
        (encoded() + b"\0" * 30_000, 413, "at most 20,000 bytes"),
    ],
)
def test_a_server_refuses_bad_uploads_in_one_sentence(client, content, code, told):
    answer = client[0].post("/explain", files={"image": ("a.png", content, "image/png")})
    assert answer.status_code == code
    assert told in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_a_server_refuses_a_large_body_before_it_is_read(client):
    answer = client[0].post("/explain", files={"image": ("a.png", b"\0" * 2_000_000, "image/png")})
    assert answer.status_code == 413
    endless = (b"\0" * 1000 for _ in range(2000))  # no content-length
    assert client[0].post("/explain", content=endless).status_code in (411, 413, 422)


def test_a_pipeline_tells_why():
    transformers = pytest.importorskip("transformers")
    module = example("huggingface_pipeline")
    pipeline = module.pipeline_for(module.random_resnet(), module.processor(), "grad-cam")
    pictures = [Image.open(io.BytesIO(encoded(size))).convert("RGB") for size in ((40, 32), (64, 64), (30, 50))]
    plain = transformers.ImageClassificationPipeline(model=pipeline.model, image_processor=module.processor())
    for batch_size in (1, 2):
        result = pipeline(pictures, top_k=2, batch_size=batch_size)
        expected = plain(pictures, top_k=2)
        assert len(result) == 3
        for item, other, picture in zip(result, expected, pictures, strict=True):
            assert [c["label"] for c in item["classes"]] == [c["label"] for c in other]
            assert [c["score"] for c in item["classes"]] == pytest.approx([c["score"] for c in other], abs=1e-5)
            assert item["overlay"].size == picture.size or item["overlay"].size == (64, 64)
            assert item["heatmap"].shape == (64, 64)
            assert float(item["heatmap"].max()) > 0
