"""The writer, stopped at every point there is, with and without a power cut."""

import contextlib
import errno
import io
import itertools
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from pyfast_xai.datasets import store as stores
from pyfast_xai.datasets.atomic_files import folder_lock
from pyfast_xai.datasets.folders import LocalFolder
from pyfast_xai.datasets.run import open_run, prepare
from pyfast_xai.datasets.schema import COLUMNS, OK, PartInfo, columns, part_info, with_info
from pyfast_xai.datasets.sources import TorchDataset
from pyfast_xai.datasets.store import PartStore, Shards, encoded
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

ROWS, SIZE = 20, 4
SHARDS = Shards(ROWS, SIZE)


class Stopped(BaseException):
    """The process is gone; nothing after this runs."""


class Disk:
    """A folder on a disk with a memory before it, as POSIX lets it behave: what speaks to it is `os` to the writer.

    Every call is a point at which the process may stop, before it, after it, and in the middle of a write. What is
    written is on the disk once its file is synced; a new name, once the folder is. At a power cut, of what was not
    synced any part may be there: here none, half, or all of a file's bytes, and names in the order of the calls, up to
    any of them.
    """

    def __init__(self):
        self.memory = {}  # name to file
        self.disk = {}  # name to file, as the folder on the disk has it
        self.changes = []  # of names, not synced
        self.handles = {}
        self.numbers = itertools.count(3)
        self.calls, self.stop_at = 0, None

    class File:
        def __init__(self):
            self.data, self.synced = b"", b""

    def _point(self):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Stopped

    def open(self, path, flags, mode=0o777):
        self._point()
        number = next(self.numbers)
        name = os.fspath(path).rpartition("/")[2]
        if flags & os.O_DIRECTORY:
            self.handles[number] = None
        else:
            assert flags & os.O_CREAT
            assert flags & os.O_TRUNC
            if name not in self.memory:
                self.memory[name] = self.File()
                self.changes.append(("link", name, self.memory[name]))
            self.memory[name].data = b""
            self.handles[number] = self.memory[name]
        return number

    def write(self, handle, data):
        self._point()
        file = self.handles[handle]
        # A write may be short.
        half = bytes(data[: max(1, len(data) // 2)])
        file.data += half
        self._point()
        return len(half)

    def fsync(self, handle):
        self._point()
        file = self.handles[handle]
        if file is None:
            self.disk, self.changes = dict(self.memory), []
        else:
            file.synced = file.data
        self._point()

    def close(self, handle):
        del self.handles[handle]

    def replace(self, old, new):
        self._point()
        old, new = (os.fspath(path).rpartition("/")[2] for path in (old, new))
        self.memory[new] = self.memory.pop(old)
        self.changes.append(("rename", old, new))
        self._point()

    def unlink(self, path):
        self._point()
        name = os.fspath(path).rpartition("/")[2]
        if name not in self.memory:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        del self.memory[name]
        self.changes.append(("unlink", name, None))
        self._point()

    def listdir(self, folder):
        return list(self.memory)

    def restart(self, power, chance):
        """The process is gone, and with `power` the machine, too."""
        self.handles, self.stop_at = {}, None
        if not power:
            return
        names = dict(self.disk)
        for kind, name, other in self.changes[: chance.randint(0, len(self.changes))]:
            if kind == "link":
                names[name] = other
            elif kind == "rename":
                names[other] = names.pop(name)
            else:
                names.pop(name, None)
        for file in names.values():
            file.data = chance.choice([file.synced, file.data, file.data[: len(file.data) // 2]])
            if file.data != file.synced and len(file.data) < len(file.synced):
                file.data = file.synced
            file.synced = file.data
        self.memory, self.disk, self.changes = dict(names), dict(names), []


def part(shard, fingerprint="run"):
    start, stop = SHARDS.range(shard)
    info = PartInfo(fingerprint, shard, start, stop, 0, SIZE)
    rows = [
        {"id": f"{n}.png", "index": n, "status": OK, "map": bytes([n]) * 8, "map_dtype": "uint8", "map_shape": [2, 4]}
        for n in range(start, stop)
    ]
    schema = with_info(columns(), info)
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


PARTS = [part(shard) for shard in range(len(SHARDS))]


class DiskFolder(LocalFolder):
    """The folder of a run on such a disk."""

    def __init__(self, disk):
        super().__init__("/run", disk)

    def make(self):
        pass

    def open(self, name):
        if name not in self._system.memory:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return pa.BufferReader(self._system.memory[name].data)

    def lock(self):
        return contextlib.nullcontext()


SOURCE = TorchDataset([None] * ROWS, ids=[f"{n}.png" for n in range(ROWS)])
NETWORK = LoadedModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), Preprocess(8), None, "tiny")


def work(disk):
    """What a run does with its folder, on its own code: listing, manifest, parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "run_folder", lambda *_: DiskFolder(disk))
        job = prepare(SOURCE, NETWORK, method="eigen-cam", out="/run", shard_size=SIZE, top_k=0)
        with open_run(job) as opened:
            for shard in opened.remaining:
                opened.job.store.write(shard, part(shard, job.manifest.fingerprint))


def whole():
    disk = Disk()
    work(disk)
    return {name: file.data for name, file in disk.memory.items()}


WHOLE = whole()


def points_of(disk):
    work(disk)
    work(disk)
    return disk.calls


def stop_twice(first, second, power, chance):
    """A run that stops, goes on, stops again, and then ends."""
    disk = Disk()
    for point in (first, second):
        disk.calls, disk.stop_at = 0, point
        with contextlib.suppress(Stopped):
            work(disk)
        disk.restart(power, chance)
        # Whatever carries a name that is not hidden is that file, at any moment.
        for name, file in disk.memory.items():
            assert name.startswith(".") or file.data == WHOLE[name], (first, second, power, name)
    work(disk)
    disk.restart(power, chance)
    assert {name: file.data for name, file in disk.memory.items()} == WHOLE, (first, second, power)


POINTS = points_of(Disk())


@pytest.mark.parametrize("power", [False, True])
def test_stopped_anywhere_nothing_is_lost_doubled_or_broken(power):
    chance = random.Random(1)
    for first in range(1 + 4 * power, POINTS + 1, 8):
        stop_twice(first, chance.randint(1, POINTS), power, chance)


@pytest.mark.extended
@pytest.mark.parametrize("power", [False, True])
def test_stopped_anywhere_and_again_anywhere(power):
    chance = random.Random(2)
    stops = list(itertools.product(range(1, POINTS + 1), range(1 + 8 * power, POINTS + 1, 16)))
    assert len(stops) >= 5000
    for first, second in stops:
        stop_twice(first, second, power, chance)


@pytest.mark.parametrize("forgotten", ["fsync", "replace"])
def test_the_disk_shows_a_writer_that_forgets(forgotten):
    # What is tested with must be able to fail: without syncing, and without a hidden name.
    class Careless(Disk):
        def fsync(self, handle):
            if forgotten != "fsync":
                super().fsync(handle)

        def open(self, path, flags, mode=0o777):
            return super().open(
                str(path).removesuffix(".tmp").replace("/.", "/") if forgotten == "replace" else path, flags
            )

        def replace(self, old, new):
            if forgotten != "replace":
                super().replace(old, new)

    damaged = 0
    for first in range(1, POINTS, 5):
        disk, chance = Careless(), random.Random(first)
        disk.stop_at = first
        with contextlib.suppress(Stopped):
            work(disk)
        disk.restart(True, chance)
        damaged += any(not n.startswith(".") and f.data != WHOLE[n] for n, f in disk.memory.items())
    assert damaged > POINTS // 40


@pytest.mark.parametrize(("failure", "step"), [(errno.ENOSPC, 5), (errno.EIO, 11), (errno.EROFS, 13)])
def test_a_disk_that_fails_at_any_call_leaves_whole_parts_and_no_litter(failure, step):
    for point in range(1, POINTS + 1, step):

        class Failing(Disk):
            def _point(self, point=point):
                self.calls += 1
                if self.calls == point:
                    raise OSError(failure, os.strerror(failure))

        disk = Failing()
        with pytest.raises(OSError, match=os.strerror(failure)):
            work(disk)
        visible = {name: file.data for name, file in disk.memory.items() if not name.startswith(".")}
        assert visible.items() <= WHOLE.items()
        assert not disk.handles
        work(disk)
        assert {name: file.data for name, file in disk.memory.items()} == WHOLE


def test_parts_open_everywhere(tmp_path):
    store = PartStore(tmp_path)
    store.write(1, PARTS[1])
    assert store.shards() == [1]
    assert store.finished() == {1: PartInfo("run", 1, 4, 8, 0, 4)}
    table = pq.read_table(store.path(1))
    assert table.schema.names == COLUMNS.names
    assert table["index"].to_pylist() == [4, 5, 6, 7]
    duckdb = pytest.importorskip("duckdb")
    assert duckdb.sql(f"select sum(\"index\") from '{tmp_path}/*.parquet'").fetchall() == [(22,)]
    assert store.read(1).equals(table)


def test_a_flipped_bit_is_found(tmp_path):
    store = PartStore(tmp_path)
    path = store.path(0)
    whole = bytearray(encoded(PARTS[0]))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    missed = []
    # Page headers have no checksum of their own, but what they say must fit; the bytes of columns all have one.
    for place in range(4, footer, 7):
        broken = bytearray(whole)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            if store.read(0).equals(PARTS[0]):
                continue
        except Exception:
            continue
        missed.append(place)
    assert not missed


def test_a_part_that_cannot_be_read_counts_as_not_there(tmp_path, caplog):
    store = PartStore(tmp_path)
    for shard in (0, 1, 2):
        store.write(shard, PARTS[shard])
    store.path(0).write_bytes(b"")
    store.path(1).write_bytes(store.path(1).read_bytes()[:-9])
    pq.write_table(pa.table({"a": [1]}), store.path(3))
    assert list(store.finished()) == [2]
    assert caplog.text.count("cannot be read") == 3
    assert store.info(4) is None


def test_what_a_part_says_of_itself_is_not_believed_blindly():
    for output in (
        b"",
        b"{}",
        b"[]",
        b'{"fingerprint": 3}',
        json.dumps(vars(PartInfo("x", 0, 0, 1, 0, 1)) | {"shard": "0"}).encode(),
    ):
        assert part_info(pa.schema([], metadata={b"pyfast_xai": output})) is None


def test_one_run_at_a_time(tmp_path):
    with folder_lock(tmp_path), pytest.raises(InputError, match="no other run writes"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        pass


def test_shards_cover_everything_once():
    for items, size in ((1, 1), (20, 4), (21, 4), (3, 512)):
        shards = Shards(items, size)
        assert [n for shard in range(len(shards)) for n in range(*shards.range(shard))] == list(range(items))


def test_what_was_unfinished_is_removed_and_nothing_else(tmp_path):
    for name in (".part-00000000.parquet.tmp", "._run.parquet.tmp", "notes.tmp", ".hidden"):
        (tmp_path / name).write_text("x")
    assert PartStore(tmp_path).folder.remove_unfinished() == 2
    assert sorted(os.listdir(tmp_path)) == [".hidden", "notes.tmp"]


def test_encoding_is_parquet_in_memory():
    assert pq.read_table(io.BytesIO(encoded(PARTS[2]))).equals(PARTS[2])
