"""Attention: the value token with the largest contribution."""

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.evidence.backward import Step, rule
from pyfast_xai.rules.evidence.points import gather, ravel, unravel
from pyfast_xai.tape import Value


def _strongest_token(step: Step, weights: Tensor, values: Tensor) -> Tensor:
    """For points (..., t, d) the token s with the largest `weights[..., t, s] * values[..., s, d]`, as flat indices.

    Args:
        weights: attention of each point over the tokens, `[P, S]`.
        values: `[..., S, D]`.
    """
    *lead, _, feature = unravel(step.points.index, step.shape)
    tokens = values.shape[-2]
    token = torch.arange(tokens, device=values.device)
    # Keys and values may be shared between queries: a leading size of one is broadcast.
    lead = [c if size > 1 else torch.zeros_like(c) for c, size in zip(lead, values.shape[:-2], strict=True)]
    index = ravel(
        [
            *(c[:, None].expand(-1, tokens) for c in lead),
            token.expand(len(feature), -1),
            feature[:, None].expand(-1, tokens),
        ],
        values.shape,
    )
    contributions = weights * gather(values, index.flatten()).view(index.shape)
    best = step.points.signed(contributions).argmax(1, keepdim=True)
    return index.gather(1, best).squeeze(1)


@rule("scaled_dot_product_attention", saves=["query", "key", "value"])
def scaled_dot_product_attention(
    step: Step,
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
    q, k, v = (step.tensor(name) for name in ("query", "key", "value"))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    *lead, row, _ = unravel(step.points.index, step.shape)
    at = (*lead, row)
    shared = tuple(c if size > 1 else torch.zeros_like(c) for c, size in zip(lead, k.shape[:-2], strict=True))
    scores = torch.einsum("pd,psd->ps", q[at], k[shared]) * (scale or 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        future = torch.arange(k.shape[-2], device=k.device) > row[:, None]
        scores = scores.masked_fill(future, -math.inf)
    if isinstance(attn_mask, Tensor):
        mask = attn_mask.expand(*step.shape[:-1], k.shape[-2])[at]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    source = _strongest_token(step, scores.softmax(-1), v)
    if enable_gqa and isinstance(value, Value):
        heads = unravel(source, v.shape)
        heads[-3] = torch.div(heads[-3], v.shape[-3] // value.shape[-3], rounding_mode="floor")
        source = ravel(heads, value.shape)
    step.send(value, step.points.to(source))


@rule("bmm", saves=["self", "mat2"])
def bmm(step: Step, self: Any, mat2: Any) -> None:
    """Attention times values `[B, T, S] @ [B, S, D]`: back to the values, or to what is not a constant."""
    attention, values = step.tensor("self"), step.tensor("mat2")
    batch, row, column = unravel(step.points.index, step.shape)
    if isinstance(mat2, Value):
        step.send(mat2, step.points.to(_strongest_token(step, attention[batch, row], values)))
    else:
        contributions = step.points.signed(attention[batch, row] * values[batch, :, column])
        step.send(self, step.points.to(ravel([batch, row, contributions.argmax(1)], attention.shape)))
