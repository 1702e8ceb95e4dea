"""Imports run downwards only."""

import ast
from pathlib import Path

import pyfast_xai

ROOT = Path(pyfast_xai.__file__).parent
# From the bottom up; `explanation`, `render` and `localize` stand beside the explainers and know no rules.
LEVELS = {
    "errors": 0,
    "memory": 0,
    "onednn": 0,
    "kernels": 1,
    "ops": 2,
    "tape": 3,
    "rules": 4,
    "localize": 3,
    "render": 3,
    "explanation": 4,
    "images": 3,
    "demo": 3,
    "explainers": 5,
    "compat": 6,
    "metrics": 6,
    "trusted": 4,
    "models": 5,
    "datasets": 7,
    "evaluation": 8,
    "reproduce": 9,
    "report": 9,
    "serve": 6,
    "cli": 10,
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyfast_xai":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pyfast_xai."))


def test_no_module_imports_upwards():
    seen = set()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        seen.add(room)
        for other in imported(path):
            if other != room and other in LEVELS:
                assert LEVELS[other] < LEVELS[room], f"{path.relative_to(ROOT)} imports {other}"
    assert seen <= set(LEVELS), f"rooms without a level: {seen - set(LEVELS)}"


def test_readings_know_no_method():
    for path in (ROOT / "rules").rglob("*.py"):
        assert not {"explainers", "explanation"} & set(imported(path)), path


def test_kernels_know_nothing_of_the_package_but_themselves():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert set(imported(path)) <= {"kernels"}, path
