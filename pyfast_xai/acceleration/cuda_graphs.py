"""A cache of CUDA graphs: a function of tensors becomes one graph launch after its first call."""

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
_MAX_GRAPHS = 16  # the most recently used graphs; each holds the memory of its inputs and outputs

# PyTorch captures one graph at a time in a process.
_capturing = ForkSafeLock()

_thread = threading.local()


def is_capturing() -> bool:
    """Returns whether this thread captures a graph or warms up for one, during which it must not synchronise."""
    if getattr(_thread, "captures", False):
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CudaGraphCache:
    """Runs functions as CUDA graphs if all their tensors are on one CUDA device, and eagerly otherwise.

    A function takes and returns tensors, nested in tuples, lists and dictionaries among other values. It must not
    synchronise: no `.item()`, no data-dependent shapes. The first call runs eagerly. The second captures a graph for
    the same shapes, strides, dtypes and other arguments, with static inputs and outputs. Later calls copy their
    arguments to the static inputs, and return copies of the static outputs.

    The graphs share memory, so they run one after another, and a stream waits for the streams that ran them before. If
    another thread is replaying the graph, the function runs eagerly. So it does under autocast, because the cached
    weight casts would not outlive it. If capturing fails, which is logged, no further graphs are captured.

    Args:
        limit: bytes of the inputs and outputs of all graphs; the least recently used graphs are evicted.
        audit: receives the function instead of the graph being replayed, at the 4th, 8th, 16th and so on call.
    """

    def __init__(self, limit: float = float("inf"), audit: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        self._limit = limit
        self._audit = audit
        self._order = ForkSafeLock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._devices: dict[torch.device, Device] = {}
        self._stopped = False

    def stop(self) -> None:
        """Runs all functions eagerly from now on."""
        self._stopped = True

    def __call__(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> T:
        """Returns `function(*arguments)`, by replaying a graph if there is one.

        Args:
            function: as described above; writes to none of the tensors.
            *arguments: arguments of the function.
            key: identifies the function and everything it depends on besides its arguments; kept as long as the graph.
        """
        graph, repeated = self._graph(arguments, key)
        if graph is None or not repeated:
            return function(*arguments)
        with graph.acquire() as acquired:
            if not (acquired and self._ready(graph, function, arguments)):
                return function(*arguments)
            graph.calls += 1
            if self._audit is not None and graph.calls > 2 and graph.calls & (graph.calls - 1) == 0:
                return self._audit(lambda: function(*arguments))
            with self._order, graph.device.on_current_stream(graph.tensors):
                graph.load(arguments)
                graph.replay()
                return _cloned(graph.result)

    @contextlib.contextmanager
    def repeating(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> Iterator["Repeatable[T]"]:
        """Captures, at its first call, a function that is called repeatedly on the same tensors and writes to them.

        Args:
            function: as described above.
            *arguments: arguments of the function.
            key: as for a call.

        Yields:
            A `Repeatable` that calls the function. Its tensors and its result are valid until the next call, or the end
            of the `with` block.
        """
        graph, _ = self._graph(arguments, key)
        if graph is None:
            yield Repeatable(function, arguments)
            return
        with graph.acquire() as acquired:
            if not (acquired and self._ready(graph, function, arguments)):
                yield Repeatable(function, arguments)
                return
            with self._order, graph.device.on_current_stream(graph.tensors):
                graph.load(arguments)
            del arguments  # the graph has copies
            yield Repeatable(lambda *copies: self._replay(graph), graph.arguments)

    def _replay(self, graph: "_Graph") -> Any:
        with self._order, graph.device.on_current_stream(graph.tensors):
            graph.replay()
            return graph.result

    def _graph(self, arguments: Any, key: Hashable) -> tuple["_Graph | None", bool]:
        """Returns the graph for these arguments, captured or not, and whether it was requested before."""
        device = None if self._stopped else device_of(arguments)
        if device is None:
            return None, False
        signature = cache_key(arguments, {})
        if signature is None:
            return None, False
        graph_key = (key, signature, registry.current_backend(), torch.are_deterministic_algorithms_enabled())
        with self._order:
            graph = self._graphs.get(graph_key)
            if graph is not None:
                self._graphs.move_to_end(graph_key)
                return graph, True
            if device not in self._devices:
                self._devices[device] = Device(device)
            self._graphs[graph_key] = graph = _Graph(self._devices[device])
            while len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return graph, False

    @property
    def captured(self) -> int:
        """Returns how many graphs there are."""
        with self._order:
            return sum(graph.captured for graph in self._graphs.values())

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the inputs and outputs of all graphs."""
        with self._order:
            return sum(graph.nbytes for graph in self._graphs.values())

    def _ready(self, graph: "_Graph", function: Callable[..., Any], arguments: Any) -> bool:
        """Returns whether a graph can be replayed; captures it if it is not captured yet."""
        if graph.captured:
            return True
        with self._order:
            try:
                if not self._stopped:
                    graph.capture(function, arguments, lambda: self._stopped)
            except Exception as error:  # a device, a driver or a model may raise anything here
                if not self._stopped:
                    logger.warning("accelerate: goes on without CUDA graphs, capturing one failed (%s)", error)
                self._stopped = True
            while self.nbytes > self._limit and next(iter(self._graphs.values())) is not graph:
                self._graphs.popitem(last=False)
            return graph.captured


class Repeatable(Generic[T]):
    """Calls a function on the same arguments.

    Args:
        function: takes the arguments.
        arguments: read and written by the function.
    """

    def __init__(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self.arguments = arguments

    def __call__(self) -> T:
        return self._function(*self.arguments)


class _Graph:
    """A captured function with its static inputs and outputs."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.calls = 1
        self.nbytes = 0
        self._lock = threading.Lock()
        self.captured = False
        self.arguments: Any = None
        self.tensors: list[Tensor] = []
        self.result: Any = None
        self.replay: Callable[[], None] = _not_captured

    @contextlib.contextmanager
    def acquire(self) -> Iterator[bool]:
        """Yields whether this thread has the graph inside the `with` block; does not wait for another thread."""
        acquired = self._lock.acquire(blocking=False)
        try:
            yield acquired
        finally:
            if acquired:
                self._lock.release()

    def capture(self, function: Callable[..., Any], arguments: Any, stopped: Callable[[], bool]) -> None:
        """Captures a call.

        Args:
            function: the function to capture.
            arguments: its arguments, which are copied and not changed.
            stopped: returns, after the warm-up, whether capturing was stopped.
        """
        copies = _cloned(arguments)
        previous, _thread.captures = getattr(_thread, "captures", False), True
        try:
            captured = self.device.capture(lambda: function(*copies), stopped)
        finally:
            _thread.captures = previous
        if captured is not None:
            self.result, self.replay = captured
            self.arguments, self.tensors = copies, _tensors(copies)
            self.nbytes = sum(tensor.nbytes for tensor in (*self.tensors, *_tensors(self.result)))
            self.captured = True

    def load(self, arguments: Any) -> None:
        for static, argument in zip(self.tensors, _tensors(arguments), strict=True):
            static.copy_(argument)


class Device:
    """Captures and replays on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: set[torch.cuda.Stream] = set()

    def capture(self, run: Callable[[], T], stopped: Callable[[], bool]) -> tuple[T, Callable[[], None]] | None:
        """Captures a function without arguments.

        Args:
            run: the function; called a few times to warm up.
            stopped: returns, after the warm-up, whether capturing was stopped.

        Returns:
            The result, whose tensors each replay overwrites, and the replay, on the current stream; None if capturing
            was stopped.
        """
        # The current stream is entered, too, because a failed capture does not restore it.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            if stopped():
                return None
            graph = torch.cuda.CUDAGraph()
            # Other threads may keep using the device.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = run()
        return result, graph.replay

    @contextlib.contextmanager
    def on_current_stream(self, tensors: list[Tensor]) -> Iterator[None]:
        """Makes the current stream wait for earlier replays, and marks `tensors` as used by it."""
        current = torch.cuda.current_stream(self._device)
        for other in self._streams - {current}:
            current.wait_stream(other)
        self._streams.add(current)
        for tensor in tensors:
            tensor.record_stream(current)
        yield


def device_of(arguments: Any) -> torch.device | None:
    """Returns the CUDA device on which a function of these arguments can be captured; None if it cannot."""
    devices = {leaf.device for leaf in _tensors(arguments)}
    if len(devices) != 1:
        return None
    (device,) = devices
    return device if device.type == "cuda" and not torch.is_autocast_enabled("cuda") else None


def _not_captured() -> None:
    raise AssertionError("nothing was captured")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _cloned(tree: T) -> T:
    """Returns a copy of a tree whose tensors are cloned and may be written to anywhere."""
    with torch.inference_mode(False):
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)
