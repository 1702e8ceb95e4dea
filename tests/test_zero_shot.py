"""Image-text models as classifiers, against the models' own similarities of images and texts."""

import pytest
import torch
from torch import nn

from pyfast_xai import (
    RISE,
    CNNFixations,
    EigenCAM,
    ExcitationBackprop,
    GradCAM,
    InputError,
    Saliency,
    ZeroShotClassifier,
)

TEXTS = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2], [1, 4, 4, 2]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    text = {
        **SIZES,
        "vocab_size": 12,
        "max_position_embeddings": 8,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    width = {"projection_dim": 16} if name == "CLIP" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **width)
    model = getattr(transformers, f"{name}Model")(config)
    return model, lambda images: model(input_ids=TEXTS, pixel_values=images).logits_per_image


def of_open_clip():
    class Clip(nn.Module):
        """Has the interface of open_clip, and returns what it returns."""

        def __init__(self):
            super().__init__()
            layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.visual, self.words = nn.Sequential(*layers, nn.Flatten()), nn.EmbeddingBag(12, 16)
            self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-1.5))

        def encode_image(self, images):
            return self.visual(images)

        def encode_text(self, texts):
            return self.words(texts)

        def forward(self, images, texts):
            sides = [self.encode_image(images), self.encode_text(texts)]
            images, texts = (side / side.norm(dim=1, keepdim=True) for side in sides)
            return self.logit_scale.exp() * images @ texts.T + self.logit_bias

    model = Clip()
    return model, lambda images: model(images, TEXTS)


def case(name):
    torch.manual_seed(0)
    model, similarities = of_open_clip() if name == "open_clip" else of_transformers(name)
    model.double().eval()
    return model, similarities, torch.randn(2, 3, 32, 32, dtype=torch.float64)


NAMES = ("CLIP", "Siglip", "open_clip")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_models_own(name):
    model, similarities, images = case(name)
    classifier = ZeroShotClassifier(model, TEXTS if name == "open_clip" else {"input_ids": TEXTS})
    assert not classifier.training
    torch.testing.assert_close(classifier(images), similarities(images), rtol=0, atol=1e-12)
    result = Saliency(classifier)(images, [[2, 0]] * 2)
    leaf = images.clone().requires_grad_()
    expected = [torch.autograd.grad(similarities(leaf)[:, k].sum(), leaf)[0] for k in (2, 0)]
    expected = torch.stack(expected, 1).flatten(0, 1)
    torch.testing.assert_close(result.attribution, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_explainer_runs_and_leaves_the_text_side_alone(name):
    model, _, images = case(name)
    classifier = ZeroShotClassifier(model, TEXTS)
    text = "encode_text" if name == "open_clip" else "get_text_features"
    setattr(model, text, lambda *args, **kwargs: pytest.fail("texts are encoded again"))
    labels = ["a cat", "a dog", "a boat"]
    for kind in (GradCAM, EigenCAM, CNNFixations, ExcitationBackprop, Saliency):
        explanation = kind(classifier, labels=labels)(images, None if kind is EigenCAM else "a dog")
        assert explanation.heatmap.shape == (2, 32, 32)
        assert bool((explanation.heatmap.flatten(1).amax(1) > 0).all()), kind
    assert RISE(classifier, n_masks=4, labels=labels)(images, "a boat").target.tolist() == [2, 2]
    delattr(model, text)


def test_features_of_texts_and_bad_input():
    model, similarities, images = case("open_clip")
    features = model.encode_text(TEXTS)
    classifier = ZeroShotClassifier(model, features)
    torch.testing.assert_close(classifier(images), similarities(images), rtol=0, atol=1e-12)
    assert set(classifier.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    with pytest.raises(InputError, match="texts must have 16 features as images do, got 7"):
        ZeroShotClassifier(model, torch.randn(2, 7))(images)
    with pytest.raises(InputError, match=r"texts must give features \[K, D\], got \[16\]"):
        ZeroShotClassifier(model, features[0])
    with pytest.raises(InputError, match=r"model must have get_image_features and get_text_features, or .* got Linear"):
        ZeroShotClassifier(nn.Linear(2, 2), TEXTS)
