"""Record the ATen operations of one forward pass.

The model runs once, unchanged, below autograd, so that composite operations (linear, conv2d, lstm, attention) arrive
whole instead of decomposed. A recording policy says which of them it handles; the others are decomposed.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from pyfast_xai.errors import InputError
from pyfast_xai.tape import aliasing, module_hooks
from pyfast_xai.tape.aliasing import Geometry
from pyfast_xai.tape.graph import Node, Saved, Tape, Value, cached_by_identity, find, substitute, unknown_name
from pyfast_xai.tape.isolation import isolated
from pyfast_xai.tape.shared_state import SharedState, address

SaveTensor = Callable[[str, Tensor], None]
Prepare = Callable[[Node, tuple[Any, ...], dict[str, Any]], None]


class RecordingPolicy(Protocol):
    """The decisions that a recording leaves to the rules it is made for.

    A policy whose `compares` is true saves numbers that are compared, bit by bit, with those of other recordings: where
    a model is replayed, all of them must be replays.
    """

    def handles(self, op: OpOverload) -> bool:
        """Returns whether the policy has a rule for this op as a whole."""

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Saves the tensors that the rule of `node` needs; called just before it runs, with the real tensors."""

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of `node(*args, **kwargs)`; may save parts of it."""


def record(
    model: nn.Module,
    *args: Any,
    policy: RecordingPolicy | None = None,
    until: str | None = None,
    prepare: Prepare | None = None,
    **kwargs: Any,
) -> Tape:
    """Runs `model(*args, **kwargs)` once and returns its tape.

    The model receives copies of the tensors. Tensors that it writes to in place, and the random number generators, are
    restored when this returns or raises; attributes that it assigns stay, as after any forward.

    Args:
        model: any module; compiled and data-parallel wrappers are unwrapped.
        *args: arguments of the model. Every tensor among them, at any depth, is an input of the tape; a tensor that
            occurs twice is two inputs with the same numbers.
        policy: saves the tensors that later rules need; None records the operations only.
        until: module path or operation name at which the forward stops the first time, "path@1" for the second call
            of a module; `tape.reached` is the tensor that it returned.
        prepare: called with each node and its arguments just before it runs; may set a kernel that computes the same
            numbers, for this run alone, and an adjoint.
        **kwargs: keyword arguments of the model.

    Raises:
        InputError: `until` names no module or operation that ran, there is no tensor among the inputs, or lazy modules
            of the model have not run yet.
        Exception: whatever the model raises.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, record
        >>> tape = record(demo.load(), torch.rand(2, 3, 96, 96))
        >>> tape.result.shape, len(tape.nodes)
        (torch.Size([2, 10]), 29)
        >>> tape.find("block").shape
        (2, 80, 12, 12)
    """
    model = module_hooks.unwrap(model)
    modules = module_hooks.modules_of(model)
    inference = _needs_inference_mode(modules)
    with torch.inference_mode(inference), torch.no_grad():
        args, kwargs = copies((args, kwargs))
    recorder = _Recorder(policy, until, modules, prepare)
    try:
        recorder.begin(args, kwargs)
        recorder.paths = paths = module_hooks.Paths(modules, recorder.module_returned)
        with (
            module_hooks.following(paths.enter, paths.leave),
            isolated(recorder.read, inference=inference),
            recorder,
        ):
            result = model(*args, **kwargs)
        if until is not None:
            raise InputError(unknown_name(until, recorder.tape.names(), "layer"))
        recorder.finish(result)
    except _StopForward:
        pass
    finally:
        recorder.restore()
    return recorder.tape


_WITH_SHAPE = {Tensor, nn.Parameter}  # the usual classes of tensors, which have a shape from the first


def _needs_inference_mode(modules: dict[nn.Module, str]) -> bool:
    """Returns whether a model has tensors that may be written to in inference mode only.

    Raises:
        InputError: a parameter or buffer that has no shape yet.
    """
    enabled = torch.is_inference_mode_enabled()
    for module, path in modules.items():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if type(tensor) not in _WITH_SHAPE and is_lazy(tensor):
                    tensor_path = f"{path}.{name}" if path else name
                    raise InputError(
                        "model must have run before it is explained (call model(images)), "
                        f"got {tensor_path!r} without a shape"
                    )
                if tensor.is_inference():
                    return True
        if enabled and any(isinstance(value, Tensor) and value.is_inference() for value in vars(module).values()):
            return True
    return False


def copies(tree: Any) -> Any:
    """Returns the same tree with copies of the tensors at any depth, which require no gradient."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


