"""A small Show and Tell on features that tell what is in a picture."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyfast_xai import CNNFixations
from pyfast_xai.evaluation import Annotation
from pyfast_xai.reproduce import captions

VOCABULARY = [captions.START, captions.END, "a", "and", "bird", "dog"]


def annotation(**areas):
    boxes = torch.tensor([[0.0, 0, 0, area - 1] for area in areas.values()]).view(-1, 4)
    return Annotation("x.jpg", None, boxes, list(areas))


def test_captions_name_the_largest_objects():
    assert captions.caption_of(annotation(dog=4, bird=9)) == ["a", "bird", "and", "a", "dog"]
    assert captions.caption_of(annotation(dog=4, bird=9, cat=2, cow=1))[-1] == "cat"
    twice = Annotation("x.jpg", None, torch.tensor([[0.0, 0, 3, 0]] * 2 + [[0, 0, 5, 0]]), ["dog", "dog", "bird"])
    assert captions.caption_of(twice) == ["a", "dog", "and", "a", "bird"]


def test_classes_of_imagenet_become_words():
    boxes = torch.zeros(2, 4)
    assert captions._in_words(Annotation("x.jpg", 200, boxes, [200, 200])).kinds == ["dog", "dog"]
    assert captions._in_words(Annotation("x.jpg", 0, boxes, [0, 0])).kinds == ["fish", "fish"]
    assert captions._in_words(Annotation("x.jpg", 999, boxes, [999, 999])).kinds == []
    spans = sorted(span for spans in captions.WORDS.values() for span in spans)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans))


@pytest.fixture
def learnt(data):
    """A captioner of pictures whose red channel is a bird and whose green one is a dog."""
    features = torch.tensor([[1.0, 0], [0, 1], [2, 1]]).repeat(8, 1)
    written = [["a", "bird"], ["a", "dog"], ["a", "bird", "and", "a", "dog"]] * 8
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(2, 3, 1, 1))
    return captions.train(features, written, VOCABULARY, network, data)


def test_the_captioner_says_what_it_learnt(learnt):
    assert not learnt.training
    for features, caption in (([1.0, 0], "a bird"), ([0.0, 1], "a dog"), ([2.0, 1], "a bird and a dog")):
        assert " ".join(captions.spoken(learnt, torch.tensor([features]), VOCABULARY)) == caption


def test_training_leaves_the_random_state(data):
    features, state = torch.rand(3, 2), torch.get_rng_state()
    captions.train(features, [["a", "dog"]] * 3, VOCABULARY, nn.Identity(), replace(data, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_word_is_explained_after_those_before_it(learnt):
    images = torch.rand(1, 3, 8, 8) * torch.tensor([2.0, 1, 0]).view(1, 3, 1, 1)
    caption = ["a", "bird", "and", "a", "dog"]
    evidence = captions._evidence(learnt, images, caption, 4, VOCABULARY)
    words = torch.tensor([[VOCABULARY.index(word) for word in (captions.START, *caption)]])
    _, explanation = evidence["CNN-Fixations"]
    expected = CNNFixations(learnt)(images, VOCABULARY.index("dog"), words[:, :5])
    assert torch.equal(explanation.heatmap, expected.heatmap)
    assert int(explanation.target[0]) == VOCABULARY.index("dog")
    with torch.no_grad():
        assert torch.allclose(explanation.logits, learnt(images, words[:, :5]), atol=1e-5)
    # The last state is that after the last word.
    _, whole = evidence["CNN-Fixations, the whole caption"]
    with torch.no_grad():
        read = torch.cat([learnt.image(learnt.features(images))[:, None], learnt.word(words)], 1)
    unit = int(learnt.lstm(read)[0][0, -1].argmax())
    last = CNNFixations(learnt, neuron=("lstm", (words.shape[1], unit)))(images, None, words)
    assert torch.equal(whole.heatmap, last.heatmap)
    assert list(evidence)[:2] == ["centre", "Grad-CAM"]
