"""Sources and runs in an object store, on the one that `fsspec` keeps in memory."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyfast_xai import datasets
from pyfast_xai.errors import InputError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(folder):
    """A store with the pictures of `folder` under `memory://bucket/pictures`."""
    store = fsspec.filesystem("memory")
    for name in os.listdir(folder):
        store.pipe_file(f"/bucket/pictures/{name}", (folder / name).read_bytes())
    yield store
    store.rm("/", recursive=True)


def steady(out):
    timing = ("source", "decode_ms", "explain_ms")
    return [{name: value for name, value in row.items() if name not in timing} for row in datasets.open(out)]


def run(source, loaded, out):
    return datasets.explain(source, loaded, method="saliency", out=out, shard_size=6, batch_size=4)


@pytest.fixture
def expected(folder, loaded, tmp_path):
    run(folder, loaded, tmp_path / "here")
    return steady(tmp_path / "here")


def test_pictures_there_and_results_here(bucket, loaded, tmp_path, expected):
    done = run("memory://bucket/pictures", loaded, tmp_path / "out")
    assert (done.rows, done.errors) == (20, 0)
    assert steady(tmp_path / "out") == expected
    assert datasets.open(tmp_path / "out")[0]["source"] == "memory://bucket/pictures/00.png"
    # What lies there is not fetched because a folder says so, but because somebody does.
    assert datasets.open(tmp_path / "out")[2].explanation().images is None
    assert datasets.open(tmp_path / "out", "memory://bucket/pictures")[2].explanation().images is not None


def test_pictures_here_and_results_there(bucket, folder, loaded, expected):
    out = "memory://bucket/results/run"
    assert run(folder, loaded, out).complete
    assert steady(out) == expected
    assert datasets.verify(out, datasets.open_source(folder)).faults == []
    bucket.rm("/bucket/results/run/part-00000002.parquet")
    assert datasets.status(out).rows == 14
    assert run(folder, loaded, out).progress.images == 6
    assert steady(out) == expected
    assert run(folder, loaded, out).progress.images == 0
    pytest.importorskip("duckdb")
    assert datasets.open(out).query("select count(*) from results").fetchall() == [(20,)]
    with pytest.raises(InputError, match="must be continued as it was begun"):
        datasets.explain(folder, loaded, method="eigen-cam", out=out, shard_size=6)
    with pytest.raises(InputError, match="must be one of a run"):
        datasets.open("memory://bucket/nothing")


def test_both_there_with_results_below_the_pictures_and_another_try(bucket, loaded, make_picture):
    bucket.pipe_file("/bucket/pictures/05.jpg", b"no picture")
    out = "memory://bucket/pictures/out"
    for _ in range(2):
        done = run("memory://bucket/pictures", loaded, out)
        assert (done.rows, done.errors) == (20, 1)
    bucket.pipe_file("/bucket/pictures/05.jpg", make_picture(5, "JPEG"))
    job = datasets.prepare("memory://bucket/pictures", loaded, method="saliency", out=out, shard_size=6, batch_size=4)
    assert datasets.retry(job).errors == 0
    assert datasets.verify(out).faults == []


def test_a_file_that_changed_is_noticed(bucket, loaded, tmp_path):
    run("memory://bucket/pictures", loaded, tmp_path / "out")
    bucket.pipe_file("/bucket/pictures/05.jpg", b"other")
    with pytest.raises(InputError, match="the same files, got some"):
        run("memory://bucket/pictures", loaded, tmp_path / "out")
    bucket.pipe_file("/bucket/pictures/more.png", b"new")
    with pytest.raises(InputError, match=r"with source.items 20, got 21"):
        run("memory://bucket/pictures", loaded, tmp_path / "out")


def test_lists_tars_and_tables_there(bucket, folder, loaded, tmp_path, make_picture):
    names = sorted(os.listdir(folder))
    bucket.pipe_file("/bucket/list.csv", ("path,label\n" + "".join(f"pictures/{n},3\n" for n in names)).encode())
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = (folder / name).stat().st_size
            tar.addfile(member, io.BytesIO((folder / name).read_bytes()))
    bucket.pipe_file("/bucket/a.tar", sink.getvalue())
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [(folder / name).read_bytes() for name in names], "id": names}), sink)
    bucket.pipe_file("/bucket/a.parquet", sink.getvalue())
    for source, ids in (
        ("list.csv", [f"pictures/{name}" for name in names]),
        ("a.tar", [f"a.tar/{name}" for name in names]),
        ("a.parquet", names),
        ("pictures/*.png", [f"memory:///bucket/pictures/{name}" for name in names if name.endswith("png")]),
    ):
        out = tmp_path / source.replace("*", "x").replace("/", "-")
        done = run(f"memory://bucket/{source}", loaded, out)
        assert done.errors == 0
        assert [row["id"] for row in datasets.open(out)] == ids


def test_a_container_there_that_changes_before_it_is_read_makes_error_rows(bucket, loaded, tmp_path, make_picture):
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(make_picture(0))
        archive.addfile(member, io.BytesIO(make_picture(0)))
    pq.write_table(pa.table({"image": [make_picture(0)]}), table)
    for name, content in (("a.tar", tar), ("a.parquet", table)):
        source, settings = f"memory://bucket/{name}", {"method": "saliency", "out": tmp_path / name}
        bucket.pipe_file(f"/bucket/{name}", content.getvalue())
        job = datasets.prepare(source, loaded, **settings)
        bucket.pipe_file(f"/bucket/{name}", content.getvalue())
        assert datasets.run_job(job).errors == 1
        assert "must be as it was when the run began" in datasets.open(tmp_path / name)[0]["error_message"]
        assert datasets.retry(datasets.prepare(source, loaded, **settings)).errors == 0


def test_a_table_there_names_no_files_elsewhere(bucket, tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    named = [
        "pictures/00.png",
        "../other/a.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "memory://bucket/pictures/00.png",
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": name} for name in named], kind)}), sink)
    bucket.pipe_file("/bucket/a.parquet", sink.getvalue())
    items = list(datasets.open_source("memory://bucket/a.parquet").items(0, 5))
    assert items[0].read() == bucket.cat_file("/bucket/pictures/00.png")
    for item in items[1:]:
        with pytest.raises(InputError, match="must lie below the folder"):
            item.read()


def test_places_are_not_mixed(bucket, folder):
    with pytest.raises(InputError, match="must lie in one place"):
        datasets.open_source([str(folder), "memory://bucket/pictures"])
    with pytest.raises(InputError, match="none for"):
        datasets.open_source("memory://bucket/nothing*.tar")


def test_the_command(bucket, loaded, tmp_path):
    from typer.testing import CliRunner

    from pyfast_xai import cli

    def call(*words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    bucket.pipe_file("/bucket/pictures/05.jpg", b"no picture")
    out = "memory://bucket/out"
    done = call("run", "memory://bucket/pictures", "--model", "digits", "--out", out)
    assert done.exit_code == 0, done.output
    assert "20 of 20 rows there" in done.output
    assert "20 of 20 rows" in call("status", out).output
    assert call("verify", out).exit_code == 0
    refused = call("retry", out)
    assert refused.exit_code == 2
    assert "source must be named again for what is fetched" in " ".join(refused.output.split())
    assert call("retry", out, "--source", "memory://bucket/pictures").exit_code == 3
    assert call("export", out, "--out", tmp_path / "rows.csv").exit_code == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 21
    for pictures, source in ((0, ()), (19, ("--source", "memory://bucket/pictures"))):
        exported = tmp_path / f"exported-{pictures}"
        assert call("export", out, "--to", "huggingface", "--out", exported, *source).exit_code == 0
        assert 20 - pq.read_table(exported / "data")["image"].null_count == pictures
        page = call("report", out, "--out", tmp_path / "r.html", "--json", *source)
        assert page.exit_code == 0, page.output
        assert f'"items": 20, "total": 20, "errors": 1, "pictures": {pictures},' in page.output


def test_no_url_becomes_a_folder_of_this_machine(folder, loaded, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pyfast_xai import cli, report

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run(folder, loaded, tmp_path / "out")
    for out in (
        "memory://bucket/r.html",
        "s3://bucket/r.html",
        Path("gs://bucket/r.html"),
        "https://example.org/r.html",
    ):
        with pytest.raises(InputError, match="out must lie on this machine, got the URL"):
            report.write(tmp_path / "out", out)
        with pytest.raises(InputError, match="out must lie on this machine, got the URL"):
            datasets.export(tmp_path / "out", "csv", out)
    with pytest.raises(InputError, match="must be on this machine or the text of a URL"):
        run(folder, loaded, Path("memory://bucket/out"))
    for command in (
        ["report", tmp_path / "out"],
        ["export", tmp_path / "out"],
        ["explain", folder / "00.png", "--model", "digits"],
        ["demo"],
    ):
        result = CliRunner().invoke(cli.app, [*map(str, command), "--out", "s3://bucket/r.html"])
        assert result.exit_code == 2, result.output
        assert "out must lie on this machine, got the URL" in " ".join(result.output.split())
    assert os.listdir(here) == []


@pytest.mark.parametrize("call", [datasets.open, datasets.status, datasets.verify])
def test_an_empty_text_is_no_folder(call, folder, loaded, tmp_path, monkeypatch):
    run(folder, loaded, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(InputError, match="got an empty text"):
        call("")


@pytest.mark.slow
def test_a_server_of_s3(folder, loaded, expected, monkeypatch, make_picture):
    server_of = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_of.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    store = s3fs.S3FileSystem(endpoint_url=address)
    try:
        store.mkdir("bucket")
        for name in os.listdir(folder):
            store.pipe_file(f"bucket/pictures/{name}", (folder / name).read_bytes())
        source, out = "s3://bucket/pictures", "s3://bucket/out"
        assert run(source, loaded, out).complete
        assert steady(out) == expected
        store.rm("bucket/out/part-00000001.parquet")
        assert run(source, loaded, out).progress.images == 6
        assert steady(out) == expected
        assert datasets.verify(out).faults == []
        store.pipe_file("bucket/pictures/more.png", b"new")
        with pytest.raises(InputError, match=r"with source.items 20, got 21"):
            run(source, loaded, out)
    finally:
        server.stop()
