"""`_run.parquet`: the description of a run, so that it is never continued as another."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from pyfast_xai.datasets.attachments import attached, detached
from pyfast_xai.datasets.folders import Folder
from pyfast_xai.datasets.schema import VERSION
from pyfast_xai.errors import InputError

NAME = "_run.parquet"
_LARGEST = 1 << 26  # bytes that are read of a file that should be small
_CONTENT = "content"  # of the source: what a repaired picture changes


@dataclass(frozen=True)
class Manifest:
    """The description of a run.

    Attributes:
        described: source, shard size, model, method, settings and versions, JSON-ready: everything that the rows depend
            on.
        made: class names and texts of source and model, with which the run can be repeated and read. Not compared.
    """

    described: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Returns SHA-256 of all of `described` but the content of pictures, which may be repaired before a `retry`."""
        steady = {**self.described, "source": {k: v for k, v in self.described["source"].items() if k != _CONTENT}}
        return hashlib.sha256(json.dumps(steady, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Folder, columns: pa.Schema) -> None:
        """Writes the manifest into the folder of a run.

        Args:
            folder: of the run.
            columns: of the parts beside it.
        """
        document = {"fingerprint": self.fingerprint, **self.described, "made": self.made}
        folder.write(NAME, attached((json.dumps(document, indent=1) + "\n").encode(), columns))


def read_manifest(folder: Folder) -> Manifest:
    """Returns the manifest of a run.

    Raises:
        InputError: there is none, or not one of this library.
    """
    path = str(folder.path)
    try:
        manifest = Manifest(*_parts_of(read_document(folder)))
    except FileNotFoundError:
        raise InputError(f"folder must be one of a run, got {path!r}, where no {NAME} lies") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{NAME} in {path!r} must be that of a run, got another ({error})") from error
    if manifest.described.get("schema") != VERSION:
        raise InputError(
            f"run in {path!r} must have columns of version {VERSION}, which this release reads, "
            f"got {manifest.described.get('schema')}"
        )
    return manifest


def read_document(folder: Folder) -> Any:
    """Returns the JSON document that the manifest file of a run holds, unchecked."""
    with folder.open(NAME) as file:
        content = file.read(_LARGEST)
    return json.loads(detached(pa.py_buffer(content)).to_pybytes())


def _parts_of(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    made, fingerprint = document.pop("made"), document.pop("fingerprint")
    is_valid = isinstance(made, dict) and all(isinstance(document[key], dict) for key in ("source", "model", "method"))
    if not is_valid or Manifest(document, made).fingerprint != fingerprint:
        raise ValueError("its fingerprint does not fit it")
    return document, made


def check_same_run(folder: Folder, manifest: Manifest, repaired: bool = False) -> Manifest | None:
    """Refuses a folder with another run.

    Args:
        folder: of the run.
        manifest: of what is to be done now.
        repaired: pictures may have changed since, as before a retry.

    Returns:
        The manifest that lies there; None for a new run.

    Raises:
        InputError: the run that lies there is another one; the sentence names the differences.
    """
    names = folder.names()
    if NAME not in names:
        if any(name.startswith("part-") for name in names):
            raise InputError(
                f"out must be the folder of a run or a new one, got {str(folder.path)!r} with parts and no {NAME}"
            )
        return None
    present = read_manifest(folder)
    present_facts, new_facts = dict(_leaves(present.described)), dict(_leaves(manifest.described))
    content = f"source.{_CONTENT}"
    differing = [
        key
        for key in {**present_facts, **new_facts}
        if present_facts.get(key) != new_facts.get(key) and not (repaired and key == content)
    ]
    if differing:
        differences = _differences(differing, present_facts, new_facts)
        raise InputError(f"out {str(folder.path)!r} must be continued as it was begun, {differences}")
    return present


def _differences(differing: list[str], present_facts: Mapping[str, Any], new_facts: Mapping[str, Any]) -> str:
    # How many there are says more than that their names differ.
    key = "source.items" if "source.items" in differing else differing[0]
    also = ", ".join(name for name in differing if name != key)
    suffix = f" ({also} {'differs' if len(differing) == 2 else 'differ'}, too)" if also else ""
    if key == f"source.{_CONTENT}":
        return f"with the same files, got some of another size or time of change{suffix}; `retry` takes repaired ones"
    return f"with {key} {_short(present_facts.get(key))}, got {_short(new_facts.get(key))}{suffix}"


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else key)


def weights_digest(model: nn.Module) -> str:
    """Returns the SHA-256 of the modules of a model and of all its tensors, by name."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {flat.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Returns a setting as JSON has it; of an object only the name of its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return weights_digest(nn.ParameterList([nn.Parameter(value, requires_grad=False)]))
    return getattr(value, "__qualname__", type(value).__qualname__)
