"""Kinds of operations that rules are chosen for, and those that only move elements.

==============  ======================================================================================================
kind            operations
==============  ======================================================================================================
convolution     convolutions and transposed ones of any rank with a constant weight
linear          `linear`, and products of matrices of which one is constant
batch_norm      batch norm with running statistics; behind a convolution or linear layer it is part of that
normalization   layer, group, instance and RMS norm
sum             a sum or difference, also with a constant
pool            means, sums, average pools and interpolations
activation      elementwise functions of one tensor, products with a constant, dropout
product         an elementwise product or quotient of two
matmul          a product of two matrices that both depend on the images
attention       fused attention
softmax         softmax and its logarithm
other           what is none of these and changes numbers
==============  ======================================================================================================

What only moves or selects elements (views, `cat`, padding, max-pools) has no kind: relevance moves as a gradient does.
"""

from pyfast_xai.rules.gradient import layers
from pyfast_xai.rules.gradient.context import has_gradient
from pyfast_xai.rules.gradient.table import GRADIENT
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.graph import argument, find

CONVOLUTIONS = frozenset(
    f"aten::{name}"
    for name in (
        *("conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    )
)
# By name, the arguments that are the factors.
PRODUCTS = {f"aten::{name}": factors for name, factors in layers.PRODUCTS.items()}

_KIND_OF = {
    "batch_norm": ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
    "normalization": (
        *("layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm", "native_group_norm"),
    ),
    "sum": ("add", "sub", "rsub"),
    "pool": (
        *("mean", "sum", "cumsum", "col2im", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"),
        *("_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    ),
    "activation": (
        *("relu", "hardtanh", "relu6", "leaky_relu", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "gelu"),
        *("silu", "mish", "softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh", "log_sigmoid_forward"),
        *("threshold", "clamp", "clamp_min", "clamp_max", "pow", "sqrt", "rsqrt", "exp", "log", "abs", "erf", "neg"),
        *("square", "dropout", "feature_dropout", "native_dropout", "reciprocal", "expm1", "log1p"),
    ),
    "attention": ("scaled_dot_product_attention",),
    "softmax": ("softmax", "_softmax", "log_softmax", "_log_softmax"),
}
_KINDS = {f"aten::{name}": kind for kind, names in _KIND_OF.items() for name in names}

# What only moves or selects elements, or writes them elsewhere.
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten"),
        *("permute", "transpose", "t", "expand", "cat", "stack", "slice", "select", "split", "split_with_sizes"),
        *("chunk", "unbind", "unsafe_split", "unsafe_chunk", "as_strided", "clone", "alias", "_to_copy", "contiguous"),
        *("to", "lift_fresh", "detach", "copy", "fill", "zero", "masked_fill", "where", "index", "index_select"),
        *("gather", "index_put", "channel_shuffle", "constant_pad_nd", "diagonal", "flip", "im2col", "pixel_shuffle"),
        *("pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat"),
        *("repeat_interleave", "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "rot90"),
        *("slice_scatter", "select_scatter", "tril", "triu", "unfold", "upsample_nearest1d", "upsample_nearest2d"),
        *("upsample_nearest3d", "_upsample_nearest_exact2d", "max_pool1d", "max_pool2d", "max_pool3d"),
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *("adaptive_max_pool3d", "max", "min", "amax", "amin", "topk", "sort", "maximum", "minimum", "movedim"),
    )
)

KINDS = ("convolution", "linear", *_KIND_OF, "product", "matmul", "other")
# Kinds that are meant by one word.
GROUPS = {"layer": ("convolution", "linear"), **{kind: (kind,) for kind in KINDS}}


def kind_of(node: Node) -> str | None:
    """Returns the kind of an operation; None where elements are only moved, or no gradient passes."""
    name = key(node.op)
    if name in _MOVES or name.startswith("aliasing::") or not any(map(has_gradient, node.inputs)):
        return None
    if name in CONVOLUTIONS or name == "aten::linear":
        constant = isinstance(node.args[0], Value) and len(node.inputs) == 1
        return ("linear" if name == "aten::linear" else "convolution") if constant else "other"
    if name in PRODUCTS:
        factors = [isinstance(argument(node, factor), Value) for factor in PRODUCTS[name]]
        return ("matmul" if all(factors) else "linear") if len(node.inputs) == sum(factors) else "other"
    if name in ("aten::mul", "aten::div"):
        return "product" if len(node.inputs) == 2 else "activation"
    kind = _KINDS.get(name)
    if kind is None:
        blocked = name in GRADIENT and GRADIENT[name].stops_at(node)
        return None if blocked else "other"
    if kind == "batch_norm" and not _has_statistics(node):
        return "other"
    return "other" if kind not in ("sum", "attention") and len(find(Value, node.args, node.kwargs)) > 1 else kind


def _has_statistics(node: Node) -> bool:
    """Returns whether a batch norm is the affine map of evaluation mode."""
    training = argument(node, "training") if "legit" not in key(node.op) else False
    return not training and argument(node, "running_mean") is not None


def takes_whole(name: str) -> bool:
    """Returns whether an operation is read as a whole, by its name."""
    return name in _KINDS or name in CONVOLUTIONS or name in PRODUCTS or name == "aten::linear"
