import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai.datasets import decode as decoding
from pyfast_xai.datasets import reduced_jpeg
from pyfast_xai.datasets.decode import (
    decode,
    decode_bytes,
    normalised,
    pillow_for_threads,
    recycle_pixels,
    visible_pixels,
)
from pyfast_xai.datasets.sources import Item, Labelled
from pyfast_xai.images import ImageError, Preprocess, load_image, upright

MOST = 1_000_000


def item(value, label=None):
    def read():
        if isinstance(value, Exception):
            raise value
        return value

    return Item("name.png", 0, "somewhere", read, label)


def test_inputs_are_those_of_the_preprocessing(make_picture):
    for size, resize, crop, mean in (
        (24, None, "center", (0.4, 0.5, 0.6)), (24, 27, "center", (0.5,) * 3), ((20, 31), None, "squash", (0.5,) * 3),
        (40, 26, "center", (0.1, 0.2, 0.3)), (16, 20, "center", (0.3,)),
    ):  # fmt: skip
        for how in ("nearest", "bilinear", "bicubic", "lanczos", "box"):
            preprocess = Preprocess(size, resize, mean, tuple(0.2 + 0.1 * m for m in mean), how, crop)
            data = make_picture(3)
            recorded = decode(item(data), preprocess, MOST)
            assert recorded.size == (32, 28)
            image = Image.open(io.BytesIO(data)).convert("RGB")
            assert torch.equal(normalised(recorded.input[None], preprocess)[0], preprocess(image)[0])


