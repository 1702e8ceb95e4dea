"""Networks whose widths are fixed by their classes, made narrower."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def thinned(divisor: int, keep: tuple[int, ...]) -> Iterator[None]:
    """Divides the widths of convolutions, linear layers and norms that are made within it.

    Widths of at most three and those to keep stay, so that images and classes do. The operations of the network are the
    same, and one that counts on its widths fails when it runs.
    """

    def narrow(width: int) -> int:
        return width if width <= 3 or width in keep else -(-width // divisor)

    def convolution(made: Callable[..., None]) -> Callable[..., None]:
        def make(self: nn.Module, in_channels: int, out_channels: int, *args: Any, **settings: Any) -> None:
            names = ("kernel_size", "stride", "padding", "dilation", "groups", "bias")
            settings |= dict(zip(names, args, strict=False))
            groups = settings.get("groups", 1)
            if groups > 1 and (narrow(in_channels) % groups or narrow(out_channels) % groups):
                settings["groups"] = narrow(groups)
            made(self, narrow(in_channels), narrow(out_channels), **settings)

        return make

    def linear(made: Callable[..., None]) -> Callable[..., None]:
        def make(self: nn.Module, in_features: int, out_features: int, *args: Any, **settings: Any) -> None:
            made(self, narrow(in_features), narrow(out_features), *args, **settings)

        return make

    def norm(made: Callable[..., None]) -> Callable[..., None]:
        def make(self: nn.Module, width: Any, *args: Any, **settings: Any) -> None:
            made(self, narrow(width) if isinstance(width, int) else width, *args, **settings)

        return make

    def grouped_norm(made: Callable[..., None]) -> Callable[..., None]:
        def make(self: nn.Module, groups: int, width: int, *args: Any, **settings: Any) -> None:
            made(self, groups, narrow(width), *args, **settings)

        return make

    kinds: dict[type[nn.Module], Callable[[Callable[..., None]], Callable[..., None]]] = {
        nn.Conv2d: convolution,
        nn.Linear: linear,
        nn.modules.batchnorm._NormBase: norm,
        nn.LayerNorm: norm,
        nn.GroupNorm: grouped_norm,
    }
    before = {kind: kind.__init__ for kind in kinds}
    try:
        for kind, change in kinds.items():
            kind.__init__ = change(before[kind])  # type: ignore[method-assign]
        yield
    finally:
        for kind, made in before.items():
            kind.__init__ = made  # type: ignore[method-assign]
