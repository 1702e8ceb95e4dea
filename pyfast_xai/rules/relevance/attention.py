"""Fused attention: its two products and its softmax, by the rule of its kind (Achtibat et al., AttnLRP, 2024)."""

from dataclasses import replace

from torch import Tensor

from pyfast_xai.rules.fused_attention import fused_attention, recorded_number
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.derivative import node_device
from pyfast_xai.rules.relevance.layer_rules import Bilinear, LayerRule, Taylor
from pyfast_xai.rules.relevance.maps import Forward, Modify, OperationMap
from pyfast_xai.tape.graph import argument


def attention_relevance(ctx: BackwardContext, rule: LayerRule) -> None:
    """Sends the relevance of attention to its queries, keys and values.

    Args:
        ctx: context of a `scaled_dot_product_attention`.
        rule: for the product with the values, and for the softmax; that of queries and keys is shared evenly.
    """
    node = ctx.node
    query, key, value = (recorded_number(node, name) for name in ("query", "key", "value"))
    attention = fused_attention(node, query, key)

    def scores(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        return attention.scores(*leaves)

    def mixed(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        return leaves[0] @ attention.each_head(leaves[1])

    def softmax(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        return attention.softmax(leaves[0])

    def mapped(inputs: list[Tensor], forward: Forward) -> OperationMap:
        return OperationMap(node.name, [], inputs, node_device(node), forward)

    raw = mapped([query, key], scores).run([query, key])[0]
    weights = mapped([raw], softmax).run([raw])[0]
    at_weights, at_value = rule.relevance(mapped([weights, value], mixed), ctx.grad)
    ctx.propagate(argument(node, "value"), at_value)
    if ctx.wants(argument(node, "query")) or ctx.wants(argument(node, "key")):
        bilinear = rule if isinstance(rule, Bilinear) else Bilinear()
        (at_scores,) = (bilinear.softmax or Taylor()).relevance(mapped([raw], softmax), at_weights)
        evenly = replace(bilinear, first=0.5)
        at_query, at_key = evenly.relevance(mapped([query, key], scores), at_scores)
        ctx.propagate(argument(node, "query"), at_query)
        ctx.propagate(argument(node, "key"), at_key)
