"""Identifiers are terms of the field, not words that anything could be called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A candidate, a match, an input, an argument, a request: the code says which.
VAGUE = {
    *("told", "heard", "asked", "said", "own", "found", "given", "taken", "kept", "seen", "met", "lent", "gone"),
    *("wanted", "begun", "once", "again", "got", "came", "ours", "theirs", "whose"),
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields the names of functions, classes, arguments, variables and attributes, with their lines."""
    for node in ast.walk(tree):
        for field in ("name", "arg", "id", "attr"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, node.lineno


def vague(source: str) -> list[tuple[str, int]]:
    return [(name, line) for name, line in identifiers(ast.parse(source)) if name.strip("_").lower() in VAGUE]


@pytest.mark.parametrize("folder", ["pyfast_xai", "kernels"])
def test_identifiers_are_terms_of_the_field(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [(str(f.relative_to(ROOT)), *use) for f in files for use in vague(f.read_text(encoding="utf-8"))] == []


def test_vague_identifiers_are_noticed():
    source = (
        "def told(own, *, kept=0):\n    self._found = [given for given in own]\n    call(asked=1)\n    candidates = 1\n"
    )
    assert {name for name, _ in vague(source)} == {"told", "own", "kept", "_found", "given", "asked"}
