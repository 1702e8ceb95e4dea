"""Sources of the inputs of a run, one kind a file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_xai.datasets.sources.entries import Listing
from pyfast_xai.datasets.sources.files import Files, FoldersOfFiles, csv_list
from pyfast_xai.datasets.sources.filesystems import FileSystem, LocalFiles, absolute, file_system, is_remote
from pyfast_xai.datasets.sources.huggingface import HuggingFace, load
from pyfast_xai.datasets.sources.item import Item, Labelled, Source, StreamedSource
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
    "StreamedSource",
    "Tars",
    "TorchDataset",
    "open_source",
]


def open_source(source: Any, without: str | Path | None = None, folder: str | None = None) -> Source:
    """Returns the source for a name, a list of names, or a data set.

    Args:
        source: a `Source`; a `datasets.Dataset`; an object with a length and items, such as a torch `Dataset`; or one
            or several texts: picture files, folders and patterns of them, a `.csv` list, `.parquet` files, `.tar`
            files (also as patterns), each on this machine or as `s3://…`, `gs://…` or `az://…`; or
            `hf:NAME[:SPLIT][@REVISION]`.
        without: a folder that is skipped if it lies below one of these.
        folder: where relative names begin; None for the working folder.

    Raises:
        InputError: nothing of the sort, or several kinds at once.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> [item.id for item in datasets.open_source("black.png").items(0, 1)]
        ['black.png']
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    if isinstance(source, Sequence) and source and all(isinstance(entry, (str, os.PathLike)) for entry in source):
        names = [os.fspath(entry) for entry in source]
        opened = _source_of_names(names, without, folder)
        opened.spec, opened.folder = names, LocalFiles(folder).folder
        return opened
    if type(source).__module__.split(".")[0] == "datasets":
        return HuggingFace(source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (str, Sequence)):
        return TorchDataset(source)
    raise InputError(f"source must be paths, a data set or a Source, got {type(source).__name__}")


def _source_of_names(names: Sequence[str], without: str | Path | None, folder: str | None) -> Source:
    if not all(names):
        raise InputError("source must be paths or names of data sets, got an empty text; `.` is the working folder")
    kinds = {_kind(name, folder) for name in names}
    if len(kinds) > 1:
        raise InputError(f"source must be of one kind, got {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "hf":
        return load(_only(names, kind).removeprefix("hf:"))
    if len({name.partition("://")[0] if is_remote(name) else "" for name in names}) > 1:
        raise InputError("source must lie in one place, got names on this machine and URLs, or URLs of several stores")
    system = file_system(names[0], folder)
    if kind == "pictures":
        if isinstance(without, Path) or (without is not None and not is_remote(without)):
            without = str(absolute(without))
        return FoldersOfFiles(names, without, system)
    if kind == "csv":
        return csv_list(_only(names, kind), system)
    paths = list(dict.fromkeys(path for name in names for path in _expanded(system, name)))
    return Tars(paths, system) if kind == "tar" else parquet(paths, system)


def _only(names: Sequence[str], kind: str) -> str:
    if len(names) > 1:
        raise InputError(f"source must be one where it is {kind}, got {len(names)}")
    return names[0]


def _kind(name: str, folder: str | None) -> str:
    if name.startswith("hf:"):
        return "hf"
    suffix = os.path.splitext(name)[1].lower()
    is_file = suffix in (".csv", ".tar", ".parquet") and not file_system(name, folder).is_folder(name)
    return suffix[1:] if is_file else "pictures"


def _expanded(system: FileSystem, name: str) -> list[str]:
    paths = system.matching(name)
    if not paths:
        raise InputError(f"source must name at least one file, got none for {name!r}")
    return paths
