"""Every public name of a peer is in `compat`, or on its migration page with the reason why it is not."""

import importlib
import importlib.metadata
import inspect
import json
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "migration"
LISTS = json.loads((Path(__file__).parent / "peer_names.json").read_text(encoding="utf-8"))
NAMES, VERSIONS = LISTS["modules"], LISTS["versions"]


@pytest.mark.parametrize("module", NAMES)
def test_a_name_is_here_or_on_the_page(module):
    place, names = NAMES[module]["here"], NAMES[module]["names"]
    ours = importlib.import_module(f"pyfast_xai.compat.{place}")
    page = (PAGES / f"{place.partition('.')[0]}.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", page.partition("## Names that are not here")[2]))
    assert [name for name in names if not hasattr(ours, name) and name not in explained] == []
    assert [name for name in explained & set(names) if hasattr(ours, name)] == []


@pytest.mark.parametrize("module", NAMES)
def test_the_list_is_that_of_the_installed_peer(module):
    theirs = pytest.importorskip(module)
    package = "grad-cam" if module.startswith("pytorch_grad_cam") else module.partition(".")[0]
    if importlib.metadata.version(package) != VERSIONS[package]:
        pytest.skip("not here")
    assert sorted(NAMES[module]["names"]) == public(theirs)


def public(module):
    """The names that a module says are public; without a word of its own, the classes and functions of its package."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    package = module.__name__.partition(".")[0]
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(package)
    )
