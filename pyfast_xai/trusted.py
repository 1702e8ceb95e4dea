"""Whole models from files: full pickles, TorchScript archives and exported programs.

Reading such a file runs what its author put into it: only files that the user has trusted come here, but for `kind`.
"""

import contextlib
import functools
import io
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_xai.errors import InputError

PICKLE, TORCHSCRIPT, PROGRAM = "a pickle", "a TorchScript archive", "an exported program"


def kind(path: str | Path) -> str:
    """Returns the kind of a file for `torch.load`, `torch.jit.load` or `torch.export.load`, by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a broken file, or one that is no archive, may raise anything
        return PICKLE
    if any(name.endswith("/constants.pkl") for name in names):
        return TORCHSCRIPT
    if any(name.endswith("/archive_format") or name == "serialized_exported_program.json" for name in names):
        return PROGRAM
    return PICKLE


def read(path: str | Path) -> Any:
    """Loads a file on the CPU; code in it is run.

    Returns:
        A `torch.jit.ScriptModule`, a `torch.export.ExportedProgram`, or whatever was pickled.
    """
    format = kind(path)
    with _silence_torch_warnings():
        if format == TORCHSCRIPT:
            return torch.jit.load(str(path), map_location="cpu")
        if format == PROGRAM:
            with open(path, "rb") as file:  # by name it must end in .pt2
                return torch.export.load(file)
        return torch.load(path, map_location="cpu", weights_only=False)


@contextlib.contextmanager
def _silence_torch_warnings() -> Iterator[None]:
    """Silences PyTorch's deprecation warnings while a file is read."""
    with warnings.catch_warnings():
        for kind_ in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind_)
        yield


def network(content: Any, name: str) -> tuple[nn.Module, tuple[int, int] | None]:
    """Converts the contents of a file to a network whose operations a tape can see.

    Args:
        found: see `read`; a module may lie in a dict, as "model".
        name: of the file, for messages.

    Returns:
        The network, in evaluation mode, and (H, W) of its input in pixels; None where any size will do, or none is
        known.

    Raises:
        InputError: there is no module, or a program that cannot be explained; the sentence says what to do instead.
    """
    if isinstance(content, ExportedProgram):
        return _program(content, name)
    if isinstance(content, dict) and isinstance(content.get("model"), nn.Module):
        content = content["model"]
    if not isinstance(content, nn.Module):
        raise InputError(
            f"model {name!r} must hold a torch.nn.Module, got a {type(content).__name__}; "
            "a file of tensors is named by --weights (weights=), beside a model to fill"
        )
    if not isinstance(content, torch.jit.ScriptModule):
        return content.eval(), None
    if not all(hasattr(module, "training") for module in content.modules()):
        raise InputError(
            f"model {name!r} must be saved before torch.jit.freeze, got weights that are written into code"
        )
    return Archive(content).eval(), None


