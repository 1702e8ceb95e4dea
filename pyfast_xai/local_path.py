"""Paths of what is written on this machine alone, told from URLs."""

import os
import re
from pathlib import Path

from pyfast_xai.errors import InputError

# `Path` takes one of two slashes. A single letter is a drive of Windows.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str | Path) -> bool:
    """Returns whether a path is a URL, as text or as the path that `Path` makes of it."""
    return _SCHEME.match(os.fspath(path)) is not None


def local_path(name: str, path: str | Path) -> Path:
    """Returns a path on this machine.

    Args:
        name: of the argument.
        path: its value.

    Raises:
        InputError: it is empty, or a URL, of which a folder would be made here.
    """
    if not os.fspath(path):
        raise InputError(f"{name} must be a file or a folder, got an empty text")
    if is_url(path):
        raise InputError(f"{name} must lie on this machine, got the URL {str(path)!r}")
    return Path(path)
