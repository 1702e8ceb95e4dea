"""Listings: streamed into the folder of a run, read by shards, and trusted only as long as they are right."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyfast_xai import datasets
from pyfast_xai.datasets import listing as listings
from pyfast_xai.datasets import run as runs
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.listing import take_listing
from pyfast_xai.datasets.run import stored_listing
from pyfast_xai.datasets.sources import entries as sourced
from pyfast_xai.errors import InputError
from pyfast_xai.images import find_images


@pytest.fixture
def short_pieces(monkeypatch):
    """Listings in pieces of five entries, files of ten, and samples of two of them."""
    monkeypatch.setattr(sourced, "CHUNK", 5)
    monkeypatch.setattr(listings, "CHUNK", 5)
    monkeypatch.setattr(listings, "_FILE", 10)
    monkeypatch.setattr(listings, "_SAMPLE", (2, 2))
    monkeypatch.setattr(sourced.rechunked, "__defaults__", (5,))


def run(source, loaded, out, **settings):
    return datasets.explain(
        source, loaded, **{"method": "saliency", "out": out, "shard_size": 6, "batch_size": 4, **settings}
    )


def old(path):
    """A time of change long enough ago to be trusted."""
    long_ago = time.time() - 1000
    os.utime(path, (long_ago, long_ago))


@pytest.fixture
def settled(folder):
    for name in os.listdir(folder):
        old(folder / name)
    old(folder)
    return folder


@pytest.fixture
def walks(monkeypatch):
    """The sources that are listed."""
    recorded = []

    def noted(source, *more):
        recorded.append(source)
        return take_listing(source, *more)

    monkeypatch.setattr(runs, "take_listing", noted)
    return recorded


def test_pieces_are_read_as_they_were_written(folder, short_pieces):
    source = datasets.open_source(folder)
    listing, summary = take_listing(source)
    assert (len(listing), summary.items, len(listing.files())) == (20, 20, 3)
    assert listing.entries(0, 99)["id"].to_pylist() == list(source.ids)
    for start, stop in ((0, 3), (3, 13), (9, 11), (19, 20), (5, 5), (20, 30)):
        assert listing.entries(start, stop)["id"].to_pylist() == list(source.ids)[start:stop]
    assert listing.take([0, 4, 5, 12, 19])["id"].to_pylist() == [source.ids[n] for n in (0, 4, 5, 12, 19)]
    assert listing.sample()["id"].to_pylist() == [source.ids[n] for n in (0, 1, 18, 19)]
    items = list(listing.items(source, range(9, 12), check=True))
    assert [(item.index, item.id) for item in items] == [(n, source.ids[n]) for n in (9, 10, 11)]
    assert items[0].read() == (folder / "09.jpg").read_bytes()


def test_digests_do_not_depend_on_how_a_source_yields_entries(folder):
    class Sliced(datasets.Files):
        def entries(self):
            for batch in super().entries():
                for n in range(0, len(batch), 3):
                    yield batch.slice(n, 3)

    paths = find_images([folder])
    assert Sliced(paths).listing() == datasets.Files(paths).listing() == take_listing(Sliced(paths))[1]


def test_names_that_come_twice_also_across_pieces(tmp_path, short_pieces):
    names = ["a", "b", "a#2", "a", "c", "b", "a", "d", "b#2", "a", "e", "f", "d"]
    source = datasets.Files([tmp_path / "x"] * len(names), names)
    expected, used, counts = [], set(), {}
    for name in names:  # the rule, said slowly
        free = name
        while free in used:
            counts[name] = counts.get(name, 1) + 1
            free = f"{name}#{counts[name]}"
        used.add(free)
        expected.append(free)
    assert take_listing(source)[0].entries(0, 99)["id"].to_pylist() == expected
    assert list(source.ids) == expected
    assert take_listing(source)[1] == source.listing()


def test_a_run_that_goes_on_lists_nothing(settled, loaded, tmp_path, walks):
    out = tmp_path / "out"
    run(settled, loaded, out)
    assert len(walks) == 1
    (out / "part-00000001.parquet").unlink()
    assert run(settled, loaded, out).complete
    datasets.open(out)[3].explanation()
    assert len(walks) == 1
    assert (
        sorted(name for name in os.listdir(out) if name.startswith("_listing"))
        == stored_listing(run_folder(out))[0].files()
    )


def test_folders_that_changed_just_before_are_compared_by_name(folder, loaded, tmp_path, walks):
    run(folder, loaded, tmp_path / "out")
    assert run(folder, loaded, tmp_path / "out").complete
    assert len(walks) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "more.png").touch(), "with source.items 20, got 21"),
        (lambda folder: (folder / "07.jpg").unlink(), "with source.items 20, got 19"),
        (lambda folder: (folder / "07.jpg").rename(folder / "77.jpg"), "with source.ids"),
        (lambda folder: (folder / "07.jpg").write_bytes(b"x"), "the same files, got some of another size or time"),
    ],
)
def test_changes_are_noticed(settled, loaded, tmp_path, walks, change, message):
    run(settled, loaded, tmp_path / "out")
    change(settled)
    with pytest.raises(InputError, match=message):
        run(settled, loaded, tmp_path / "out")
    assert len(walks) == 2


def test_a_new_folder_is_noticed_though_it_takes_the_time_of_the_old(settled, loaded, tmp_path):
    (settled / "sub").mkdir()
    (settled / "sub" / "a.png").write_bytes((settled / "00.png").read_bytes())
    for path in (settled / "sub" / "a.png", settled / "sub", settled):
        old(path)
    run(settled, loaded, tmp_path / "out")
    (settled / "sub" / "b.png").write_bytes((settled / "00.png").read_bytes())
    with pytest.raises(InputError, match=r"with source.items 21, got 22"):
        run(settled, loaded, tmp_path / "out")


def test_a_file_that_changes_beyond_the_sample_is_an_error_row_and_retried(settled, loaded, tmp_path, short_pieces):
    out = tmp_path / "out"
    job = datasets.prepare(settled, loaded, method="saliency", out=out, shard_size=6, batch_size=4)
    whole = (settled / "09.jpg").read_bytes()
    (settled / "09.jpg").write_bytes(whole + b"more")
    assert (datasets.run_job(job).rows, datasets.status(out).errors) == (20, 1)
    row = datasets.open(out)[9]
    assert "must be as it was when the run began" in row["error_message"]
    job = datasets.prepare(settled, loaded, method="saliency", out=out, shard_size=6, batch_size=4)
    assert datasets.retry(job).errors == 0


def tar_of(path, pictures):
    with tarfile.open(path, "w") as tar:
        for n, picture in enumerate(pictures):
            member = tarfile.TarInfo(f"{n:02d}.png")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))


def table_of(path, pictures):
    pq.write_table(pa.table({"image": pictures}), path, row_group_size=8)


@pytest.mark.parametrize(("name", "write"), [("a.tar", tar_of), ("a.parquet", table_of)])
def test_a_container_that_changes_while_the_run_works_is_error_rows_and_retried(
    name, write, loaded, make_picture, tmp_path
):
    pictures = [make_picture(n, "BMP") for n in range(80)]  # all of one size, so that offsets stay
    path, out = tmp_path / name, tmp_path / "out"
    write(path, pictures)
    old(path)
    run(path, loaded, tmp_path / "undisturbed")
    scores = [row["score"] for row in datasets.open(tmp_path / "undisturbed")]
    settings = {"method": "saliency", "out": out, "shard_size": 4, "batch_size": 4, "workers": 1}
    job = datasets.prepare(path, loaded, **settings)

    def change(progress):
        if progress.images == 4:
            write(path, pictures[::-1])

    done = datasets.run_job(job, change)
    assert done.complete
    rows = list(datasets.open(out))
    assert 0 < done.errors < 80
    for row, score in zip(rows, scores, strict=True):
        if row["status"] == "ok":
            assert row["score"] == pytest.approx(score)
        else:
            assert "must be as it was when the run began" in row["error_message"]
    with pytest.raises(InputError, match="`retry` takes repaired ones"):
        datasets.explain(path, loaded, **settings)
    assert datasets.retry(datasets.prepare(path, loaded, **settings)).errors == 0


@pytest.mark.parametrize(("name", "write"), [("a.tar", tar_of), ("a.parquet", table_of)])
def test_a_container_that_vanishes_while_the_run_works_is_error_rows(name, write, loaded, make_picture, tmp_path):
    path, out = tmp_path / name, tmp_path / "out"
    write(path, [make_picture(n) for n in range(80)])
    settings = {"method": "saliency", "out": out, "shard_size": 4, "batch_size": 4, "workers": 1}
    job = datasets.prepare(path, loaded, **settings)
    done = datasets.run_job(
        job, lambda progress: path.exists() and progress.images == 4 and path.rename(tmp_path / "x")
    )
    assert done.complete
    assert 0 < done.errors < 80
    (tmp_path / "x").rename(path)
    assert datasets.retry(datasets.prepare(path, loaded, **settings)).errors == 0


def test_results_below_the_pictures(settled, loaded, walks):
    for _ in range(3):
        assert run(settled, loaded, settled / "out").complete
    assert len(walks) == 1


def test_a_folder_that_was_moved_goes_on_and_is_known_from_then_on(settled, loaded, tmp_path, walks):
    out = tmp_path / "out"
    run(settled, loaded, out)
    (out / "part-00000001.parquet").unlink()
    moved = settled.rename(tmp_path / "moved")
    assert run(moved, loaded, out).complete
    assert run(moved, loaded, out).complete
    assert len(walks) == 2
    assert datasets.open(out)[8].explanation().images is not None


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 100, None])
def test_a_listing_that_is_damaged_or_gone_is_taken_anew(settled, loaded, tmp_path, damage):
    out = tmp_path / "out"
    run(settled, loaded, out)
    (out / "part-00000001.parquet").unlink()
    for name in [name for name in os.listdir(out) if name.startswith("_listing")]:
        if damage is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(damage)
    assert run(settled, loaded, out).complete
    assert datasets.verify(out).faults == []


def test_lists_tars_and_tables_are_known_by_their_files(folder, loaded, tmp_path, walks):
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in find_images([folder])))
    out = tmp_path / "out"
    for count in (1, 1):
        assert run(tmp_path / "list.csv", loaded, out).complete
        assert len(walks) == count
    (tmp_path / "list.csv").write_text((tmp_path / "list.csv").read_text() + "gone.png\n")
    with pytest.raises(InputError, match=r"with source.items 20, got 21"):
        run(tmp_path / "list.csv", loaded, out)


def test_torch_datasets_are_known_by_length_and_version(loaded, tmp_path, walks):
    class Data:
        def __len__(self):
            return 7

        def __getitem__(self, index):
            return torch.full((3, 8, 8), 1.0 + index)

    out = tmp_path / "out"
    run(Data(), loaded, out)
    run(Data(), loaded, out)
    assert len(walks) == 1
    with pytest.raises(InputError, match="the same files, got some"):
        run(datasets.TorchDataset(Data(), version="2"), loaded, out)


def test_listing_holds_little_and_prepare_writes_nothing(tmp_path, loaded):
    class Many(datasets.StreamedSource):
        kind = "many"

        def entries(self):
            for start in range(0, 300_000, 1000):
                yield sourced.entries([f"picture-{n:09d}" for n in range(start, start + 1000)])

        def stamps(self):
            return ()

    before = pa.total_allocated_bytes()
    peak = []
    listing, summary = take_listing(Many(), lambda count: peak.append((count, pa.total_allocated_bytes() - before)))
    assert (len(listing), summary.items) == (300_000, 300_000)
    assert peak[-1][0] == 300_000
    # A file of entries at a time, and not all of them.
    assert max(size for _, size in peak) < 32e6
    assert listing.entries(299_999, 300_000)["id"].to_pylist() == ["picture-000299999"]
    datasets.prepare(Many(), loaded, method="saliency", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_listings_and_sources_travel(folder, short_pieces):
    source = datasets.open_source(folder)
    listing, _ = take_listing(source)
    copy, other = pickle.loads(pickle.dumps((listing, source)))
    assert [item.read() for item in copy.items(other, range(4, 7), check=True)] == [
        (folder / name).read_bytes() for name in ("04.png", "05.jpg", "06.png")
    ]


LISTS = """
import sys
from pathlib import Path
from pyfast_xai import datasets
from pyfast_xai.datasets.listing import take_listing
listing, _ = take_listing(datasets.Files([Path("a.png")]))
print("listed", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs locks that end with their process")
def test_listings_of_killed_processes_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def lists():
        process = subprocess.Popen(
            [sys.executable, "-c", LISTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "listed\n"
        return process

    def folders():
        return {path for path in tmp_path.iterdir() if path.name.startswith("pyfast-xai-listing-")}

    dies = lists()
    left = folders()
    lives = lists()
    at_work = folders() - left
    dies.kill()
    dies.communicate()
    assert (len(left), len(at_work)) == (1, 1)
    assert folders() == left | at_work
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    link = tmp_path / "pyfast-xai-listing-link"
    link.symlink_to(elsewhere)
    just_made = tmp_path / "pyfast-xai-listing-new"
    just_made.mkdir()
    listing, _ = take_listing(datasets.Files([tmp_path / "a.png"]))
    assert folders() > at_work | {link, just_made}
    assert not folders() & left
    assert (elsewhere / "lock").exists()
    del listing
    assert folders() == at_work | {link, just_made}
    assert lives.communicate("")[0] == ""
    assert lives.returncode == 0
    assert folders() == {link, just_made}


def test_linked_folders_are_walked_one_time(tmp_path, make_picture):
    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_picture(0))

    root = tmp_path / "root"
    for name in ("cats/1.png", "dogs/2.png", ".store/3.png", "../elsewhere/4.png", "../elsewhere/deep/5.png"):
        put(root / name)
    links = {
        "a-cats": "cats",
        "birds": "../elsewhere",
        "more-birds": "../elsewhere",
        "cats/deep": "../../elsewhere/deep",
    }
    links |= {"fish": ".store", "loop": "loop", "up": "..", "cats/itself": "."}
    for name, target in links.items():
        (root / name).symlink_to(target)
    listed = ["birds/4.png", "birds/deep/5.png", "cats/1.png", "dogs/2.png", "fish/3.png"]
    result = [str(path.relative_to(root)) for path in find_images([root])]
    assert sorted(path.rpartition("/")[2] for path in result) == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    assert result == list(datasets.open_source(root).ids)
    # Real names come before names by links, and the first link before later ones.
    assert "cats/1.png" in result
    assert "fish/3.png" in result
    assert result == sorted(result)
    assert len(listed) == len(result)


def test_results_that_are_linked_are_no_pictures(folder, loaded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "results").symlink_to(out)
    assert len(datasets.open_source(folder, without=out)) == 20


def test_a_folder_that_cannot_be_read_is_a_row(folder, loaded, tmp_path, monkeypatch):
    (folder / "locked").mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    done = run(folder, loaded, tmp_path / "out")
    assert (done.rows, done.errors) == (21, 1)
    (row,) = [row for row in datasets.open(tmp_path / "out") if row["status"] == "error"]
    assert row["id"] == "locked/"
    assert "folder must be readable, got Permission denied" in row["error_message"]


def test_several_names_list_each_file_one_time(folder, tmp_path, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.png").write_bytes((folder / "00.png").read_bytes())
    names = [folder / "03.jpg", folder / "sub", folder, str(folder / "*.png"), folder / "sub" / "a.png"]
    ids = list(datasets.open_source(names).ids)
    assert ids == list(map(str, find_images(names)))
    assert ids[0] == str(folder / "03.jpg")
    assert len(ids) == len(set(ids)) == 21


@pytest.mark.parametrize("empty", ["", [""], ["a.png", ""]])
def test_an_empty_name_is_refused(empty):
    with pytest.raises(InputError, match="must be paths or names of data sets, got an empty text"):
        datasets.open_source(empty)
