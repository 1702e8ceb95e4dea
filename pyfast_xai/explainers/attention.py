"""Attention of vision transformers, read from the recorded forward pass, fused or spelled out.

Rollout multiplies the attention of all layers; relevance weighs it by the gradient of a class first; LeGrad is the
gradient alone, of the class as the tokens of each layer have it.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.attention_maps import Attention, KeepAttention, attention_of, check_whole_images
from pyfast_xai.explainers.common.axes import Layout
from pyfast_xai.explainers.common.explainer import Explainer, Settings, one_of
from pyfast_xai.explainers.common.layer_explainer import resized
from pyfast_xai.explainers.common.layer_search import LayerSearch, class_scores
from pyfast_xai.explainers.common.model_cache import ModelCache
from pyfast_xai.explainers.common.output_gradients import output_gradients
from pyfast_xai.explainers.common.targets import Goal, Target
from pyfast_xai.explainers.common.tensors import outside_inference_mode, repeat_rows, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.rules.kinds import KINDS
from pyfast_xai.rules.relevance import Balance, Bilinear, Composite, Gradient, Norm, Pass, Positive, RelevanceRules
from pyfast_xai.tape import Node, Tape, Value
from pyfast_xai.tape.record import SaveTensor
from pyfast_xai.tape.suffix import KeepSuffix, replay_suffix


@dataclass
class _Tokens:
    """The tokens of a model.

    Attributes:
        layout: where positions of the image lie among them; None before the first call.
        read: the first token that the head reads, and that after the last.
        blocks: names of the operations that made the tokens behind each block, as far as they are known.
    """

    layout: Layout | None = None
    read: tuple[int, int] = (0, 1)
    blocks: list[str] = field(default_factory=list)


class _AttentionExplainer(Explainer):
    """Base: maps `[N, T, T]` of how much each token depends on each, and the rows that the head reads."""

    ranks = (3, 4, 5)
    default_box_rule = Mass()
    needs_attention = True

    def __init__(
        self, model: nn.Module, *, tokens: tuple[int, int] | None = None, **settings: Unpack[Settings]
    ) -> None:
        super().__init__(model, **settings)
        self.tokens = tokens
        self._known: ModelCache[_Tokens] = ModelCache(self, _Tokens)

    def _read(self, tape: Tape, images: Tensor, args: Any, kwargs: Any) -> tuple[list[Attention], _Tokens]:
        """Returns the attention of every layer, and the layout of the tokens."""
        layers = attention_of(tape, len(images))
        with self._known.entry(images, args, kwargs, self.tokens) as known:
            if known.layout is None:
                check_whole_images(tape)
                tokens = _tokens_of(tape, layers[0].weights.shape[-1], self.tokens)
                known.layout, known.read = tokens.layout, tokens.read
            return layers, _Tokens(known.layout, known.read, known.blocks)


def _maps(mixed: Tensor, tokens: _Tokens) -> Tensor:
    """Returns the maps `[*, N, h, w]` of what the head reads, from `[*, N, T, T]`."""
    assert tokens.layout is not None
    first, end = tokens.read
    row = mixed[..., first:end, :].mean(-2)
    cells = replace(tokens.layout, channels=2).cells(row.reshape(-1, row.shape[-1], 1))
    return outside_inference_mode(cells[..., 0].reshape(*row.shape[:-1], *tokens.layout.grid))


def _tokens_of(tape: Tape, count: int, grid: tuple[int, int] | None) -> _Tokens:
    search = LayerSearch(tape, class_scores(tape))
    layers = [
        layer
        for layer in search.layers()
        if len(layer.value.shape) == 3 and layer.value.shape[3 - layer.layout.channels] == count
    ]
    if grid is not None:
        before = count - grid[0] * grid[1]
        if before < 0:
            raise InputError(f"tokens must fit the {count} tokens of the model, got {grid}")
        layout = Layout(2, grid, grid, (0, 1), before)
        return _Tokens(layout, search.read_range(layers[-1]) if layers else (0, 1 if before else count))
    if not layers:
        raise InputError(f"tokens must be the grid (h, w) of the {count} tokens of the model, got None")
    return _Tokens(layers[-1].layout, search.read_range(layers[-1]))


class AttentionRollout(_AttentionExplainer):
    """Attention rollout: how much of each token flows to those that the head reads (Abnar and Zuidema, 2020).

    With `A_l` the attention of layer l over its heads, `R = prod_l (A_l + I) / 2`, rows brought to a sum of one. The
    map does not depend on a class. Attention is read from the recorded forward, also where it is fused and no hook
    sees it. For networks that attend over the whole image; windows (Swin) are refused.

    An explanation has `signed_map`, at the resolution of the tokens, never negative here, and `heatmap`.

    Args:
        model: in evaluation mode.
        heads: how the heads of a layer become one: their "mean", "max" or "min".
        discard: share of the attention of each layer and image that is set to zero, the smallest first (0.9 in a
            well-known implementation); 0 for the paper's.
        tokens: grid `(h, w)` of the tokens; None for what the network made them of.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import AttentionRollout
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        ...         self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        >>> AttentionRollout(Net().eval())(torch.rand(2, 3, 16, 24)).signed_map.shape
        torch.Size([2, 4, 6])
    """

    method = "attention-rollout"
    paper = "Quantifying attention flow in transformers (Abnar and Zuidema, 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: Literal["mean", "max", "min"] = "mean",
        discard: float = 0.0,
        tokens: tuple[int, int] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, tokens=tokens, **settings)
        self.heads = one_of("heads", heads, ("mean", "max", "min"))
        if not 0 <= discard < 1:
            raise InputError(f"discard must be at least 0 and under 1, got {discard}")
        self.discard = discard

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        tape = self.record(images, *args, policy=KeepAttention(), **kwargs)
        layers, tokens = self._read(tape, images, args, kwargs)
        rollout = functools.reduce(lambda below, layer: layer @ below, (self._flow(layer.weights) for layer in layers))
        maps = _maps(rollout, tokens)
        return Explanation(
            method=self.method,
            heatmap=resized(maps[:, None], images.shape[2:])[:, 0].float(),
            signed_map=maps,
            images=repeat_rows(images, 1),
            box_rule=self.box_rule,
            labels=self.labels,
        )

    def _flow(self, weights: Tensor) -> Tensor:
        """Returns the flow from token to token in a layer, `[N, T, T]`, from attention `[N, heads, T, T]`."""
        fused = weights.mean(1) if self.heads == "mean" else getattr(weights, f"a{self.heads}")(1)
        if self.discard:
            flat = fused.flatten(1)
            least = flat.topk(int(flat.shape[1] * self.discard), largest=False).indices
            fused = flat.scatter(1, least, 0.0).view_as(fused)
        flow = fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
        return flow / flow.sum(-1, keepdim=True)


class AttentionRelevance(_AttentionExplainer):
    """Relevance of tokens for a class, by attention and its gradient (Chefer, Gur and Wolf, 2021, in two forms).

    With `A_l` the attention of layer l and y the score of the class, `R = I` at first and then, layer by layer,
    `R += mean_heads max(dy/dA_l * A_l, 0) R` (Eq. 5 and 6, self-attention). That is the second, generic form. The first
    ("Transformer interpretability beyond attention visualization", CVPR 2021, Eq. 13 and 14) has the relevance of
    attention by layer-wise relevance propagation in place of `A_l`: linear layers share among positive contributions
    without their bias, attention gets half of its product with the values, the terms of a sum share in proportion to
    their totals, and activations, norms and softmax leave relevance where it is.

    Attention and its gradient are read from one recorded forward and one backward walk, or two for the first form, also
    where attention is fused. For networks that attend over the whole image; windows (Swin) are refused.

    An explanation has `signed_map`, at the resolution of the tokens, never negative here, and `heatmap`.

    Args:
        model: in evaluation mode.
        form: "generic", the second, or "lrp", the first.
        tokens: grid `(h, w)` of the tokens; None for what the network made them of.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import AttentionRelevance
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        ...         self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        >>> AttentionRelevance(Net().eval())(torch.rand(2, 3, 16, 24), target=[[1, 3]] * 2).heatmap.shape
        torch.Size([4, 16, 24])
    """

    method = "attention-relevance"
    paper = "Generic attention-model explainability for bi-modal and encoder-decoder transformers (Chefer et al., 2021)"

    def __init__(
        self,
        model: nn.Module,
        *,
        form: Literal["generic", "lrp"] = "generic",
        tokens: tuple[int, int] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, tokens=tokens, **settings)
        self.form = one_of("form", form, ("generic", "lrp"))

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        rules = GradientRules(warned=self.warned) if self.form == "generic" else RelevanceRules(self.warned)
        tape = self.record(images, *args, policy=KeepAttention(rules), **kwargs)
        layers, tokens = self._read(tape, images, args, kwargs)
        seeds = output_gradients(tape, target, self.outputs, self.labels)
        values = [layer.value for layer in layers]
        if isinstance(rules, RelevanceRules):
            gradients = backward_pass(rules.by(_GRADIENT, tape, {}), tape, seeds.grads, values, retain=True)
            shares = backward_pass(rules.by(_SHARES, tape, {}), tape, seeds.grads, values)
            weights = [layer.relevance(share, _STABILIZER) for layer, share in zip(layers, shares, strict=True)]
        else:
            gradients = backward_pass(rules, tape, seeds.grads, values)
            weights = [layer.weights[None] for layer in layers]
        slopes = [layer.gradient(gradient) for layer, gradient in zip(layers, gradients, strict=True)]
        maps = targets_to_rows(_maps(_relevance(weights, slopes), tokens))
        return Explanation(
            **self._fields(images, seeds),
            heatmap=resized(maps[:, None], images.shape[2:])[:, 0].float(),
            signed_map=maps,
        )


# The rules of the first form of attention relevance, and its denominators (Chefer et al., CVPR 2021, section 3).
_STABILIZER = 1e-9
_SHARES = Composite(
    {
        "layer": Positive(_STABILIZER),
        ("normalization", "softmax"): Pass(),
        "sum": Balance(_STABILIZER),
        "pool": Norm(_STABILIZER),
        ("attention", "matmul"): Bilinear(stabilizer=_STABILIZER, softmax=Pass()),
    }
)
_GRADIENT = Composite({KINDS: Gradient()})


def _relevance(weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Returns the relevance of every token for every other, `[K, N, T, T]`, without that of a token for itself.

    Args:
        weights: what weighs each layer, `[K or 1, N, heads, T, T]`.
        gradients: those of its probabilities, `[K, N, heads, T, T]`.
    """
    identity = torch.eye(gradients[0].shape[-1], dtype=gradients[0].dtype, device=gradients[0].device)
    relevance = identity.expand(*gradients[0].shape[:2], *identity.shape)
    for weight, gradient in zip(weights, gradients, strict=True):
        relevance = relevance + (gradient * weight).clamp_min(0).mean(2) @ relevance
    return relevance - identity


