"""Replays of a tape on other inputs of the same shapes, without the model's Python code."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.tape import aliasing
from pyfast_xai.tape.graph import Node, Saved, Tape, Value, substitute
from pyfast_xai.tape.record import RecordingPolicy, address, writes, written_by


def replay(tape: Tape, *inputs: Tensor) -> Any:
    """Runs the operations of `tape` on other inputs; returns the same numbers, bit for bit, as the model itself.

    Args:
        tape: a recording of a whole forward pass.
        *inputs: one tensor for each of `tape.inputs`, of the same shape, dtype and device.

    Returns:
        The outputs of the model, in new tensors.

    Raises:
        InputError: the inputs differ in shape, dtype or device, or the tape cannot be replayed (the message says why:
            a decision taken from the data, a random op, a forward stopped early).

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, record, replay
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> tape = record(model, torch.rand(2, 3, 96, 96))
        >>> torch.equal(replay(tape, images), model(images))
        True
    """
    if tape.reached is not None:
        raise InputError("tape must be of a whole forward to be replayed, got one that was stopped early")
    return Replay(tape)(*inputs).result


@dataclass(slots=True)
class _Step:
    """A node of the recording, and the facts about it that are the same in every replay.

    Attributes:
        node: the recorded node.
        places: the positional arguments that are values; None if there are values inside lists or among the keyword
            arguments.
        writes: whether the operation may write to its arguments.
        unused: the values that no later node needs.
    """

    node: Node
    places: list[tuple[int, Value]] | None
    writes: bool
    unused: list[Value]


class Replay:
    """Records the operations of a tape on other inputs, without running the model's Python.

    Args:
        tape: a recording; its nodes keep their arguments.
        until: the value that `tape` was stopped at, None for a whole forward.
    """

    def __init__(self, tape: Tape, until: Value | None = None) -> None:
        self._tape, self._until = tape, until
        unused = _unused_after(tape, tape.end_values(until))
        self._steps = [_Step(node, _places(node), writes(node.op), unused[node.index]) for node in tape.nodes]

    def __call__(self, *inputs: Tensor, policy: RecordingPolicy | None = None) -> Tape:
        """Runs the operations.

        Args:
            *inputs: one tensor for each of `tape.inputs`, of the same shape, dtype and device. None is written to.
            policy: saves the tensors that later rules need, and handles the same composite operations as the policy of
                the recording; None runs the operations only.

        Returns:
            A tape of the same values, with its own results and saved tensors.

        Raises:
            InputError: as `replay`.
        """
        tape, until = self._tape, self._until
        _check(tape, inputs)
        replayed = dataclasses.replace(tape, nodes=[], result=None, reached=None)
        environment: dict[Value, Tensor] = {}
        for value, tensor in zip(tape.inputs, inputs, strict=True):
            # The recorded memory layout decides which views exist; a copy also shields the caller's tensor from writes.
            environment[value] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
            environment[value].copy_(tensor.detach())
        saved_by_address: dict[int, list[Saved]] = {}
        with torch.inference_mode():
            for step in self._steps:
                node = step.node.without_saved()
                replayed.nodes.append(node)
                result = _run(node, step, environment, policy, saved_by_address)
                step.node.rule = node.rule  # for the next replay
                if isinstance(result, (list, tuple)):
                    pairs = zip(node.outputs, result, strict=True)
                    environment.update((output, part) for output, part in pairs if output is not None)
                elif node.outputs[0] is not None:
                    environment[node.outputs[0]] = result
                for value in step.unused:
                    environment.pop(value, None)
        if until is not None:
            replayed.reached = environment[until]
            return replayed
        with torch.inference_mode(False):
            replayed.result = pytree.tree_map_only(Value, lambda value: environment[value].clone(), tape.outputs)
        return replayed


def _check(tape: Tape, inputs: tuple[Tensor, ...]) -> None:
    if tape.not_replayable is not None:
        raise InputError(f"tape must be replayable, got one in which {tape.not_replayable}")
    if len(inputs) != len(tape.inputs):
        raise InputError(f"inputs must be the {len(tape.inputs)} tensors of the tape, got {len(inputs)}")
    for value, tensor in zip(tape.inputs, inputs, strict=True):
        if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            expected = f"{list(value.shape)} {value.dtype} on {value.device}"
            raise InputError(
                f"inputs must be as recorded, {expected}, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _unused_after(tape: Tape, end_values: set[Value]) -> list[list[Value]]:
    """Returns, for each node, the values that no later node needs."""
    last = {output: node.index for node in tape.nodes for output in node.outputs if output is not None}
    last.update({value: node.index for node in tape.nodes for value in node.inputs})
    unused: list[list[Value]] = [[] for _ in tape.nodes]
    for value, index in last.items():
        if value not in end_values:
            unused[index].append(value)
    return unused


def _places(node: Node) -> list[tuple[int, Value]] | None:
    places = [(position, value) for position, value in enumerate(node.args) if isinstance(value, Value)]
    return places if len(places) == len(node.inputs) else None


def _run(
    node: Node,
    step: _Step,
    environment: dict[Value, Tensor],
    policy: RecordingPolicy | None,
    saved_by_address: dict[int, list[Saved]],
) -> Any:
    """Runs a node and returns its result; saves what the policy needs of it."""
    if node.op is aliasing.scatter_view:
        # The write has already happened in the shared memory.
        return environment[node.args[0]]
    args: Any = node.args
    kwargs = node.kwargs
    if step.places is None:
        args, kwargs = substitute(Value, environment.__getitem__, args, kwargs)
    else:
        args = list(args)
        for position, value in step.places:
            args[position] = environment[value]
    if policy is None or node.op is aliasing.regenerate_view:
        return node(*args, **kwargs)

    def keep(name: str, tensor: Tensor) -> None:
        node.saved[name] = saved = Saved(tensor)
        saved_by_address.setdefault(address(tensor), []).append(saved)

    policy.save(node, keep, args, kwargs)
    if step.writes:
        for tensor in written_by(node.op, args, kwargs):
            for saved in saved_by_address.pop(address(tensor), ()):
                saved.tensor = saved.tensor.clone()
    return policy.run(node, keep, args, kwargs)
