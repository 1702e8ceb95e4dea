"""Labels of any kind and size become a class, nothing, or nothing with a reason."""

import decimal
import fractions
import io
import math
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyfast_xai import datasets
from pyfast_xai.datasets.sources.labels import label_columns, read_label
from pyfast_xai.errors import InputError


class Hostile:
    def __repr__(self):
        raise RuntimeError("no words")

    __str__ = __repr__

    def __int__(self):
        raise MemoryError


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3),
        (-1, -1),
        (True, 1),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (3.0, 3),
        ("7", 7),
        (" 12\n", 12),
        (b"5\n", 5),
        ("4.0", 4),
        ("1e3", 1000),
        (np.int8(4), 4),
        (np.uint64(9), 9),
        (np.float32(2), 2),
        (np.array([6]), 6),
        (torch.tensor(8), 8),
        (torch.tensor([8.0]), 8),
        (decimal.Decimal(11), 11),
        (fractions.Fraction(4, 2), 2),
    ],
)
def test_whole_numbers_of_all_types_are_labels(value, label):
    index, why = read_label(value)
    assert (index, why) == (label, None)
    assert type(index) is int


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, np.float64("nan"), "nan", torch.tensor(math.nan)])
def test_nothing_is_no_label_and_needs_no_reason(value):
    assert read_label(value) == (None, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2**63, "must fit into 64 bits, got 9223372036854775808"),
        (-(2**63) - 1, "must fit into 64 bits"),
        ("99999999999999999999", "must fit into 64 bits"),
        ("9" * 5000, "must be a whole number"),
        (1e300, "must fit into 64 bits"),
        (math.inf, "must be a whole number, got inf"),
        ("-inf", "must be a whole number"),
        (3.5, "must be a whole number, got 3.5"),
        ("cat", "must be a whole number, got 'cat'"),
        ("1_000", "must be a whole number"),
        (b"\xff\xfe", "must be a whole number"),
        ([3], "must be a whole number, got [3]"),
        ({"boxes": []}, "must be a whole number"),
        (torch.tensor([1, 2]), "must be one whole number, got 2 of them"),
        (np.zeros(0), "must be one whole number, got 0 of them"),
        (1 + 2j, "must be a whole number"),
        (Hostile(), "must be a whole number"),
    ],
)
def test_everything_else_has_a_reason(value, reason):
    index, why = read_label(value)
    assert index is None
    assert reason in why
    assert "\n" not in why
    assert len(why) < 200


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0, 3, None], pa.int16()),
        pa.array([0, 3, None], pa.uint64()),
        pa.array([0.0, 3.0, None]),
        pa.array([0.0, 3.0, math.nan]),
        pa.array(["0", "3", None]),
        pa.array(["0", "3", None]).dictionary_encode(),
        pa.array([b"0", b"3", None]),
        pa.chunked_array([[0], [3, None]]),
        pa.array([decimal.Decimal(0), decimal.Decimal(3), None]),
    ],
)
def test_columns_of_all_types(values):
    labels, why = label_columns(values)
    assert labels.to_pylist() == [0, 3, None]
    assert why.to_pylist() == [None] * 3
    assert labels.type == pa.int64()


def test_one_odd_label_in_a_column_costs_the_others_nothing():
    labels, why = label_columns(pa.array([1, 2**64 - 1, 2], pa.uint64()))
    assert labels.to_pylist() == [1, None, 2]
    assert "64 bits" in why[1].as_py()
    labels, why = label_columns(pa.array([[1], None], pa.list_(pa.int64())))
    assert labels.to_pylist() == [None, None]
    assert [reason is None for reason in why.to_pylist()] == [False, True]


def csv_of(folder, labels, pictures):
    lines = "".join(f"{n}.png,{label}\n" for n, label in enumerate(labels))
    (folder / "list.csv").write_text(f"path,label\n{lines}")
    return folder / "list.csv"


