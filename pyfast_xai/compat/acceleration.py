"""Replays in the classes that take the place of other libraries', whose signatures have no room for a setting."""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.cache_key import cache_key
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.compat.called import Called, Forward
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.replay_trial import ReplayTrial, nearly_same
from pyfast_xai.tape import Tape, record
from pyfast_xai.tape.module_hooks import unwrap
from pyfast_xai.tape.record import tensors_in

T = TypeVar("T")

Mode = bool | Literal["auto"]

_MOST_KINDS = 4  # of calls of one object, each with a replay of its own


class accelerate:  # noqa: N801 reads as a verb: `with compat.accelerate("auto"):`
    """Sets whether the drop-in classes replay the models that they are given; in a `with` block until its end.

    The default is "auto", unless the environment variable `PYFAST_XAI_COMPAT_ACCELERATE` is set to "on" or "off".
    Functions that are no modules, and models with forward hooks, are recorded always. Replays belong to the object that
    made them: keep it for the next images. The classes of `compat.torchcam` leave the forward to the user: there is
    nothing to replay.

    Args:
        mode: "auto" to replay once that has proven faster for tensors of one shape; True to replay from the first call
            on; False to record in every call. See the setting `accelerate` of `Explainer`.

    Raises:
        InputError: another mode.

    Example:
        >>> import torch
        >>> from pyfast_xai import compat, demo
        >>> from pyfast_xai.compat.captum import Saliency
        >>> saliency, images = Saliency(demo.load()), torch.rand(2, 3, 96, 96)
        >>> with compat.accelerate("auto"):
        ...     maps = [saliency.attribute(images, target=3) for _ in range(4)]
        >>> torch.allclose(maps[0], maps[3], atol=1e-5)
        True
    """

    _mode: Mode | None = None

    def __init__(self, mode: Mode = "auto") -> None:
        self._before = accelerate._mode
        accelerate._mode = one_of("mode", mode, (True, False, "auto"))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        accelerate._mode = self._before


_IN_WORDS: dict[str, Mode] = {"auto": "auto", "on": True, "off": False}


def mode() -> Mode:
    """Returns the setting of `accelerate`, otherwise that of the environment.

    Raises:
        InputError: the environment says something else.
    """
    if accelerate._mode is not None:
        return accelerate._mode
    setting = os.environ.get("PYFAST_XAI_COMPAT_ACCELERATE", "auto")
    if setting not in _IN_WORDS:
        raise InputError(f"PYFAST_XAI_COMPAT_ACCELERATE must be auto, on or off, got {setting!r}")
    return _IN_WORDS[setting]


class Kind:
    """The calls of an object that have function, layers and settings in common, and their replays.

    Args:
        called: the module that is recorded.
        job: what the object does.
        described: the function and the layers in words.
        pinned: replay from the first call on.
    """

    def __init__(self, called: Called, job: str, described: str, pinned: bool) -> None:
        self.called, self._described = called, described
        self._pinned = ReplayedModel(called) if pinned else None
        self._trial = ReplayTrial(called, job=job)

    def record(self, *args: Any, **kwargs: Any) -> Tape:
        """Records the module, or its replay."""
        replayed = self._trial.current if self._pinned is None else self._pinned
        if replayed is None or (self._pinned is not None and self._pinned.has_forward_hooks):
            return record(self.called, *args, **kwargs)
        return replayed.record(*args, **kwargs)

    def __call__(self, run: Callable[[], T], args: Sequence[Any]) -> T:
        """Returns `run()`, in which `record` may replay.

        Args:
            run: records, and reads what was recorded.
            args: arguments of the call.
        """
        if self._pinned is not None:
            return run()
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        shapes = ", ".join(f"{tensor.dtype}{list(tensor.shape)}{list(tensor.stride())}" for tensor in tensors)
        return self._trial(
            run,
            signature=cache_key(tuple(args), {}),
            described=f"{self._described}, {shapes}",
            device=tensors[0].device if tensors else torch.device("cpu"),
            agree=lambda actual, expected: nearly_same(tensors_in(actual), tensors_in(expected)),
        )


class Replays:
    """The replays of one object of a drop-in class.

    Args:
        job: the name of the class.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._kinds: OrderedDict[Any, Kind] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, (self._job,)  # a copy belongs to another model

    def kind(self, function: Forward, layers: Sequence[nn.Module], at_input: bool, stop: bool) -> Kind | None:
        """Returns the kind of a call; None where it is to be recorded."""
        setting = mode()
        if setting is False or not isinstance(function, nn.Module):
            return None
        function = unwrap(function)
        key = (setting, id(function), *map(id, layers), at_input, stop)
        kind = self._kinds.get(key)
        if kind is None:
            described = " at ".join(type(module).__name__ for module in (function, *layers))
            called = Called(function, layers, at_input, stop)
            kind = self._kinds[key] = Kind(called, self._job, described, pinned=setting is True)
            while len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return kind


class Replaying:
    """Base of drop-in classes that replay."""

    @functools.cached_property
    def _replays(self) -> Replays:
        return Replays(f"{type(self).__module__.removeprefix('pyfast_xai.')}.{type(self).__name__}")
