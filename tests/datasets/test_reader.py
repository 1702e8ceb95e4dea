import csv
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pyfast_xai import datasets
from pyfast_xai.datasets.columns import unpacked
from pyfast_xai.datasets.schema import COLUMNS
from pyfast_xai.datasets.store import read
from pyfast_xai.errors import InputError


@pytest.fixture
def done(folder, loaded, tmp_path):
    """A run over twenty pictures, of which two are bad, in four parts."""
    (folder / "05.jpg").write_bytes(b"no picture")
    (folder / "14.png").write_bytes(b"")
    out = tmp_path / "out"
    datasets.explain(str(folder), loaded, method="eigen-cam", out=out, shard_size=6, batch=4)
    return out


def test_rows_by_number_and_in_order(done):
    results = datasets.open(done)
    assert len(results) == 20
    assert [row["index"] for row in results] == list(range(20))
    assert [results[n]["index"] for n in (19, 0, 7, -1)] == [19, 0, 7, 19]
    assert list(results[3]) == COLUMNS.names
    assert repr(results[5]).startswith("Row('05.jpg', error, \"image")
    with pytest.raises(IndexError, match=r"row must lie in \[-20, 20\), got 20"):
        results[20]


def test_tables_and_questions(done):
    pytest.importorskip("duckdb")
    results = datasets.open(done)
    table = results.table(["id", "status"])
    assert table.column_names == ["id", "status"]
    assert table["status"].to_pylist().count("error") == 2
    assert results.table().num_columns == len(COLUMNS)
    counted = results.query("select status, count(*) from results group by 1 order by 1").fetchall()
    assert counted == [("error", 2), ("ok", 18)]
    first = results.query("select topk_name[1] as best from results where id = '00.png'").fetchall()
    assert first == [(results[0]["topk_name"][0],)]


def test_a_run_in_progress_can_be_read(done):
    os.remove(done / "part-00000001.parquet")
    results = datasets.open(done)
    assert [row["index"] for row in results] == [*range(6), *range(12, 20)]
    assert results[6]["index"] == 12
    assert results[6].explanation().images is not None


def test_pictures_come_from_the_source(done, folder, tmp_path, loaded):
    row = datasets.open(done)[2]
    with Image.open(folder / "02.png") as image:
        shown = loaded.preprocess.shown(image.convert("RGB"))
    assert torch.equal(row.explanation().images[0], shown)
    plotted = row.explanation().plot()
    assert plotted.width > 24
    # Elsewhere: not found by itself, but when it is said.
    moved = folder.rename(tmp_path / "moved")
    assert datasets.open(done)[2].explanation().images is None
    assert torch.equal(datasets.open(done, moved)[2].explanation().images[0], shown)
    (moved / "more.png").touch()
    with pytest.raises(InputError, match="must be the one of the run"):
        datasets.open(done, moved)[2].explanation()


def test_rows_that_lie_about_their_maps_are_refused(done):
    row = dict(datasets.open(done)[0])
    for wrong in (
        {"map_shape": [10**9, 10**9]},
        {"map_shape": []},
        {"map_shape": [-3, -27]},
        {"map_dtype": "object"},
        {"map": b"x"},
    ):
        with pytest.raises(InputError, match="must"):
            unpacked(row | wrong)


def test_sound_runs_are_found_sound(done, folder):
    seen = []
    found = datasets.verify(done, datasets.open_source(str(folder)), lambda *told: seen.append(told))
    assert (found.rows, found.missing, found.faults) == (20, 0, [])
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def changed(path, change):
    table = read(path)
    metadata = table.schema.metadata
    pq.write_table(change(table).replace_schema_metadata(metadata), path, write_page_checksum=True)


def replaced(column, value):
    def change(table):
        values = table[column].to_pylist()
        values[1] = value
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array(values, table.schema.field(column).type))

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda table: table.slice(1), "must have a row for each item from 6 to 12"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "must have a row for each item"),
        (replaced("id", "00.png"), "id '00.png' must be there once, got 2 rows"),
        (replaced("status", "error"), "must have 0 error rows"),
        (replaced("status", "fine"), "must have 0 error rows"),
        (replaced("map", b"short"), "map of '07.jpg' must have shape"),
        (lambda table: table.drop_columns(["map"]), "must have the columns of this version"),
    ],
)
def test_faults_are_found(done, change, fault):
    changed(done / "part-00000001.parquet", change)
    faults = datasets.verify(done).faults
    assert any(fault in told for told in faults), faults


def test_damaged_missing_and_foreign_parts_are_found(done, folder, loaded, tmp_path):
    path = done / "part-00000001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "must be readable" in datasets.verify(done).faults[0]
    broken = bytearray(whole)
    place = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0).column(0).data_page_offset + 40
    broken[place] ^= 1
    path.write_bytes(broken)
    assert "must be readable" in datasets.verify(done).faults[0]
    os.remove(path)
    found = datasets.verify(done)
    assert (found.rows, found.missing, found.faults) == (14, 6, [])
    (done / "part-00000009.parquet").write_bytes(whole)
    assert "must be one of 4 parts" in datasets.verify(done).faults[0]
    os.remove(done / "part-00000009.parquet")
    path.write_bytes((done / "part-00000000.parquet").read_bytes())
    assert "got a part that says 0 to 6" in " ".join(datasets.verify(done).faults)
    other = tmp_path / "other"
    datasets.explain(str(folder), loaded, method="saliency", out=other, shard_size=6)
    path.write_bytes((other / path.name).read_bytes())
    assert "a part of another" in datasets.verify(done).faults[0]
    # And once it is gone, the same call makes it again.
    os.remove(path)
    datasets.explain(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch=4)
    assert datasets.verify(done).faults == []


