import contextlib
import importlib.machinery
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from case_ids import case_id
from scipy import ndimage
from skimage.measure import label, regionprops

import pyfast_xai
from pyfast_xai import Explanation, localize
from pyfast_xai.errors import InputError


def kept_by_the_text(points, size, radius, share):
    """The rule word for word: more than a share of all points, itself included, nearer than the radius."""
    p = points.double()
    near = ((p[:, None] - p[None]).square().sum(-1).sqrt() < radius * math.hypot(*size)).sum(1)
    return points[near > share * len(points)]


def random_points(count, size, seed=0, spread=None):
    generator = np.random.default_rng(seed)
    if spread is None:
        return torch.from_numpy(generator.integers(0, size, (count, 2)))
    points = generator.normal(np.array(size) / 2, spread, (count, 2)).round()
    return torch.from_numpy(points.clip(0, np.array(size) - 1)).long()


@pytest.mark.parametrize("size", [(32, 32), (40, 97), (224, 160)])
@pytest.mark.parametrize(("radius", "share"), [(0.10, 0.05), (0.03, 0.02), (0.5, 0.4), (1.0, 0.9), (0.001, 0.01)])
def test_outliers_equal_brute_force(size, radius, share):
    batch = [random_points(n, size, n, spread) for n, spread in ((1, None), (20, 9), (300, 12), (700, None))]
    result = localize.remove_outliers(batch, size, radius, share)
    for points, saved in zip(batch, result, strict=True):
        assert torch.equal(saved, kept_by_the_text(points, size, radius, share))


def test_outliers_are_cut_strictly_on_both_sides():
    # A diagonal of 50 makes the radius exactly 5: (3, 4) lies at that distance, not nearer.
    pair = torch.tensor([[10, 10], [13, 14]])
    assert len(localize.remove_outliers([pair], (30, 40), 0.10, 0.5)[0]) == 0
    assert len(localize.remove_outliers([pair], (30, 40), 0.101, 0.5)[0]) == 2
    # One point of twenty alone is exactly the share of 5 %, not more.
    crowd = torch.tensor([[5, 5]] * 19 + [[29, 39]])
    assert localize.remove_outliers([crowd], (30, 40))[0].tolist() == [[5, 5]] * 19
    assert len(localize.remove_outliers([crowd[1:]], (30, 40))[0]) == 19


def test_outliers_keep_duplicates_and_order():
    points = torch.tensor([[8, 9], [1, 30], [8, 9], [7, 9]])
    assert localize.remove_outliers([points], (32, 32), 0.1, 0.3)[0].tolist() == [[8, 9], [8, 9], [7, 9]]


def test_outliers_without_points_and_without_images():
    assert localize.remove_outliers([], (8, 8)) == []
    assert localize.remove_outliers([torch.zeros(0, 2, dtype=torch.int64)], (8, 8))[0].shape == (0, 2)
    assert len(localize.remove_outliers([torch.tensor([[3, 3]])], (8, 8), radius=0.0)[0]) == 0


