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
from pyfast_xai.datasets.attachments import attached
from pyfast_xai.datasets.columns import unpacked
from pyfast_xai.datasets.export_fiftyone import _in_picture
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document
from pyfast_xai.datasets.schema import COLUMNS
from pyfast_xai.datasets.store import PartStore
from pyfast_xai.errors import InputError
from pyfast_xai.images import MAX_PIXELS, Preprocess
from pyfast_xai.models import LoadedModel


@pytest.fixture
def done(folder, loaded, tmp_path):
    """A run over twenty pictures, of which two are bad, in four parts."""
    (folder / "05.jpg").write_bytes(b"no picture")
    (folder / "14.png").write_bytes(b"")
    out = tmp_path / "out"
    datasets.explain(str(folder), loaded, method="eigen-cam", out=out, shard_size=6, batch_size=4)
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
    recorded = []
    result = datasets.verify(
        done, datasets.open_source(str(folder)), lambda progress: recorded.append((progress.done, progress.total))
    )
    assert (result.rows, result.missing, result.faults) == (20, 0, [])
    assert recorded == [(1, 4), (2, 4), (3, 4), (4, 4)]


def changed(path, change):
    table = PartStore(path.parent).read(int(path.name[5:13]))
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
    assert any(fault in output for output in faults), faults


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
    result = datasets.verify(done)
    assert (result.rows, result.missing, result.faults) == (14, 6, [])
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
    datasets.explain(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch_size=4)
    assert datasets.verify(done).faults == []


def test_another_try_takes_error_rows_only(done, folder, loaded, make_picture):
    before = [dict(row) for row in datasets.open(done)]
    (folder / "05.jpg").write_bytes(make_picture(5, "JPEG"))
    job = datasets.prepare(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch_size=4)
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
    datasets.explain(str(folder), loaded, method="eigen-cam", out=done, shard_size=6, batch_size=4)
    (folder / "more.png").touch()
    with pytest.raises(InputError, match="must be continued as it was begun"):
        datasets.retry(datasets.prepare(str(folder), loaded, method="eigen-cam", out=done, shard_size=6))


def test_pandas_opens_the_folder(done):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(done, columns=["id", "status", "topk_score"])
    assert frame["id"].tolist() == [row["id"] for row in datasets.open(done)]


def test_csv(done, tmp_path):
    reports = []
    assert datasets.export(done, "csv", tmp_path / "a.csv", reports.append) == 20
    assert (reports[-1].done, reports[-1].total) == (20, 20)
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
        output = json.load(tar.extractfile(names[0]))
        assert output["id"] == "00.png"
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
    actual = datasets.open(done)[3].explanation().heatmap[0]
    assert np.abs(heat[3] - ((actual - actual.min()) / (actual.max() - actual.min())).numpy()).max() < 2**-11
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
    document = read_document(run_folder(done))
    document["made"] |= {
        "source": ["hf:evil/evil"],
        "labels": ["\x1b[2J", "<script>"],
        "request": {"model": "evil:net"},
    }
    (done / NAME).write_bytes(attached(json.dumps(document).encode(), COLUMNS))
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
    assert done.stdout.strip() == "pyfast_xai.datasets needs pyarrow: pip install pyarrow"


