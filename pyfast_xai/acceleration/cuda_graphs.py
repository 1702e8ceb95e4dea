"""Functions of tensors as CUDA graphs: all their kernels launched at once, without the Python in between."""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.acceleration.cache_key import cache_key
from pyfast_xai.forks import ForkSafeLock
from pyfast_xai.ops import registry

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")

_WARM_UPS = 3  # compile kernels, choose algorithms and make the workspaces of the stream
_KEPT = 16  # graphs, the last that were used: each holds the memory of what goes in and out of it

# PyTorch captures one graph at a time in a process.
_capturing = ForkSafeLock()

_thread = threading.local()


def is_capturing() -> bool:
    """Returns whether this thread captures a graph or warms up for one, so that nothing may wait for the device."""
    if getattr(_thread, "captures", False):
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CudaGraphCache:
    """Runs functions as CUDA graphs where all their tensors lie on one CUDA device, and as they are elsewhere.

    A function takes tensors, nested in tuples, lists and dictionaries beside anything else, and returns such. It reads
    no number of a tensor and takes no shape from one. It runs as it is the first time; the second time it is captured
    for these shapes, strides and dtypes and for what else it is given, with inputs and outputs of the graph's own, and
    from then on what it is given is copied there and what comes out copied from there.

    The graphs share memory, so one runs after another, and a stream waits for those that ran them before. A thread that
    finds a graph taken by another calls the function. So does everyone under autocast, whose copies of weights go
    with it. Where capturing fails, which is logged, no more graphs are made.

    Args:
        limit: bytes of what goes in and out of all graphs, and of what capturing them took from the device. Those that
            were used longest ago are let go.
        audit: calls a function that is due to be looked at: instead of the graph, at its 4th, 8th, 16th and so on call.
    """

    def __init__(self, limit: float = float("inf"), audit: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        self._limit = limit
        self._audit = audit
        self._turn = ForkSafeLock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._devices: dict[torch.device, Device] = {}
        self._stopped = False

    def stop(self) -> None:
        """Call functions from now on."""
        self._stopped = True

    def __call__(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> T:
        """Calls `function(*arguments)`, as a graph where there is one.

        Args:
            function: as described above; writes to none of the tensors.
            *arguments: of the function.
            key: what the function is and depends on besides its arguments; kept as long as the graph.
        """
        graph, known = self._graph(arguments, key)
        if graph is None or not known:
            return function(*arguments)
        with graph.taken() as ours:
            if not (ours and self._ready(graph, function, arguments)):
                return function(*arguments)
            graph.calls += 1
            if self._audit is not None and graph.calls > 2 and graph.calls & (graph.calls - 1) == 0:
                return self._audit(lambda: function(*arguments))
            with self._turn, graph.device.turn(graph.tensors):
                graph.load(arguments)
                graph.replay()
                return _copied(graph.result)

    @contextlib.contextmanager
    def repeating(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> Iterator["Repeatable[T]"]:
        """Captures a function that is called repeatedly on the same tensors, and writes to them.

        It is captured at once.

        Args:
            function: as described above.
            *arguments: of the function.
            key: as for a call.

        Yields:
            What calls it. Its tensors, and what it returned, are good until the end of the `with` block, or until the
            next call.
        """
        graph, _ = self._graph(arguments, key)
        if graph is None:
            yield Repeatable(function, arguments)
            return
        with graph.taken() as ours:
            if not (ours and self._ready(graph, function, arguments)):
                yield Repeatable(function, arguments)
                return
            with self._turn, graph.device.turn(graph.tensors):
                graph.load(arguments)
            del arguments  # the graph has its own
            yield Repeatable(lambda *own: self._again(graph), graph.arguments)

    def _again(self, graph: "_Graph") -> Any:
        with self._turn, graph.device.turn(graph.tensors):
            graph.replay()
            return graph.result

    def _graph(self, arguments: Any, key: Hashable) -> tuple["_Graph | None", bool]:
        """Returns the graph for these arguments, captured or not, and whether it was asked for before."""
        device = None if self._stopped else device_of(arguments)
        if device is None:
            return None, False
        signature = cache_key(arguments, {})
        if signature is None:
            return None, False
        known = (key, signature, registry.asked_for(), torch.are_deterministic_algorithms_enabled())
        with self._turn:
            graph = self._graphs.get(known)
            if graph is not None:
                self._graphs.move_to_end(known)
                return graph, True
            if device not in self._devices:
                self._devices[device] = Device(device)
            self._graphs[known] = graph = _Graph(self._devices[device])
            while len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
            return graph, False

    @property
    def nbytes(self) -> int:
        """Returns the memory of the graphs that there are."""
        with self._turn:
            return sum(graph.nbytes for graph in self._graphs.values())

    def _ready(self, graph: "_Graph", function: Callable[..., Any], arguments: Any) -> bool:
        """Returns whether a graph can be replayed; captures it if nobody has."""
        if graph.captured:
            return True
        with self._turn:
            try:
                if not self._stopped:
                    graph.capture(function, arguments, lambda: self._stopped)
            except Exception as error:  # whatever a device, a driver or a model says to this
                if not self._stopped:
                    logger.warning("accelerate: goes on without CUDA graphs, capturing one failed (%s)", error)
                self._stopped = True
            while self.nbytes > self._limit and next(iter(self._graphs.values())) is not graph:
                self._graphs.popitem(last=False)
            return graph.captured


class Repeatable(Generic[T]):
    """Calls a function again.

    Args:
        function: of the arguments.
        arguments: that it reads and writes.
    """

    def __init__(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self.arguments = arguments

    def __call__(self) -> T:
        return self._function(*self.arguments)


class _Graph:
    """One captured function with the memory it works on."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.calls = 1
        self.nbytes = 0
        self._lock = threading.Lock()
        self.captured = False
        self.arguments: Any = None
        self.tensors: list[Tensor] = []
        self.result: Any = None
        self.replay: Callable[[], None] = _nothing

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """Yields whether this thread holds the graph inside the `with` block; it does not wait for another thread."""
        ours = self._lock.acquire(blocking=False)
        try:
            yield ours
        finally:
            if ours:
                self._lock.release()

    def capture(self, function: Callable[..., Any], arguments: Any, stopped: Callable[[], bool]) -> None:
        """Capture a call.

        Args:
            function: to be captured.
            arguments: which are left alone.
            stopped: asked after warming up.
        """
        own = _copied(arguments)
        before, _thread.captures = getattr(_thread, "captures", False), True
        try:
            made = self.device.capture(lambda: function(*own), stopped)
        finally:
            _thread.captures = before
        if made is not None:
            self.result, self.replay = made
            self.arguments, self.tensors = own, _tensors(own)
            self.nbytes = sum(tensor.nbytes for tensor in (*self.tensors, *_tensors(self.result)))
            self.captured = True

    def load(self, arguments: Any) -> None:
        for own, given in zip(self.tensors, _tensors(arguments), strict=True):
            own.copy_(given)


class Device:
    """Captures and replays on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: set[torch.cuda.Stream] = set()

    def capture(self, run: Callable[[], T], stopped: Callable[[], bool]) -> tuple[T, Callable[[], None]] | None:
        """Capture a function without arguments.

        Args:
            run: the function; called a few times before.
            stopped: asked after that, whether it must not be captured after all.

        Returns:
            What it returned, whose tensors a replay fills anew, and the replay, on the current stream; None where it
            must not be captured.
        """
        # The current stream is entered, too: capturing that fails does not leave its own.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            if stopped():
                return None
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = run()
        return result, graph.replay

    @contextlib.contextmanager
    def turn(self, tensors: list[Tensor]) -> Iterator[None]:
        """Reserves `tensors` and what graphs share for the current stream, until the block ends, after earlier use."""
        current = torch.cuda.current_stream(self._device)
        for other in self._streams - {current}:
            current.wait_stream(other)
        self._streams.add(current)
        for tensor in tensors:
            tensor.record_stream(current)
        yield


def device_of(arguments: Any) -> torch.device | None:
    """Returns the device on which a function of these can be a graph; None where it cannot."""
    devices = {leaf.device for leaf in _tensors(arguments)}
    if len(devices) != 1:
        return None
    (device,) = devices
    return device if device.type == "cuda" and not torch.is_autocast_enabled("cuda") else None


def _nothing() -> None:
    raise AssertionError("nothing was captured")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copied(tree: T) -> T:
    """Returns a copy of a tree whose tensors are cloned and may be written to anywhere."""
    with torch.inference_mode(False):
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)
