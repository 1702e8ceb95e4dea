"""Finds and loads the compiled libraries: absent is fine, present but unloadable is an error."""

import os
from contextlib import ExitStack
from importlib.resources import as_file, files

import torch

_extracted = ExitStack()  # keeps a library that had to be unpacked on disk for the life of the process


def load(name: str) -> bool:
    """Load `pyfast_xai/<name>.so`; False where the installation has none.

    Raises:
        OSError: the file is there and the dynamic loader refuses it.
    """
    entry = files("pyfast_xai") / f"{name}.so"
    if not entry.is_file():
        return False
    torch.ops.load_library(os.fspath(_extracted.enter_context(as_file(entry))))
    return True
