import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai import render
from pyfast_xai.errors import InputError


@pytest.fixture
def photo():
    return torch.rand(2, 3, 60, 80) * 0.6 + 0.2


def test_images_within_range_are_shown_as_they_are(photo):
    assert torch.equal(render.for_display(photo), photo)


def test_normalised_images_are_stretched_one_by_one(photo):
    shown = render.for_display(torch.cat([photo, (photo - 0.5) / 0.2]))
    assert torch.equal(shown[:2], photo)
    for item, image in zip(shown[2:], photo, strict=True):
        assert (item.min(), item.max()) == (0, 1)
        torch.testing.assert_close(item, (image - image.min()) / (image.max() - image.min()))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_any_number_of_channels(channels):
    images = torch.rand(2, channels, 5, 6, dtype=torch.float64)
    shown = render.for_display(images)
    assert shown.dtype == torch.float32
    torch.testing.assert_close(shown, images.mean(1, keepdim=True).expand(2, 3, 5, 6).float())


@pytest.mark.parametrize("value", [-7.0, 300.0, math.nan, math.inf])
def test_constant_and_infinite_images_are_shown(value):
    shown = render.for_display(torch.full((1, 3, 4, 4), value))
    assert torch.isfinite(shown).all()
    assert 0 <= shown.min() <= shown.max() <= 1


def test_for_display_wants_a_batch():
    with pytest.raises(InputError, match=r"images must have shape \[N, C, H, W\], got \[3, 4, 4\]"):
        render.for_display(torch.rand(3, 4, 4))


def test_maps_are_normalised_one_by_one():
    maps = torch.rand(3, 5, 6) * torch.tensor([1e-20, 5.0, 1e20]).view(3, 1, 1)
    normal = render.normalize(maps)
    assert normal.amin((1, 2)).tolist() == [0, 0, 0]
    assert normal.amax((1, 2)).tolist() == [1, 1, 1]
    assert render.normalize(torch.full((1, 2, 2), 4.0)).tolist() == [[[0, 0], [0, 0]]]
    assert torch.isfinite(render.normalize(torch.tensor([[[math.nan, 1.0, -math.inf]]]))).all()


@pytest.mark.parametrize("name", ["turbo", "viridis", "plasma", "inferno", "magma", "cividis", "coolwarm", "gray"])
def test_colours_equal_matplotlib(name):
    matplotlib = pytest.importorskip("matplotlib")
    steps = torch.linspace(0, 1, 256)[None, None]
    ours = render.colorize(steps, name)[0, :, 0].T.numpy()
    theirs = matplotlib.colormaps[name](np.arange(256))[:, :3]
    assert np.abs(ours - theirs).max() < 0.03


def test_jet_is_that_of_matlab():
    x = np.linspace(0, 1, 256)
    theirs = np.stack([np.clip(1.5 - np.abs(4 * x - peak), 0, 1) for peak in (3, 2, 1)], 1)
    ours = render.colorize(torch.linspace(0, 1, 256)[None, None], "jet")[0, :, 0].T.numpy()
    assert np.abs(ours - theirs).max() < 0.02


def test_unknown_colormap_is_named():
    with pytest.raises(InputError, match=r"colormap must be one of 'plasma', .*, got 'rainbow'"):
        render.colorize(torch.rand(1, 2, 2), "rainbow")


def test_cold_places_show_the_photograph(photo):
    heatmap = torch.zeros(2, 60, 80)
    heatmap[:, 20:30, 30:50] = 1
    shown = render.overlay(photo, heatmap, alpha=0.5)
    cold = heatmap == 0
    for channel in range(3):
        torch.testing.assert_close(shown[:, channel][cold], photo[:, channel][cold])
        hot = 0.5 * photo[:, channel][~cold] + 0.5 * render.colorize(torch.ones(1, 1, 1))[0, channel, 0, 0]
        torch.testing.assert_close(shown[:, channel][~cold], hot)


def test_opacity_never_falls_with_the_heat():
    ramp = torch.linspace(0, 1, 101)[None, None].expand(1, 2, 101)
    black, white = torch.zeros(1, 3, 2, 101), torch.ones(1, 3, 2, 101)
    through = (render.overlay(white, ramp) - render.overlay(black, ramp))[0, 0, 0]
    assert (through.diff() <= 1e-6).all()
    assert through[0] == pytest.approx(1)
    assert through[-1] == pytest.approx(0.5)


