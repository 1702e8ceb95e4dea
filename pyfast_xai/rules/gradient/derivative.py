"""Any op without a rule of its own: autograd differentiates that one op, on what was kept of its inputs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.gradient.context import BackwardContext, has_gradient, stacked
from pyfast_xai.rules.gradient.strides import canonical
from pyfast_xai.rules.gradient.table import Rule
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.graph import find, substitute
from pyfast_xai.tape.record import SaveTensor, writes

# Linear in their tensors: the derivative needs shapes only, and no input is kept.
LINEAR = {
    f"aten::{name}"
    for name in (
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"),
        *("_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("channel_shuffle", "cumsum", "diagonal", "flip", "im2col"),
        *("col2im", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "rot90", "slice_scatter"),
        *("select_scatter", "tril", "triu", "unfold", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d"),
        *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d"),
        *("_fft_c2c", "_fft_r2c", "_fft_c2r", "view_as_real", "view_as_complex", "complex", "_conj", "_neg_view"),
    )
}

# Composite operations that autograd takes as a whole: their inputs are less than what their parts would keep.
WHOLE = LINEAR | {f"aten::{name}" for name in ("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu")}


def pairs(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Value, Tensor]]:
    """Returns the values among a node's arguments with the tensors they stand for."""
    recorded_leaves: list[Any] = find((Value, Tensor), node.args, node.kwargs)  # type: ignore[arg-type]
    tensors = find(Tensor, args, kwargs)
    return [(value, t) for value, t in zip(recorded_leaves, tensors, strict=True) if isinstance(value, Value)]


def save(node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps what depends on the inputs, and the state of the random numbers that the op may draw.

    Weights are on the tape already.
    """
    linear = key(node.op) in LINEAR
    for value, tensor in pairs(node, args, kwargs):
        if not (linear and has_gradient(value)):
            keep(str(value.index), tensor)
    if _is_random(node.op):
        keep(_GENERATOR, _generator(node, kwargs).get_state())


_GENERATOR = "generator"


def _is_random(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def _generator(node: Node, kwargs: dict[str, Any]) -> torch.Generator:
    """Returns the generator that the op of a node draws from."""
    device = node.inputs[0].device
    if kwargs.get("generator") is not None:
        return kwargs["generator"]
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


@contextlib.contextmanager
def _drawing_as_recorded(node: Node) -> Iterator[None]:
    """Lets an op draw the random numbers that it drew in the forward pass, and puts the generator back."""
    state = node.saved.get(_GENERATOR)
    if state is None:
        yield
        return
    generator = _generator(node, node.kwargs)
    before = generator.get_state()
    generator.set_state(state.tensor)
    try:
        yield
    finally:
        generator.set_state(before)


def _backward(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
    node = ctx.node
    leaves: dict[Value, Tensor] = {}

    def leaf(value: Value) -> Tensor:
        if value not in leaves:
            saved = node.saved.get(str(value.index))
            if saved is not None:
                # A copy: what was recorded in inference mode cannot be part of a graph.
                leaves[value] = canonical(saved.tensor.clone())
            else:
                leaves[value] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
            if ctx.wants(value):
                leaves[value].requires_grad_()
        # In-place operations write to what they are given.
        return leaves[value].clone() if leaves[value].requires_grad and writes(node.op) else leaves[value]

    def constant(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    with torch.enable_grad(), torch.autocast(node_device(node), enabled=False):
        args, kwargs = substitute(Tensor, constant, args, kwargs)
        args, kwargs = substitute(Value, leaf, args, kwargs)
        differentiable = [value for value, tensor in leaves.items() if tensor.requires_grad]
        if not differentiable:
            return
        targets = len(ctx.grad)
        try:
            with _drawing_as_recorded(node):
                result = node.op(*args, **kwargs)
            results = result if isinstance(result, (list, tuple)) else (result,)
            pairs = [(r, g) for r, g in zip(results, ctx.grads, strict=True) if g is not None]
            # Some of several results may have no derivative in autograd, for example the statistics of a normalisation.
            pairs = [(r, g) for r, g in pairs if r.requires_grad] or pairs
            if any(_has_no_derivative(r) for r, _ in pairs):
                raise _unsupported(node, "PyTorch has no derivative of it")
            by_target = [
                torch.autograd.grad(
                    [r for r, _ in pairs],
                    [leaves[value] for value in differentiable],
                    [canonical(g[k]) for _, g in pairs],
                    retain_graph=k + 1 < targets,
                    allow_unused=True,
                )
                for k in range(targets)
            ]
        except (UnsupportedOpError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise _unsupported(node, str(error)) from error
    for value, *grads in zip(differentiable, *by_target, strict=True):
        if grads[0] is not None:
            ctx.propagate(value, stacked(grads))


def _unsupported(node: Node, reason: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"{key(node.op)}, which ran in {node.path or 'the model'!r} (operation {node.name!r}), cannot be "
        f"differentiated ({reason}); register a rule with pyfast_xai.rules.gradient.rule({key(node.op)!r}), or use a "
        f"method without gradients (occlusion, RISE)"
    )


def _has_no_derivative(result: Tensor) -> bool:
    """Returns whether autograd would answer with no gradient, as it does for ops that are not registered with it."""
    stack, visited = [result.grad_fn], set()
    while stack:
        function = stack.pop()
        if function is None or function in visited:
            continue
        if "NotImplemented" in function.name():
            return True
        visited.add(function)
        stack.extend(following for following, _ in function.next_functions)
    return False


def node_device(node: Node) -> str:
    """Returns the type of the device a node ran on."""
    return next(value.device.type for value in (*node.outputs, *node.inputs) if value is not None)


RULE = Rule(_backward)
