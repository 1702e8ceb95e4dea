"""`_run.json`: what a run is of, so that it is never continued as another."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.datasets.durable import write_whole
from pyfast_xai.datasets.schema import VERSION
from pyfast_xai.errors import InputError

NAME = "_run.json"
_MOST = 1 << 26  # bytes that are read of a file that should be small
_CONTENT = "content"  # of the source: what a repaired picture changes


@dataclass(frozen=True)
class Manifest:
    """What a run is of.

    Attributes:
        described: source, shard size, model, method, settings and versions; JSON-ready. Everything that decides what a
            row says.
        made: how to make it again and how to read it: names of the classes, texts of source and model. Not compared.
    """

    described: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of `described` but the content of pictures, which `retry` may find repaired."""
        steady = {**self.described, "source": {k: v for k, v in self.described["source"].items() if k != _CONTENT}}
        return hashlib.sha256(json.dumps(steady, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, system: Any = os) -> None:
        told = {"fingerprint": self.fingerprint, **self.described, "made": self.made}
        write_whole(folder / NAME, (json.dumps(told, indent=1) + "\n").encode(), system)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a run.

    Raises:
        InputError: there is none, or not one of this library.
    """
    path = Path(folder) / NAME
    try:
        with open(path, "rb") as file:
            told = json.loads(file.read(_MOST))
        made, fingerprint = told.pop("made"), told.pop("fingerprint")
        manifest = Manifest(told, made)
        known = isinstance(made, dict) and all(isinstance(told[k], dict) for k in ("source", "model", "method"))
        if not known or manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint does not fit it")
    except FileNotFoundError:
        raise InputError(f"folder must be one of a run, got {str(folder)!r}, where no {NAME} lies") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{NAME} in {str(folder)!r} must be that of a run, got another ({error})") from error
    if told.get("schema") != VERSION:
        raise InputError(
            f"run in {str(folder)!r} must have columns of version {VERSION}, which this release reads, "
            f"got {told.get('schema')}"
        )
    return manifest


def begin(folder: Path, manifest: Manifest, repaired: bool = False, system: Any = os) -> None:
    """Write the manifest of a new run, or see that an old one is the same.

    Args:
        folder: of the run.
        manifest: of what is to be done now.
        repaired: pictures may have changed since, as before a retry; the new state of them is written down.
        system: what speaks to the disk.

    Raises:
        InputError: the run that lies there is another one; the sentence names what differs.
    """
    if not (folder / NAME).exists():
        if any(name.startswith("part-") for name in os.listdir(folder)):
            raise InputError(
                f"out must be the folder of a run or a new one, got {str(folder)!r} with parts and no {NAME}"
            )
        manifest.write(folder, system)
        return
    old = dict(_leaves(read_manifest(folder).described))
    new = dict(_leaves(manifest.described))
    content = f"source.{_CONTENT}"
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key) and not (repaired and key == content)]
    if differing:
        raise InputError(f"out {str(folder)!r} must be continued as it was begun, {_told(differing, old, new)}")
    if old[content] != new[content]:
        Manifest(manifest.described, read_manifest(folder).made).write(folder, system)


def _told(differing: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    # How many there are says more than that their names differ.
    key = "source.items" if "source.items" in differing else differing[0]
    also = ", ".join(other for other in differing if other != key)
    rest = f" ({also} {'differs' if len(differing) == 2 else 'differ'}, too)" if also else ""
    if key == f"source.{_CONTENT}":
        return f"with the same files, got some of another size or time of change{rest}; `retry` takes repaired ones"
    return f"with {key} {_short(old.get(key))}, got {_short(new.get(key))}{rest}"


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    shown = json.dumps(value)
    return shown if len(shown) <= 100 else f"{shown[:99]}…"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else key)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of what a model is made of and of all its tensors, by name; wherever they came from."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {flat.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A setting as JSON has it; of an object only what kind it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, Tensor):
        return weights_digest(nn.ParameterList([nn.Parameter(value, requires_grad=False)]))
    return getattr(value, "__qualname__", type(value).__qualname__)