class _StopForward(BaseException):
    """Ends the forward early; not an Exception, so that no model catches it by accident."""


class _Facts(NamedTuple):
    """The facts that the schema of an op states; `tensors` are the positions of arguments that may hold tensors."""

    name: str
    tensors: tuple[int, ...]
    composite: bool
    written: tuple[tuple[int, str], ...]
    statistics: tuple[tuple[int, str], ...]
    training: tuple[tuple[int, str, Any], ...]
    constant: bool
    data_dependent: bool
    random: bool


HANDS_OUT = "the model hands data to other code, such as NumPy"
_DATA_DEPENDENT = {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose"}
_STATISTICS = ("running_mean", "running_var")
# Arguments by which an op draws random numbers, or updates statistics, in training only.
_TRAINING = ("train", "training", "use_input_stats", "dropout_p", "p")
# Types of arguments that hold no tensor; a tensor given as a number arrives as a Python number.
_PLAIN = {"int", "float", "bool", "complex", "number", "str", "Device", "Generator", "SymInt", "SymBool"}
_PLAIN |= {f"List[{name}]" for name in _PLAIN}
_PLAIN |= {f"Optional[{name}]" for name in _PLAIN}


@cached_by_identity
def _facts(op: OpOverload) -> _Facts:
    name = op._schema.name.split("::")[1]
    arguments = list(enumerate(op._schema.arguments))
    return _Facts(
        name=name.strip("_"),
        tensors=tuple(i for i, a in arguments if str(a.type) not in _PLAIN),
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"),
        written=tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        # Old schemas do not say that running statistics are written to.
        statistics=tuple((i, a.name) for i, a in arguments if a.name in _STATISTICS and a.alias_info is None),
        training=tuple((i, a.name, a.default_value) for i, a in arguments if a.name in _TRAINING),
        # Only the shape of these results depends on a tensor, the contents do not.
        constant=name.endswith("_like") or name.startswith(("new_", "sym_")),
        data_dependent=name in _DATA_DEPENDENT
        or torch.Tag.data_dependent_output in op.tags
        or torch.Tag.dynamic_output_shape in op.tags,
        random=torch.Tag.nondeterministic_seeded in op.tags,
    )


def writes(op: Any) -> bool:
    """Returns whether an op may write to its arguments."""
    return isinstance(op, OpOverload) and bool(_facts(op).written)


def written_by(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the arguments that an op writes to; in-place dropout writes in training only."""
    if _facts(op).name.endswith("dropout") and not _trains(op, args, kwargs):
        return []
    written = (args[i] if i < len(args) else kwargs.get(name) for i, name in _facts(op).written)
    return [tensor for tensor in written if isinstance(tensor, Tensor)]


def _statistics_written(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the running statistics that an op writes to, though its schema does not say so."""
    if not _trains(op, args, kwargs):
        return []
    written = (args[i] if i < len(args) else kwargs.get(name) for i, name in _facts(op).statistics)
    return [tensor for tensor in written if isinstance(tensor, Tensor)]


def _trains(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether an op runs in training mode: draws numbers for dropout, updates statistics."""
    return all(args[i] if i < len(args) else kwargs.get(name, default) for i, name, default in _facts(op).training)


def not_repeatable(node: Node) -> str | None:
    """Returns why an operation cannot be replayed on other numbers; None if it can."""
    if not isinstance(node.op, OpOverload):
        return None
    facts = _facts(node.op)
    if facts.random and _trains(node.op, node.args, node.kwargs):
        return f"{node.op} draws random numbers"
    return f"{node.op} takes a decision from the data" if facts.data_dependent else None


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors at any depth of a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tensors_of(facts: _Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the same as `find(Tensor, args, kwargs)` for the arguments of an op; looks at no others."""
    tensors: list[Tensor] = []
    count = len(args)
    for i in facts.tensors:
        if i >= count:
            break
        argument = args[i]
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors.extend([part for part in argument if isinstance(part, Tensor)])
    return tensors + find(Tensor, (), kwargs) if kwargs else tensors


class _Memory:
    """One storage on the tape: the value that spans it, and how often it was written to."""

    __slots__ = ("owner", "storage", "writes")

    def __init__(self, owner: Value, tensor: Tensor) -> None:
        self.owner = owner
        self.writes = 0
        # The reference also keeps the address, which identifies the storage, from being reused.
        self.storage = StorageWeakRef(tensor.untyped_storage())


class _Recorder(TorchDispatchMode):
    """The dispatch mode that writes the tape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would import its compiler, which takes over a second, to keep it away from this mode; `isolated` does.
        return False

    def __init__(
        self,
        policy: RecordingPolicy | None,
        until: str | None,
        modules: dict[nn.Module, str],
        prepare: Prepare | None,
    ) -> None:
        super().__init__()
        self.tape = Tape()
        self.paths: module_hooks.Paths | None = None
        self._policy = policy
        self._until = until
        self._prepare = prepare
        self._shared = SharedState(modules)
        # Keyed by the id of the tensor: its value, the number of writes to its storage so far, and the storage address.
        # An id may be reused, an address is not while the storage is on the tape.
        self._values: dict[int, tuple[Value, int, int]] = {}
        # Keyed by storage address.
        self._memory: dict[int, _Memory] = {}
        self._saved: dict[int, list[Saved]] = {}
        self._constants: set[int] = set()
        self._created: set[int] = set()  # storages allocated by this forward; all others existed before
        # Names of operations differ from those of modules, because `until` and `Tape.find` accept both.
        self._names = dict.fromkeys(modules.values(), 0)
        self._count = 0

    # PyTorch's own context managers also set process-wide flags, which other threads would see.

    def __enter__(self) -> "_Recorder":
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        _pop_mode()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Puts the inputs on the tape."""
        tensors = tensors_in((args, kwargs))
        if not tensors:
            raise InputError("the inputs must hold at least one tensor, got none")
        for tensor in tensors:
            self.tape.inputs.append(self._new_owner(tensor, address(tensor), None))
        self.tape.input_structure = pytree.tree_map_only(Tensor, self._value_of, (args, kwargs))

    def read(self, tensor: Tensor) -> None:
        """Records that the numbers of a tensor were read without an operation of PyTorch."""
        if address(tensor) in self._memory:
            self.tape.not_replayable = HANDS_OUT

    def finish(self, result: Any) -> None:
        self.tape.outputs = pytree.tree_map_only(Tensor, lambda t: self._value_of(t) or t, result)
        with torch.inference_mode(False):
            self.tape.result = copies(result)

    def restore(self) -> None:
        """Restores the state that the forward changed, and releases everything but the tape."""
        self.paths = None  # it refers to `module_returned`, and so to this recorder
        written = self._shared.written
        for storage in written:
            self._preserve(storage)
        reached = self.tape.reached
        if reached is not None and address(reached) in written:
            self.tape.reached = reached.clone()
        self._saved.clear()
        self._shared.restore()

    def module_returned(self, path: str, output: Any) -> None:
        """Records the outputs of each module as it returns."""
        values, first = [], None
        for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
            value = self._value_of(tensor)
            if value is not None:
                values.append(value)
                first = tensor if first is None else first
        if first is not None:
            calls = self.tape.modules.setdefault(path, [])
            calls.append(values)
            if self._until is not None and self._until in (path, f"{path}@{len(calls) - 1}"):
                self._stop(first)

    def _stop(self, tensor: Tensor) -> None:
        self.tape.reached = tensor
        raise _StopForward

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # the operations in here are not the model's
            return self._record_op(op, args, kwargs or {})

    def _record_op(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        facts = _facts(op)
        tensors = _tensors_of(facts, args, kwargs)
        values: dict[int, Value] = {}
        sources: set[int] = set()  # storage addresses of the tensors that depend on the inputs
        constants: list[tuple[Tensor, int]] = []
        on_tape = self._memory
        for tensor in tensors:
            storage = address(tensor)
            value = self._value_at(tensor, storage) if storage in on_tape else None
            if value is None:
                constants.append((tensor, storage))
            else:
                values[id(tensor)] = value
                sources.add(storage)
        if values and facts.composite and self._policy is not None and not self._policy.handles(op):
            with self:
                return op.decompose(*args, **kwargs)
        if facts.random and _trains(op, args, kwargs):
            self._shared.before_draw(tensors)
            self.tape.not_replayable = f"{op} draws random numbers"
        if values and facts.data_dependent:
            self.tape.not_replayable = f"{op} takes a decision from the data"
        written = written_by(op, args, kwargs) if facts.written else []
        if facts.statistics:
            self._before_write(_statistics_written(op, args, kwargs))
        if not values or facts.constant:
            self._before_write(written)
            result = op(*args, **kwargs)
            self._mark_created(result, tensors, facts.name)
            return result
        for tensor in written:
            if id(tensor) not in values:
                values[id(tensor)] = self._adopt(tensor)
                sources.add(address(tensor))
        for tensor, storage in constants:
            if not written or id(tensor) not in values:
                self._constants.add(storage)

        node = self._node(op, facts, args, kwargs, values)
        if self._prepare is not None:
            self._prepare(node, args, kwargs)
        if self._policy is None:
            self._before_write(written)
            result = node(*args, **kwargs)
        else:
            keep = functools.partial(self._save, node)
            self._policy.save(node, keep, args, kwargs)
            self._before_write(written)
            result = self._policy.run(node, keep, args, kwargs)
        node.kernel = None  # later runs of the node may have other numbers, or need their gradient
        for output in result if isinstance(result, (list, tuple)) else (result,):
            node.outputs.append(self._output(output, node, written, sources) if isinstance(output, Tensor) else None)
        if node.name == self._until:
            self._stop(find(Tensor, (result,), {})[0])
        return result

    def _node(self, op: Any, facts: _Facts, args: Any, kwargs: Any, values: dict[int, Value]) -> Node:
        args, inputs = _on_tape(values, args, facts.tensors)
        if kwargs:
            named, more = _on_tape(values, kwargs.values(), range(len(kwargs)))
            kwargs = dict(zip(kwargs, named, strict=True))
            inputs += more
        return self._append(op, facts.name, args, kwargs, inputs)

    def _append(self, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Value]) -> Node:
        path = self.paths.current if self.paths is not None else ""
        name = f"{path}.{name}" if path else name
        before = self._names[name] = self._names.get(name, -1) + 1
        if before:
            name = f"{name}_{before}"
        nodes = self.tape.nodes
        node = Node.with_inputs(len(nodes), op, args, kwargs, path, name, inputs)
        nodes.append(node)
        return node

    def _save(self, node: Node, name: str, tensor: Tensor) -> None:
        saved = Saved(tensor)
        node.saved[name] = saved
        self._saved.setdefault(address(tensor), []).append(saved)

    # Values and memory

    def _new_value(self, tensor: Tensor, producer: Node | None) -> Value:
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

    def _new_owner(self, tensor: Tensor, storage: int, producer: Node | None) -> Value:
        """Returns a value that owns its memory, at this address."""
        value = self._new_value(tensor, producer)
        self._memory[storage] = _Memory(value, tensor)
        self._values[id(tensor)] = (value, 0, storage)
        self._created.add(storage)
        return value

    def _mark_created(self, result: Any, sources: list[Tensor], op: str) -> None:
        """Marks the storages of results that do not depend on the inputs, but were allocated by this forward."""
        outputs = find(Tensor, (result,), {})
        if outputs:
            existing = {address(tensor) for tensor in sources} if op != "lift_fresh" else ()
            self._created.update(storage for output in outputs if (storage := address(output)) not in existing)

    def _value_of(self, tensor: Tensor) -> Value | None:
        """Returns the current value of a tensor on the tape; None if it does not depend on the inputs."""
        return self._value_at(tensor, address(tensor))

    def _value_at(self, tensor: Tensor, storage: int) -> Value | None:
        """Returns the same as `_value_of` for a tensor at a known storage address."""
        memory = self._memory.get(storage)
        if memory is None:
            return None
        entry = self._values.get(id(tensor))
        valid = entry is not None and entry[2] == storage and entry[0].shape == tensor.shape
        if entry is not None and valid and entry[1] == memory.writes:
            return entry[0]
        # Another view of this memory was written to since, or the view was made without an operation (`x.data`).
        owner = memory.owner
        node = self._append(aliasing.regenerate_view, "refresh", (owner, _geometry(tensor, owner)), {}, [owner])
        value = self._new_value(tensor, node)
        node.outputs.append(value)
        self._values[id(tensor)] = (value, memory.writes, storage)
        return value

    def _output(self, tensor: Tensor, node: Node, written: list[Tensor], sources: set[int]) -> Value:
        storage = address(tensor)
        if not written or not any(tensor is other for other in written):
            if storage not in sources:
                return self._new_owner(tensor, storage, node)
            value = self._new_value(tensor, node)
            self._values[id(tensor)] = (value, self._memory[storage].writes, storage)
            return value
        memory = self._memory[storage]
        value = self._new_value(tensor, node)
        owner = memory.owner
        geometry = _geometry(tensor, owner)
        if (geometry.size, geometry.stride, geometry.offset) == (owner.shape, owner.stride, 0):
            memory.owner = value
        else:
            scatter = self._append(aliasing.scatter_view, "overwrite", (owner, value, geometry), {}, [owner, value])
            memory.owner = Value(
                self._count, owner.shape, owner.stride, owner.offset, owner.dtype, owner.device, scatter.index
            )
            self._count += 1
            scatter.outputs.append(memory.owner)
        memory.writes += 1
        self._values[id(tensor)] = (value, memory.writes, storage)
        return value

    def _adopt(self, tensor: Tensor) -> Value:
        """Puts a constant on the tape, because an operation is about to write input-dependent numbers to it."""
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.as_strided((length,), (1,), 0)
        node = self._append(torch.ops.aten.clone.default, "clone", (flat.clone(),), {}, [])
        owner = self._new_value(flat, node)
        node.outputs.append(owner)
        self._memory[address(tensor)] = _Memory(owner, tensor)
        value = self._value_of(tensor)
        assert value is not None
        return value

    def _before_write(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = address(tensor)
            if storage in self._constants:
                self.tape.not_replayable = "a constant was written to after it was used"
            self._preserve(storage)
            if storage not in self._created:
                self.tape.writes = True
                self._shared.before_write(tensor, self.paths.running if self.paths is not None else None)
                if storage not in self._memory:
                    self.tape.not_replayable = "the model writes to its own state"

    def _preserve(self, storage: int) -> None:
        """Copies the tensors of a storage that the tape holds, before the storage is overwritten."""
        for saved in self._saved.pop(storage, ()):
            saved.tensor = saved.tensor.clone()
        if storage in self._constants:
            self._constants.remove(storage)

            def preserved(tensor: Tensor) -> Tensor:
                return tensor.clone() if address(tensor) == storage else tensor

            for node in self.tape.nodes:
                node.args, node.kwargs = substitute(Tensor, preserved, node.args, node.kwargs)


def _on_tape(
    values: dict[int, Value], arguments: Iterable[Any], places: Iterable[int]
) -> tuple[tuple[Any, ...], list[Value]]:
    """Returns the arguments of an op with the value in place of each tensor that depends on the inputs.

    The second result has these values. Only the arguments at `places` may hold tensors; lists are copied.
    """
    replaced, inputs = list(arguments), []
    for i in places:
        if i >= len(replaced):
            break
        argument = replaced[i]
        if isinstance(argument, (list, tuple)):
            replaced[i] = parts = [values.get(id(part), part) for part in argument]
            inputs += [part for part in parts if isinstance(part, Value)]
        elif id(argument) in values:
            replaced[i] = value = values[id(argument)]
            inputs.append(value)
    return tuple(replaced), inputs


def _geometry(tensor: Tensor, owner: Value) -> Geometry:
    return Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - owner.offset)
