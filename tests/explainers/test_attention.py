"""Attention rollout and relevance against a plain transformer whose attention is written out, in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import AttentionRelevance, AttentionRollout, InputError, LeGrad

DOUBLE = torch.float64
GRID, WIDTH, HEADS, CLASSES = (2, 3), 8, 2, 4


class Block(nn.Module):
    """Attention in one of the ways in which it is written, and a layer of its own for every token."""

    def __init__(self, way):
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = None

    def forward(self, x):
        size = (len(x), x.shape[1], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norm(x)).view(size).permute(2, 0, 3, 1, 4)
        scale = 1 / math.sqrt(q.shape[-1])
        if self.way == "fused":
            out = functional.scaled_dot_product_attention(q, k, v)
        elif self.way == "heads in the batch":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            out = torch.bmm((torch.bmm(q, k.mT) * scale).softmax(-1), v).unflatten(0, (len(x), HEADS))
        else:
            self.attention = functional.dropout((q @ k.mT * scale).softmax(-1), 0.1, self.training)
            if self.attention.requires_grad:
                self.attention.retain_grad()
            out = self.attention @ v
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + torch.tanh(self.mlp(x))


class Transformer(nn.Module):
    def __init__(self, way="fused", class_token=True):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, CLASSES)
        self.norm = nn.LayerNorm(WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH)) if class_token else None
        self.place = nn.Parameter(torch.randn(1, math.prod(GRID) + class_token, WIDTH))
        self.blocks = nn.ModuleList(Block(way) for _ in range(3))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.place
        for block in self.blocks:
            x = block(x)
        return self.read(x)

    def read(self, x):
        x = self.norm(x)
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


WAYS = ("fused", "spelled out", "heads in the batch")


def case(way, class_token):
    torch.manual_seed(0)
    model = Transformer(way, class_token).to(DOUBLE).eval()
    images = torch.randn(3, 3, 4 * GRID[0], 4 * GRID[1], dtype=DOUBLE)
    torch.manual_seed(0)
    plain = Transformer("spelled out", class_token).to(DOUBLE).eval()
    plain(images)
    return model, plain, images


def grid_of(mixed, class_token):
    """The map of one image, of how much each token depends on each."""
    row = mixed[0, 1:] if class_token else mixed.mean(0)
    return row.view(GRID)


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_multiplies_the_attention_of_all_layers(way, class_token, heads):
    model, plain, images = case(way, class_token)
    explanation = AttentionRollout(model, heads=heads)(images)
    for n in range(len(images)):
        rollout = torch.eye(plain.blocks[0].attention.shape[-1], dtype=DOUBLE)
        for block in plain.blocks:
            attention = block.attention[n].detach()
            fused = attention.mean(0) if heads == "mean" else getattr(attention, heads)(0).values
            flow = fused + torch.eye(len(fused), dtype=DOUBLE)
            rollout = flow / flow.sum(1, keepdim=True) @ rollout
        torch.testing.assert_close(explanation.signed_map[n], grid_of(rollout, class_token), rtol=0, atol=1e-13)
    assert explanation.heatmap.shape == (3, 8, 12)


def test_discarded_attention_is_the_smallest_of_each_image_and_layer():
    model, plain, images = case("fused", True)
    explanation = AttentionRollout(model, discard=0.6)(images)
    for n in range(len(images)):
        rollout = torch.eye(7, dtype=DOUBLE)
        for block in plain.blocks:
            fused = block.attention[n].detach().mean(0)
            fused[fused < fused.flatten().sort().values[int(0.6 * 49)]] = 0
            flow = fused + torch.eye(7, dtype=DOUBLE)
            rollout = flow / flow.sum(1, keepdim=True) @ rollout
        torch.testing.assert_close(explanation.signed_map[n], grid_of(rollout, True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_relevance_weighs_attention_by_its_gradient(way, class_token):
    model, plain, images = case(way, class_token)
    targets = [[2, 0]] * 3
    explanation = AttentionRelevance(model)(images, targets)
    assert explanation.target.tolist() == [2, 0] * 3
    for k, target in enumerate(targets[0]):
        plain(images)[:, target].sum().backward()
        for n in range(len(images)):
            relevance = torch.eye(plain.blocks[0].attention.shape[-1], dtype=DOUBLE)
            for block in plain.blocks:
                attention, gradient = block.attention[n].detach(), block.attention.grad[n]
                relevance = relevance + (attention * gradient).clamp_min(0).mean(0) @ relevance
            relevance -= torch.eye(len(relevance), dtype=DOUBLE)
            result = explanation.signed_map[2 * n + k]
            torch.testing.assert_close(result, grid_of(relevance, class_token), rtol=0, atol=1e-13)
    assert explanation.heatmap.any()


def quotient(numerator, denominator):
    return numerator / torch.where(denominator < 0, denominator - 1e-9, denominator + 1e-9)


def among_positive(layer, x, above):
    """Relevance of the inputs of a linear layer, among positive contributions, without its bias."""
    contributions = (x[:, None] * layer.weight.detach()).clamp_min(0)  # [tokens, out, in]
    return (contributions * quotient(above, contributions.sum(2))[..., None]).sum(1)


def among_terms(first, second, above):
    shares = [term * quotient(above, first + second) for term in (first, second)]
    totals = [abs(float(share.sum())) for share in shares]
    return [
        share * (total / sum(totals) * above.sum() / share.sum()) for share, total in zip(shares, totals, strict=True)
    ]


def among_factors(left, right, above):
    """Halves of the relevance of a product of matrices, by contributions."""
    share = quotient(above, left @ right)
    return left * (share @ right.mT) / 2, right * (left.mT @ share) / 2


def slow_relevance_of_attention(plain, image, target):
    """The relevance of the attention of each block, `[heads, T, T]`, of one image, written out layer by layer."""
    with torch.no_grad():
        x = plain.patches(image[None]).flatten(2).transpose(1, 2)
        if plain.token is not None:
            x = torch.cat([plain.token, x], 1)
        x = (x + plain.place)[0]
        passed = []
        for block in plain.blocks:
            normed = block.norm(x)
            q, k, v = block.qkv(normed).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
            attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            mixed = (attention @ v).transpose(0, 1).flatten(1)
            made = block.out(mixed)
            middle = x + made
            grown = torch.tanh(block.mlp(middle))
            passed.append((block, x, normed, q, k, v, attention, mixed, made, middle, grown))
            x = middle + grown
        read = plain.norm(x)
        first = functional.one_hot(torch.tensor([target]), CLASSES).to(DOUBLE)
        relevance = torch.zeros_like(x)
        if plain.token is not None:
            relevance[:1] = among_positive(plain.head, read[:1], first)
        else:
            mean = read.mean(0, keepdim=True)
            relevance = read / len(read) * quotient(among_positive(plain.head, mean, first), mean)
        of_attention = []
        for block, x, normed, q, k, v, attention, mixed, made, middle, grown in reversed(passed):
            kept, above = among_terms(middle, grown, relevance)
            kept, above = among_terms(x, made, kept + among_positive(block.mlp, middle, above))
            above = among_positive(block.out, mixed, above).unflatten(1, (HEADS, -1)).transpose(0, 1)
            at_attention, at_values = among_factors(attention, v, above)
            of_attention.append(at_attention)
            at_queries, at_keys = among_factors(q, k.mT, at_attention)
            at_all = torch.stack([at_queries, at_keys.mT, at_values]).permute(2, 0, 1, 3).flatten(1)
            relevance = kept + among_positive(block.qkv, normed, at_all)
        return of_attention[::-1]


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_relevance_of_attention_by_lrp(way, class_token):
    """The first form, against every rule of the paper written out for one image after the other."""
    model, plain, images = case(way, class_token)
    explanation = AttentionRelevance(model, form="lrp")(images, [[2, 0]] * 3)
    for k, target in enumerate((2, 0)):
        plain(images)[:, target].sum().backward()
        for n in range(len(images)):
            relevance = torch.eye(plain.blocks[0].attention.shape[-1], dtype=DOUBLE)
            of_attention = slow_relevance_of_attention(plain, images[n], target)
            for block, share in zip(plain.blocks, of_attention, strict=True):
                relevance = relevance + (block.attention.grad[n] * share).clamp_min(0).mean(0) @ relevance
            relevance -= torch.eye(len(relevance), dtype=DOUBLE)
            expected = grid_of(relevance, class_token)
            assert expected.max() > 0
            result = explanation.signed_map[2 * n + k]
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))
    other = AttentionRelevance(model)(images, [[2, 0]] * 3).signed_map
    assert not torch.allclose(explanation.signed_map, other, rtol=1e-2)


def slow_legrad(plain, images, target):
    """The map of each image before it is laid out, `[N, T]`, from the head on the tokens behind each block."""
    behind = []
    hooks = [block.register_forward_hook(lambda actual, inputs, out: behind.append(out)) for block in plain.blocks]
    plain(images)
    for hook in hooks:
        hook.remove()
    maps = []
    for block, tokens in zip(plain.blocks, behind, strict=True):
        scores = plain.read(tokens)[:, target]
        (gradient,) = torch.autograd.grad(scores.sum(), block.attention, retain_graph=True)
        maps.append(gradient.clamp_min(0).mean((1, 2)))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_legrad_is_the_gradient_of_the_head_on_the_tokens_of_each_layer(way, class_token):
    model, plain, images = case(way, class_token)
    explain = LeGrad(model)
    for _ in range(2):  # the second call knows the blocks
        explanation = explain(images, [[2, 0]] * 3)
        for k, target in enumerate((2, 0)):
            expected = slow_legrad(plain, images, target)[:, int(class_token) :].reshape(3, *GRID)
            assert expected.min() >= 0 < expected.max()
            torch.testing.assert_close(explanation.signed_map[k::2], expected, rtol=0, atol=1e-13)
    of_function = LeGrad(model)(images, lambda output: 2 * output[:, 2]).signed_map
    torch.testing.assert_close(of_function, 2 * explanation.signed_map[::2], rtol=0, atol=1e-13)


class Casting(Block):
    """A block that ends in a norm which is computed in float32, whatever the model computes in."""

    def forward(self, x):
        x = super().forward(x)
        single = x.float()
        return (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_legrad_of_a_model_that_casts_inside(dtype):
    def built(way):
        torch.manual_seed(0)
        model = Transformer(way)
        model.blocks = nn.ModuleList(Casting(way) for _ in range(3))
        return model.to(dtype).eval()

    plain, images = built("spelled out"), torch.randn(2, 3, 4 * GRID[0], 4 * GRID[1], dtype=dtype)
    explanation = LeGrad(built("fused"))(images, 2)
    expected = slow_legrad(plain, images, 2)[:, 1:].reshape(2, *GRID)
    assert expected.max() > 1e-3
    torch.testing.assert_close(explanation.signed_map, expected, rtol=1e-4, atol=1e-7)  # rounding of float32


class Mixed(Transformer):
    """Blocks and a head in precisions of their own."""

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x.to(block.norm.weight.dtype)).to(self.place.dtype)
        return self.read(x)

    def read(self, x):
        return super().read(x.to(self.norm.weight.dtype))


@pytest.mark.parametrize("in_single", ["head", "last block and head", "first block", "blocks"])
def test_legrad_of_networks_that_change_their_precision(in_single):
    def mixed(way):
        torch.manual_seed(0)
        model = Mixed(way, class_token=False).to(DOUBLE).eval()
        singles = {
            "head": [model.norm, model.head],
            "last block and head": [model.blocks[-1], model.norm, model.head],
            "first block": [model.blocks[0]],
            "blocks": [model.blocks],
        }
        for part in singles[in_single]:
            part.float()
        return model

    plain, images = mixed("spelled out"), torch.randn(3, 3, 4 * GRID[0], 4 * GRID[1], dtype=DOUBLE)
    explanation = LeGrad(mixed("fused"))(images, 2)
    expected = slow_legrad(plain, images, 2).reshape(3, *GRID).to(explanation.signed_map.dtype)
    torch.testing.assert_close(explanation.signed_map, expected, rtol=0, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("kind", [AttentionRollout, AttentionRelevance, LeGrad])
def test_a_mask_and_replays(kind):
    class Masked(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.fused, self.patches, self.head = fused, nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            mask = x @ x.mT
            if self.fused:
                x = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            else:
                x = (x @ x.mT / 2 + mask).softmax(-1) @ x
            return self.head(x.mean(1))

    torch.manual_seed(0)
    fused = Masked(True).to(DOUBLE).eval()
    spelled_out = Masked(False).to(DOUBLE).eval()
    spelled_out.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 8, 12, dtype=DOUBLE)
    expected = kind(spelled_out)(images)
    explain = kind(fused).accelerate()
    for _ in range(3):
        torch.testing.assert_close(explain(images).signed_map, expected.signed_map, rtol=0, atol=1e-12)


def test_the_encoder_of_pytorch():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, CLASSES)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    model = Encoder().eval()
    for kind in (AttentionRollout, AttentionRelevance, LeGrad):
        explanation = kind(model)(torch.randn(2, 3, 8, 12))
        assert explanation.signed_map.shape == (2, 2, 3)
        assert bool((explanation.signed_map >= 0).all())


def test_networks_without_such_attention():
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(InputError, match="model must have self-attention over tokens of the images, got none"):
        AttentionRollout(convolutions)(torch.rand(1, 3, 8, 8))
    models = pytest.importorskip("torchvision.models")
    for kind in (AttentionRelevance, LeGrad):
        with pytest.raises(InputError, match="model must attend over whole images"):
            kind(models.swin_t(weights=None, num_classes=3).eval())(torch.rand(1, 3, 64, 64))
    with pytest.raises(InputError, match="discard must be at least 0 and under 1, got 1"):
        AttentionRollout(convolutions, discard=1)