def test_maps_of_another_size_are_resized(photo):
    heatmap = torch.rand(2, 7, 9)
    resized = torch.nn.functional.interpolate(heatmap[:, None], (60, 80), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(render.overlay(photo, heatmap), render.overlay(photo, resized))


@pytest.mark.parametrize("heatmap", [torch.zeros(2, 60, 80), torch.full((2, 60, 80), math.nan)])
def test_maps_without_heat_leave_the_photograph(photo, heatmap):
    torch.testing.assert_close(render.overlay(photo, heatmap), photo)


def test_overlay_refuses_what_does_not_fit(photo):
    with pytest.raises(InputError, match="heatmap must be one for each of 2 images, got 3"):
        render.overlay(photo, torch.rand(3, 60, 80))
    with pytest.raises(InputError, match="alpha must lie in 0 to 1, got 2"):
        render.overlay(photo, torch.rand(2, 60, 80), alpha=2)


def changed(before, after):
    return (before - after).abs().amax(0) > 0.02


@pytest.mark.parametrize("size", [(48, 64), (300, 400), (1300, 1500)])
def test_points_are_drawn_where_they_lie(size):
    images = torch.full((2, 3, *size), 0.5)
    point = torch.tensor([[size[0] // 3, size[1] // 2]])
    drawn = render.draw_points(images, [point, point[:0]], color=(1, 0, 0))
    assert torch.equal(drawn[1], images[1])
    marked = changed(images[0], drawn[0]).nonzero()
    torch.testing.assert_close(marked.double().mean(0), point[0].double(), atol=0.51, rtol=0)
    extent = marked.amax(0) - marked.amin(0) + 1
    assert (extent <= max(6, 0.04 * min(size))).all()
    y, x = point[0].tolist()
    assert drawn[0, 0, y, x] > 0.9
    assert drawn[0, 1, y, x] < 0.1
    # The rim is dark.
    assert drawn[0, 0].min() < 0.45


def test_points_at_the_corners_stay_inside(photo):
    corners = torch.tensor([[0, 0], [0, 79], [59, 0], [59, 79]])
    drawn = render.draw_points(photo, [corners, corners], radius=3)
    assert drawn.shape == photo.shape
    for y, x in corners.tolist():
        assert drawn[0, :, y, x].min() > 0.9


def test_points_of_another_count_are_refused(photo):
    with pytest.raises(InputError, match="points must be one tensor for each of 2 images, got 1"):
        render.draw_points(photo, [torch.zeros(0, 2)])


def test_box_is_drawn_around_its_pixels():
    images = torch.full((2, 3, 100, 120), 0.5)
    boxes = torch.tensor([[30.0, 20, 70, 60], [math.nan] * 4])
    drawn = render.draw_boxes(images, boxes, color=(0, 1, 0), width=2)
    assert torch.equal(drawn[1], images[1])
    marked = changed(images[0], drawn[0])
    assert not marked[21:60, 31:70].any()
    assert not marked[30, :26].any()
    row = drawn[0, 1, 40]
    assert row[28] > 0.9
    assert row[29] > 0.9
    assert row[71] > 0.9
    assert row[72] > 0.9
    assert drawn[0, 1, 61, 50] > 0.9


@pytest.mark.parametrize("box", [[0, 0, 119, 99], [0, 0, 0, 0], [119, 99, 119, 99], [-50, -50, 500, 500]])
def test_boxes_at_the_border_are_seen(box):
    images = torch.full((1, 3, 100, 120), 0.5)
    drawn = render.draw_boxes(images, torch.tensor([box]).float())
    assert changed(images[0], drawn[0]).any()


def test_boxes_of_another_shape_are_refused(photo):
    with pytest.raises(InputError, match=r"boxes must have shape \[2, 4\], got \[1, 4\]"):
        render.draw_boxes(photo, torch.zeros(1, 4))


def test_pictures_keep_their_pixels(photo):
    picture = render.to_pil(photo[0])
    assert picture.mode == "RGB"
    assert picture.size == (80, 60)
    back = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert (back - photo[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(np.array(Image.open(io.BytesIO(render.png_bytes(picture)))), np.array(picture))


def test_drawing_leaves_its_input_alone(photo):
    before = photo.clone()
    render.draw_boxes(photo, torch.tensor([[3.0, 3, 9, 9]] * 2))
    render.draw_points(photo, [torch.tensor([[3, 3]])] * 2)
    render.overlay(photo, torch.rand(2, 60, 80))
    assert torch.equal(photo, before)


def test_contact_sheet_shows_every_image():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    cells = [colour.view(3, 1, 1).expand(3, 30, 40) for colour in colours]
    sheet = render.montage([cells[:3], cells[3:]], labels=["first", "second"], titles=[["a", "b", "c"], ["d", "e"]])
    pixels = np.array(sheet).reshape(-1, 3)
    for colour in colours:
        result = (np.abs(pixels / 255 - colour.numpy()).max(1) < 0.02).sum()
        assert result == pytest.approx(192 * 144, rel=0.02)
    assert render.montage([cells[:1]]).size < sheet.size
    assert render.montage([], labels=[], titles=[]).size[0] >= 1


@pytest.mark.parametrize("text", ["", "a" * 500, "two\nlines", "bad \udcff byte", "[red]*&<b>", "Ω é 汉", "\t"])
def test_contact_sheet_takes_any_text(text):
    image = torch.zeros(3, 8, 8)
    plain = render.montage([[image]], labels=["x"], titles=[["x"]])
    sheet = render.montage([[image]], labels=[text], titles=[[text]])
    assert abs(sheet.height - plain.height) <= 30
    assert sheet.width <= plain.width + 2 * 192


def test_one_outlier_does_not_hide_a_map():
    generator = torch.Generator().manual_seed(0)
    heatmap = torch.randn(1, 64, 64, generator=generator).abs()
    heatmap[0, 0, 0] = 1e4
    grey = torch.full((1, 3, 64, 64), 0.5)

    def changed(saturated):
        return float(((render.overlay(grey, heatmap, saturated=saturated) - grey).abs().amax(1) > 0.1).float().mean())

    assert changed(0.0) < 0.001
    assert changed(0.02) > 0.3


@pytest.mark.parametrize("saturated", [-0.1, 1.0])
def test_overlay_refuses_a_share_outside(photo, saturated):
    with pytest.raises(InputError, match="saturated must lie in"):
        render.overlay(photo, torch.rand(2, 60, 80), saturated=saturated)


def test_stretch_clips_outliers_at_both_ends():
    values = torch.linspace(-1, 1, 1000).view(1, 1, 10, 100).clone()
    values[0, 0, 0, 0], values[0, 0, 9, 99] = -100, 100
    plain, clipped = render.stretch(values), render.stretch(values, saturated=0.02)
    assert float(plain[0, 0, 5].std()) < 0.001
    torch.testing.assert_close(clipped[0, 0, 1:9], (values[0, 0, 1:9] / 2 / 0.98 + 0.5), atol=0.01, rtol=0)
    assert torch.equal(render.stretch(torch.zeros(1, 1, 2, 2), saturated=0.02), torch.full((1, 1, 2, 2), 0.5))
    sparse = torch.zeros(1, 1, 10, 100)
    sparse[0, 0, 0, 0] = 3.0
    assert float(render.stretch(sparse, saturated=0.1).max()) == 1


def test_signed_maps_keep_their_zero(photo):
    heatmap = torch.linspace(-2, 1, 80).expand(2, 60, 80).clone()
    heatmap[:, 30] = 0
    shown = render.overlay(photo, heatmap, alpha=1.0, signed=True)
    torch.testing.assert_close(shown[:, :, 30], photo[:, :, 30])
    against, speaking = shown[0, :, 0, 0], shown[0, :, 0, 79]
    assert against[2] > against[0] + 0.3  # blue
    assert speaking[0] > speaking[2] + 0.1  # red, half as far from zero
    values = torch.tensor([[-1.0, 0.0, 0.5, 4.0], [0.0, 0.0, 0.0, math.nan]])
    stretched = render.stretch_signed(values, saturated=0)
    assert stretched.tolist() == [[-0.25, 0, 0.125, 1], [0, 0, 0, 0]]


def test_keys_are_drawn_below_the_sheet():
    image = torch.zeros(3, 32, 32)
    keys = [render.Key("more", colormap="gray", low="less"), render.Key("box", color=(1, 0, 0))]
    plain, keyed = (render.montage([[image, image]], side=128, keys=item) for item in ([], keys))
    added = np.array(keyed)[plain.height :].astype(int)
    greys = {int(value) for value in np.unique(added[(added.max(2) == added.min(2))])}
    assert len(greys) > 60  # the scale
    assert ((added[..., 0] > 200) & (added[..., 1] < 50)).sum() > 20  # the box
    narrow = render.montage([[image]], side=64, keys=keys)
    assert narrow.height > render.montage([[image]], side=64, keys=keys[:1]).height  # a line for each


def test_headings_and_legends_take_room_of_their_own():
    image = torch.ones(3, 32, 32)
    legends = [render.legend(names, [render.GREEN] * len(names), 128) for names in (["a"], ["a", "b", "c"])]
    plain = render.montage([[image, image]], side=128)
    sheet = render.montage([[image, image]], side=128, heading="a heading", legends=[legends])
    assert sheet.height > plain.height + legends[1].height
    # Letters are as large below one picture as below another.
    pixels = np.array(sheet)
    for legend in legends:
        actual = np.array(legend)
        height, width = actual.shape[:2]
        places = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 1], (height, width))
        assert (places == actual[:, :, 1]).all((2, 3)).any()


def test_the_hottest_percent_is_clipped_as_pair_saliency_does():
    """`VisualizeImageGrayscale` and `VisualizeImageDiverging`; of 101 numbers the percentile is one of them."""
    maps = torch.randn(3, 1, 101, generator=torch.Generator().manual_seed(0))
    for each in maps:
        values = each.double().numpy()
        top, least = np.percentile(values, 99), values.min()
        expected = np.clip((values - least) / (top - least), 0, 1)
        grey = render.stretch_signed(render.normalize(each[None]), saturated=0.01)[0]
        np.testing.assert_allclose(grey, expected, atol=1e-6)
        span = np.percentile(np.abs(values), 99)
        signed = render.stretch_signed(each[None], saturated=0.01)[0]
        np.testing.assert_allclose(signed, np.clip(values / span, -1, 1), atol=1e-6)