def test_a_folder_for_the_hub(folder, loaded, tmp_path):
    hugging = pytest.importorskip("datasets")
    (folder / "05.jpg").write_bytes(b"no picture")
    loaded = LoadedModel(loaded.model, loaded.preprocess, loaded.labels, "odd | name\n---\nlicense: none")
    datasets.explain(folder, loaded, method="saliency", out=tmp_path / "out", shard_size=6)
    assert datasets.export(tmp_path / "out", "huggingface", tmp_path / "hub") == 20
    names = [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    assert sorted(os.listdir(tmp_path / "hub" / "data")) == names
    data = hugging.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(data["id"]) == [row["id"] for row in datasets.open(tmp_path / "out")]
    heatmap = datasets.open(tmp_path / "out")[3].explanation().heatmap[0].numpy()
    grey = np.asarray(data[3]["heatmap"]) / 255
    assert np.abs(grey - (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())).max() < 1 / 255
    assert data[3]["image"].size == (32, 28)
    assert data[5]["image"] is data[5]["heatmap"] is None
    assert data[5]["status"] == "error"
    card = hugging_face_card(tmp_path / "hub" / "README.md")
    assert card["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "license" not in card
    assert "20, 1 of them errors" in (tmp_path / "hub" / "README.md").read_text()


def hugging_face_card(path):
    """The header of a card, as YAML reads it."""
    yaml = pytest.importorskip("yaml")
    _, header, text = path.read_text().split("---\n", 2)
    assert text.startswith("\n# Explanations by saliency")
    return yaml.safe_load(header)


def test_tensors_have_no_image_on_the_hub(loaded, tmp_path):
    hugging = pytest.importorskip("datasets")
    datasets.explain(
        datasets.TorchDataset([torch.rand(3, 24, 24)] * 2), loaded, method="saliency", out=tmp_path / "out"
    )
    datasets.export(tmp_path / "out", "huggingface", tmp_path / "hub")
    data = hugging.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert data[0]["image"] is None
    assert data[0]["heatmap"].size == (24, 24)


def test_a_folder_for_fiftyone(folder, loaded, tmp_path):
    """In the layout of `fiftyone.types.FiftyOneDataset`, as its documentation and its importer have it."""
    (folder / "05.jpg").write_bytes(b"no picture")
    size = (50, 24)  # twice as wide as what the network sees
    wide = np.zeros((24, 50, 3), np.uint8)
    wide[4:20, 17:30] = 255
    Image.fromarray(wide).save(folder / "04.png")
    listed = tmp_path / "list.csv"
    rows = "".join(f"{path},{n % 3}\n" for n, path in enumerate(sorted(folder.iterdir())))
    listed.write_text("path,label\n" + rows)
    datasets.explain(str(listed), loaded, method="grad-cam", out=tmp_path / "out", shard_size=6)
    assert datasets.export(tmp_path / "out", "fiftyone", tmp_path / "fo") == 20
    made = tmp_path / "fo"
    metadata = json.loads((made / "metadata.json").read_text())
    assert "version" not in metadata
    assert (metadata["media_type"], metadata["info"]["method"]) == ("image", "grad-cam")
    samples = json.loads((made / "samples.json").read_text())["samples"]
    results = list(datasets.open(tmp_path / "out"))
    assert [sample["row_id"] for sample in samples] == [row["id"] for row in results]
    for n, (sample, row) in enumerate(zip(samples, results, strict=True)):
        assert sample["ground_truth"] == {
            "_cls": "Classification", "tags": [], "label": loaded.labels[n % 3], "index": n % 3
        }  # fmt: skip
        if n == 5:
            assert sample["tags"] == ["error", "no picture"]
            assert "heatmap" not in sample
            assert not (made / sample["filepath"]).exists()
            continue
        assert sample["tags"] == ["ok"]
        assert (made / sample["filepath"]).read_bytes() == (folder / row["id"].rpartition("/")[2]).read_bytes()
        assert sample["prediction"]["label"] == row["topk_name"][0]
        assert sample["prediction"]["confidence"] == row["topk_score"][0]
        assert sample["target"]["label"] == row["class_name"]
        assert sample["heatmap"]["_cls"] == "Heatmap"
        width, height = size if n == 4 else (32, 28)
        if row["box_in_picture"]:
            (detection,) = sample["evidence"]["detections"]
            left, top, across, down = np.array(detection["bounding_box"]) * [width, height, width, height]
            place = [left, top, left + across - 1, top + down - 1]
            assert np.allclose(place, row["box_in_picture"], atol=1e-4)
            assert detection["label"] == row["class_name"]
    # Over the whole picture, of which the network saw the middle.
    heatmap = np.asarray(Image.open(made / samples[4]["heatmap"]["map_path"]))
    assert heatmap.shape == (24, 50)
    assert not heatmap[:, :13].any()
    assert not heatmap[:, 37:].any()
    recorded = results[4].explanation().heatmap[0].numpy()
    recorded = (recorded - recorded.min()) / max(float(recorded.max() - recorded.min()), 1e-12)
    assert np.abs(heatmap[:, 13:37] / 255 - recorded).max() < 1 / 255
    assert "FiftyOneDataset" in (made / "README.md").read_text()


def test_samples_open_in_fiftyone(done, tmp_path):
    """Its importer makes samples of them; no data base is needed for these."""
    fiftyone = pytest.importorskip("fiftyone")
    importers = pytest.importorskip("fiftyone.utils.data")
    datasets.export(done, "fiftyone", tmp_path / "fo")
    importer = importers.FiftyOneDatasetImporter(str(tmp_path / "fo"))
    assert importer._is_legacy_format_data()
    with importer._to_legacy_importer() as opened:
        samples = list(opened)
    assert [sample["row_id"] for sample in samples] == [row["id"] for row in datasets.open(done)]
    sample = samples[0]
    assert sample.media_type == "image"
    assert sample.heatmap.map_path == str(tmp_path / "fo" / "fields" / "heatmap" / "0000000000-00_png.png")
    assert sample.heatmap.get_map().ndim == 2
    assert isinstance(sample.evidence.detections[0], fiftyone.Detection)
    assert isinstance(sample.prediction, fiftyone.Classification)
    assert 0 < sample.prediction.confidence <= 1


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (1, 1)], ids=["tall", "wide", "single"])
def test_heat_maps_over_pictures_of_any_shape_stay_small(size):
    heatmap = Image.new("L", (24, 24), 255)
    placed = _in_picture(heatmap, Preprocess(24, 27), size)
    assert placed.width * placed.height <= MAX_PIXELS
    assert placed.getextrema()[1] == 255
