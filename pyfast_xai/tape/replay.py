"""Run a tape again on other inputs of the same shapes, without the model's Python."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.tape import alias
from pyfast_xai.tape.nodes import Tape, Value, substitute


def replay(tape: Tape, *inputs: Tensor) -> Any:
    """The operations of `tape` on other inputs; the same numbers, bit for bit, as the model itself gives.

    Args:
        tape: a recording of a whole forward pass.
        *inputs: one tensor for each of `tape.inputs`, of the same shape, dtype and device.

    Returns:
        What the model returned, anew.

    Raises:
        InputError: other inputs, or a tape that cannot be replayed (it says why: a decision taken from the data, a
            random op, a forward stopped early).
    """
    if tape.reached is not None:
        raise InputError("tape must be of a whole forward to be replayed, got one that was stopped early")
    if tape.not_replayable is not None:
        raise InputError(f"tape must be replayable, got one in which {tape.not_replayable}")
    if len(inputs) != len(tape.inputs):
        raise InputError(f"inputs must be the {len(tape.inputs)} tensors of the tape, got {len(inputs)}")
    environment: dict[Value, Tensor] = {}
    for value, tensor in zip(tape.inputs, inputs, strict=True):
        if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            expected = f"{list(value.shape)} {value.dtype} on {value.device}"
            raise InputError(
                f"inputs must be as recorded, {expected}, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        # The recorded memory layout decides which views exist; a copy also shields the caller's tensor from writes.
        environment[value] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
        environment[value].copy_(tensor)

    def resolve(value: Value) -> Tensor:
        return environment[value]

    last_use = {value: node.index for node in tape.nodes for value in node.inputs}
    wanted = {leaf for leaf in pytree.tree_leaves(tape.outputs) if isinstance(leaf, Value)}
    with torch.inference_mode():
        for node in tape.nodes:
            if node.op is alias.overwrite:
                # The write itself has happened to the memory that both share.
                results: Any = [environment[node.args[0]]]
            else:
                args, kwargs = substitute(Value, resolve, node.args, node.kwargs)
                result = node.op(*args, **kwargs)
                results = result if isinstance(result, (list, tuple)) else [result]
            for output, result in zip(node.outputs, results, strict=True):
                if output is not None:
                    environment[output] = result
            for value in {*node.inputs, *filter(None, node.outputs)}:
                if last_use.get(value, -1) <= node.index and value not in wanted:
                    environment.pop(value, None)
    with torch.inference_mode(False):
        return pytree.tree_map_only(Value, lambda value: environment[value].clone(), tape.outputs)