def tar_of(folder, labels, pictures):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for n, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
            for suffix, data in ((".png", picture), (".cls", str(label).encode())):
                member = tarfile.TarInfo(f"{n}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "a.tar"


def parquet_of(folder, labels, pictures):
    pq.write_table(pa.table({"image": pictures, "label": [str(label) for label in labels]}), folder / "a.parquet")
    return folder / "a.parquet"


def listed_parquet_of(folder, labels, pictures):
    table = pa.table({"path": [f"{n}.png" for n in range(len(labels))], "label": [str(label) for label in labels]})
    pq.write_table(table, folder / "list.parquet")
    return folder / "list.parquet"


def torch_of(folder, labels, pictures):
    class Data:
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return torch.rand(3, 24, 24), labels[index]

    return Data()


@pytest.mark.parametrize("make", [csv_of, tar_of, parquet_of, listed_parquet_of, torch_of])
def test_an_odd_label_is_a_null_with_its_reason_whatever_the_source(tmp_path, loaded, make_picture, make):
    labels = [1, 10**20, 2.0, "inf", "cat", "", 3]
    pictures = [make_picture(n) for n in range(len(labels))]
    for n, picture in enumerate(pictures):
        (tmp_path / f"{n}.png").write_bytes(picture)
    source = make(tmp_path, labels, pictures)
    out = tmp_path / "out"
    done = datasets.explain(source, loaded, method="saliency", out=out, shard_size=3)
    assert (done.rows, done.errors) == (7, 0)
    rows = list(datasets.open(out))
    assert [row["label"] for row in rows] == [1, None, 2, None, None, None, 3]
    assert [row["label_error"] is not None for row in rows] == [False, True, False, True, True, False, False]
    # Where the label is what is explained, such an image is an error row that says why.
    rows = datasets.explain(source, loaded, method="saliency", out=tmp_path / "labelled", target="label")
    assert (rows.rows, rows.errors) == (7, 4)
    messages = [row["error_message"] for row in datasets.open(tmp_path / "labelled") if row["status"] == "error"]
    assert "64 bits" in messages[0]
    assert "must be there where it is explained" in messages[3]


def test_labels_that_pandas_made_floats(tmp_path, make_picture):
    table = pa.table({"image": [make_picture(n) for n in range(3)], "label": pa.array([4.0, None, 2.0])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [item.label for item in datasets.open_source(tmp_path / "a.parquet").items(0, 3)] == [4, None, 2]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), "column 'path' of .* must hold paths as text, got int64"),
        (pa.array([[b"a"], [b"b"]]), "column 'path' of .* must hold paths as text, got list"),
        (pa.array([1.5, 2.5]), "column 'path' of .* must hold paths as text, got double"),
    ],
)
def test_lists_whose_paths_are_none(tmp_path, column, message):
    pq.write_table(pa.table({"path": column}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match=message):
        datasets.open_source(tmp_path / "list.parquet")


def test_ids_of_any_kind(tmp_path, make_picture):
    pictures = [make_picture(n) for n in range(3)]
    for ids in (pa.array([[b"a"], [b"a"], None]), pa.array([1.5, 1.5, None]), pa.array([2**64 - 1, 0, 0], pa.uint64())):
        pq.write_table(pa.table({"image": pictures, "id": ids}), tmp_path / "a.parquet")
        names = datasets.open_source(tmp_path / "a.parquet").ids
        assert len(set(names)) == 3
        assert all(isinstance(name, str) for name in names)


def test_an_item_without_an_id_has_the_name_of_items_without_ids(tmp_path, make_picture):
    pictures = [make_picture(n) for n in range(3)]
    pq.write_table(pa.table({"image": pictures, "id": ["a", None, ""]}), tmp_path / "a.parquet")
    assert datasets.open_source(tmp_path / "a.parquet").ids == ["a", "a.parquet:1", "a.parquet:2"]
    pq.write_table(pa.table({"path": ["x.png", "y.png"], "id": pa.array([7, None])}), tmp_path / "list.parquet")
    assert datasets.open_source(tmp_path / "list.parquet").ids == ["7", "y.png"]
    (tmp_path / "list.csv").write_text("path,id\nx.png,\ny.png,7\n")
    assert datasets.open_source(tmp_path / "list.csv").ids == ["x.png", "7"]
    hugging_face = pytest.importorskip("datasets")
    images = [{"bytes": picture, "path": None} for picture in pictures]
    data = hugging_face.Dataset.from_dict({"image": images, "id": ["a", None, ""]})
    assert datasets.open_source(data.cast_column("image", hugging_face.Image())).ids == ["a", "1", "2"]
