import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai import images
from pyfast_xai.errors import InputError
from pyfast_xai.images import FORMATS, ImageError, Preprocess, find_images, load_image

# Four corners of different colours show every turn.
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def picture():
    image = Image.new("RGB", (64, 32), WHITE)
    image.paste(RED, (0, 0, 32, 16))
    image.paste(GREEN, (32, 0, 64, 16))
    image.paste(BLUE, (0, 16, 32, 32))
    return image


def corners(image):
    width, height = image.size
    return [image.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]


def near(a, b, far=6):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= far


@pytest.mark.parametrize(
    ("kind", "suffix"), list(zip(FORMATS, ("png", "jpg", "webp", "bmp", "gif", "tif"), strict=True))
)
def test_every_format_is_read_whatever_its_name(tmp_path, picture, kind, suffix):
    for name in (f"a.{suffix}", "no suffix", "lies.txt"):
        picture.save(tmp_path / name, kind)
        image = load_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (64, 32))
        assert near(corners(image), [RED, GREEN, BLUE, WHITE], 40 if kind in ("JPEG", "WEBP") else 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.new("L", (16, 8), 0)
    grey.paste(255, (0, 0, 8, 8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "PA":
        image = grey.convert("LA").convert("PA")
    else:
        image = grey.convert(mode)
    assert image.mode == mode
    path = tmp_path / ("a.tif" if mode in ("PA", "CMYK", "YCbCr", "I", "F") else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    assert near(loaded.getpixel((2, 2)), WHITE)
    assert near(loaded.getpixel((12, 2)), (0, 0, 0))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in ("png", "tif"):
        Image.fromarray(ramp).save(tmp_path / f"a.{kind}")
        assert np.array_equal(np.asarray(load_image(tmp_path / f"a.{kind}"))[..., 0].ravel(), np.arange(256))
    # Dark pictures stay dark: the range is that of the format, not of the picture.
    Image.fromarray(ramp // 4).save(tmp_path / "dark.png")
    assert np.asarray(load_image(tmp_path / "dark.png")).max() == 64


def test_big_endian_sixteen_bits(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(">u2")
    Image.frombytes("I;16B", (16, 16), ramp.tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif"))[..., 0].ravel(), np.arange(256))


def test_grey_without_a_known_range_is_stretched(tmp_path):
    Image.fromarray(np.array([[-3.0, 0.0], [np.nan, 5.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    values = np.asarray(load_image(tmp_path / "a.tif"))[..., 0]
    assert (values.min(), values.max()) == (0, 255)


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "b.webp", lossless=True)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "c.png", transparency=1)
    palette.save(tmp_path / "d.gif", transparency=1)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "e.png", transparency=(1, 2, 3))
    Image.new("L", (4, 4), 7).save(tmp_path / "f.png", transparency=7)
    Image.new("P", (4, 4), 0).save(tmp_path / "g.png", transparency=bytes([0, 255]))
    for name in ("a.png", "c.png", "d.gif", "e.png", "f.png", "g.png"):
        assert load_image(tmp_path / name).getpixel((1, 1)) == WHITE, name
    assert near(load_image(tmp_path / "b.webp").getpixel((1, 1)), (255, 127, 127), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_applied(tmp_path, picture, orientation, kind):
    # The stored pixels, which a viewer turns back to `picture`.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = picture if orientation == 1 else picture.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a", kind, exif=exif)
    image = load_image(tmp_path / "a")
    assert image.size == (64, 32)
    assert near(corners(image), [RED, GREEN, BLUE, WHITE], 40)


def test_broken_metadata_is_no_reason_to_refuse(tmp_path, picture):
    picture.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert load_image(tmp_path / "a.jpg").size == (64, 32)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((2, 2)) == RED
    assert load_image(tmp_path / "a.tif").getpixel((2, 2)) == RED


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def bad_files(folder):
    buffer = io.BytesIO()
    Image.effect_noise((128, 128), 60).save(buffer, "PNG")
    whole = buffer.getvalue()
    jpeg = io.BytesIO()
    Image.effect_noise((128, 128), 60).save(jpeg, "JPEG")
    files = {
        "truncated.png": (whole[: len(whole) // 2], "broken data"),
        "truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "broken data"),
        "flipped.png": (whole[:60] + bytes(200) + whole[260:], "broken data"),
        "head.png": (whole[:20], ""),
        "zero.png": (b"", "empty"),
        "text.jpg": (b"this is no picture", "something else"),
        "page.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "something else"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "something else"),
        "wide.png": (png_header(9000, 9000), "64,000,000 pixels, got 9000 x 9000"),
        "bomb.png": (png_header(60000, 60000), "64,000,000 pixels"),
        "odd\n[name]\t.png": (b"no", "something else"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    names = {name: reason for name, (_, reason) in files.items()}
    return {
        **names,
        "missing.png": "no such file",
        "folder.png": "a folder",
        "pipe.png": "no such file",
        "\0": "no such",
    }


def test_bad_file_is_one_sentence_that_names_it(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        message = str(caught.value)
        assert message.startswith("image ")
        assert "\n" not in message
        assert repr(name)[1:-1] in message
        assert reason in message, message
        assert isinstance(caught.value, InputError)


def test_size_is_checked_before_decoding(tmp_path):
    # Its data would be broken: the header alone is read.
    (tmp_path / "a.png").write_bytes(png_header(100, 100))
    with pytest.raises(ImageError, match="at most 9,999 pixels, got 100 x 100"):
        load_image(tmp_path / "a.png", max_pixels=9_999)
    with pytest.raises(ImageError, match="broken data"):
        load_image(tmp_path / "a.png", max_pixels=10_000)


def test_more_pixels_than_pillow_allows(tmp_path, monkeypatch):
    Image.new("1", (60, 50)).save(tmp_path / "a.png")
    Image.new("1", (60, 500)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert load_image(tmp_path / "a.png", max_pixels=3000).size == (60, 50)
    with pytest.raises(ImageError, match="at most 2,999 pixels, got 60 x 50"):
        load_image(tmp_path / "a.png", max_pixels=2999)
    with pytest.raises(ImageError, match="at most 3,000 pixels, got far more"):
        load_image(tmp_path / "b.png", max_pixels=3000)
    # A limit below Pillow's own is told from what lies between the two, and Pillow's is as it was.
    with pytest.raises(ImageError, match="at most 999 pixels, got far more"):
        load_image(tmp_path / "a.png", max_pixels=999)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match="must be readable"):
        load_image(tmp_path / "a.png")


def test_folders_and_patterns(tmp_path, monkeypatch):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "sub/c.tiff", "sub/.cache/d.png", "x[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def names(*options):
        return [str(path) for path in find_images(options)]

    assert names(".") == ["a.jpg", "b.PNG", "sub/c.tiff", "x[1].png"]
    assert names("*.jpg", "sub") == ["a.jpg", "sub/c.tiff"]
    assert names("**/*.tiff") == ["sub/c.tiff"]
    assert names("x[1].png") == ["x[1].png"]
    assert names("b.PNG", "a.jpg", "b.PNG") == ["b.PNG", "a.jpg"]
    # Files named explicitly are taken, so that a missing file is reported.
    assert names("notes.txt", "missing.png") == ["notes.txt", "missing.png"]
    assert names("sub", "*.jpg") == ["sub/c.tiff", "a.jpg"]
    assert [str(path) for path in find_images(["."], without=tmp_path / "sub")] == ["a.jpg", "b.PNG", "x[1].png"]
    assert [str(path) for path in find_images(["sub"], without="sub")] == ["sub/c.tiff"]
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "*.gif"):
        with pytest.raises(ImageError, match="at least one picture"):
            find_images([nothing])


def test_preprocess_equals_torchvision(picture):
    transforms = pytest.importorskip("torchvision.transforms._presets")
    rng = np.random.default_rng(0)
    for size in ((64, 32), (301, 443), (500, 375), (224, 224), (255, 257)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for crop, resize in ((224, 256), (224, 224), (299, 342)):
            expected = transforms.ImageClassification(crop_size=crop, resize_size=resize)(image)
            recorded, shown = Preprocess(crop, resize)(image)
            torch.testing.assert_close(recorded, expected, atol=1e-6, rtol=0)
            assert shown.shape == (3, crop, crop)
            assert 0 <= shown.min() <= shown.max() <= 1


def test_preprocess_of_one_channel_and_of_a_rectangle(picture):
    recorded, shown = Preprocess((20, 44), mean=(0.0,), std=(1.0,), crop="squash")(picture)
    assert recorded.shape == (1, 20, 44)
    assert shown.shape == (3, 20, 44)
    assert recorded[0, 2, 2] == pytest.approx(0.299, abs=1e-3)


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("size", [(320, 200), (200, 320), (97, 431), (64, 64)])
def test_places_on_the_input_are_found_on_the_picture(size, crop):
    preprocess = Preprocess(48, 56, interpolation="bilinear", crop=crop)
    left, top, right, bottom = preprocess.window(size)
    for x, y in ((0.1, 0.2), (0.5, 0.5), (0.9, 0.7)):
        # A bright spot put on the picture lights up a pixel of the input, which leads back to it.
        column, row = int(left + x * (right - left)), int(top + y * (bottom - top))
        radius = max(3, min(size) // 25)
        image = Image.new("RGB", size)
        image.paste(WHITE, (column - radius, row - radius, column + radius + 1, row + radius + 1))
        recorded = preprocess(image)[1].mean(0)
        peak = recorded.flatten().argmax()
        point = torch.stack([peak // 48, peak % 48])[None]
        back = preprocess.points_in(point, size)[0]
        pixel = max((right - left) / 48, (bottom - top) / 48)
        assert (back - torch.tensor([row, column])).abs().max() <= radius + pixel
        lit = (recorded > recorded.max() / 2).nonzero()
        box = torch.cat([lit.amin(0).flip(0), lit.amax(0).flip(0)])[None].float()
        expected = torch.tensor([column - radius, row - radius, column + radius, row + radius])
        assert (preprocess.boxes_in(box, size)[0] - expected).abs().max() <= pixel + 1


def test_whole_input_is_the_whole_window():
    preprocess = Preprocess(224, 256)
    box = preprocess.boxes_in(torch.tensor([[0.0, 0, 223, 223], [torch.nan] * 4]), (512, 512))
    assert box[0].tolist() == [32, 32, 479, 479]
    assert box[1].isnan().all()
    assert Preprocess(96).boxes_in(torch.tensor([[3.0, 4, 5, 6]]), (96, 96)).tolist() == [[3, 4, 5, 6]]
    assert Preprocess(96).points_in(torch.tensor([[3, 95]]), (96, 96)).tolist() == [[3, 95]]


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 60_000_000), (3, 5_000_001)])
@pytest.mark.parametrize(
    "preprocess", [Preprocess(224, 256), Preprocess(224), Preprocess(40, 20), Preprocess((64, 900))]
)
def test_extreme_shapes_are_never_resized_as_a_whole(monkeypatch, size, preprocess):
    resize = Image.Image.resize

    def small(image, size, *args, **kwargs):
        assert size[0] * size[1] <= images.MAX_PIXELS
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", small)
    image = Image.new("RGB", size, RED)
    for zoom in (1, 2):
        shown = preprocess.shown(image, zoom)
        assert shown.shape == (3, zoom * preprocess.shape[0], zoom * preprocess.shape[1])
        assert shown[0].mean() > 0.2


@pytest.mark.parametrize(("width", "height"), [(12, 4001), (31, 4000), (4001, 50), (300, 4003)])
@pytest.mark.parametrize(
    "preprocess", [Preprocess(48, 56), Preprocess(48, interpolation="lanczos"), Preprocess(40, 20)]
)
def test_far_ends_do_not_matter(monkeypatch, width, height, preprocess):
    rng = np.random.default_rng(0)
    # Coarse structure, as the ends may shift the view by less than a pixel of the input.
    coarse = Image.fromarray(rng.integers(0, 256, (height // 50 + 1, width // 50 + 1, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    for zoom in (1, 3):
        whole = preprocess.shown(image, zoom)
        with monkeypatch.context() as patch:
            patch.setattr(images, "MAX_PIXELS", 1000)
            assert (preprocess.shown(image, zoom) - whole).abs().mean() < 0.06


def test_enlarged_view_shows_the_same_crop(picture):
    for preprocess in (Preprocess(24, 28), Preprocess(24, crop="squash"), Preprocess(40, 20)):
        single, larger = preprocess.shown(picture), preprocess.shown(picture, 4)
        assert larger.shape == (3, 4 * single.shape[1], 4 * single.shape[2])
        small = torch.nn.functional.avg_pool2d(larger[None], 4)[0]
        assert (small - single).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got size 0"),
        ({"size": 8, "mean": (0.5,)}, "mean and std must have 3 values each, or 1, got 1 and 3"),
        ({"size": 8, "std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"size": 8, "interpolation": "fancy"}, "interpolation must be"),
        ({"size": 8, "crop": "left"}, "crop must be 'center' or 'squash', got 'left'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Preprocess(**settings)


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("size", [(64, 48), (31, 97), (20, 20)])
def test_boxes_seen_undo_boxes_in(crop, size):
    preprocess = Preprocess(size=(24, 32), resize=None if crop == "squash" else 40, crop=crop)
    whole = torch.tensor([[0.0, 0, 31, 23]])
    recorded = preprocess.visible_boxes(preprocess.boxes_in(whole, size), size)
    # The picture's pixels that the window touches reach beyond it, and are cut again.
    assert torch.allclose(recorded, whole, atol=1e-4)
    inner = torch.tensor([[0.0, 0, size[0] - 1, size[1] - 1], [-9.0, -9, -5, -5]])
    assert preprocess.visible_boxes(inner, size).shape == (1, 4)


def test_boxes_seen_in_a_squashed_picture_are_scaled():
    recorded = Preprocess(size=(10, 20), crop="squash").visible_boxes(torch.tensor([[4.0, 5, 7, 9]]), (40, 50))
    # Edges 4..8 and 5..10 of 40 x 50, on 20 x 10.
    assert torch.allclose(recorded, torch.tensor([[2.0, 1, 3, 1]]))


def forms(picture):
    """One picture in every form that a user may have it in."""
    pixels = np.array(picture)
    return {
        "pillow": picture,
        "rgba": picture.convert("RGBA"),
        "hwc": pixels,
        "chw": pixels.transpose(2, 0, 1),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "float": (pixels / 255).astype(np.float32),
        "lists": pixels.tolist(),
        "int64": pixels.astype(np.int64),
    }


@pytest.mark.parametrize(
    "form", ["pillow", "rgba", "hwc", "chw", "tensor", "float", "lists", "int64", "path", "text path"]
)
def test_a_picture_is_taken_in_every_form(tmp_path, picture, form):
    picture.save(tmp_path / "a.png")
    options = {**forms(picture), "path": tmp_path / "a.png", "text path": str(tmp_path / "a.png")}[form]
    loaded = load_image(options)
    assert (loaded.mode, loaded.size) == ("RGB", picture.size)
    assert np.array_equal(np.array(loaded), np.array(picture))
    preprocess = Preprocess(24)
    expected = preprocess(picture)
    for result in (preprocess(options), [part[0] for part in preprocess.batch(options)]):
        assert all(torch.equal(item, other) for item, other in zip(result, expected, strict=True))


def test_grey_pixels_become_colours():
    values = np.arange(30, dtype=np.uint8).reshape(5, 6)
    for options in (values, values[..., None], values[None]):
        assert np.array_equal(np.array(load_image(options)), np.repeat(values[..., None], 3, 2))
    assert np.array(load_image(np.ones((5, 6), bool))).min() == 255


def test_an_open_picture_is_turned_upright_once(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose(2)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        single = load_image(opened)
    assert np.array_equal(np.array(load_image(single)), np.array(picture))


def test_several_pictures_become_a_batch(picture):
    preprocess = Preprocess(24)
    several = list(forms(picture).values())
    inputs, shown = preprocess.batch(several)
    assert inputs.shape == shown.shape == (len(several), 3, 24, 24)
    stacked, _ = preprocess.batch(np.stack([np.array(picture)] * 2))
    assert torch.equal(stacked, inputs[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(None, "image must be a path, a Pillow image or pixels", id="none"),
        pytest.param(np.zeros((5, 5, 7)), r"got \[5, 5, 7\]", id="channels"),
        pytest.param(np.zeros((2, 3, 4, 4)), r"got a batch \[2, 3, 4, 4\]", id="batch"),
        pytest.param(np.full((4, 4), 200.0), r"in 0..1, got 200 to 200: divide by 255", id="pixels"),
        pytest.param(np.full((4, 4), -2.0), r"got -2 to -2: undo the normalisation", id="normalised"),
        pytest.param(np.full((4, 4), 300), r"int64 must hold numbers in 0..255, got 300 to 300", id="large"),
        pytest.param(np.full((4, 4), np.nan), "must hold numbers in 0..1, got nan to nan", id="nan"),
        pytest.param([[1, 2], [3]], "image must be a path", id="ragged"),
        pytest.param(Image.new("L", (9000, 9000)), "at most 64,000,000 pixels, got 9000 x 9000", id="too many"),
    ],
)
def test_what_is_no_picture_is_said(given, message):
    with pytest.raises(ImageError, match=message) as caught:
        load_image(given)
    assert "\n" not in str(caught.value)


def test_an_empty_list_is_no_batch():
    with pytest.raises(ImageError, match="images must hold at least one picture, got none"):
        Preprocess(24).batch([])
