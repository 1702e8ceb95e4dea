"""The reference of the site has every public name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from import_file import import_file

import pyfast_xai

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_in_the_reference(monkeypatch):
    files = ModuleType("mkdocs.structure.files")  # the environment of tests has no MkDocs
    files.File = object
    monkeypatch.setitem(sys.modules, files.__name__, files)
    hooks = import_file(ROOT / "docs/hooks.py")
    shown = {name for _, names in hooks.api_pages().values() for name in names}
    assert {f"pyfast_xai.{name}" for name in pyfast_xai.__all__} - {"pyfast_xai.__version__"} <= shown
    for title in hooks.TITLES:
        for name in getattr(importlib.import_module(title), "__all__", ()):
            assert {f"{title}.{name}", f"pyfast_xai.{name}"} & shown, name
