"""Recordings of a model that runs faster: a replay in the model's place, with folded and packed weights."""

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyfast_xai.acceleration import cuda_graphs
from pyfast_xai.acceleration.batch_norm_folding import fold_batch_norm
from pyfast_xai.acceleration.cache_key import cache_key
from pyfast_xai.acceleration.cuda_graphs import CudaGraphCache, Repeatable, is_capturing
from pyfast_xai.acceleration.freshness import Snapshot
from pyfast_xai.acceleration.packed_convolutions import Allowance, pack
from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.forks import ForkSafeLock
from pyfast_xai.memory import give_back_freed_memory
from pyfast_xai.tape import aliasing, module_hooks
from pyfast_xai.tape.graph import Node, Tape, Value, find, key
from pyfast_xai.tape.record import RecordingPolicy, SaveTensor, record, tensors_in
from pyfast_xai.tape.replay import replay_recording
from pyfast_xai.tuning import stopwatch

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")

MEMORY_LIMIT = 1 << 30

# Tolerance relative to the largest output: well above rounding, well below what a different branch would change.
_AGREES = {torch.float64: 1e-9, torch.float32: 1e-2}
# An audit allows so many times the difference that there was at first, and at least a hundredth of the above.
_AUDIT_SLACK = 100

_TAPES_SHARE = 4  # of the memory limit, tapes may take one part in so many
_NODE_BYTES = 2048  # what Python takes for one operation of a tape
_CALLS_OF_ONE_EXPLANATION = 2  # at most, of a signature: to find a layer, and to explain
_CONTESTS = 1.5  # recordings of the model: what contests of kernels may take in a call
_MANY_SIGNATURES = 8  # from so many on, kernels are contested for those alone that come again
_MOST_CHANGES = 4  # of the model one after another, without a replay between


@dataclass
class _Template:
    """A tape to be replayed.

    Attributes:
        tape: None where the model must run itself.
        until: the value at which it stops.
        understood: what the reading said of each composite operation that it was asked about.
        seen: whether readings may look at it.
        rounding: the largest difference to the model that was seen, as a share of the largest output.
        nbytes: memory of its operations, and of the tensors that are neither the model's nor in the weight cache.
        calls: how often it was used.
    """

    tape: Tape | None
    until: Value | None
    understood: dict[OpOverload, bool]
    seen: bool
    rounding: float = 0.0
    nbytes: int = _NODE_BYTES
    calls: int = 0

    def serves(self, policy: RecordingPolicy | None) -> bool:
        if policy is not None and not self.seen:
            return False
        return all(_understands(policy, op) == answer for op, answer in self.understood.items())


