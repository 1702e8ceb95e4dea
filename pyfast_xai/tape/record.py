"""Write down the ATen operations of one forward pass.

The model runs once, as it is, under `inference_mode`, so that composite operations (linear, conv2d, lstm, attention)
arrive whole instead of in pieces. A reading says which of them it understands; the others are taken apart.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_xai.errors import InputError
from pyfast_xai.tape import alias, watch
from pyfast_xai.tape.alias import Geometry
from pyfast_xai.tape.nodes import Node, Saved, Tape, Value, find, substitute, unknown_name

Keep = Callable[[str, Tensor], None]


class Reading(Protocol):
    """What a recording must know about the reading it is made for."""

    def understands(self, op: OpOverload) -> bool:
        """Whether the reading has a rule for this op as a whole."""

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the rule of `node` will need; called just before it runs, with the real tensors."""

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what `node(*args, **kwargs)` does and return its result; may keep of the result, too."""


def record(
    model: nn.Module, *args: Any, reading: Reading | None = None, until: str | None = None, **kwargs: Any
) -> Tape:
    """Run `model(*args, **kwargs)` once and return its tape.

    The model's state, the inputs and the random number generators are as before when this returns or raises.

    Args:
        model: any module; compiled and data-parallel wrappers are looked through.
        *args: what the model is called with. Every tensor among them, at any depth, is an input of the tape.
        reading: what to save for reading the tape later; None to write down the operations only.
        until: module path or operation name at which the forward stops; `tape.reached` is what it returned.
        **kwargs: keyword arguments of the model.

    Raises:
        InputError: `until` is no module or operation that ran, or there is no tensor among the inputs.
        Exception: whatever the model raises.
    """
    model = watch.unwrap(model)
    recorder = _Recorder(reading, until)
    recorder.begin(args, kwargs)
    modules = watch.modules_of(model)
    for module in modules:
        recorder.protect(tensor for tensor in module._parameters.values() if tensor is not None)
        recorder.protect(tensor for tensor in module._buffers.values() if tensor is not None)
    try:
        with watch.watching(modules, recorder.returned) as recorder.paths, torch.inference_mode(), recorder:
            result = model(*args, **kwargs)
        if until is not None:
            raise InputError(unknown_name(until, recorder.tape.names(), "layer"))
        recorder.finish(result)
    except _Reached:
        pass
    finally:
        recorder.restore()
    return recorder.tape


class _Reached(BaseException):
    """Leaves the forward early; not an Exception, so that no model catches it by accident."""


class _Facts(NamedTuple):
    """What the schema of an op says."""

    name: str
    composite: bool
    written: tuple[tuple[int, str], ...]
    constant: bool
    data_dependent: bool
    random: bool


_DATA_DEPENDENT = {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "tolist"}


@functools.cache
def _facts(op: OpOverload) -> _Facts:
    name = op._schema.name.split("::")[1]
    arguments = enumerate(op._schema.arguments)
    return _Facts(
        name=name.strip("_"),
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"),
        written=tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        # The shape of these depends on a tensor, the contents do not.
        constant=name.endswith("_like") or name.startswith(("new_", "sym_")),
        data_dependent=name in _DATA_DEPENDENT
        or torch.Tag.data_dependent_output in op.tags
        or torch.Tag.dynamic_output_shape in op.tags,
        random=torch.Tag.nondeterministic_seeded in op.tags,
    )


def written_by(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an op writes to."""
    written = (args[i] if i < len(args) else kwargs.get(name) for i, name in _facts(op).written)
    return [tensor for tensor in written if isinstance(tensor, Tensor)]


