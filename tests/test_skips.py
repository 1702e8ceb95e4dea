import os
import subprocess
import sys

import pytest
from allowed_skips import PACKAGES, allowed


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Skipped: could not import 'quantus': No module named 'quantus'", True),
        ("Skipped: could not import 'captum.attr': No module named 'captum'", False),
        ("Skipped: needs a device", True),
        ("Skipped: max_pool_forward on triton: no kernel was written for it", True),
        ("Skipped: conv_trace on numba: the package numba is not installed", False),
        ("Skipped: no time today", False),
    ],
    ids=["absent package", "peer", "device", "kernel", "backend", "other"],
)
def test_reasons(reason, expected):
    assert allowed(reason) is expected


def test_every_package_that_may_be_absent_is_asked_for():
    from pathlib import Path

    source = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name in PACKAGES if f'("{name}' not in source] == []


@pytest.mark.parametrize(("reason", "code"), [("needs a device", 0), ("no time today", 1)], ids=["allowed", "other"])
def test_a_run_of_all_tests_fails_for_another_reason(reason, code, tmp_path):
    root = os.path.dirname(__file__)
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {os.path.join(root, 'support')!r})\nfrom skips_reported import *\n"
    )
    (tmp_path / "test_it.py").write_text(f"import pytest\n@pytest.mark.skip(reason={reason!r})\ndef test(): pass\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYFAST_XAI_ALL_TESTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code, run.stdout
    assert ("no time today" in run.stdout) == bool(code)