class ReplayedModel:
    """Records a model by replaying it: without its Python, batch norm folded, weights packed, dead branches dropped.

    The first recording for a signature (`cache_key`) is of the model itself. It is made into a replay, and that must
    give what the model gives on these inputs, on those of the second call, and on others made of them, up to rounding.
    A model that takes decisions from data, draws random numbers or writes to its state is recorded as it is, which is
    logged once.

    A replay is used while `Snapshot` finds the model as it was: its modules, hooks, attributes, functions and weights.
    A change begins all anew. A model of which a change could not be seen, or that changes from call to call, is
    recorded as it is. At the 2nd, 4th, 8th and so on call of a signature the model runs beside its replay; where they
    differ, the model's results are returned, and it is recorded as it is from then on.

    What reads no number on the way can be handed to `run`, which makes a CUDA graph of it on a device.

    Args:
        model: any module.
        fold: fold batch norm into convolutions.
        memory_limit: bytes that replays, packed weights and CUDA graphs may take; those that were used longest ago
            are let go.
        tentative: nobody has asked for replays. Once the model has changed it is recorded as it is until `forget`,
            instead of replays being made anew, and reasons not to replay are logged as information.

    Attributes:
        outdated: whether the model has changed since replays were made of it, and none are made of what it is now.
        replays: recordings that were replays.
    """

    def __init__(
        self, model: nn.Module, *, fold: bool = True, memory_limit: int = MEMORY_LIMIT, tentative: bool = False
    ) -> None:
        self._model = module_hooks.unwrap(model)
        self._fold = fold
        self._memory_limit = memory_limit
        self._tentative = tentative
        self._prepared = self.replays = 0
        self._weights, self._contests = WeightCache(), Allowance()
        self._lock = ForkSafeLock()
        self._warned = False
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # Replays and packed weights are made again where a copy lands.
        made = functools.partial(
            ReplayedModel, fold=self._fold, memory_limit=self._memory_limit, tentative=self._tentative
        )
        return made, (self._model,)

    @property
    def nbytes(self) -> int:
        """Returns the memory that replays, packed weights and CUDA graphs take."""
        with self._lock:
            return self._tapes_bytes() + self._weights.nbytes + self._captured.nbytes

    @property
    def refused(self) -> bool:
        """Returns whether the model is recorded as it is for good."""
        return self._refused

    @property
    def has_forward_hooks(self) -> bool:
        """Returns whether forward hooks run with the model, its own or those of all modules; replays leave them out."""
        snapshot = self._snapshot
        modules = module_hooks.modules_of(self._model) if snapshot is None else snapshot.modules
        return module_hooks.any_forward_hooks(modules)

    @property
    def preparations(self) -> int:
        """Returns how often calls did more than replay: made a replay, compared it, held a contest, packed a weight."""
        with self._lock:
            return self._prepared + self._contests.count + self._weights.made

    def forget(self) -> None:
        """Begins anew."""
        with self._lock:
            self._changes = 0
            self._refused = self.outdated = False
            self._begin()

    def record(
        self, *args: Any, policy: RecordingPolicy | None = None, until: str | None = None, **kwargs: Any
    ) -> Tape:
        """Records a forward pass of the model, as `tape.record` does."""
        template, due, recorded = self._template_for(args, kwargs, policy, until)
        if recorded is not None and not getattr(policy, "compares", False):
            return recorded
        if template is not None and template.tape is not None:
            tape = replay_recording(template.tape, *tensors_in((args, kwargs)), policy=policy, until=template.until)
            if all(self._passes(audit, template, tape, args, kwargs, until) for audit in due):
                self.replays += 1
                return tape
        return record(self._model, *args, policy=policy, until=until, **kwargs)

    def run(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> T:
        """Returns `function(*arguments)`; the function records this model and may run as a CUDA graph."""
        return self._graphs()(function, *arguments, key=key)

    def repeating(
        self, function: Callable[..., T], *arguments: Any, key: Hashable
    ) -> AbstractContextManager[Repeatable[T]]:
        """Captures a function that is called repeatedly on the same tensors, to which it writes."""
        return self._graphs().repeating(function, *arguments, key=key)

    def _graphs(self) -> CudaGraphCache:
        with self._lock:
            self._look()
            return self._captured

    # Freshness

    def _begin(self) -> None:
        self._prepared += 1 + self._contests.count + self._weights.made
        self._templates: OrderedDict[Hashable, list[_Template]] = OrderedDict()
        self._weights = WeightCache(self._memory_limit)
        self._contests = Allowance()
        self._captured = CudaGraphCache(self._memory_limit // 2, _audited)
        if self._refused or self.outdated:
            self._captured.stop()
        self._snapshot: Snapshot | None = None

    def _look(self) -> None:
        """Begins anew if the model has changed."""
        if self._refused or self.outdated or is_capturing():
            return
        if self._snapshot is not None and not self._snapshot.holds():
            self._changes += 1
            if self._tentative:
                self.outdated = True
                self._begin()
                return
            if self._changes == _MOST_CHANGES:
                self._refuse("it changes from call to call")
                return
            self._begin()
        if self._snapshot is None:
            self._snapshot = Snapshot(self._model)
            if self._snapshot.unproven is not None:
                self._refuse(self._snapshot.unproven)

    def _refuse(self, reason: str) -> None:
        """Lets the model run as it is for good."""
        self._refused = True
        self._begin()
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            level = logging.INFO if self._tentative else logging.WARNING
            logger.log(level, "accelerate: the model runs as it is: %s", reason)

    def _passes(
        self, audit: "_Audit", template: _Template, tape: Tape, args: Any, kwargs: Any, until: str | None
    ) -> bool:
        """Returns whether a replay gives the outputs of the model; if not, the model is no longer replayed."""
        reason = self._differs(audit, template, tape if audit is _given else None, args, kwargs, until)
        if reason is None:
            return True
        with self._lock:
            if not self._refused:
                self._refuse(reason)
        return False

    def _differs(
        self, audit: "_Audit", template: _Template, came: Tape | None, args: Any, kwargs: Any, until: str | None
    ) -> str | None:
        """Returns why the replay is not the model on inputs made of these, if it is not."""
        tape = template.tape
        if tape is None:  # another thread has seen it
            return None
        others, names = pytree.tree_map_only(Tensor, audit, (args, kwargs))
        try:
            expected = _answers(record(self._model, *others, policy=_Asked(None), until=until, **names))
        except Exception as error:  # whatever the model says to what it did not expect
            return f"it cannot be compared on other inputs ({error})"
        with self._lock:
            if not self._renew():
                return "it changes its own attributes as it runs"
        allowed = min(1.0, max(_AUDIT_SLACK * template.rounding, 1 / _AUDIT_SLACK))
        if came is not None and _difference(_answers(came), expected) <= allowed:
            return None
        # Without the policy of the call, which may change what operations give.
        came = replay_recording(tape, *tensors_in((others, names)), until=template.until)
        difference = _difference(_answers(came), expected)
        if audit is _given:
            return None if difference <= allowed else "an audit found that its replay no longer gives its results"
        template.rounding = max(template.rounding, difference)
        return None if difference <= 1 else "its replay gives other results"

    # Templates

    def _template_for(
        self, args: Any, kwargs: Any, policy: RecordingPolicy | None, until: str | None
    ) -> tuple[_Template | None, Sequence["_Audit"], Tape | None]:
        """Returns the template to replay, None if the model must run, and how to compare it with the model.

        The third is the recording of the model that a replay was made of in this call.
        """
        with self._lock:
            self._look()
            if self._refused or self.outdated:
                return None, (), None
            signature = cache_key(args, kwargs)
            if signature is None:
                self._warn("it is given an object that may change without being seen")
                return None, (), None
            known = (signature, until)
            templates = self._templates.setdefault(known, [])
            self._templates.move_to_end(known)
            template = next((template for template in templates if template.serves(policy)), None)
            repeated = template is not None and template.calls >= _CALLS_OF_ONE_EXPLANATION
            contested = repeated or len(self._templates) <= _MANY_SIGNATURES
            self._make_room(lay_out=repeated)
            self._contests.next_call(share=1.0 if contested else 0.0)
            recorded = None
            if template is None:
                self._prepared += 1
                template, recorded = self._make(args, kwargs, policy, until, contested=contested)
                templates.append(template)
                give_back_freed_memory()
            elif template.tape is not None:
                self._changes = 0
            template.calls += 1
            audits = () if is_capturing() else _due(template.calls)
            self._prepared += len(audits)
            return None if self._refused else template, audits, recorded

    def _tapes_bytes(self) -> int:
        return sum(template.nbytes for templates in self._templates.values() for template in templates)

    def _make_room(self, *, lay_out: bool) -> None:
        while len(self._templates) > 1 and self._tapes_bytes() > self._memory_limit // _TAPES_SHARE:
            self._templates.popitem(last=False)
        # Sizes that come one time only are not worth weights of their own.
        self._weights.next_call(self._memory_limit - self._tapes_bytes() - self._captured.nbytes, lay_out=lay_out)

    def _make(
        self, args: Any, kwargs: Any, policy: RecordingPolicy | None, until: str | None, *, contested: bool
    ) -> tuple[_Template, Tape]:
        """Records the model, makes a replay of that, and returns it.

        The second is the recording, or what the replay gave where nobody reads more of it than its operations.
        """
        asked = _Asked(policy)
        past = stopwatch("cpu", torch.get_num_threads())
        recorded = record(self._model, *args, policy=asked, until=until, **kwargs)
        self._contests.seconds = min(self._contests.seconds, _CONTESTS * past())
        self._contests.next_call(share=0.5 if contested else 0.0)  # this one makes a replay, too
        self._renew()
        tape = recorded.copy()
        template = _Template(tape, None if until is None else tape.find(until), asked.answers, seen=policy is not None)
        reason, replayed = tape.not_replayable, None
        if len({value.device for node in tape for value in node.outputs if value is not None}) > 1:
            self._captured.stop()  # a graph is of one
        if reason is None:
            reason, replayed = self._speed_up(template, recorded, args, kwargs, until)
        if reason is None and cuda_graphs.device_of((args, kwargs)) is not None:
            # Once it is in a graph, nothing compares the next calls.
            reasons = (self._differs(audit, template, None, args, kwargs, until) for audit in (_mirrored, _faint))
            reason = next(filter(None, reasons), None)
        if reason is None:
            template.nbytes = self._bytes_of(tape)
            return template, recorded if template.seen or replayed is None else replayed
        self._warn(reason)
        self._captured.stop()  # a graph is a replay, too
        return _Template(None, None, asked.answers, seen=True), recorded

    def _renew(self) -> bool:
        """Looks at the model again after it ran, and says whether it was as before."""
        if self._snapshot is None or self._snapshot.holds():
            return True
        self._snapshot = Snapshot(self._model)
        return False

    def _bytes_of(self, tape: Tape) -> int:
        assert self._snapshot is not None
        owned = self._snapshot.storages()
        memory: dict[int, int] = {}
        for node in tape:
            for tensor in find(Tensor, node.args, node.kwargs):
                if tensor.layout == torch.strided and not self._weights.keeps(tensor):
                    memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return _NODE_BYTES * len(tape.nodes) + sum(size for place, size in memory.items() if place not in owned)

    def _speed_up(
        self, template: _Template, recorded: Tape, args: Any, kwargs: Any, until: str | None
    ) -> tuple[str | None, Tape | None]:
        """Folds and packs, writes down the memory layouts that come of it, and compares the results.

        Returns:
            Why the model is not to be replayed, None if it is; and the replay on what was recorded, nothing saved.
        """
        tape = template.tape
        assert tape is not None
        policy = None
        if not any(node.op in (aliasing.scatter_view, aliasing.regenerate_view) for node in tape.nodes):
            if self._fold:
                fold_batch_norm(tape, template.until, self._weights)
            pack(tape, self._weights, until=template.until, seen=template.seen, contests=self._contests)
            policy = _Layouts(tape)
        # Otherwise where a view lies depends on the layout of what it is of, and the tape is replayed as it is.
        try:
            first = replay_recording(tape, *tensors_in((args, kwargs)), policy=policy, until=template.until)
        except RuntimeError as error:
            return f"its replay failed ({error})", None
        came = _answers(first)
        template.rounding = _difference(came, _answers(recorded))
        if template.rounding > 1 and template.seen:  # the policy may have changed what operations give
            expected = record(self._model, *args, policy=_Asked(None), until=until, **kwargs)
            template.rounding = _difference(came, _answers(expected))
        return (None, first) if template.rounding <= 1 else ("its replay gives other results", None)


_thread = threading.local()


def _audited(function: Callable[[], T]) -> T:
    """Calls a function, and compares the replays in it with the model."""
    before, _thread.due = getattr(_thread, "due", False), True
    try:
        return function()
    finally:
        _thread.due = before


class _Asked:
    """Wraps a policy and remembers which operations it takes as a whole; saves nothing without one."""

    def __init__(self, policy: RecordingPolicy | None) -> None:
        self._policy = policy
        self.answers: dict[OpOverload, bool] = {}

    def handles(self, op: OpOverload) -> bool:
        self.answers[op] = _understands(self._policy, op)
        return self.answers[op]

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._policy is not None:
            self._policy.save(node, keep, args, kwargs)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node(*args, **kwargs) if self._policy is None else self._policy.run(node, keep, args, kwargs)


class _Layouts(_Asked):
    """Puts on the tape how results lie in memory, which other kernels may have changed.

    A view that cannot be taken of the new layout is taken of a copy in the one that the model had.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__(None)
        self._nodes = tape.nodes
        self._recorded = {value: value.stride for node in tape.nodes for value in node.inputs}

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            result = node(*args, **kwargs)
        except RuntimeError:
            if key(node.op) not in _VIEWS or node.kernel is not None:
                raise
            node.kernel = _OfCopy(node.op, self._recorded[node.inputs[0]])
            result = node(*args, **kwargs)
            self._nodes[node.index].kernel = node.kernel
        for value, tensor in zip(node.outputs, result if isinstance(result, (list, tuple)) else [result], strict=True):
            if value is not None and tensor.layout == torch.strided:
                value.stride = tensor.stride()
        return result


_VIEWS = {"aten::view", "aten::_unsafe_view", "aten::view_as", "aten::view_as_complex"}


@dataclass(frozen=True)
class _OfCopy:
    """Takes a view of a copy with other strides."""

    op: Callable[..., Any]
    stride: tuple[int, ...]

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        copy = torch.empty_strided(input.shape, self.stride, dtype=input.dtype, device=input.device)
        return self.op(copy.copy_(input), *args, **kwargs)


def _understands(policy: RecordingPolicy | None, op: OpOverload) -> bool:
    # Without a reading nothing is taken apart.
    return policy is None or policy.handles(op)


_Audit = Callable[[Tensor], Tensor]


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _mirrored(tensor: Tensor) -> Tensor:
    """Returns other numbers of the same kind."""
    other = tensor.flip(-1) if tensor.dim() else tensor.clone()
    return -other if tensor.is_floating_point() else other


def _faint(tensor: Tensor) -> Tensor:
    """Returns numbers of another size."""
    return tensor / 8 if tensor.is_floating_point() else tensor.clone()


def _due(call: int) -> Sequence[_Audit]:
    """Returns the audits at one call: the ways in which a replay is compared with the model.

    The first call was compared as it was made. The second is compared on its inputs and the third after other inputs
    have shown no difference, so that no results are returned before that which were not the model's.
    """
    if getattr(_thread, "due", False):
        return (_given,)
    if call == 2:
        return _given, _mirrored
    if call == 3:
        return (_faint,)
    return (_given,) if call > 3 and call & (call - 1) == 0 else ()


def _answers(tape: Tape) -> list[Tensor]:
    return tensors_in(tape.result if tape.reached is None else tape.reached)


def _difference(came: list[Tensor], wanted: list[Tensor]) -> float:
    """Returns the largest difference of results as a share of the rounding error; infinite if they do not compare."""
    if len(came) != len(wanted):
        return float("inf")
    return max(map(_difference_of, came, wanted), default=0.0)


def _difference_of(came: Tensor, wanted: Tensor) -> float:
    if came.shape != wanted.shape or came.dtype != wanted.dtype:
        return float("inf")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(came, wanted) else float("inf")
    if not wanted.numel():
        return 0.0
    both = torch.isfinite(wanted)
    if not torch.equal(torch.isfinite(came), both):
        return float("inf")
    zero = torch.zeros((), dtype=wanted.dtype, device=wanted.device)
    difference = float(torch.where(both, came - wanted, zero).abs().max())
    largest = float(torch.where(both, wanted, zero).abs().max())
    allowed = _AGREES.get(wanted.dtype, 0.1) * largest
    return difference / allowed if allowed else (float("inf") if difference else 0.0)
