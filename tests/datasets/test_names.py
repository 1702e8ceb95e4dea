"""Pictures and folders with names drawn to do harm: one row each, and nothing outside the folders that were named."""

import csv
import os
import random
import tarfile

import pytest

from pyfast_xai import datasets

PIECES = [
    *("a", "B", " ", ".", "..", "-", "--out", "=", "+", "@", "#2", "~", "$HOME", "`id`", "$(id)", ";", "|", "&", "'"),
    *('"', "*", "?", "[", "]", "[!a]", "**", "{", "}", "{a,b}", "%", "%2e%2e", "%s", "%00", "\\", "\\n", "\n", "\r"),
    *("\t", "\x01", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\u200b", "\ufeff", "é", "e\u0301", "ß", "İ"),
    *("日本", "😀", "<script>", "</td>", "&lt;", "CON", "NUL", "s3:", "hf:", "file:", "part-00000000.parquet", ".tmp"),
    *("_run.parquet", ",", "label", "null", "nan", "-1", "0", "'--", "\udc80", "\udcff\udcfe", b"\xed\xa0\x80"),
]


def drawn(chance):
    """A name as bytes that a file can have."""
    parts = [chance.choice(PIECES) for _ in range(chance.randint(1, 8))]
    name = b"".join(part if isinstance(part, bytes) else os.fsencode(part) for part in parts)
    if chance.random() < 0.05:
        name *= 60
    # Hidden ones are passed over, which is no loss.
    return name.replace(b"/", b"").replace(b"\0", b"").lstrip(b".")[:200] or b"_"


def put(top, count, seed, pictures):
    """Files in folders of such names; returns how many."""
    chance, made, folders = random.Random(seed), 0, [os.fsencode(top)]
    while made < count:
        folder = chance.choice(folders)
        path = os.path.join(folder, drawn(chance))
        if chance.random() < 0.05 and len(path) < 1500:
            os.makedirs(path, exist_ok=True)
            folders.append(path)
            continue
        path += chance.choice([b".png", b".PNG", b".Png"])
        if not os.path.lexists(path):
            with open(path, "xb") as file:
                file.write(chance.choice(pictures))
            made += 1
    return made


def survive(count, seed, loaded, make_picture, place):
    pictures, out = place / "pictures", place / "out"
    pictures.mkdir()
    put(pictures, count, seed, [make_picture(n) for n in range(4)])
    for _ in range(2):  # the second goes on, and finds nothing to do
        done = datasets.explain(str(pictures), loaded, method="eigen-cam", out=out, shard_size=64, top_k=0)
    assert (done.items, done.rows, done.errors, done.before) == (count, count, 0, count)
    assert datasets.verify(out).faults == []
    rows = list(datasets.open(out))
    assert len({row["id"] for row in rows}) == count
    assert all(row["id"].isprintable() or row["id"].encode() for row in rows)
    before = sorted(os.listdir(place))
    assert datasets.export(out, "csv", place / "rows.csv") == count
    with open(place / "rows.csv", newline="", encoding="utf-8") as file:
        # A cell that begins like a formula is quoted; else an id comes back as it is.
        assert [row["id"].removeprefix("'") for row in csv.DictReader(file)] == [
            row["id"].removeprefix("'") for row in rows
        ]
    assert datasets.export(out, "webdataset", place / "tars") == count
    for path in sorted((place / "tars").iterdir()):
        with tarfile.open(path) as tar:
            assert all(name.isascii() and "/" not in name and not name.startswith(".") for name in tar.getnames())
    assert datasets.export(out, "fiftyone", place / "fiftyone") == count
    assert len(os.listdir(place / "fiftyone" / "data")) == count
    assert sorted(os.listdir(place)) == sorted([*before, "rows.csv", "tars", "fiftyone"])


def test_names_that_are_drawn_to_do_harm(loaded, make_picture, tmp_path):
    survive(40, 0, loaded, make_picture, tmp_path)


@pytest.mark.extended
def test_a_thousand_such_names(loaded, make_picture, tmp_path):
    survive(1000, 1, loaded, make_picture, tmp_path)
