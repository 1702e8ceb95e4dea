"""Where the inputs of a run come from, one kind a file."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_xai.datasets.sources.files import Files, csv_list, files
from pyfast_xai.datasets.sources.huggingface import HuggingFace, load
from pyfast_xai.datasets.sources.item import Item, Labelled, Listing, Source
from pyfast_xai.datasets.sources.parquet import ParquetImages, parquet
from pyfast_xai.datasets.sources.tars import Tars
from pyfast_xai.datasets.sources.torch_dataset import TorchDataset
from pyfast_xai.errors import InputError

__all__ = [
    "Files",
    "HuggingFace",
    "Item",
    "Labelled",
    "Listing",
    "ParquetImages",
    "Source",
    "Tars",
    "TorchDataset",
    "open_source",
]


def open_source(given: Any, without: str | Path | None = None) -> Source:
    """The source that something stands for.

    Args:
        given: a `Source`; a `datasets.Dataset`; an object with a length and items, such as a torch `Dataset`; or one or
            several texts: picture files, folders and patterns of them, a `.csv` list, `.parquet` files, `.tar` files
            (also as patterns), or `hf:NAME[:SPLIT][@REVISION]`.
        without: a folder that is passed over where it lies below one of the given.

    Raises:
        InputError: nothing of the sort, or several kinds at once.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(one, (str, os.PathLike)) for one in given):
        names = [os.fspath(one) for one in given]
        source = _named(names, without)
        source.spec = [name if name.startswith("hf:") else os.path.abspath(name) for name in names]
        return source
    if type(given).__module__.split(".")[0] == "datasets":
        return HuggingFace(given)
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, (str, Sequence)):
        return TorchDataset(given)
    raise InputError(f"source must be paths, a data set or a Source, got {type(given).__name__}")


def _named(names: Sequence[str], without: str | Path | None) -> Source:
    remote = next((name for name in names if "://" in name or name.startswith("pipe:")), None)
    if remote is not None:
        raise InputError(f"source must lie on this machine, or be 'hf:NAME', got {remote!r}")
    kinds = {_kind(name) for name in names}
    if len(kinds) > 1:
        raise InputError(f"source must be of one kind, got {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "pictures":
        return files(names, without)
    if kind in ("hf", "csv"):
        if len(names) > 1:
            raise InputError(f"source must be one where it is {kind}, got {len(names)}")
        return load(names[0].removeprefix("hf:")) if kind == "hf" else csv_list(names[0])
    paths = list(dict.fromkeys(path for name in names for path in _expanded(name)))
    return Tars(paths) if kind == "tar" else parquet(paths)


def _kind(name: str) -> str:
    if name.startswith("hf:"):
        return "hf"
    suffix = os.path.splitext(name)[1].lower()
    plain = suffix in (".csv", ".tar", ".parquet") and not os.path.isdir(name)
    return suffix[1:] if plain else "pictures"


def _expanded(name: str) -> list[Path]:
    # A file may have brackets in its name.
    if os.path.lexists(name) or not glob.has_magic(name):
        return [Path(name)]
    found = sorted(Path(path) for path in glob.glob(name, recursive=True))
    if not found:
        raise InputError(f"source must name at least one file, got none for {name!r}")
    return found