class Archive(nn.Module):
    """A TorchScript archive that behaves as a module written in Python does, to whoever watches its operations.

    Its layers run in an interpreter that calls no module: they are named as operations, such as `conv2d_3`, not by
    paths. Unlike the archive alone it can be pickled.

    Args:
        archive: scripted or traced.
    """

    def __init__(self, archive: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.archive = archive
        self.training = archive.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        written = _AsWritten()
        # The optimiser would fuse operations into kernels that no dispatch mode sees.
        with torch.jit.optimized_execution(False):
            try:
                with written:
                    return self.archive.forward(*args, **kwargs)  # past the hooks, which know the archive by no path
            except RuntimeError:
                # The interpreter makes this of every exception, that which ends a recording early among them.
                if written.raised is not None:
                    raise written.raised from None
                raise

    def __reduce__(self) -> Any:
        sink = io.BytesIO()
        with _silence_torch_warnings():
            torch.jit.save(self.archive, sink)
        return _unpacked, (sink.getvalue(),)


def _unpacked(archive: bytes) -> Archive:
    with _silence_torch_warnings():
        return Archive(torch.jit.load(io.BytesIO(archive)))


class _AsWritten(TorchDispatchMode):
    """Gives operations of a traced model the names they had in Python, and remembers what one of them raised."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in tape.record: nothing to keep the compiler away from, and no reason to import it

    def __init__(self) -> None:
        super().__init__()
        self.raised: BaseException | None = None

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            if op is torch.ops.aten._convolution.default:
                return _convolution(*args)
            return op(*args, **(kwargs or {}))
        except BaseException as error:
            self.raised = error
            raise


_CONVOLUTIONS = {3: torch.ops.aten.conv1d, 4: torch.ops.aten.conv2d, 5: torch.ops.aten.conv3d}


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *_: Any,
) -> Tensor:  # fmt: skip
    plain_op = _CONVOLUTIONS.get(input.dim())
    if transposed or plain_op is None or input.dim() != weight.dim():
        arguments = (input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        return torch.ops.aten.convolution.default(*arguments)
    return plain_op.default(input, weight, bias, stride, padding, dilation, groups)


def _program(program: ExportedProgram, name: str) -> tuple[nn.Module, tuple[int, int] | None]:
    """Returns an exported program as modules with the paths and weights they had."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shape = inputs[0].meta["val"].shape if len(inputs) == 1 and isinstance(inputs[0].meta["val"], Tensor) else ()
    spec = program.call_spec.in_spec
    called = None if spec is None else pytree.tree_unflatten([0] * spec.num_leaves, spec)
    if len(shape) != 4 or called != ((0,), {}):
        raise InputError(f"model {name!r} must take images [N, C, H, W] and nothing else, got {len(inputs)} inputs")
    mode = next((str(node.target) for node in program.graph.nodes if _trains(node)), None)
    if mode is not None:
        raise InputError(f"model {name!r} must be exported after model.eval(), got {mode} in training mode")
    bounds = [_bounds(program, length) for length in shape]
    height, width = (least if least == largest else None for least, largest in bounds[2:])
    with _silence_torch_warnings():
        module = torch.export.unflatten(program).eval()
    # Its own check raises unrelated errors, and its metadata cannot be copied.
    module.check_input_constraints = False
    for part in module.modules():
        for node in getattr(part, "graph", torch.fx.Graph()).nodes:
            node.meta.clear()
    least, largest = bounds[0]
    if least == largest:
        if not _takes_any_batch(module, [least for least, _ in bounds]):
            raise InputError(
                f"model {name!r} must be exported for any number of images (dynamic_shapes with "
                f"torch.export.Dim.DYNAMIC), got one for {least}; its weights fill a model of Python: "
                "--model NAME --weights FILE"
            )
        bounds[0] = (0, None)
    module.register_forward_pre_hook(functools.partial(_check, bounds))
    return module, None if height is None or width is None else (height, width)


def _bounds(program: ExportedProgram, length: Any) -> tuple[int, int | None]:
    """Returns the least and the most that a length may be; None for no end."""
    if isinstance(length, int):
        return length, length
    constraint = program.range_constraints.get(length.node.expr)
    if constraint is None:
        return 0, None
    # Up to 2 it says how the export went about it, not what the program takes.
    return int(constraint.lower) if constraint.lower > 2 else 0, int(
        constraint.upper
    ) if constraint.upper < 1 << 40 else None


def _trains(node: torch.fx.Node) -> bool:
    """Returns whether an operation is one of training only."""
    if not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return arguments.get("train") is True or arguments.get("training") is True


def _takes_any_batch(module: nn.Module, shape: list[int]) -> bool:
    """Returns whether a program exported for one batch size gives the same results on larger batches as in pieces.

    It has no branches, so what holds for one batch holds for all.

    Args:
        module: that asks no more for the length it was exported for.
        shape: of the batch it was exported for.
    """
    length = shape[0]
    reference_tensor = next(
        (tensor for tensor in module.state_dict().values() if tensor.is_floating_point()), torch.empty(0)
    )
    images = torch.randn(length + 2, *shape[1:], generator=torch.Generator().manual_seed(0)).to(reference_tensor.dtype)
    try:
        with torch.no_grad():
            first, last, whole_batch = module(images[:length]), module(images[2:]), module(images)
            if whole_batch.shape[:1] != images.shape[:1]:
                return False
            # Against what tells images apart: outputs of an untrained network hardly differ.
            spread = (whole_batch.amax(0) - whole_batch.amin(0)).max()
            difference = torch.maximum((whole_batch[:length] - first).abs().max(), (whole_batch[2:] - last).abs().max())
            return bool(difference <= spread * torch.finfo(whole_batch.dtype).eps ** 0.5)
    except (RuntimeError, AttributeError, TypeError):  # shapes written into it; outputs that are no tensor
        return False


def _check(bounds: Sequence[tuple[int, int | None]], _module: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuses images of another size than the program's: it might run, but not give what the model would."""
    shape = list(args[0].shape) if args and isinstance(args[0], Tensor) else []
    if len(shape) != 4 or any(
        length < least or (largest is not None and length > largest)
        for length, (least, largest) in zip(shape, bounds, strict=True)
    ):
        lengths = ["any" if b == (0, None) else str(b[0]) if b[0] == b[1] else f"{b[0]} to {b[1]}" for b in bounds]
        raise InputError(f"images must be those the program was exported for, [{', '.join(lengths)}], got {shape}")