def _draws(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a random op really draws: not dropout and its kind outside training."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name in ("train", "training", "dropout_p", "p"):
            given = kwargs.get(argument.name, args[position] if position < len(args) else argument.default_value)
            if not given:
                return False
    return True


def address(tensor: Tensor) -> int:
    """The address by which the memory of a tensor is known, while it lives."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse tensors have none
        return id(tensor)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors at any depth."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Memory:
    """One storage on the tape: the value that spans it, and how often it was written to."""

    __slots__ = ("alive", "owner", "writes")

    def __init__(self, owner: Value, tensor: Tensor) -> None:
        self.owner = owner
        self.writes = 0
        # Also keeps the address, by which the storage is known, from being used again.
        self.alive = StorageWeakRef(tensor.untyped_storage())


class _Recorder(TorchDispatchMode):
    """The dispatch mode that writes the tape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would import its compiler, a second and more, to keep it away from this mode; `watch` has it stand
        # aside where it is there.
        return False

    def __init__(self, reading: Reading | None, until: str | None) -> None:
        super().__init__()
        self.tape = Tape()
        self.paths: watch.Paths | None = None
        self._reading = reading
        self._until = until
        # By id of the tensor: what it is, how often its memory had been written to then, and the address of that.
        # An id that is used again is told by the address, which is not.
        self._values: dict[int, tuple[Value, int, int]] = {}
        # By storage address.
        self._memory: dict[int, _Memory] = {}
        self._kept: dict[int, list[Saved]] = {}
        self._constants: set[int] = set()
        self._protected: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] | None = None
        self._names: Counter[str] = Counter()
        self._count = 0

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = tensors_in((args, kwargs))
        if not tensors:
            raise InputError("the inputs must hold at least one tensor, got none")
        self.tape.input_structure = (args, kwargs)
        for tensor in tensors:
            self.tape.inputs.append(self._fresh(tensor, None))
        self.tape.input_structure = pytree.tree_map_only(Tensor, self._known, (args, kwargs))
        self.protect(tensors)

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that a forward must not change, so that `restore` can put them back."""
        for tensor in tensors:
            self._protected[address(tensor)] = tensor

    def finish(self, result: Any) -> None:
        self.tape.outputs = pytree.tree_map_only(Tensor, lambda t: self._known(t) or t, result)
        with torch.inference_mode(False):
            self.tape.result = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, result)

    def restore(self) -> None:
        """Put back what the forward changed, and let go of everything but the tape."""
        self.paths = None  # it knows `returned`, and so this recorder
        self._kept.clear()
        with torch.inference_mode():
            for tensor, copy in self._before.values():
                tensor.copy_(copy)
            for generator, state in self._generators or ():
                generator.set_state(state)

    def returned(self, path: str, output: Any) -> None:
        """Called as each module returns."""
        tensors = [output] if isinstance(output, Tensor) else tensors_in(output)
        pairs = [(tensor, value) for tensor in tensors if (value := self._known(tensor)) is not None]
        if pairs:
            self.tape.modules.setdefault(path, []).append([value for _, value in pairs])
            if path == self._until:
                self._stop(pairs[0][0])

    def _stop(self, tensor: Tensor) -> None:
        self.tape.reached = tensor
        raise _Reached

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        facts = _facts(op)
        tensors = find(Tensor, args, kwargs)
        values: dict[int, Value] = {}
        sources: set[int] = set()  # addresses of what depends on the inputs
        for tensor in tensors:
            storage = address(tensor)
            value = self._value(tensor, storage)
            if value is not None:
                values[id(tensor)] = value
                sources.add(storage)
        if values and facts.composite and self._reading is not None and not self._reading.understands(op):
            with self:
                return op.decompose(*args, **kwargs)
        if facts.random and _draws(op, args, kwargs):
            self._keep_generators(tensors)
            self.tape.not_replayable = f"{op} draws random numbers"
        if values and facts.data_dependent:
            self.tape.not_replayable = f"{op} takes a decision from the data"
        written = written_by(op, args, kwargs) if facts.written else []
        if not values or facts.constant:
            self._about_to_write(written)
            return op(*args, **kwargs)
        for tensor in written:
            if id(tensor) not in values:
                values[id(tensor)] = self._adopt(tensor)
                sources.add(address(tensor))

        node = self._node(op, facts.name, args, kwargs, values)
        if self._reading is None:
            self._about_to_write(written)
            result = op(*args, **kwargs)
        else:
            keep = functools.partial(self._keep, node)
            self._reading.save(node, keep, args, kwargs)
            self._about_to_write(written)
            result = self._reading.run(node, keep, args, kwargs)
        for output in result if isinstance(result, (list, tuple)) else (result,):
            node.outputs.append(self._output(output, node, written, sources) if isinstance(output, Tensor) else None)
        if node.name == self._until:
            self._stop(find(Tensor, (result,), {})[0])
        return result

    def _node(self, op: Any, name: str, args: Any, kwargs: Any, values: dict[int, Value]) -> Node:
        def on_tape(tensor: Tensor) -> Tensor | Value:
            value = values.get(id(tensor))
            if value is None:
                self._constants.add(address(tensor))
                return tensor
            return value

        path = self.paths.current if self.paths is not None else ""
        name = f"{path}.{name}" if path else name
        self._names[name] += 1
        if self._names[name] > 1:
            name = f"{name}_{self._names[name] - 1}"
        args, kwargs = substitute(Tensor, on_tape, args, kwargs)
        node = Node(len(self.tape.nodes), op, args, kwargs, [], path, name)
        self.tape.nodes.append(node)
        return node

    def _keep(self, node: Node, name: str, tensor: Tensor) -> None:
        saved = Saved(tensor)
        node.saved[name] = saved
        self._kept.setdefault(address(tensor), []).append(saved)

    # Values and memory

    def _new(self, tensor: Tensor, producer: Node | None) -> Value:
        strided = tensor.layout == torch.strided
        value = Value(
            self._count,
            tuple(tensor.shape),
            tensor.stride() if strided else (),
            int(tensor.storage_offset()) if strided else 0,
            tensor.dtype,
            tensor.device,
            None if producer is None else producer.index,
        )
        self._count += 1
        return value

    def _fresh(self, tensor: Tensor, producer: Node | None) -> Value:
        """A value with memory of its own."""
        value = self._new(tensor, producer)
        storage = address(tensor)
        self._memory[storage] = _Memory(value, tensor)
        self._values[id(tensor)] = (value, 0, storage)
        return value

    def _known(self, tensor: Tensor) -> Value | None:
        """What a tensor is on the tape now; None where it does not depend on the inputs."""
        return self._value(tensor, address(tensor))

    def _value(self, tensor: Tensor, storage: int) -> Value | None:
        """The same of a tensor whose address is known."""
        memory = self._memory.get(storage)
        if memory is None:
            return None
        entry = self._values.get(id(tensor))
        known = entry is not None and entry[2] == storage and entry[0].shape == tensor.shape
        if entry is not None and known and entry[1] == memory.writes:
            return entry[0]
        # Another view of this memory was written to since, or the view was made out of sight (`x.data`).
        node = self._node(alias.refresh, "refresh", (memory.owner, _geometry(tensor, memory.owner)), {}, {})
        value = self._new(tensor, node)
        node.outputs.append(value)
        self._values[id(tensor)] = (value, memory.writes, storage)
        return value

    def _output(self, tensor: Tensor, node: Node, written: list[Tensor], sources: set[int]) -> Value:
        storage = address(tensor)
        if not any(tensor is other for other in written):
            if storage not in sources:
                return self._fresh(tensor, node)
            value = self._new(tensor, node)
            self._values[id(tensor)] = (value, self._memory[storage].writes, storage)
            return value
        memory = self._memory[storage]
        value = self._new(tensor, node)
        owner = memory.owner
        geometry = _geometry(tensor, owner)
        if (geometry.size, geometry.stride, geometry.offset) == (owner.shape, owner.stride, 0):
            memory.owner = value
        else:
            spread = self._node(alias.overwrite, "overwrite", (owner, value, geometry), {}, {})
            memory.owner = Value(
                self._count, owner.shape, owner.stride, owner.offset, owner.dtype, owner.device, spread.index
            )
            self._count += 1
            spread.outputs.append(memory.owner)
        memory.writes += 1
        self._values[id(tensor)] = (value, memory.writes, storage)
        return value

    def _adopt(self, tensor: Tensor) -> Value:
        """Put a constant on the tape that is about to receive something that depends on the inputs."""
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.as_strided((length,), (1,), 0)
        node = self._node(torch.ops.aten.clone.default, "clone", (whole.clone(),), {}, {})
        owner = self._new(whole, node)
        node.outputs.append(owner)
        self._memory[address(tensor)] = _Memory(owner, tensor)
        value = self._known(tensor)
        assert value is not None
        return value

    def _about_to_write(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = address(tensor)
            for saved in self._kept.pop(storage, ()):
                saved.tensor = saved.tensor.clone()
            if storage in self._constants:
                self.tape.not_replayable = "a constant was written to after it was used"
            if storage in self._protected and storage not in self._before:
                self._before[storage] = (self._protected[storage], self._protected[storage].clone())
                if storage not in self._memory:
                    self.tape.not_replayable = "the model writes to its own state"

    def _keep_generators(self, tensors: list[Tensor]) -> None:
        if self._generators is None:
            self._generators = [(torch.default_generator, torch.default_generator.get_state())]
            if torch.cuda.is_available():
                for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                    generator = torch.cuda.default_generators[device.index]
                    self._generators.append((generator, generator.get_state()))


def _geometry(tensor: Tensor, owner: Value) -> Geometry:
    return Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - owner.offset)
