"""Fused attention taken apart: the scale, the mask and the heads of `scaled_dot_product_attention`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_xai.rules.precision import at_least_float32
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.graph import argument


@dataclass(frozen=True)
class FusedAttention:
    """Attention `softmax(scale q k^T + bias) v`, without its queries, keys and values.

    Attributes:
        scale: scale of the scores.
        groups: heads of queries that read the same keys and values.
        bias: added to the scores, -inf where nothing is read; None for nothing.
    """

    scale: float
    groups: int
    bias: Tensor | None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the scores without the bias."""
        return query @ self.each_head(key).mT * self.scale

    def softmax(self, scores: Tensor) -> Tensor:
        """Returns the attention weights."""
        return (scores if self.bias is None else scores + self.bias).softmax(-1)

    def each_head(self, tensor: Tensor) -> Tensor:
        """Returns keys or values with a copy for each head of queries that reads them."""
        return tensor if self.groups == 1 else tensor.repeat_interleave(self.groups, -3)


def recorded_number(node: Node, name: str) -> Tensor:
    """Returns an argument of a node in float32 or more: the saved one if it depends on the images, or the constant."""
    value = argument(node, name)
    return at_least_float32(node.saved[str(value.index)].tensor if isinstance(value, Value) else value.detach())


def fused_attention(node: Node, query: Tensor, key: Tensor) -> FusedAttention:
    """Returns the settings of a node of fused attention.

    Args:
        node: node of `scaled_dot_product_attention`; a mask that depends on the images is saved.
        query: numbers of the queries.
        key: numbers of the keys.
    """
    scale = argument(node, "scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[-3] // key.shape[-3] if argument(node, "enable_gqa") else 1
    return FusedAttention(scale, groups, _bias(node, query, key))


def _bias(node: Node, query: Tensor, key: Tensor) -> Tensor | None:
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal"):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    mask = node.saved[str(mask.index)].tensor if isinstance(mask, Value) else mask.detach()
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    return mask.to(query.dtype)