def test_another_try_takes_error_rows_only(done, folder, loaded, make_picture):
    before = [dict(row) for row in datasets.open(done)]
    (folder / "05.jpg").write_bytes(make_picture(5, "JPEG"))
    job = datasets.prepare(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch=4)
    summary = datasets.retry(job)
    assert (summary.rows, summary.errors, summary.progress.images) == (20, 1, 2)
    after = [dict(row) for row in datasets.open(done)]
    assert [row["index"] for row in after] == list(range(20))
    assert [a == b for a, b in zip(after, before, strict=True)] == [n not in (5, 14) for n in range(20)]
    assert after[5]["status"] == "ok"
    assert after[14]["status"] == "error"
    assert datasets.verify(done, job.source).faults == []
    assert datasets.status(done).errors == 1
    # The repaired pictures are those of the run from now on.
    datasets.explain(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch=4)
    (folder / "more.png").touch()
    with pytest.raises(InputError, match="must be continued as it was begun"):
        datasets.retry(datasets.prepare(str(folder), loaded, method="eigen-cam", out=done, shard_size=6))


def test_pandas_opens_the_folder(done):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(done, columns=["id", "status", "topk_score"])
    assert frame["id"].tolist() == [row["id"] for row in datasets.open(done)]


def test_csv(done, tmp_path):
    told = []
    assert datasets.export(done, "csv", tmp_path / "a.csv", lambda *args: told.append(args)) == 20
    assert told[-1] == (20, 20)
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [row["id"] for row in datasets.open(done)]
    assert json.loads(rows[0]["box"]) == datasets.open(done)[0]["box"]
    assert "map" not in rows[0]
    with pytest.raises(InputError, match="must not be there yet"):
        datasets.export(done, "csv", tmp_path / "a.csv")
    with pytest.raises(InputError, match="to must be one of csv"):
        datasets.export(done, "xls", tmp_path / "a.xls")


def test_names_are_harmless_in_exports(tmp_path, loaded, make_picture):
    names = ["=cmd()", "../../up", "<script>", "a\nb", "+1"]
    source = datasets.TorchDataset([torch.rand(3, 24, 24)] * 5, ids=names)
    datasets.explain(source, loaded, method="saliency", out=tmp_path / "out")
    datasets.export(tmp_path / "out", "csv", tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["'=cmd()", "../../up", "<script>", "a\nb", "'+1"]
    datasets.export(tmp_path / "out", "webdataset", tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "part-00000000.tar") as tar:
        assert all("/" not in name and ".." not in name and name.isprintable() for name in tar.getnames())


def test_webdataset(done, tmp_path):
    datasets.export(done, "webdataset", tmp_path / "tars")
    assert sorted(os.listdir(tmp_path / "tars")) == [f"part-{n:08d}.tar" for n in range(4)]
    with tarfile.open(tmp_path / "tars" / "part-00000000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 6 + 5  # one of the six is an error, and has no map
        told = json.load(tar.extractfile(names[0]))
        assert told["id"] == "00.png"
        picture = np.asarray(Image.open(tar.extractfile(names[1])))
    heat = datasets.open(done)[0].explanation().heatmap[0].numpy()
    assert np.abs(picture / 255 - (heat - heat.min()) / (heat.max() - heat.min())).max() < 1 / 255
    # It is a source, too.
    assert len(datasets.open_source(str(tmp_path / "tars" / "*.tar"))) == 18


def test_zarr(done, tmp_path):
    zarr = pytest.importorskip("zarr")
    datasets.export(done, "zarr", tmp_path / "a.zarr")
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
    heat = group["heatmap"][:]
    assert heat.shape == (20, 24, 24)
    assert np.isnan(heat[5]).all()
    own = datasets.open(done)[3].explanation().heatmap[0]
    assert np.abs(heat[3] - ((own - own.min()) / (own.max() - own.min())).numpy()).max() < 2**-11
    assert group.attrs["ids"][7] == "07.jpg"


def test_hugging_face_opens_the_pictures(folder, loaded, tmp_path):
    hugging = pytest.importorskip("datasets")
    datasets.explain(str(folder), loaded, method="saliency", out=tmp_path / "out", pictures=True)
    data = hugging.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "*.parquet"), cache_dir=str(tmp_path / "c")
    )
    row = data["train"][3]
    assert row["picture"].size == (24, 24)
    assert row["id"] == "03.jpg"
    assert len(row["topk_name"]) == 5


class Boom:
    def __reduce__(self):
        return os.system, ("touch was_here",)


def test_a_malicious_folder_runs_nothing(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('was_here', 'w')\ndef net(): return 1\n")
    told = json.loads((done / "_run.json").read_text())
    told["made"] |= {"source": ["hf:evil/evil"], "classes": ["\x1b[2J", "<script>"], "asked": {"model": "evil:net"}}
    (done / "_run.json").write_text(json.dumps(told))
    (done / "part-00000099.parquet").write_bytes(pickle.dumps(Boom()))
    datasets.open(done)[0].explanation().overlay(torch.rand(1, 3, 24, 24))
    datasets.verify(done)
    datasets.status(done)
    assert not (tmp_path / "was_here").exists()


def test_the_package_itself_needs_no_arrow():
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import pyfast_xai, pyfast_xai.explainers, pyfast_xai.cli\n"
        "try:\n    import pyfast_xai.datasets\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pyfast_xai.datasets needs pyarrow: pip install 'pyfast-xai[datasets]'"
