"""Imports run downwards only."""

from pathlib import Path

from package_imports import imported

import pyfast_xai

ROOT = Path(pyfast_xai.__file__).parent
# From the bottom up; `explanation`, `render` and `localize` stand beside the explainers and know no rules.
LEVELS = {
    "errors": 0,
    "local_path": 1,
    "forks": 0,
    "memory": 0,
    "progress": 0,
    "onednn": 0,
    "kernels": 1,
    "ops": 2,
    "proof": 3,
    "tuning": 1,
    "tape": 3,
    "rules": 4,
    "acceleration": 5,
    "localize": 3,
    "render": 3,
    "explanation": 4,
    "nifti": 3,
    "images": 3,
    "demo": 3,
    "explainers": 6,
    "compat": 8,
    "metrics": 7,
    "trusted": 4,
    "models": 5,
    "zero_shot": 5,
    "segmentation": 5,
    "datasets": 8,
    "evaluation": 9,
    "reproduce": 10,
    "report": 10,
    "serve": 7,
    "layer_list": 7,
    "cli": 11,
    "__main__": 12,
}


def test_no_module_imports_upwards():
    recorded = set()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        recorded.add(room)
        for other in imported(path):
            if other != room and other in LEVELS:
                assert LEVELS[other] < LEVELS[room], f"{path.relative_to(ROOT)} imports {other}"
    assert recorded <= set(LEVELS), f"rooms without a level: {recorded - set(LEVELS)}"


def test_readings_know_no_method():
    for path in (ROOT / "rules").rglob("*.py"):
        assert not {"explainers", "explanation"} & set(imported(path)), path


def test_kernels_know_nothing_of_the_package_but_themselves():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert set(imported(path)) <= {"kernels"}, path
