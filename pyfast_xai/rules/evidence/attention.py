"""Attention: the value token with the largest contribution."""

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.evidence.backward import TraceContext, rule
from pyfast_xai.rules.evidence.points import broadcast, gather, ravel, unravel
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.graph import argument


def _strongest_token(ctx: TraceContext, weights: Tensor, values: Tensor) -> Tensor:
    """Returns, for points (..., t, d), the token s with the largest `weights[..., t, s] * values[..., s, d]`.

    Args:
        weights: attention of each point over the tokens, `[P, S]`.
        values: `[..., S, D]`.
    """
    *lead, _, feature = unravel(ctx.points.index, ctx.shape)
    tokens = values.shape[-2]
    token = torch.arange(tokens, device=values.device)
    index = ravel(
        [
            *(c[:, None].expand(-1, tokens) for c in lead),
            token.expand(len(feature), -1),
            feature[:, None].expand(-1, tokens),
        ],
        values.shape,
    )
    contributions = weights * gather(values, index.flatten()).view(index.shape)
    best = ctx.points.signed(contributions).argmax(1, keepdim=True)
    return index.gather(1, best).squeeze(1)


def _read(node: Node) -> list[str]:
    mask = argument(node, "attn_mask") is not None
    return ["query", "key", "value", *(["attn_mask"] if mask else [])]


@rule("scaled_dot_product_attention", saves=_read)
def scaled_dot_product_attention(
    ctx: TraceContext,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    q, k, v = (ctx.tensor(name) for name in ("query", "key", "value"))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    shared = v.shape
    q, k, v = (x.expand(*ctx.shape[:-2], *x.shape[-2:]) for x in (q, k, v))
    *lead, row, _ = unravel(ctx.points.index, ctx.shape)
    at = (*lead, row)
    keys = k[tuple(lead)] if lead else k.expand(len(row), *k.shape)
    scores = torch.einsum("pd,psd->ps", q[at], keys) * (scale or 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        future = torch.arange(k.shape[-2], device=k.device) > row[:, None]
        scores = scores.masked_fill(future, -math.inf)
    if attn_mask is not None:
        mask = ctx.tensor("attn_mask").expand(*ctx.shape[:-1], k.shape[-2])[at]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    source = broadcast(_strongest_token(ctx, scores.softmax(-1), v), v.shape, shared)
    if enable_gqa and isinstance(value, Value):
        heads = unravel(source, shared)
        heads[-3] = torch.div(heads[-3], shared[-3] // value.shape[-3], rounding_mode="floor")
        source = ravel(heads, value.shape)
    ctx.propagate(value, ctx.points.to(source))


@rule("bmm", saves=["self", "mat2"])
def bmm(ctx: TraceContext, self: Any, mat2: Any) -> None:
    """Traces attention times values `[B, T, S] @ [B, S, D]` to the values, or to the operand that is not a constant."""
    attention, values = ctx.tensor("self"), ctx.tensor("mat2")
    batch, row, column = unravel(ctx.points.index, ctx.shape)
    if isinstance(mat2, Value):
        ctx.propagate(mat2, ctx.points.to(_strongest_token(ctx, attention[batch, row], values)))
    else:
        contributions = ctx.points.signed(attention[batch, row] * values[batch, :, column])
        ctx.propagate(self, ctx.points.to(ravel([batch, row, contributions.argmax(1)], attention.shape)))
