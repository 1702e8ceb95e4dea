"""Small pictures: what they show, and that threads change nothing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai import datasets, report
from pyfast_xai.datasets import reduced_jpeg
from pyfast_xai.datasets.sources import Item, Labelled
from pyfast_xai.images import MAX_PIXELS, Preprocess, load_image
from pyfast_xai.report.thumbnails import thumbnail


def photo(size, seed=0):
    """Soft colours, as photographs have them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **how):
    sink = io.BytesIO()
    image.save(sink, kind, **how)
    return sink.getvalue()


def item(result):
    return Item("a", 0, "a", lambda: result)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def as_seen(data, preprocess, size, tmp_path):
    """The crop of the whole picture, made smaller."""
    (tmp_path / "a").write_bytes(data)
    recorded = preprocess.shown(load_image(tmp_path / "a"))
    image = Image.fromarray((recorded * 255).round().byte().permute(1, 2, 0).numpy())
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(float)


@pytest.mark.parametrize(
    ("size", "preprocess", "shown"),
    [
        ((1300, 900), Preprocess(224, 256), (112, 112)),
        ((1300, 901), Preprocess((96, 160), 128), (112, 67)),
        ((900, 1303), Preprocess(224, crop="squash"), (112, 112)),
        ((500, 375), Preprocess(224, 256), (112, 112)),
        ((150, 120), Preprocess(224), (112, 112)),
        ((1300, 200), Preprocess(96, 64), (96, 96)),  # black beyond the picture
        ((20, 2000), Preprocess(24), (24, 24)),
    ],
)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_picture_that_is_decoded_small_shows_the_same(size, preprocess, shown, orientation, tmp_path):
    data = encoded(photo(size), quality=95, **turned(orientation))
    result = thumbnail(item(data), preprocess, 112, MAX_PIXELS)
    assert result.size == shown
    expected = as_seen(data, preprocess, shown, tmp_path)
    # Colours change by hundreds of levels over the picture; a pixel of the crop is worth a few.
    assert np.abs(np.asarray(result) - expected).mean() < 2.5


def test_large_pictures_are_not_decoded_in_full(monkeypatch):
    sizes = []
    monkeypatch.setattr(reduced_jpeg, "to_rgb", lambda image: sizes.append(image.size) or image.convert("RGB"))
    for size in ((4000, 3000), (1300, 900), (700, 500), (350, 350)):
        thumbnail(item(encoded(photo(size))), Preprocess(224, 256), 112, MAX_PIXELS)
    # Reduced so that 1.5 pixels are left for each of the 112 shown; the decoder of runs reads the full size.
    assert sizes == [(500, 375), (325, 225), (350, 250)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "image", "bytes tensor", "labelled"])
def test_small_pictures_are_those_of_the_network(kind, tmp_path):
    image = photo((260, 240))
    data = encoded(image, "PNG" if kind != "JPEG" else kind)
    result = {
        "image": image,
        "bytes tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "labelled": Labelled(data, 3),
    }.get(kind, data)
    shown = np.asarray(thumbnail(item(result), Preprocess(224, 256), 112, MAX_PIXELS)).astype(float)
    # JPEG decoders may differ by a grey level.
    assert np.abs(shown - as_seen(data, Preprocess(224, 256), (112, 112), tmp_path)).max() <= (kind == "JPEG")


def test_tensors_are_shown_as_they_are():
    shown = thumbnail(item(torch.linspace(-3, 5, 24 * 24).reshape(1, 24, 24)), Preprocess(24), 112, MAX_PIXELS)
    grey = np.asarray(shown)[..., 0]
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)


def test_too_large_pictures_are_not_decoded():
    with pytest.raises(ValueError, match="must have at most 1,000 pixels"):
        thumbnail(item(encoded(photo((1300, 900)))), Preprocess(24), 24, 1000)


@pytest.mark.parametrize("methods", [("grad-cam",), ("saliency", "clear", "fixations")])
def test_threads_change_nothing(methods, made, loaded, tmp_path, explained):
    runs = [explained(made.folder, loaded, tmp_path / method, method) for method in methods]
    pages = [report.write(runs, tmp_path / f"{n}.html", workers=n).path.read_bytes() for n in (1, 2, 7)]
    assert pages[0] == pages[1] == pages[2]


def test_few_pictures_are_held_at_a_time(made, loaded, tmp_path, explained, paint, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 60)
    run = explained(folder, loaded, tmp_path / "run")
    requests, most, done = [], [], []

    def counted(item, *options):
        requests.append(item.index)
        return thumbnail(item, *options)

    monkeypatch.setattr("pyfast_xai.report.pictures.thumbnail", counted)

    def note(progress):
        done.append(progress.done)
        most.append(len(requests) - progress.done)

    report.write(run, tmp_path / "r.html", workers=2, progress=note)
    assert done == list(range(1, 61))
    assert max(most) <= 8 * 2 + 1
    assert sorted(requests) == list(range(60))


def test_what_stops_a_report_stops_its_threads(made, tmp_path):
    import threading

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write(made.one, tmp_path / "r.html", workers=3, progress=stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_a_row_group_is_read_once(tmp_path, loaded):
    """Not once a picture: it may hold thousands."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [{"bytes": encoded(photo((32, 28), n), "PNG"), "path": None} for n in range(40)]
    pq.write_table(pa.table({"image": pictures, "id": [str(n) for n in range(40)]}), tmp_path / "a.parquet")
    datasets.explain(str(tmp_path / "a.parquet"), loaded, method="saliency", out=tmp_path / "run", shard_size=16)
    with pytest.MonkeyPatch.context() as patch:
        reads = []
        read = pq.ParquetFile.iter_batches

        def counted(file, size, groups=None, columns=None, **settings):
            reads.append(columns)
            return read(file, size, groups, columns, **settings)

        patch.setattr(pq.ParquetFile, "iter_batches", counted)
        assert report.write(tmp_path / "run", tmp_path / "r.html").pictures == 40
    assert reads == [["image"]]


@pytest.mark.parametrize("indices", [[], [0], [14], list(range(15)), [0, 1, 2, 13, 14], [0, 3, 6, 9, 12], [2, 11]])
def test_some_rows_and_items(made, indices):
    results = datasets.open(made.one)
    assert [row["index"] for row in results.rows(indices)] == indices
    assert [dict(row) for row in results.rows(indices)] == [dict(results[index]) for index in indices]
    assert [result.index for result in results.items(indices)] == indices
    places = [result.place for result in results.items(indices)]
    assert places == [results[index]["source"] for index in indices]


def test_items_without_a_source(made, loaded, tmp_path, explained, paint):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 3)
    out = explained(folder, loaded, tmp_path / "run", labels=False)
    folder.rename(tmp_path / "moved")
    assert list(datasets.open(out).items([0, 2])) == [None, None]


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_some(made, tmp_path, workers):
    with pytest.raises(ValueError, match=f"^workers must be at least 1, got {workers}"):
        report.write(made.one, tmp_path / "r.html", workers=workers)
