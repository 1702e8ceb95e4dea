"""The reference of the site has every public name."""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pyfast_xai

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_in_the_reference(monkeypatch):
    files = ModuleType("mkdocs.structure.files")  # the environment of tests has no MkDocs
    files.File = object
    monkeypatch.setitem(sys.modules, files.__name__, files)
    spec = spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    shown = {name for _, names in hooks.api_pages().values() for name in names}
    assert {f"pyfast_xai.{name}" for name in pyfast_xai.__all__} - {"pyfast_xai.__version__"} <= shown
    for title in hooks.TITLES:
        for name in getattr(importlib.import_module(title), "__all__", ()):
            assert {f"{title}.{name}", f"pyfast_xai.{name}"} & shown, name
