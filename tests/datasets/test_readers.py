"""A folder of a run opens as it is in what others use, whatever the folder is called."""

import io
import subprocess
import sys

import pytest
import torch

from pyfast_xai import datasets
from pyfast_xai.datasets import attachments
from pyfast_xai.datasets.schema import COLUMNS


@pytest.fixture
def out(folder, loaded, tmp_path):
    """A run of twenty pictures in four parts; two of them are error rows."""
    (folder / "05.jpg").write_bytes(b"no picture")
    (folder / "14.png").write_bytes(b"")
    datasets.explain(
        folder, loaded, method="fixations", out=tmp_path / "out", shard_size=6, batch_size=4, pictures=True
    )
    return tmp_path / "out"


def ids(out):
    return [row["id"] for row in datasets.open(out)]


def test_pandas(out):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(out)
    assert frame["id"].tolist() == ids(out)
    assert frame["status"].tolist().count("error") == 2


def test_polars(out):
    polars = pytest.importorskip("polars")
    assert polars.read_parquet(out)["id"].to_list() == ids(out)
    assert polars.scan_parquet(out).select("status").collect().height == 20


def test_duckdb(out):
    duckdb = pytest.importorskip("duckdb")
    assert duckdb.sql(f"select id from '{out}/*.parquet' order by index").fetchall() == [(name,) for name in ids(out)]


def test_hugging_face(out, tmp_path):
    hugging = pytest.importorskip("datasets")
    for name, how in (("parquet", {"data_files": f"{out}/*.parquet"}), (str(out), {})):
        data = hugging.load_dataset(name, cache_dir=str(tmp_path / f"cache-{len(how)}"), **how)["train"]
        assert data["id"] == ids(out) if isinstance(data["id"], list) else list(data["id"]) == ids(out)
        assert data[3]["picture"].size == (24, 24)


def test_arrow(out):
    from pyarrow import dataset

    assert dataset.dataset(out).to_table(columns=["id"])["id"].to_pylist() == ids(out)


@pytest.mark.slow
def test_ray_data(out):
    pytest.importorskip("ray")
    code = (
        "import ray, logging\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)\n"
        f"print(sorted(row['id'] for row in ray.data.read_parquet({str(out)!r}, columns=['id']).take_all()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == str(sorted(ids(out)))


NAMES = ["run[1]", "a*b", "q?", "**", "x=1", "index=3", "{a,b}", "it's", 'a"b', "$HOME", "~", "a b", "-x", "%41", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_answered_from_this_folder_whatever_it_is_called(loaded, tmp_path, name):
    pytest.importorskip("duckdb")

    class Data:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return torch.full((3, 8, 8), 1.0 + index)

    # Beside it lie folders that its name matches as a pattern.
    for neighbour in ("run1", "ab", "aab", "qq", "a", "b"):
        datasets.explain(Data(2), loaded, method="saliency", out=tmp_path / neighbour)
    datasets.explain(Data(5), loaded, method="eigen-cam", out=tmp_path / name, shard_size=2)
    results = datasets.open(tmp_path / name)
    requests = results.query('select count(*), min("index"), max("index"), count(distinct map_kind) from results')
    assert requests.fetchall() == [(5, 0, 4, 1)]
    assert results.query("select * from results limit 1").columns == COLUMNS.names
    assert [row["index"] for row in results] == list(range(5))
    assert datasets.status(tmp_path / name).rows == 5
    assert datasets.verify(tmp_path / name).faults == []


def test_questions_read_no_more_than_they_need(out):
    pytest.importorskip("duckdb")
    results = datasets.open(out)
    assert results.query('select id from results where "index" in (3, 13)').fetchall() == [("03.jpg",), ("13.jpg",)]
    assert results.query("select points[1].y from results where points is not null limit 1").fetchall()


@pytest.mark.parametrize("data", [b"", b"{}", b"PAR1" * 9, bytes(range(256)) * 100])
def test_what_a_file_without_rows_carries_comes_back(data):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = attachments.attached(data, COLUMNS)
    assert attachments.detached(pa.py_buffer(file)).to_pybytes() == data
    table = pq.read_table(io.BytesIO(file))
    assert (table.num_rows, table.schema.names) == (0, COLUMNS.names)
    for cut in (file[:-1], file[1:], file[:8], b"", b"PAR1\xff\xff\xff\xffPAR1"):
        with pytest.raises(ValueError, match=r"no Parquet file|damaged"):
            attachments.detached(pa.py_buffer(cut))
