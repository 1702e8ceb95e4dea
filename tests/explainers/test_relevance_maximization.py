"""RelMax: a sort of zennit's relevance of a whole data set, and zennit-crp's choice of a channel's value."""

import pytest
import torch
from small_networks import small
from torch import nn
from torch.nn import functional

from pyfast_xai import CRP, InputError, RelMax

DOUBLE = torch.float64
SIZES = [3, 1, 4]


@pytest.fixture
def images():
    return torch.randn(8, 3, 16, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def relevance_by_zennit(net, layer, image, target):
    """The relevance of one image at the output of a layer, `[C, h, w]`."""
    composites, zoo = (pytest.importorskip(f"zennit.{name}") for name in ("composites", "torchvision"))
    seen = []
    with composites.EpsilonPlusFlat(canonizers=[zoo.ResNetCanonizer()]).context(net) as modified:
        module = dict(modified.named_modules())[layer]
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        output = modified(image[None].clone().requires_grad_())
        handle.remove()
        start = functional.one_hot(torch.tensor([target]), 5) * output.detach()
        return torch.autograd.grad(output, seen[0], start)[0][0]


def expected_images(relevances, channel, pooling, normalize, count):
    """The best images of one channel: their number, relevance and place, by a sort in Python."""
    ranked = []
    for n, relevance in enumerate(relevances):
        values = [float(cells.sum() if pooling == "sum" else cells.max()) for cells in relevance]
        value = values[channel] / (sum(abs(other) for other in values) if normalize else 1)
        cells = relevance[channel]
        ranked.append((value, n, divmod(int(cells.argmax()), cells.shape[1])))
    return sorted(ranked, key=lambda item: -item[0])[:count]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "max"])
def test_the_images_are_those_of_a_sort_of_zennits_relevance(pooling, normalize, images):
    net = small("resnet")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    targets = [0, 3, 1, 4, 2, 3, 0, 1]
    relmax = RelMax(CRP(net, layer="layer2"), n_images=3, pooling=pooling, normalize=normalize)
    for part, labels in zip(images.split(SIZES), torch.tensor(targets).split(SIZES), strict=True):
        relmax.update(part, labels)
    best = relmax.compute()
    relevances = [
        relevance_by_zennit(net, "layer2", image, target) for image, target in zip(images, targets, strict=True)
    ]
    assert best.image.shape == best.relevance.shape == (128, 3)
    assert best.position.shape == (128, 3, 2)
    for channel in range(128):
        expected = expected_images(relevances, channel, pooling, normalize, 3)
        values = [value for value, _, _ in expected]
        assert best.relevance[channel].tolist() == pytest.approx(values, rel=1e-7, abs=1e-12)
        for j, (value, number, place) in enumerate(expected):
            if abs(value) > 1e-9:  # channels without relevance have no place
                assert best.image[channel, j] == number
                assert tuple(best.position[channel, j].tolist()) == place


def test_the_batches_do_not_matter(images):
    net = small("vit")
    results = []
    for sizes in ([8], SIZES, [1] * 8):
        relmax = RelMax(
            CRP(net, layer="encoder.layers.encoder_layer_0", channel_dim=-1, composite="gamma-attention"), n_images=5
        )
        for part in images.split(sizes):
            relmax.update(part, 2)
        results.append(relmax.compute())
    assert results[0].position.shape[2] == 1  # tokens
    for other in results[1:]:
        assert torch.equal(other.image, results[0].image)
        assert torch.equal(other.position, results[0].position)
        torch.testing.assert_close(other.relevance, results[0].relevance, rtol=1e-7, atol=1e-12)


def test_several_targets_count_by_themselves(images):
    net = small("resnet")
    together, apart = (RelMax(CRP(net, layer="layer3"), n_images=16) for _ in range(2))
    together.update(images, [[1, 3]] * 8)
    assert together.n_seen == 8
    together = together.compute()
    assert together.image.shape == (256, 16)
    assert together.image.sort(1).values[0].tolist() == sorted([*range(8)] * 2)
    for target in (1, 3):
        apart.update(images, target)
    apart = apart.compute()
    torch.testing.assert_close(together.relevance, apart.relevance, rtol=1e-7, atol=1e-12)


def test_the_first_of_equals_wins_and_few_images_are_all_returned(images):
    relmax = RelMax(CRP(small("resnet"), layer="layer2"), n_images=40)
    for _ in range(3):
        relmax.update(images[:1], 2)
    best = relmax.compute()
    assert best.image.tolist() == [[0, 1, 2]] * 128


def test_a_layer_without_positions(images):
    relmax = RelMax(CRP(small("resnet"), layer="flatten"), n_images=2)
    relmax.update(images, 2)
    best = relmax.compute()
    assert best.position.shape == (512, 2, 1)
    assert not best.position.any()


def test_what_does_not_fit_is_said_so(images):
    net = small("resnet")
    with pytest.raises(InputError, match=r"^explain must be a CRP, got ResNet$"):
        RelMax(net)
    with pytest.raises(InputError, match=r"^pooling must be one of 'sum', 'max', got 'mean'$"):
        RelMax(CRP(net), pooling="mean")
    with pytest.raises(InputError, match=r"^n_images must be at least 1, got 0$"):
        RelMax(CRP(net), n_images=0)
    relmax = RelMax(CRP(net, layer="layer2"))
    with pytest.raises(InputError, match=r"^images must be one or more before .*, got none$"):
        relmax.compute()
    relmax.update(images[:1], 1)
    relmax.explain = CRP(net, layer="layer3")
    with pytest.raises(InputError, match=r"^the layer must have 128 channels as before, got 256$"):
        relmax.update(images[:1], 1)
    assert len(relmax.compute().image) == 128
    with pytest.raises(InputError, match="images must have shape"):
        relmax.update(images[0], 1)
