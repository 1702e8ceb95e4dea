"""A process short of memory stops with one sentence; a single image that is too large is a row."""

import contextlib
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyfast_xai import datasets
from pyfast_xai.datasets.run_worker import on_device
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explanation import Explanation


class Hungry(Explainer):
    """Runs out of memory as it is told to."""

    method, paper = "hungry", ""

    def __init__(self, model, needs_too_much):
        super().__init__(model)
        self._needs_too_much = needs_too_much

    def _explain(self, images, target, args, kwargs):
        if self._needs_too_much(images):
            raise MemoryError("no room")
        logits = self.record(images).result
        return Explanation(self.method, images.abs().mean(1), target=logits.argmax(1), score=logits.softmax(1).amax(1))


class Tensors:
    def __init__(self, *shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        return torch.full(self.shapes[index], 1.0 + index)


SMALL, LARGE = (3, 8, 8), (3, 9, 9)


@pytest.mark.parametrize("shard_size", [5, 100])
def test_memory_that_never_suffices_ends_the_run_before_a_part(loaded, tmp_path, shard_size):
    method = Hungry(loaded.model, lambda images: True)
    source = Tensors(*[SMALL] * 40)
    for _ in range(2):
        with pytest.raises(MemoryError, match=r"memory must suffice for one image at a time, ran out for \d+"):
            datasets.explain(source, loaded, method=method, out=tmp_path / "out", shard_size=shard_size)
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("part")]
    # With more of it the same run goes on.
    method._needs_too_much = lambda images: False
    assert datasets.explain(source, loaded, method=method, out=tmp_path / "out", shard_size=shard_size).errors == 0


def test_memory_that_suffices_no_longer_ends_the_run(loaded, tmp_path):
    method = Hungry(loaded.model, lambda images: bool((images > 20).any()))
    with pytest.raises(MemoryError):
        datasets.explain(Tensors(*[SMALL] * 40), loaded, method=method, out=tmp_path / "out", shard_size=10)
    assert datasets.status(tmp_path / "out").errors == 0


def test_single_images_that_are_too_large_are_rows(loaded, tmp_path):
    method = Hungry(loaded.model, lambda images: images.shape[-1] > 8)
    for n, shapes in enumerate(([SMALL, LARGE] * 10, [LARGE, SMALL, SMALL], [LARGE])):
        done = datasets.explain(Tensors(*shapes), loaded, method=method, out=tmp_path / f"{n}", shard_size=6)
        assert (done.rows, done.errors) == (len(shapes), shapes.count(LARGE))


def test_pictures_that_cannot_be_decoded_for_want_of_memory(folder, loaded, tmp_path, monkeypatch):
    from pyfast_xai.datasets import decode

    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "visible_pixels", no_room)
    with pytest.raises(MemoryError, match="memory must suffice"):
        datasets.explain(folder, loaded, method="saliency", out=tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("part")]


def test_the_command_says_so_in_one_sentence(folder, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pyfast_xai import cli
    from pyfast_xai.datasets import decode

    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "visible_pixels", no_room)
    words = ["run", str(folder), "--model", "digits", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1
    lines = done.output.strip().splitlines()
    assert lines[-1].startswith("resume  pyfast-xai run")
    assert lines[-2].startswith("error  memory must suffice for one image at a time")
    assert "Traceback" not in done.output


PARQUET = """
import resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from pyfast_xai.datasets import open_source
source = open_source(sys.argv[1])
list(source.entries())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(len(item.read()) for item in source.items(0, len(source)))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_row_group_of_any_size_is_read_in_slices(tmp_path):
    rows, size = 640, 200_000
    path = tmp_path / "one.parquet"
    table = pa.table({"image": [os.urandom(size) for _ in range(rows)]})
    pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False, write_batch_size=8)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PARQUET, str(path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    total, grown = output.split()
    assert int(total) == rows * size
    # 128 MB in one row group; what is held is a slice and the buffers of the reader.
    assert float(grown) < 48


def test_a_row_group_is_read_one_time_by_a_run_and_by_a_retry(loaded, tmp_path, make_picture, monkeypatch):
    pictures = [make_picture(n) if n % 4 else b"broken" for n in range(80)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=40)
    reads = []
    read = pq.ParquetFile.iter_batches

    def counted(file, size, groups=None, columns=None, **settings):
        if columns == ["image"]:
            reads.append(groups)
        return read(file, size, groups, columns, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    settings = {"method": "saliency", "out": tmp_path / "out", "shard_size": 7}
    assert datasets.explain(tmp_path / "a.parquet", loaded, **settings).errors == 20
    assert reads == [[0], [1]]
    reads.clear()
    assert datasets.retry(datasets.prepare(tmp_path / "a.parquet", loaded, **settings)).errors == 20
    assert reads == [[0], [1]]


@pytest.mark.parametrize("indices", [[0, 1, 2], [5, 4, 39], [79, 0, 40, 3], list(range(80)), list(range(79, -1, -7))])
def test_pictures_of_a_table_in_any_order(tmp_path, make_picture, indices):
    pictures = [make_picture(n) for n in range(80)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=40)
    source = datasets.open_source(tmp_path / "a.parquet")
    read = [next(source.items(index, index + 1)) for index in indices]
    assert [item.read() for item in read] == [pictures[index] for index in indices]


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_moved_for_the_time_of_a_run_and_comes_back(loaded, monkeypatch, fails):
    moves = []
    monkeypatch.setattr(loaded.model, "to", lambda device: moves.append(str(device)))
    with contextlib.suppress(KeyboardInterrupt), on_device(loaded.model, "meta") as device:
        assert str(device) == "meta"
        assert moves == ["meta"]
        if fails:
            raise KeyboardInterrupt
    assert moves == ["meta", "cpu"]
    for place in (None, "cpu", torch.device("cpu")):
        with on_device(loaded.model, place) as device:
            assert str(device) == "cpu"
    assert moves == ["meta", "cpu"]


def test_a_model_in_several_places_is_not_moved(loaded):
    loaded.model[0].to("meta")
    refusal = pytest.raises(InputError, match="device must be left out for a model that lies on meta and cpu")
    with refusal, on_device(loaded.model, "cpu"):
        pass
    with on_device(loaded.model, None) as device:
        assert str(device) == "meta"


def test_prepare_moves_no_model(loaded, tmp_path):
    job = datasets.prepare(Tensors(SMALL), loaded, method="saliency", out=tmp_path / "out", device="meta")
    assert {str(tensor.device) for tensor in loaded.model.state_dict().values()} == {"cpu"}
    assert job.settings.device == "meta"
    assert not (tmp_path / "out").exists()
