"""Docstrings begin with a verb, and those of public names have an example that runs."""

import ast
import doctest
import importlib
import inspect
from enum import Enum
from pathlib import Path

import pytest

import pyfast_xai

ROOT = Path(pyfast_xai.__file__).parent
# Modules whose public names a user calls.
PUBLIC = (
    *("pyfast_xai", "pyfast_xai.metrics", "pyfast_xai.localize", "pyfast_xai.render", "pyfast_xai.ops"),
    *("pyfast_xai.tuning", "pyfast_xai.datasets", "pyfast_xai.demo", "pyfast_xai.serve", "pyfast_xai.rules.relevance"),
    *("pyfast_xai.compat.captum", "pyfast_xai.compat.grad_cam", "pyfast_xai.compat.torchcam"),
    *(
        f"pyfast_xai.compat.zennit.{own}"
        for own in ("attribution", "canonizers", "composites", "core", "layer", "rules")
    ),
    *("pyfast_xai.compat.grad_cam.metrics", "pyfast_xai.compat.torchcam.metrics"),
)
# Openings that leave the subject of the sentence to the reader.
NO_SUBJECT = frozenset(
    (
        *("As", "By", "Does", "For", "From", "How", "Likewise", "Nor", "Nothing", "Of", "Those", "What", "Where"),
        *("Whether", "Which", "Who", "Whose", "Why", "With", "Without"),
    )
)
# Openings of a noun phrase, which says what a class or module is but not what a function does.
NOUN = frozenset(("A", "All", "An", "Any", "Each", "Every", "No", "One", "Some", "The", "These", "This", "Two"))


def _is_class(value):
    """Enums have no example: those of the ops that take them show them."""
    return inspect.isclass(value) and not issubclass(value, Enum)


def public_objects():
    objects = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [own for own in vars(module) if not own.startswith("_")]
        for public in names:
            value = getattr(module, public)
            home = "pyfast_xai" if hasattr(module, "__all__") else name
            inside = getattr(value, "__module__", "").startswith(home)
            if inside and (inspect.isroutine(inspect.unwrap(value)) or _is_class(value)):
                objects.setdefault(value, f"{name}.{public}".removeprefix("pyfast_xai."))
    return [pytest.param(value, id=name) for value, name in objects.items()]


OBJECTS = public_objects()


def documented():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                first = ast.get_docstring(node).split(maxsplit=1)[0].rstrip(",:;.?")
                yield node, first, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {first}"


def test_every_docstring_names_its_subject():
    assert [place for _, first, place in documented() if first in NO_SUBJECT] == []


def test_functions_say_what_they_do():
    """A public function's docstring begins with a verb, not with an article or a value."""
    nouns = [
        place
        for node, first, place in documented()
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if first in NOUN or not first[0].isupper()
    ]
    assert nouns == []


@pytest.mark.parametrize("value", OBJECTS)
def test_example_runs(value, tmp_path, monkeypatch):
    """The example of a public name gives what it shows."""
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_examples(value.__doc__ or "")
    assert examples, f"{value.__qualname__} has no example"
    test = doctest.DocTest(examples, {"__name__": "__main__"}, value.__qualname__, None, None, None)
    report = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not result.failed, "".join(report)
