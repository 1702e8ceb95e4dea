"""Runs a forward without autograd, compiler and fused fast paths, invisibly to other threads and to the model.

Every setting applies to the running thread alone; no process-wide switch is changed.
"""

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._guards import TracingContext, tracing
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("pyfast_xai")

# Methods that read the numbers of a tensor without an operation of PyTorch.
_READS = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__cuda_array_interface__.__get__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
    Tensor.apply_,
    Tensor.map_,
}
_GRADIENT_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
_WATCHED = _READS | _GRADIENT_HOOKS | {Tensor.retain_grad}

# A compiled function runs eagerly while a kernel runs on fake tensors; this context makes a thread look like that.
_COMPILES_NOTHING: Any = TracingContext(SimpleNamespace(in_kernel_invocation=True, shape_env=None))  # type: ignore[arg-type]


class _TensorMethods(TorchFunctionMode):
    """Intercepts tensor methods that call no operation.

    While such a mode is active, PyTorch's modules avoid their fused transformer kernels, which have no derivative and
    hide the attention that is traced.
    """

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WATCHED:
            if func in _READS:
                self._read(args[0])
            else:  # no gradient arrives here, and the model must not fail because of it
                return _hooked() if func in _GRADIENT_HOOKS else None
        return func(*args, **kwargs) if kwargs else func(*args)


def _hooked() -> RemovableHandle:
    _warn_hooks_do_not_run()
    return RemovableHandle(OrderedDict())


@functools.cache
def _warn_hooks_do_not_run() -> None:
    logger.warning("the model hooks gradients of tensors in its forward: these hooks do not run in an explanation")


@contextlib.contextmanager
def isolated(read: Callable[[Tensor], None] = lambda tensor: None, *, inference: bool = False) -> Iterator[None]:
    """Runs the block without autograd, compiler and fused transformer kernels, on this thread alone.

    Operations are called below autograd, so that composite ones (linear, conv2d, lstm, attention) arrive whole at a
    dispatch mode; the resulting tensors are ordinary ones, which a model may keep and train with.

    Args:
        read: called with a tensor whose numbers are read through NumPy, DLPack or an address.
        inference: run in inference mode, for a model that writes to tensors of its own that were made there.
    """
    autocast_cache = torch.is_autocast_cache_enabled()
    compiler = set_eval_frame(None)
    try:
        # A weight that was cast without autograd would serve a training step inside the same autocast region.
        torch.set_autocast_cache_enabled(False)
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch._C._AutoDispatchBelowAutograd(),
            tracing(_COMPILES_NOTHING),
            _TensorMethods(read),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(autocast_cache)
        set_eval_frame(compiler)
