"""Any op without a rule of its own: autograd differentiates that one op, on what was kept of its inputs."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import Rule
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.nodes import find, substitute
from pyfast_xai.tape.record import Keep

# Linear in their tensors: the derivative needs shapes only, and no input is kept.
LINEAR = {
    f"aten::{name}"
    for name in (
        *("as_strided", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"),
        *("_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("channel_shuffle", "constant_pad_nd", "cumsum", "diagonal", "flip", "im2col"),
        *("col2im", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "rot90", "slice_scatter"),
        *("select_scatter", "tril", "triu", "unfold", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d"),
        *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d"),
    )
} | {"alias::refresh"}

# Composite operations that autograd takes as a whole: their inputs are less than what their parts would keep.
WHOLE = LINEAR | {f"aten::{name}" for name in ("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu")}


def _pairs(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Value, Tensor]]:
    """The values among a node's arguments with the tensors they stand for."""
    written_down: list[Any] = find((Value, Tensor), node.args, node.kwargs)  # type: ignore[arg-type]
    given = find(Tensor, args, kwargs)
    return [(value, t) for value, t in zip(written_down, given, strict=True) if isinstance(value, Value)]


def save(node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep what depends on the inputs; weights are on the tape already."""
    linear = key(node.op) in LINEAR
    for value, tensor in _pairs(node, args, kwargs):
        if not (linear and value.dtype.is_floating_point):
            keep(str(value.index), tensor)


def _pull(step: Step, *args: Any, **kwargs: Any) -> None:
    node = step.node
    leaves: dict[Value, Tensor] = {}

    def leaf(value: Value) -> Tensor:
        if value not in leaves:
            kept = node.saved.get(str(value.index))
            if kept is not None:
                # A copy: what was recorded in inference mode cannot be part of a graph.
                leaves[value] = kept.tensor.clone()
            else:
                leaves[value] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
            if step.wants(value):
                leaves[value].requires_grad_()
        # In-place operations write to what they are given.
        return leaves[value].clone() if leaves[value].requires_grad and _writes(node) else leaves[value]

    def constant(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    with torch.enable_grad(), torch.autocast(node_device(node), enabled=False):
        args, kwargs = substitute(Tensor, constant, args, kwargs)
        args, kwargs = substitute(Value, leaf, args, kwargs)
        result = node.op(*args, **kwargs)
        results = result if isinstance(result, (list, tuple)) else (result,)
        pairs = [(r, g) for r, g in zip(results, step.grads, strict=True) if g is not None]
        wanted = [value for value, tensor in leaves.items() if tensor.requires_grad]
        if not wanted:
            return
        targets = len(step.grad)
        try:
            by_target = [
                torch.autograd.grad(
                    [r for r, _ in pairs],
                    [leaves[value] for value in wanted],
                    [g[k] for _, g in pairs],
                    retain_graph=k + 1 < targets,
                    allow_unused=True,
                )
                for k in range(targets)
            ]
        except RuntimeError as error:
            raise UnsupportedOpError(
                f"{key(node.op)}, which ran in {node.path or 'the model'!r} (operation {node.name!r}), cannot be "
                f"differentiated ({error}); register a rule with pyfast_xai.rules.response.rule({key(node.op)!r})"
            ) from error
    for value, *grads in zip(wanted, *by_target, strict=True):
        if grads[0] is not None:
            step.send(value, grads[0][None] if targets == 1 else torch.stack(grads))


def node_device(node: Node) -> str:
    """The type of the device a node ran on."""
    return next(value.device.type for value in (*node.outputs, *node.inputs) if value is not None)


def _writes(node: Node) -> bool:
    schema = getattr(node.op, "_schema", None)
    return schema is not None and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


RULE = Rule(_pull, saves=lambda node: ())
