"""Loading of the compiled libraries: a missing library is allowed, one that cannot be loaded is an error."""

import os
from contextlib import ExitStack
from importlib.resources import as_file, files

import torch

_extracted = ExitStack()  # keeps an unpacked library on disk while the process lives


def load(name: str) -> bool:
    """Loads `pyfast_xai/<name>.so`; returns False if the installation has none.

    Raises:
        OSError: the dynamic loader cannot load the file.
    """
    entry = files("pyfast_xai") / f"{name}.so"
    if not entry.is_file():
        return False
    torch.ops.load_library(os.fspath(_extracted.enter_context(as_file(entry))))
    return True
