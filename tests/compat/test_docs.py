"""What the pages for users of the peers name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "complaints.md", *sorted((ROOT / "docs" / "migration").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), (file, test)


def test_every_complaint_has_a_test():
    rows = [line for line in PAGES[0].read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 15
    for row in rows:
        assert "::test_" in row
        assert "https://github.com/" in row


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_names_that_are_to_be_imported_exist(page):
    lines = re.findall(r"^\+from (pyfast_xai[\w.]*) import (.+)$", page.read_text(), re.MULTILINE)
    assert lines
    for module, names in lines:
        result = __import__(module, fromlist=["_"])
        for name in names.split(", "):
            assert hasattr(result, name), (module, name)
