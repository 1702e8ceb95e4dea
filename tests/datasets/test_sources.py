import csv
import io
import os
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from pyfast_xai.datasets import Files, ParquetImages, Tars, TorchDataset, open_source
from pyfast_xai.datasets.sources import Labelled
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError


def items(source, start=0, stop=None):
    return list(source.items(start, len(source) if stop is None else stop))


def outcome(item):
    try:
        return item.read()
    except ImageError as error:
        return str(error)


def tar_of(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            output = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            output.name = name
            if not isinstance(data, tarfile.TarInfo):
                output.size = len(data)
            tar.addfile(output, None if isinstance(data, tarfile.TarInfo) else io.BytesIO(data))


def test_a_folder_is_listed_the_same_every_time(folder):
    source = open_source(str(folder))
    assert source.ids == [f"{n:02d}.{('png', 'jpg')[n % 2]}" for n in range(20)]
    assert [item.read() for item in items(source)] == [(folder / name).read_bytes() for name in source.ids]
    assert [item.index for item in items(source, 7, 11)] == [7, 8, 9, 10]
    assert items(source, 18, 99)[-1].index == 19
    assert open_source(folder).listing() == source.listing()
    # From elsewhere, too: ids of one folder do not depend on where it is.
    ids = source.listing().ids
    moved = folder.rename(folder.parent / "moved")
    assert open_source(moved).listing().ids == ids


def test_a_listing_tells_changes(folder):
    before = open_source(folder).listing()
    (folder / "00.png").write_bytes(b"another size")
    changed = open_source(folder).listing()
    assert (changed.ids, changed.items) == (before.ids, before.items)
    assert changed.content != before.content
    (folder / "more.png").touch()
    assert open_source(folder).listing().ids != before.ids


def test_patterns_files_and_results_in_between(folder):
    (folder / "out").mkdir()
    (folder / "out" / "heat.png").touch()
    assert len(open_source(folder)) == 21
    assert len(open_source(folder, without=folder / "out")) == 20
    assert len(open_source([str(folder / "*.png"), str(folder / "01.jpg")])) == 11


def test_what_lies_there_but_is_no_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    paths = [tmp_path / name for name in ("folder.png", "pipe.png", "empty.png", "gone.png", "a\0b.png")]
    output = [outcome(item) for item in items(Files(paths))]
    expected = ("a folder", "a device", "got 0", "no such file", "no such file")
    assert all(what in sentence for what, sentence in zip(expected, output, strict=True)), output


def test_names_that_are_no_text_or_twice_there(tmp_path):
    name = os.fsdecode(b"bytes \xff.png")
    (tmp_path / name).write_bytes(b"x")
    assert open_source(tmp_path).ids == ["bytes \\xff.png"]
    assert Files([tmp_path / "a", tmp_path / "a", tmp_path / "a"], ["a", "a", "a#2"]).ids == ["a", "a#2", "a#2#2"]


def test_csv(folder):
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["file", "label", "id"], ["03.jpg", "4", "x"], [str(folder / "00.png"), "", "y"]])
    source = open_source(folder / "list.csv")
    assert source.ids == ["x", "y"]
    assert [(item.label, item.read()) for item in items(source)] == [
        (4, (folder / "03.jpg").read_bytes()),
        (None, (folder / "00.png").read_bytes()),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "must have a column path or file"),
        ("", "must have a column"),
        (b"path\n\xff\xfe\n", "must be a CSV file"),
    ],
)
def test_csv_that_is_none(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary", "binary_view", "dictionary"])
def test_parquet_images(tmp_path, make_picture, kind):
    pictures = [make_picture(n) for n in range(7)]
    values = pictures
    if kind == "struct":
        values = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures)]
    elif kind == "dictionary":
        values = pa.array(pictures).dictionary_encode()
    else:
        values = pa.array(pictures, getattr(pa, kind)())
    for part, (start, stop) in enumerate(((0, 5), (5, 7))):
        table = pa.table(
            {"image": values[start:stop], "label": list(range(start, stop)), "id": list("abcdefg")[start:stop]}
        )
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "*.parquet"))
    assert isinstance(source, ParquetImages)
    assert source.ids == list("abcdefg")
    assert [(i.label, i.read()) for i in items(source)] == list(enumerate(pictures))
    # Across row groups and files.
    assert [(i.index, i.read()) for i in items(source, 3, 6)] == [(n, pictures[n]) for n in (3, 4, 5)]


def test_parquet_paths_stay_below_their_file(tmp_path, make_picture):
    inner = tmp_path / "data"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(make_picture(0))
    (inner / "own.png").write_bytes(make_picture(1))
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    named = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array([{"bytes": None, "path": name} for name in named], kind)
    pq.write_table(pa.table({"image": values}), inner / "a.parquet")
    output = [outcome(item) for item in items(open_source(inner / "a.parquet"))]
    assert output[0] == make_picture(1)
    assert all("must lie below the folder" in sentence for sentence in output[1:4])
    assert "must have bytes" in output[4]


def test_parquet_list_of_paths(folder):
    pq.write_table(pa.table({"path": ["01.jpg", "gone.png"], "label": [3, None]}), folder / "list.parquet")
    source = open_source(folder / "list.parquet")
    first, second = items(source)
    assert (first.label, first.read()) == (3, (folder / "01.jpg").read_bytes())
    assert "no such file" in outcome(second)