def test_outliers_of_many_points_on_a_large_picture():
    # All pairs would be 10^10 distances.
    size = (2848, 4288)
    points = torch.cat([random_points(99_000, size, 1, 200), random_points(1_000, size, 2)])
    saved = localize.remove_outliers([points], size)[0]
    some = saved[:: len(saved) // 50].double()
    near = (torch.cdist(some, points.double()) < 0.1 * math.hypot(*size)).sum(1)
    assert 99_000 <= len(saved) < 100_000
    assert (near > 5_000).all()


def test_hull_of_points():
    boxes = localize.hull([torch.tensor([[3, 9], [7, 2]]), torch.zeros(0, 2).long(), torch.tensor([[4, 5]])])
    assert boxes.dtype == torch.float32
    assert boxes[0].tolist() == [2, 3, 9, 7]
    assert boxes[1].isnan().all()
    assert boxes[2].tolist() == [5, 4, 5, 4]
    assert localize.hull([]).shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("size", [(1, 2), (1, 17), (23, 31), (64, 64)])
def test_segment_equals_scikit_image(size, threshold):
    maps = torch.rand(6, *size).pow(8)
    boxes = localize.largest_segment(maps, threshold)
    for item, box in zip(maps, boxes, strict=True):
        mask = (item >= item.min() + threshold * (item.max() - item.min())).numpy()
        regions = regionprops(label(mask, connectivity=2))
        most = max(region.area for region in regions)
        # The first of equals in reading order.
        first = min((r for r in regions if r.area == most), key=lambda r: r.coords.tolist())
        y1, x1, y2, x2 = first.bbox
        assert box.tolist() == [x1, y1, x2 - 1, y2 - 1]


def test_segment_joins_corners_and_not_neighbouring_maps():
    maps = torch.zeros(2, 4, 6)
    maps[0, 0, 0] = maps[0, 1, 1] = maps[0, 0, 2] = maps[0, 3, 5] = 1
    maps[1, 0, 0] = maps[1, 3, 4] = maps[1, 3, 5] = 1
    assert localize.largest_segment(maps, 0.5).tolist() == [[0, 0, 2, 1], [4, 3, 5, 3]]


def test_pixel_at_the_threshold_is_inside():
    heatmap = torch.tensor([[[0.25, 0.249, 1.0, 0.25, 0.0]]])
    assert localize.largest_segment(heatmap, 0.25).tolist() == [[2, 0, 3, 0]]


def test_maps_without_evidence_have_no_box():
    maps = torch.ones(5, 4, 4)
    maps[4, 0] = 0.5
    maps[0] = 0
    maps[1, 2, 2] = math.nan
    maps[2, 2, 2] = math.inf
    maps[3] = -1
    boxes = localize.largest_segment(maps)
    assert boxes[:4].isnan().all()
    assert boxes[4].tolist() == [0, 1, 3, 3]
    assert localize.largest_segment(maps[:0]).shape == (0, 4)


def maps_of_every_kind(height, width):
    """Noise, few values (ties of sizes and of values), plateaus, smooth blobs, and maps without a range."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    noise = torch.rand(4, height, width, generator=generator)
    few = torch.randint(0, 3, (6, height, width), generator=generator).float()
    sparse = (torch.rand(6, height, width, generator=generator) > 0.85).float() * few
    coarse = torch.rand(3, 1, (height + 3) // 4, (width + 3) // 4, generator=generator)
    sizes = {"size": (height, width)}
    plateaus = torch.nn.functional.interpolate(coarse, **sizes, mode="nearest")[:, 0]
    smooth = torch.nn.functional.interpolate(coarse, **sizes, mode="bilinear")[:, 0]
    constant = torch.full((1, height, width), 0.25)
    steps = torch.arange(height * width).view(1, height, width) / 100  # values at the thresholds themselves
    return torch.cat([noise, few, sparse, plateaus, smooth, constant, steps, -steps, few * 1e30, few * 1e-42 - 3])


@pytest.mark.parametrize("size", [(1, 2), (1, 17), (17, 1), (7, 7), (23, 31), (64, 48)])
def test_one_pass_over_the_pixels_equals_a_cut_at_each_threshold(size, monkeypatch):
    maps, thresholds = maps_of_every_kind(*size), [*(i / 100 for i in range(1, 100)), 0.3, 1e-6, 1 - 1e-6, 0.3]
    expected = torch.stack([localize.largest_segment(maps, threshold) for threshold in thresholds])
    assert not expected.isnan().all()
    monkeypatch.delattr(localize, "largest_segment")
    assert torch.equal(localize.largest_segments(maps, thresholds).nan_to_num(-1), expected.nan_to_num(-1))
    turned = localize.largest_segments(maps.mT, thresholds).nan_to_num(-1)  # maps that are not contiguous
    assert torch.equal(turned, localize.largest_segments(maps.mT.contiguous(), thresholds).nan_to_num(-1))


def test_one_pass_takes_the_first_of_equals():
    heatmap = torch.zeros(1, 5, 7)
    heatmap[0, 0, 5:] = heatmap[0, 3, :2] = 1.0  # two pixels each; the lower pair is hotter
    heatmap[0, 3, :2] = 2.0
    heatmap[0, 4, 6] = 2.0
    expected = [[[0.0, 3, 1, 3]], [[5.0, 0, 6, 0]]]
    assert localize.largest_segments(heatmap, (0.9, 0.4)).tolist() == expected
    assert localize.largest_segments(heatmap.flip(1), (0.9, 0.4)).tolist() == [[[0, 1, 1, 1]], [[0, 1, 1, 1]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_one_pass_reads_maps_as_a_cut_does(dtype):
    maps = (torch.rand(3, 9, 9, dtype=torch.float64) * 50).to(dtype)
    expected = torch.stack([localize.largest_segment(maps, t) for t in (0.2, 0.6)])
    assert torch.equal(localize.largest_segments(maps, (0.2, 0.6)), expected)


@pytest.mark.parametrize("reason", ["no numba", "another backend"])
def test_thresholds_are_cut_one_after_the_other_without_numba(reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyfast_xai.kernels.numba.threshold_boxes", None)
    maps = maps_of_every_kind(7, 9)
    expected = torch.stack([localize.largest_segment(maps, t) for t in (0.7, 0.2)]).nan_to_num(-1)
    if reason == "no numba":
        monkeypatch.setattr(localize.importlib.util, "find_spec", lambda name: None)
        boxes = localize.largest_segments(maps, (0.7, 0.2))
    else:
        with pyfast_xai.backend("reference"):
            boxes = localize.largest_segments(maps, (0.7, 0.2))
    assert torch.equal(boxes.nan_to_num(-1), expected)


def test_boxes_at_several_thresholds_of_odd_arguments():
    maps = torch.rand(4, 4, 4)
    maps[0, 1, 1], maps[1, 2, 2], maps[2] = math.nan, math.inf, 1.0
    boxes = localize.largest_segments(maps, (0.5, 0.1))
    assert boxes[:, :3].isnan().all()
    assert not boxes[:, 3].isnan().any()
    assert localize.largest_segments(maps, ()).shape == (0, 4, 4)
    assert localize.largest_segments(maps[:0], (0.5,)).shape == (1, 0, 4)
    with pytest.raises(InputError, match=r"threshold must lie between 0 and 1, got 1.5"):
        localize.largest_segments(maps, (0.5, 1.5))
    with pytest.raises(InputError, match=r"heatmap must have shape \[N, H, W\], got \[4, 4\]"):
        localize.largest_segments(maps[0], (0.5,))


def several_by_scikit_image(actual, threshold, least):
    mask = (actual >= actual.min() + threshold * (actual.max() - actual.min())).numpy()
    regions = sorted(regionprops(label(mask, connectivity=2)), key=lambda r: (-r.area, r.coords.tolist()))
    boxes = [r.bbox for r in regions if r.area >= least * regions[0].area]
    return [[x1, y1, x2 - 1, y2 - 1] for y1, x1, y2, x2 in boxes]


@pytest.mark.parametrize("least", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.9])
def test_several_segments_equal_scikit_image(threshold, least):
    maps = torch.rand(5, 23, 31).pow(8)
    maps[3] = 1
    result = localize.segment_boxes(maps, threshold, least)
    assert result[3].shape == (0, 4)
    for n in (0, 1, 2, 4):
        assert result[n].tolist() == several_by_scikit_image(maps[n], threshold, least)
    largest = localize.largest_segment(maps, threshold)
    assert torch.equal(torch.stack([result[n][0] for n in (0, 1, 2, 4)]), largest[[0, 1, 2, 4]])


def test_several_segments_of_no_maps():
    assert localize.segment_boxes(torch.zeros(0, 4, 4)) == []
    assert [len(boxes) for boxes in localize.segment_boxes(torch.zeros(2, 4, 4))] == [0, 0]
    with pytest.raises(InputError, match=r"least must lie in 0 to 1, got 2"):
        localize.segment_boxes(torch.rand(1, 4, 4), least=2)


def mass_box_by_loops(heatmap, cut, power):
    """Drops rows and columns one by one, as long as what was dropped holds at most a share of the mass."""
    mass = np.maximum(heatmap.double().numpy(), 0) ** power

    def ends(sums):
        low = 0
        while sums[: low + 1].sum() <= cut * sums.sum():
            low += 1
        high = len(sums) - 1
        while sums[high:].sum() <= cut * sums.sum():
            high -= 1
        return low, high

    (x1, x2), (y1, y2) = ends(mass.sum(0)), ends(mass.sum(1))
    return [x1, y1, x2, y2]


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
@pytest.mark.parametrize("cut", [0, 0.01, 0.03, 0.2, 0.49])
def test_mass_box_equals_a_loop(cut, power):
    maps = torch.rand(6, 23, 31).pow(8)
    maps[1] -= 0.2
    maps[2, :, :9] = maps[2, 20:] = 0
    maps[3] *= 1e30
    maps[4] *= 1e-30
    result = localize.mass_box(maps, cut, power)
    assert result.dtype == torch.float32
    for item, box in zip(maps, result, strict=True):
        assert box.tolist() == mass_box_by_loops(item / item.max(), cut, power)


def test_mass_box_mirrors_with_its_map():
    maps = torch.rand(4, 20, 30).pow(6)
    boxes, mirrored = localize.mass_box(maps), localize.mass_box(maps.flip(2))
    assert torch.equal(mirrored[:, [0, 2]], 29 - boxes[:, [2, 0]])
    assert torch.equal(mirrored[:, [1, 3]], boxes[:, [1, 3]])


def test_mass_of_maps_without_evidence():
    maps = torch.zeros(6, 4, 4)
    maps[1] = 1
    maps[2, 2, 2] = math.nan
    maps[3, 2, 2] = math.inf
    maps[4] = -torch.rand(4, 4) - 1
    maps[5, 2, 3] = 1
    boxes = localize.mass_box(maps)
    assert boxes[:5].isnan().all()
    assert boxes[5].tolist() == [3, 2, 3, 2]
    assert localize.mass_box(maps[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"cut": 0.5}, "cut must lie in 0 to 0.5, without 0.5 itself, got 0.5", id="half"),
        pytest.param({"cut": -0.1}, "cut must lie in 0 to 0.5", id="negative"),
        pytest.param({"cut": math.nan}, "cut must lie in 0 to 0.5", id="nan"),
        pytest.param({"power": 0}, "power must be positive and finite, got 0", id="no-power"),
        pytest.param({"power": math.inf}, "power must be positive and finite, got inf", id="infinite-power"),
    ],
)
def test_mass_box_refuses(settings, said):
    with pytest.raises(InputError, match=said):
        localize.mass_box(torch.rand(1, 4, 4), **settings)
    with pytest.raises(InputError, match=said):
        localize.Mass(**settings)


@pytest.mark.parametrize("rule", [localize.Segment(0.3), localize.Mass(0.05, 1.5), localize.Hull()], ids=case_id)
def test_a_rule_is_its_text(rule):
    assert localize.box_rule(str(rule)) == localize.box_rule(rule) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("median", "box_rule must be segment, mass, hull, with settings after colons", id="name"),
        pytest.param("segment:wide", "box_rule must have numbers after its colons", id="word"),
        pytest.param("mass:0.1:2:3", "box_rule must be at most mass:cut:power, got", id="too-many"),
        pytest.param("hull:1", "box_rule must be 'hull' without settings, got", id="none-taken"),
        pytest.param("segment:2", "threshold must lie between 0 and 1, got 2", id="range"),
        pytest.param(0.4, "box_rule must be segment, mass, hull, with settings after colons", id="number"),
    ],
)
def test_texts_that_are_no_rule(text, said):
    with pytest.raises(InputError, match=said):
        localize.box_rule(text)


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 15, math.nan])
def test_threshold_is_a_share(threshold):
    with pytest.raises(InputError, match=r"threshold must lie between 0 and 1, got"):
        localize.largest_segment(torch.rand(1, 4, 4), threshold)


def test_segment_wants_a_batch():
    with pytest.raises(InputError, match=r"heatmap must have shape \[N, H, W\], got \[4, 4\]"):
        localize.largest_segment(torch.rand(4, 4))


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a CUDA device."""

    @property
    def is_cuda(self):
        return True


@pytest.fixture
def cupy(monkeypatch):
    """What `localize` uses of CuPy, on the CPU, and an account of how it was used."""
    recorded = SimpleNamespace(entered=[], given=[], masks=[], structures=[])

    @contextlib.contextmanager
    def entering(kind, name):
        recorded.entered.append((kind, name))
        yield
        recorded.entered.remove((kind, name))

    def from_dlpack(tensor):
        recorded.given.append(tensor.data_ptr())
        return np.from_dlpack(torch.Tensor(tensor).as_subclass(torch.Tensor))

    def label(input, structure=None, output=None):
        # cupyx 14 returns a new array and a number; its structure may be any nested list of three to a side.
        assert isinstance(input, np.ndarray)
        assert output is None
        assert recorded.entered == [("device", None), ("stream", 77)]
        recorded.masks.append(input)
        recorded.structures.append(np.array(structure, dtype=bool))
        result, count = ndimage.label(input, structure=structure)
        return result.astype(np.int32), count

    modules = {name: ModuleType(name) for name in ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.ndimage")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
    modules["cupy"].from_dlpack = from_dlpack
    modules["cupy"].cuda = SimpleNamespace(
        Device=lambda index: entering("device", index), ExternalStream=lambda pointer: entering("stream", pointer)
    )
    modules["cupyx"].scipy = modules["cupyx.scipy"]
    modules["cupyx.scipy"].ndimage = modules["cupyx.scipy.ndimage"]
    modules["cupyx.scipy.ndimage"].label = label
    # The stream of the mask's device, which need not be the current one.
    streams = {torch.device("cpu"): SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    return recorded


def test_segments_by_cupy(cupy):
    mask = torch.rand(5, 9, 13) > 0.6
    actual = mask.as_subclass(OnDevice)
    result = localize.segments(actual)
    expected = localize.segments(mask)
    assert result.dtype == torch.int64
    assert torch.equal(result.as_subclass(torch.Tensor), expected)
    # Pixels touch at corners, within a map only.
    assert cupy.structures[0].astype(int).tolist() == [[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]
    assert len(cupy.structures) == 1
    assert cupy.entered == []
    # The array is the memory of the tensor.
    assert cupy.masks[0].__array_interface__["data"][0] == cupy.given[0]
    assert cupy.masks[0].dtype == np.uint8


def test_arrays_go_in_and_out_by_dlpack_without_a_copy():
    labels = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    assert torch.from_dlpack(labels).data_ptr() == labels.__array_interface__["data"][0]
    explanation = Explanation("saliency", torch.rand(2, 3, 4))
    array = np.from_dlpack(explanation)
    assert array.__array_interface__["data"][0] == explanation.heatmap.data_ptr()
    assert np.array_equal(array, explanation.numpy())
    assert explanation.__dlpack_device__() == explanation.heatmap.__dlpack_device__()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_segments_by_cupy_on_a_device():
    pytest.importorskip("cupyx")
    mask = torch.rand(5, 33, 47) > 0.6
    mask[2] = False
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = localize.segments(mask.cuda())
    assert result.is_cuda
    # Segments are numbered in reading order by both.
    assert torch.equal(result.cpu(), localize.segments(mask))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_segment_on_a_device_equals_the_cpu():
    maps = torch.rand(6, 33, 47).pow(8)
    assert torch.equal(localize.largest_segment(maps.cuda()).cpu(), localize.largest_segment(maps))


def test_peak_is_the_first_maximum():
    maps = torch.zeros(3, 5, 7)
    maps[1, 4, 2] = 3
    maps[2, 1, 6] = maps[2, 3, 0] = 2
    assert localize.peak(maps).tolist() == [[0, 0], [4, 2], [1, 6]]


def test_iou_counts_pixels():
    def pixels(box):
        mask = torch.zeros(20, 20, dtype=torch.bool)
        mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
        return mask

    corners = torch.randint(0, 10, (40, 2, 2))
    boxes = torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1]], 1)
    result = localize.iou(boxes[:, None], boxes[None].float())
    for i, a in enumerate(boxes.tolist()):
        for j, b in enumerate(boxes.tolist()):
            expected = (pixels(a) & pixels(b)).sum() / (pixels(a) | pixels(b)).sum()
            assert result[i, j] == pytest.approx(float(expected))


def test_iou_of_no_box_is_zero():
    none, box = torch.full((4,), math.nan), torch.tensor([0.0, 0, 3, 3])
    assert localize.iou(none, box) == localize.iou(box, none) == localize.iou(none, none) == 0
    assert localize.iou(box, box) == 1
    assert localize.iou(box, torch.tensor([4.0, 0, 5, 3])) == 0


def test_overlap_of_boxes_in_small_integers():
    box = torch.tensor([[0, 0, 499, 499]], dtype=torch.int16)
    assert float(localize.iou(box, box)) == 1