class LeGrad(_AttentionExplainer):
    """LeGrad: the gradient of a class with respect to attention, layer by layer (Bousselham et al., 2024).

    With `s_l` the score of the class that the model's head gives the tokens behind block l, and `A_l` the attention of
    that block, the map is the mean over layers, heads and queries of `max(ds_l/dA_l, 0)`. The paper stretches each map
    to 0 to 1, which is left to whoever draws it. Attention is read from the recorded forward, also where it is fused.
    For networks that attend over the whole image; windows (Swin) are refused.

    An explanation has `signed_map`, at the resolution of the tokens, never negative here, and `heatmap`.

    Args:
        model: in evaluation mode.
        tokens: grid `(h, w)` of the tokens; None for what the network made them of.
        **settings: those of `Explainer`.

    Raises:
        InputError: when called, a model without such attention, or whose blocks do not hand all tokens on.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import LeGrad
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        ...         self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        >>> LeGrad(Net().eval())(torch.rand(2, 3, 16, 24), target=[[1, 3]] * 2).heatmap.shape
        torch.Size([4, 16, 24])
    """

    method = "legrad"
    paper = "LeGrad: an explainability method for vision transformers via feature formation sensitivity (2024)"

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        rules = GradientRules(warned=self.warned)
        blocks = self._blocks(images, target, args, kwargs)
        tape = self.record_unaccelerated(images, *args, policy=_KeepTokens(rules, blocks), **kwargs)
        layers, tokens = self._read(tape, images, args, kwargs)
        seeds = output_gradients(tape, target, self.outputs, self.labels)
        fixed: Goal = target if seeds.target is None else seeds.target
        keeps = KeepSuffix(blocks[-1], like=KeepAttention(rules))
        suffix = self.record_unaccelerated(images, *args, policy=keeps, **kwargs)
        total: Tensor | None = None
        for layer, name in reversed(list(zip(layers, blocks, strict=True))):  # a walk lets go of what lies behind it
            value = tape.find(name)
            slopes = _slopes_of_head(suffix, suffix.find(blocks[-1]), _tokens_behind(tape, value), fixed)
            (gradient,) = backward_pass(rules, tape, {value: slopes}, [layer.value])
            mean = layer.gradient(gradient).clamp_min(0).mean((2, 3))  # [K, N, T], over heads and queries
            total = mean if total is None else total + mean
        assert total is not None
        every = replace(tokens, read=(0, 1))
        maps = targets_to_rows(_maps(total[..., None, :] / len(layers), every))
        return Explanation(
            **self._fields(images, seeds),
            heatmap=resized(maps[:, None], images.shape[2:])[:, 0].float(),
            signed_map=maps,
        )

    def _blocks(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> list[str]:
        """Returns the names of the operations that made the tokens behind each block, found on a first recording."""
        with self._known.entry(images, args, kwargs, self.tokens) as known:
            if not known.blocks:
                rules = GradientRules(warned=self.warned)
                tape = self.record_unaccelerated(images, *args, policy=KeepAttention(rules), **kwargs)
                layers = attention_of(tape, len(images))
                check_whole_images(tape)
                seeds = output_gradients(tape, target, self.outputs, self.labels)
                known.blocks[:] = _blocks_of(tape, layers, seeds.grads)
            return list(known.blocks)


_TOKENS = "tokens behind a block"


class _KeepTokens(KeepAttention):
    """Keeps what attention and the gradient need, and the tokens behind some operations."""

    def __init__(self, gradients: GradientRules, names: Collection[str]) -> None:
        super().__init__(gradients)
        self._names = set(names)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().run(node, keep, args, kwargs)
        if node.name in self._names:
            keep(_TOKENS, result)
        return result


def _tokens_behind(tape: Tape, value: Value) -> Tensor:
    producer = tape.producer(value)
    assert producer is not None
    return producer.saved[_TOKENS].tensor


def _blocks_of(tape: Tape, layers: list[Attention], ends: Collection[Value]) -> list[str]:
    """Returns the names of the operations through whose tokens each block hands on all that it computed.

    It is the last such operation in front of the next block. Behind the last block that would be the norm of the head,
    so that there it is as far behind attention as in the block before.
    """
    starts = [producer.index for layer in layers if (producer := tape.producer(layer.value)) is not None]
    sizes = (len(layers[0].weights), layers[0].weights.shape[-1])
    passed = [
        node
        for node in map(tape.producer, LayerSearch(tape, ends).passed())
        if node is not None and len(node.outputs) == 1 and _is_tokens(node.outputs[0], sizes)
    ]
    stops = [*starts[1:], len(tape.nodes)]
    behind = [[node.name for node in passed if a <= node.index < b] for a, b in zip(starts, stops, strict=True)]
    if not all(behind):
        raise InputError(
            "model must hand all tokens on from block to block, got one that goes past its blocks; AttentionRelevance "
            "and AttentionRollout read the attention alone"
        )
    if len(behind) > 1:
        behind[-1] = behind[-1][: len(behind[-2])]
    return [names[-1] for names in behind]


def _is_tokens(value: Value | None, sizes: tuple[int, int]) -> bool:
    return value is not None and len(value.shape) == 3 and tuple(value.shape[:2]) == sizes


def _slopes_of_head(suffix: Tape, value: Value, tokens: Tensor, target: Goal) -> Tensor:
    """Returns the gradient of the head's scores for some tokens with respect to these, `[K, N, T, D]`."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = tokens.detach().clone().requires_grad_()
        result = replay_suffix(suffix, value, leaf.to(value.dtype, copy=True))  # the blocks may end in front of a cast
        pairs = dict(zip(pytree.tree_leaves(suffix.outputs), pytree.tree_leaves(result), strict=True))
        scored = replace(suffix, result=pytree.tree_map_only(Tensor, Tensor.detach, result))
        seeds = output_gradients(scored, target).grads
        count = len(next(iter(seeds.values())))
        return torch.stack(
            [
                torch.autograd.grad([pairs[end] for end in seeds], leaf, [grad[k] for grad in seeds.values()], True)[0]
                for k in range(count)
            ]
        )