def test_a_broken_row_group_is_as_many_errors(tmp_path, make_picture):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [make_picture(n) for n in range(6)]})
    pq.write_table(table, path, row_group_size=3, compression="zstd")
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = second.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    output = [outcome(item) for item in items(open_source(path))]
    assert [isinstance(one, bytes) for one in output] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path, make_picture, form):
    for n in range(2):
        members = []
        for k in range(3):
            members += [(f"{k}.png", make_picture(10 * n + k)), (f"{k}.cls", b"%d\n" % k), (f"{k}.json", b"{}")]
        tar_of(tmp_path / f"{n}.tar", members, format=form)
    source = open_source(str(tmp_path / "*.tar"))
    assert source.ids == [f"{n}.tar/{k}.png" for n in range(2) for k in range(3)]
    assert [(i.label, i.read()) for i in items(source)] == [
        (k, make_picture(10 * n + k)) for n in range(2) for k in range(3)
    ]


class Boom:
    def __reduce__(self):
        return os.system, ("touch was_here",)


def test_malicious_tars(tmp_path, make_picture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link, hard, device = (tarfile.TarInfo() for _ in range(3))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../etc/passwd"
    device.type = tarfile.CHRTYPE
    names = ["../../escape.png", "/etc/absolute.png", "a/../../b.png", "<script>.png", "new\nline.png"]
    members = [(name, make_picture(n)) for n, name in enumerate(names)]
    members += [("a.pyd", pickle.dumps(Boom())), ("a.pkl", pickle.dumps(Boom())), ("a.pth", pickle.dumps(Boom()))]
    members += [("link.png", link), ("hard.png", hard), ("device.png", device), ("a.cls", pickle.dumps(Boom()))]
    tar_of(tmp_path / "evil.tar", members)
    source = Tars([tmp_path / "evil.tar"])
    read = [outcome(item) for item in items(source)]
    assert read[:5] == [make_picture(n) for n in range(5)]
    assert all("must be a whole file in its tar, got a link or a device" in output for output in read[5:])
    assert len(read) == 8
    assert os.listdir(tmp_path) == ["evil.tar"]
    assert not os.path.exists("/etc/absolute.png")


def test_a_tar_that_breaks_off_is_one_more_row(tmp_path, make_picture):
    whole = tmp_path / "whole.tar"
    tar_of(whole, [(f"{n}.png", make_picture(n)) for n in range(4)])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        offsets = [member.offset for member in tar] + [tar.offset]
    # Everywhere: in the middle of a picture, of a header, and between two.
    for cut in (offsets[1] + 700, offsets[2] + 100, offsets[3] + 512 + 5):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        output = [outcome(item) for item in items(Tars([path]))]
        complete = sum(end <= cut for end in offsets[1:])
        assert output[:complete] == [make_picture(n) for n in range(complete)]
        assert len(output) > complete
        assert all(isinstance(one, str) for one in output[complete:])
    header = bytearray(data)
    header[offsets[2] : offsets[2] + 512] = b"x" * 512
    path.write_bytes(header)
    source = Tars([path])
    assert source.ids == ["cut.tar/0.png", "cut.tar/1.png", "cut.tar"]
    assert "breaks off after 2 pictures" in outcome(items(source)[2])


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match="must be an uncompressed tar"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("given", ["pipe:cat /etc/passwd", "http://example.org/a.tar", "simplecache::s3://b/a.tar"])
def test_nothing_is_run_or_fetched(given):
    with pytest.raises(InputError, match="must lie on this machine"):
        open_source(given)


def test_kinds_are_not_mixed(folder):
    (folder / "a.csv").write_text("path\n00.png\n")
    with pytest.raises(InputError, match="must be of one kind"):
        open_source([str(folder / "a.csv"), str(folder / "00.png")])
    with pytest.raises(InputError, match="must be paths, a data set or a Source, got int"):
        open_source(3)
    with pytest.raises(InputError, match="none for"):
        open_source(str(folder / "*.tar"))


def test_torch_datasets():
    data = TensorDataset(torch.arange(12.0).reshape(4, 3, 1, 1), torch.tensor([3, 1, 0, 2]))
    source = open_source(data)
    assert source.ids == ["0", "1", "2", "3"]
    result = [item.read() for item in items(source)]
    assert all(isinstance(one, Labelled) for one in result)
    assert [one.label for one in result] == [3, 1, 0, 2]
    assert torch.equal(result[2].picture, data[2][0])
    named = TorchDataset(data, ids=list("abca"), version="2")
    assert named.ids == ["a", "b", "c", "a#2"]
    assert named.listing().content != source.listing().content
    with pytest.raises(InputError, match="ids must be one for each of 4 entries, got 1"):
        TorchDataset(data, ids=["a"])

    class Plain:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Image.new("RGB", (2, 2)), {"boxes": []}

    assert items(open_source(Plain()))[0].read().label == {"boxes": []}


def test_hugging_face(make_picture):
    datasets = pytest.importorskip("datasets")
    pictures = [make_picture(n) for n in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": one, "path": None} for one in pictures], "label": [0, 1, 1]}, features=features
    )
    source = open_source(data)
    assert source.ids == ["0", "1", "2"]
    assert [(item.label, item.read()) for item in items(source)] == list(zip([0, 1, 1], pictures, strict=True))
    assert open_source(data).listing() == source.listing()
    assert open_source(data.select([0, 1])).listing().content != source.listing().content
    with pytest.raises(InputError, match="column must be one of images"):
        type(source)(data, column="label")