def test_extreme_shapes():
    for size in ((1, 9000), (9000, 1), (1, 1)):
        image = Image.new("RGB", size, "red")
        preprocess = Preprocess(24)
        assert torch.equal(visible_pixels(preprocess, image).float() / 255, preprocess.shown(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_bytes_are_read_as_files_are(tmp_path, make_picture, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = make_picture(1, kind, **({} if kind in ("BMP", "GIF") else {"exif": exif}))
    (tmp_path / "a").write_bytes(data)
    ours, theirs = (
        np.asarray(image).astype(int) for image in (decode_bytes(data, "a", MOST), load_image(tmp_path / "a"))
    )
    assert ours.shape == theirs.shape
    # Two JPEG decoders may round differently.
    assert np.abs(ours - theirs).max() <= (1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 0, "quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_fast_decoder_agrees(monkeypatch, how, mode):
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)).convert(mode)
    sink = io.BytesIO()
    image.save(sink, "JPEG", **how)
    fast = np.asarray(decode_bytes(sink.getvalue(), "a", MOST)).astype(int)
    monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    slow = np.asarray(decode_bytes(sink.getvalue(), "a", MOST)).astype(int)
    assert np.abs(fast - slow).max() <= 1


def test_what_the_fast_decoder_refuses_pillow_decides(make_picture, monkeypatch):
    # Rows must not depend on what is installed.
    data = bytearray(make_picture(2, "JPEG", quality=95))
    chance = random.Random(0)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(3):
            broken[chance.randrange(2, len(data))] = chance.randrange(256)
        output = []
        for fast in (True, False):
            with monkeypatch.context() as patch:
                if not fast:
                    patch.setattr(decoding, "_simplejpeg", lambda: None)
                decoded = decode(item(bytes(broken)), Preprocess(24), MOST)
                output.append(None if decoded.error is None else str(decoded.error))
        assert output[0] == output[1]


def bomb(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(min((width // 8 + 2) * height, 1 << 22)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_that_claims(make_picture, side):
    data = bytearray(make_picture(0, "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.fixture
def hand_made(make_picture):
    whole = make_picture(0)
    return {
        "zero bytes": b"",
        "text": b"this is no picture",
        "truncated": whole[: len(whole) // 2],
        "truncated jpeg": make_picture(0, "JPEG")[:200],
        "bomb": bomb(30000, 30000),
        "larger bomb": bomb(2**31 - 1, 2**31 - 1),
        "a jpeg that claims to be large": jpeg_that_claims(make_picture, 65500),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pickle": b"\x80\x04cos\nsystem\n.",
    }


def test_bad_bytes_are_told(hand_made):
    for name, data in hand_made.items():
        decoded = decode(item(data), Preprocess(24), MOST)
        assert isinstance(decoded.error, ImageError), name
        assert decoded.input is None
        assert "\n" not in str(decoded.error)
        assert decoded.error.__traceback__ is None


def test_items_that_are_no_bytes():
    preprocess = Preprocess(24)
    whole = torch.rand(3, 5, 7)
    assert torch.equal(decode(item(whole), preprocess, MOST).input, whole)
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    recorded = decode(item(Labelled(pixels, 4)), preprocess, MOST)
    assert (recorded.label, recorded.size) == (4, (40, 30))
    assert torch.equal(recorded.input, decode(item(image), preprocess, MOST).input)
    assert decode(item(image, 7), preprocess, MOST).label == 7
    for wrong in (3, None, torch.zeros(3, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), Image.new("RGB", (1001, 1000))):
        assert isinstance(decode(item(wrong), preprocess, MOST).error, ImageError), wrong
    for raised in (OSError("gone"), KeyError("x"), MemoryError(), RecursionError()):
        assert decode(item(raised), preprocess, MOST).error is raised


def test_threads_share_one_pillow(make_picture, monkeypatch):
    # The limit and the warnings of Pillow belong to the process.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    filters = list(warnings.filters)
    sink = io.BytesIO()
    Image.new("L", (300, 20)).save(sink, "PNG")
    with pytest.raises(ImageError, match="far more"):
        decode_bytes(sink.getvalue(), "a", 10_000)
    odd = make_picture(0, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    with pillow_for_threads(10_000), ThreadPoolExecutor(4) as pool:
        work = [odd, sink.getvalue()] * 50
        assert all(image.mode == "RGB" for image in pool.map(lambda data: decode_bytes(data, "a", 10_000), work))
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert warnings.filters == filters


def test_memory_of_decoded_pictures_serves_the_next_ones(make_picture):
    files = [make_picture(n, "JPEG", size=(40 * n, 30 * n)) for n in (7, 1, 9, 2, 9)]
    files += [files[0][:200], make_picture(3, "PNG"), files[1]]

    def decoded(data):
        try:
            return np.asarray(decode_bytes(data, "a", MOST))
        except ImageError as error:
            return str(error)

    expected = [decoded(data) for data in files]
    blocks = Image.core.get_blocks_max()
    with pillow_for_threads(MOST, threads=2), ThreadPoolExecutor(1, initializer=recycle_pixels) as pool:
        assert Image.core.get_blocks_max() > blocks
        output = list(pool.map(decoded, files))
    assert Image.core.get_blocks_max() == blocks
    assert all(np.array_equal(one, other) for one, other in zip(output, expected, strict=True))


@pytest.mark.parametrize(
    ("size", "preprocess", "decoded_at"),
    [
        ((1600, 1200), Preprocess(128, 150), (400, 300)),
        ((1202, 1602), Preprocess(128, 150), (601, 801)),
        ((1201, 1601), Preprocess(128, 150), (1201, 1601)),
        ((1600, 1200), Preprocess((60, 80), crop="squash"), (200, 150)),
        ((590, 900), Preprocess(128, 150), (590, 900)),  # a half would be less than twice the input
    ],
    ids=["quarter", "half", "odd", "squashed", "too small"],
)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_large_jpeg_files_at_a_fraction_of_their_size(size, preprocess, decoded_at, orientation, monkeypatch):
    exif, sizes = Image.Exif(), []
    exif[0x0112] = orientation
    stored = size[::-1] if orientation >= 5 else size
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize(stored, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90, exif=exif)
    whole = decode(item(sink.getvalue()), preprocess, 2_000_000)
    for module in (decoding, reduced_jpeg):
        monkeypatch.setattr(module, "upright", lambda *options: sizes.append(upright(*options)) or sizes[-1])
    result = decode(item(sink.getvalue()), preprocess, 2_000_000, reduced_jpeg=True)
    assert [image.size for image in sizes] == [decoded_at]
    assert result.size == whole.size == size
    difference = (result.input.int() - whole.input.int()).abs()
    assert difference.float().mean() < 1
    assert difference.max() <= 8
    assert bool(difference.any()) == (decoded_at != size)


def test_only_whole_jpeg_files_are_reduced(make_picture):
    preprocess = Preprocess(24)
    for data in (make_picture(0), make_picture(0, "JPEG")[:-300], b"no picture", make_picture(0, "JPEG", exif=b"Exif")):
        plain, result = (decode(item(data), preprocess, MOST, reduced_jpeg=reduced) for reduced in (False, True))
        assert (str(plain.error), plain.size) == (str(result.error), result.size)
        assert (plain.input is None) == (result.input is None)
        assert plain.input is None or torch.equal(plain.input, result.input)
    too_large = decode(item(make_picture(0, "JPEG", size=(600, 400))), preprocess, 1000, reduced_jpeg=True)
    assert "must have at most 1,000 pixels, got 600 x 400" in str(too_large.error)


def mutated(data, chance):
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        how, place = chance.randrange(5), chance.randrange(len(data))
        if how == 0:
            data[place] = chance.randrange(256)
        elif how == 1:
            del data[place : place + chance.randint(1, 40)]
        elif how == 2:
            data[place:place] = chance.randbytes(chance.randint(1, 40))
        elif how == 3:
            del data[max(1, place) :]
        else:
            # Numbers in headers, as large as they can be.
            data[place : place + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"])
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


KINDS = [(kind, {}) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")]
KINDS += [
    ("JPEG", {"progressive": True}),
    *(("TIFF", {"compression": how}) for how in ("tiff_lzw", "tiff_adobe_deflate")),
]


def survive(make_picture, count, seed):
    chance = random.Random(seed)
    whole = [make_picture(n, kind, **how) for n, (kind, how) in enumerate(KINDS)]
    preprocess, good = Preprocess(24), 0
    with pillow_for_threads(MOST):
        for n in range(count):
            decoded = decode(item(mutated(whole[n % len(whole)], chance)), preprocess, MOST)
            assert (decoded.input is None) == (decoded.error is not None)
            if decoded.input is None:
                assert isinstance(decoded.error, ImageError)
            else:
                assert decoded.input.shape == (3, 24, 24)
                good += 1
    assert 0 < good < count


def test_mutations(make_picture):
    survive(make_picture, 450, 0)


@pytest.mark.extended
def test_ten_thousand_mutations_in_little_memory():
    code = (
        "import resource, runpy, sys, warnings; warnings.simplefilter('error')\n"
        "sys.path[:0] = eval(sys.argv[1]); from pathlib import Path; from import_file import import_file\n"
        "t, c = (import_file(Path(path)) for path in sys.argv[2:])\n"
        "t.survive(c.encoded, 450, 1); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "t.survive(c.encoded, 10000, 2); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    here = os.path.dirname(__file__)
    arguments = [repr(sys.path), __file__, os.path.join(here, "conftest.py")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # KiB above what a few hundred took: a million pixels and their copies.
    assert int(done.stdout) < 200_000
