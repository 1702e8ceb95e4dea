import math

import numpy as np
import pytest
import torch
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score

from pyfast_xai import InputError, localize
from pyfast_xai.metrics import (
    LesionSensitivity,
    MaxBoxAcc,
    MaxBoxAccV2,
    PointingGame,
    PrecisionAtEER,
    PxAP,
    SingleProposal,
    box_correct,
    iou,
    localization_error,
    pointing_hit,
)


def random_boxes(count, size=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size // 2, (count, 2, 2), generator=generator)
    return torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1]], 1).float()


def as_mask(box, size=(40, 40)):
    mask = torch.zeros(size, dtype=torch.bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def ragged(count, seed=0, most=4):
    """Boxes of each image, and the same in compressed rows."""
    generator = np.random.default_rng(seed)
    parts = [random_boxes(int(generator.integers(1, most + 1)), seed=seed * 1000 + i) for i in range(count)]
    offsets = torch.tensor([0, *np.cumsum([len(p) for p in parts])])
    return parts, (torch.cat(parts), offsets)


def blobs(count, size=40, seed=0):
    """Smooth maps with a bump or two, >= 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=generator).pow(3)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[:, 0]


# Boxes


def test_iou_counts_pixels_or_area():
    a, b = torch.tensor([1.0, 2, 5, 6]), torch.tensor([3.0, 1, 4, 5])
    assert float(iou(a, b)) == pytest.approx(8 / 27)
    assert float(iou(a, b, inclusive=False)) == pytest.approx(3 / 17)
    boxes = random_boxes(30)
    assert torch.equal(iou(boxes[:, None], boxes), localize.iou(boxes[:, None], boxes))


def test_iou_of_boxes_without_area():
    point = torch.tensor([3.0, 3, 3, 3])
    assert iou(point, point) == 1
    assert iou(point, point, inclusive=False) == 0
    assert iou(torch.full((4,), math.nan), point) == 0


def test_iou_of_short_integers_does_not_overflow():
    box = torch.tensor([0, 0, 4287, 2847], dtype=torch.int16)
    assert iou(box, box) == 1


def test_the_three_ways_to_give_boxes_agree():
    parts, rows = ragged(50)
    boxes = random_boxes(50, seed=9)
    expected = torch.tensor([bool((localize.iou(b, item) >= 0.3).any()) for b, item in zip(boxes, parts, strict=True)])
    assert 0 < expected.sum() < 50
    assert torch.equal(box_correct(boxes, parts, threshold=0.3), expected)
    assert torch.equal(box_correct(boxes, rows, threshold=0.3), expected)
    one = torch.stack([item[0] for item in parts])
    assert torch.equal(box_correct(boxes, one), box_correct(boxes, list(one[:, None])))


def test_any_box_of_the_image_will_do_and_the_threshold_is_reached():
    # 8 of 16 pixels: exactly a half.
    truth = [torch.tensor([[20.0, 20, 30, 30], [0, 0, 3, 3]])]
    assert box_correct(torch.tensor([[0.0, 0, 3, 1]]), truth)
    assert not box_correct(torch.tensor([[0.0, 0, 3, 1]]), truth, threshold=0.51)
    assert not box_correct(torch.full((1, 4), math.nan), truth)


def test_localization_error_with_and_without_classes():
    truth = torch.tensor([[0.0, 0, 9, 9]] * 4)
    boxes = truth.clone()
    boxes[3] = torch.tensor([50.0, 50, 60, 60])
    labels = torch.tensor([5, 6, 7, 8])
    predicted = torch.tensor([5, 6, 0, 8])
    assert localization_error(boxes, truth) == 0.25
    assert localization_error(boxes, truth, predicted, labels) == 0.5


@pytest.mark.parametrize(
    ("network", "top1", "agnostic"),
    [("alexNet", 65.69, 48.03), ("vgg16", 55.19, 43.66), ("googleNet", 57.49, 43.80), ("resNet152", 54.30, 44.74)],
)
def test_published_boxes_of_cnn_fixations_give_table_1(real_data, network, top1, agnostic):
    published = np.load(real_data / "wsol" / "cnn_fixations_boxes.npz")
    truth = np.load(real_data / "wsol" / "ilsvrc_val_ground_truth.npz")
    boxes = torch.from_numpy(published[f"{network}_box_xyxy"])
    objects = (torch.from_numpy(truth["box_xyxy"]), torch.from_numpy(truth["box_offset"]))
    predicted, labels = torch.from_numpy(published[f"{network}_label"]), torch.from_numpy(truth["label"])
    assert 100 * float(localization_error(boxes, objects, predicted, labels)) == pytest.approx(top1, abs=0.05)
    assert 100 * float(localization_error(boxes, objects)) == pytest.approx(agnostic, abs=0.05)


# MaxBoxAcc


def slow_max_box_acc(maps, truth, thresholds, least, every):
    """One map, threshold and segment after the other."""
    right = np.zeros((len(least), len(thresholds)))
    for item, objects in zip(maps.numpy(), truth, strict=True):
        for t, threshold in enumerate(thresholds):
            regions = regionprops(label(item >= item.min() + threshold * (item.max() - item.min()), connectivity=2))
            boxes = [(r.area, (r.bbox[1], r.bbox[0], r.bbox[3] - 1, r.bbox[2] - 1)) for r in regions]
            chosen = boxes if every else [max(boxes, key=lambda b: b[0])]
            best = max(localize.iou(torch.tensor(b).float(), objects).max() for _, b in chosen)
            right[:, t] += [bool(best >= i) for i in least]
    return (right / len(maps)).max(1).mean()


@pytest.mark.parametrize("make", [MaxBoxAcc, MaxBoxAccV2])
@pytest.mark.parametrize("segments", ["largest", "all"])
def test_max_box_acc_equals_one_after_the_other(make, segments):
    truth, rows = ragged(24, seed=3, most=2)
    objects = torch.stack([as_mask(item[0]) for item in truth]).float()
    maps = blobs(24) + torch.nn.functional.avg_pool2d(objects, 7, 1, 3)
    thresholds = [0.1, 0.3, 0.5, 0.7, 0.9]
    metric = make(thresholds, segments=segments)
    metric.update(maps[:10], truth[:10])
    metric.update(maps[10:], truth[10:])
    expected = slow_max_box_acc(maps, truth, thresholds, metric.iou, segments == "all")
    assert 0.1 < expected < 0.9
    assert float(metric.compute()) == pytest.approx(expected)
    whole = make(thresholds, segments=segments)
    whole.update(maps, rows)
    assert torch.equal(whole.correct, metric.correct)


def test_max_box_acc_takes_one_threshold_for_all_images():
    # The first map is right at high thresholds only, the second at low ones.
    maps = torch.full((2, 20, 20), 0.3)
    maps[:, 4:8, 4:8] = 1.0
    maps[:, 0, 0] = 0.0
    maps[1, :, :12], maps[1, 0, 0] = 0.6, 0.0
    maps[1, 4:8, 4:8] = 1.0
    truth = torch.tensor([[4.0, 4, 7, 7], [0, 0, 11, 19]])
    metric = MaxBoxAcc([0.5, 0.9])
    metric.update(maps, truth)
    assert metric.accuracy.tolist() == [[1.0, 0.5]]
    maps[0] = maps[1]
    metric = MaxBoxAcc([0.5, 0.9])
    metric.update(maps, truth)
    assert metric.compute() == 0.5


def test_perfect_maps_are_right_at_every_overlap():
    boxes = random_boxes(20, seed=4)
    maps = torch.stack([as_mask(b) for b in boxes]).float()
    keep = (maps.amin((1, 2)) == 0).nonzero().flatten()
    for metric in (MaxBoxAcc([0.5], iou=(0.5, 0.9, 1.0)), MaxBoxAccV2([0.5])):
        metric.update(maps[keep], boxes[keep])
        assert metric.compute() == 1


def test_constant_maps_have_no_box():
    for segments in ("largest", "all"):
        metric = MaxBoxAcc([0.5], segments=segments)
        metric.update(torch.ones(3, 8, 8), torch.tensor([[0.0, 0, 7, 7]] * 3))
        assert metric.compute() == 0


def test_boxes_in_pixels_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"truth must lie within the maps of 40 x 40 pixels, got box \[10.0, 10.0, 9"):
        MaxBoxAcc().update(blobs(1), torch.tensor([[10.0, 10, 99, 30]]))


# Pixels


def exact_bins(maps, bins):
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low) * bins).floor()


def test_pxap_equals_scikit_learn():
    maps, masks = blobs(12), torch.stack([as_mask(b) for b in random_boxes(12, seed=1)])
    maps = maps + 0.3 * masks * torch.rand(maps.shape)
    ignore = torch.rand(maps.shape) < 0.2
    metric = PxAP()
    metric.update(maps[:5], masks[:5], ignore[:5])
    metric.update(maps[5:], masks[5:], ignore[5:])
    counted = ~ignore
    scores = exact_bins(maps.double(), 1000)
    expected = average_precision_score(masks[counted].numpy(), scores[counted].numpy())
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-4)


def test_pxap_of_perfect_constant_and_random_maps():
    masks = torch.stack([as_mask(b) for b in random_boxes(40, seed=2)])
    share = float(masks.float().mean())
    for maps, expected in ((masks.float(), 1), (torch.ones(masks.shape), share), (torch.rand(masks.shape), share)):
        for metric in (PxAP(), PrecisionAtEER()):
            metric.update(maps, masks)
            assert float(metric.compute()) == pytest.approx(expected, abs=0.01)


def test_what_is_ignored_does_not_count():
    masks = torch.stack([as_mask(b) for b in random_boxes(4, seed=2)])
    ignore = torch.zeros_like(masks)
    ignore[:, 30:] = True
    masks[:, 30:] = False
    maps = masks.float()
    maps[:, 30:] = 1
    for metric, spoiled in ((PxAP(), PxAP()), (PrecisionAtEER(), PrecisionAtEER())):
        metric.update(maps, masks, ignore)
        spoiled.update(maps, masks)
        assert metric.compute() == 1
        assert spoiled.compute() < 1


def test_precision_at_equal_error_rate_takes_as_many_pixels_as_the_objects_have():
    masks = torch.stack([as_mask(b) for b in random_boxes(6, seed=5)])
    # Values from 0 to 1, all different, in bins of their own.
    values = torch.stack([torch.randperm(1600) for _ in range(6)]).view(6, 40, 40)
    maps = values / 1599 + masks * 0.2
    bins = 100_000
    metric = PrecisionAtEER(bins)
    metric.update(maps, masks)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    hottest = ((maps - low) / (high - low)).flatten().argsort(descending=True)[: int(masks.sum())]
    expected = masks.flatten()[hottest].double().mean()
    assert float(metric.compute()) == pytest.approx(float(expected), abs=2e-3)
    precision, recall = metric.curve()
    assert float((precision - recall).abs().amin()) < 2e-3


def test_curve_of_a_small_case():
    metric = PxAP(bins=10)
    metric.update(torch.tensor([[[1.0, 0.75], [0.55, 0.0]]]), torch.tensor([[[True, False], [True, False]]]))
    precision, recall = metric.curve()
    assert precision[[0, 3, 5, 10]].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert recall[[0, 3, 5, 10]].tolist() == [0.5, 0.5, 1, 1]
    assert float(metric.compute()) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


# Points


def torchray_hit(mask, point, tolerance):
    """TorchRay's acceptance region: the disc, and whether it meets the mask."""
    v = (torch.arange(mask.shape[0]).float() - point[0]) ** 2
    u = (torch.arange(mask.shape[1]).float() - point[1]) ** 2
    return bool((mask & (v[:, None] + u[None] < tolerance**2)).any())


@pytest.mark.parametrize("tolerance", [1, 3, 7.5, 15])
def test_pointing_equals_the_disc_of_torchray(tolerance):
    parts, _ = ragged(60, seed=6, most=3)
    masks = torch.stack([torch.stack([as_mask(b) for b in item]).any(0) for item in parts])
    points = torch.randint(0, 40, (60, 2))
    expected = [torchray_hit(m, p, tolerance) for m, p in zip(masks, points, strict=True)]
    assert 0 < sum(expected) <= 60
    assert pointing_hit(points, masks, tolerance=tolerance).tolist() == expected
    assert pointing_hit(points, parts, tolerance=tolerance).tolist() == expected


def test_without_tolerance_the_point_itself_must_lie_on_the_object():
    truth = torch.tensor([[2.0, 3, 4, 5]] * 3)
    points = torch.tensor([[3, 2], [5, 4], [6, 4]])
    assert pointing_hit(points, truth, tolerance=0).tolist() == [True, True, False]
    masks = torch.stack([as_mask(b) for b in truth])
    assert pointing_hit(points, masks, tolerance=0).tolist() == [True, True, False]
    # A distance of one is not less than one.
    assert pointing_hit(points, truth, tolerance=1).tolist() == [True, True, False]
    assert pointing_hit(points, truth, tolerance=1.01).tolist() == [True, True, True]


def test_pointing_game_is_the_mean_of_the_classes_that_came():
    game = PointingGame(4, tolerance=1)
    truth = torch.tensor([[0.0, 0, 3, 3]] * 4)
    points = torch.tensor([[0, 0], [9, 9], [1, 1], [2, 2]])
    game.update(points[:2], truth[:2], torch.tensor([0, 0]))
    game.update(points[2:], truth[2:], torch.tensor([0, 3]))
    assert game.hits.tolist() == [2, 0, 0, 1]
    assert game.misses.tolist() == [1, 0, 0, 0]
    assert float(game.compute()) == pytest.approx((2 / 3 + 1) / 2)
    assert game.accuracy.isnan().tolist() == [False, True, True, False]


def test_random_points_hit_as_often_as_the_object_is_large():
    game = PointingGame(tolerance=0)
    masks = as_mask([5, 5, 24, 14]).expand(4000, -1, -1)
    game.update(torch.randint(0, 40, (4000, 2)), masks)
    assert float(game.compute()) == pytest.approx(200 / 1600, abs=0.02)


# Proposals


def test_single_proposal_equals_counting():
    parts, rows = ragged(80, seed=7)
    boxes = random_boxes(80, seed=8)
    boxes[3] = math.nan
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 5, (len(item),), generator=generator) for item in parts]
    metric = SingleProposal(6, threshold=0.3)
    metric.update(boxes[:30], parts[:30], labels[:30])
    metric.update(boxes[30:], (rows[0][rows[1][30] :], rows[1][30:] - rows[1][30]), torch.cat(labels[30:]))
    recall, precision = [], []
    for kind in range(5):
        results = images = objects = 0
        for box, item, kinds in zip(boxes, parts, labels, strict=True):
            of_kind = item[kinds == kind]
            if len(of_kind):
                images, objects = images + 1, objects + len(of_kind)
                results += bool((localize.iou(box, of_kind) >= 0.3).any())
        recall.append(results / objects)
        precision.append(results / images)
    result = metric.compute()
    assert float(result.recall) == pytest.approx(np.mean(recall))
    assert float(result.precision) == pytest.approx(np.mean(precision))
    assert 0 < result.recall < result.precision < 1


def test_a_proposal_finds_one_object_of_a_class_at_most():
    metric = SingleProposal(2)
    truth = [torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]])]
    metric.update(torch.tensor([[0.0, 0, 9, 9]]), truth, [torch.tensor([0, 0, 1])])
    assert metric.hits.tolist() == [1, 1]
    result = metric.compute()
    assert (float(result.recall), float(result.precision)) == (0.75, 1)


# Lesions


def test_lesions_are_found_where_enough_of_them_is_covered():
    regions = torch.zeros(4, 20, 30, dtype=torch.bool)
    regions[:, :, :15] = True
    lesions = [
        torch.tensor([[10.0, 2, 19, 5]]),  # half
        torch.tensor([[12.0, 2, 21, 5], [25, 0, 29, 3]]),  # three tenths, and nothing
        torch.zeros(0, 4),
        torch.tensor([[13.0, 2, 22, 5]]),  # a fifth
    ]
    metric = LesionSensitivity()
    metric.update(regions[:3], lesions[:3])
    metric.update(regions[3:], lesions[3:])
    assert metric.images == 3
    assert metric.compute().tolist() == pytest.approx([2 / 3, 1 / 3])
    masks = [torch.stack([as_mask(b, (20, 30)) for b in item]) if len(item) else regions[:0] for item in lesions]
    as_masks = LesionSensitivity()
    as_masks.update(regions, masks)
    assert as_masks.images == 3
    assert torch.equal(as_masks.compute(), metric.compute())


def test_covered_share_equals_counting_pixels():
    regions = torch.rand(30, 40, 40) < 0.4
    parts, _ = ragged(30, seed=11, most=3)
    for overlap in (0.3, 0.4, 0.5):
        metric = LesionSensitivity([overlap])
        metric.update(regions, parts)
        result = [
            any(bool(item[as_mask(b)].float().mean() >= overlap) for b in boxes)
            for item, boxes in zip(regions, parts, strict=True)
        ]
        assert metric.compute().tolist() == pytest.approx([np.mean(result)])


# All of them


def test_the_order_of_images_does_not_matter():
    maps, (parts, _) = blobs(10), ragged(10, seed=12)
    shuffled = torch.randperm(10)
    masks = torch.stack([as_mask(item[0]) for item in parts])
    points, boxes = localize.peak(maps), localize.largest_segment(maps, 0.4)
    repeated = [parts[i] for i in shuffled]
    assert torch.equal(box_correct(boxes, parts)[shuffled], box_correct(boxes[shuffled], repeated))
    assert torch.equal(pointing_hit(points, parts)[shuffled], pointing_hit(points[shuffled], repeated))
    for make, args in ((MaxBoxAcc, parts), (PxAP, masks), (PrecisionAtEER, masks)):
        one, other = make(), make()
        one.update(maps, args)
        other.update(maps[shuffled], [args[i] for i in shuffled] if args is parts else args[shuffled])
        assert one.compute() == other.compute()


BOX = torch.tensor([[0.0, 0, 3, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_correct(BOX[0], BOX), r"boxes must have shape \[N, 4\], got \[4\]"),
        (lambda: box_correct(BOX.tolist(), BOX), r"boxes must be a tensor \[N, 4\], got list"),
        (lambda: box_correct(BOX.flip(1), BOX), r"boxes must have x1 <= x2 and y1 <= y2, got \[3.0, 3.0, 0.0, 0.0\]"),
        (lambda: box_correct(BOX, BOX.flip(1)), r"truth must have x1 <= x2"),
        (lambda: box_correct(BOX, BOX * math.nan), r"truth must be finite, got \[nan"),
        (lambda: box_correct(BOX, [BOX, BOX]), r"truth must hold the boxes of 1 images, got 2"),
        (lambda: box_correct(BOX, [BOX[0]]), r"truth must hold boxes \[B, 4\] of each image, got \[4\] for image 0"),
        (
            lambda: box_correct(BOX.expand(3, 4), [BOX, BOX[:0], BOX[:0]]),
            r"truth must hold a box for every image, got none for image 1 \(2 of 3\)",
        ),
        (lambda: box_correct(BOX, (BOX, torch.tensor([0, 2]))), r"truth must have offsets that rise from 0 to the nu"),
        (lambda: box_correct(BOX, BOX, threshold=50), r"threshold must lie in \(0, 1\], got 50"),
        (lambda: localization_error(BOX[:0], []), r"boxes must hold at least one image, got none"),
        (lambda: localization_error(BOX, BOX, torch.tensor([1])), r"predicted and labels must be given together, got"),
        (
            lambda: localization_error(BOX, BOX, torch.tensor([1.0]), torch.tensor([1])),
            r"predicted must be a tensor of integers, got torch.float32",
        ),
        (lambda: MaxBoxAcc(segments="some"), r"segments must be 'largest' or 'all', got 'some'"),
        (lambda: MaxBoxAccV2([0, 50]), r"thresholds must lie between 0 and 1, got 0"),
        (lambda: MaxBoxAcc(iou=(50,)), r"iou must lie in \(0, 1\], got 50"),
        (lambda: MaxBoxAcc().update(torch.rand(8, 8), BOX), r"heatmaps must have shape \[N, H, W\] and hold at least"),
        (lambda: MaxBoxAcc().update(torch.rand(0, 8, 8), []), r"heatmaps must have shape \[N, H, W\] and hold at lea"),
        (
            lambda: MaxBoxAcc().update(torch.tensor([[[0.0, math.nan]]]), BOX),
            r"heatmaps must be finite, got NaN or infinity in map 0 \(1 of 1\)",
        ),
        (lambda: MaxBoxAcc().compute(), r"update must be called before compute, got no image yet"),
        (lambda: PxAP().compute(), r"masks must hold at least one pixel of an object before compute, got none"),
        (lambda: PxAP().update(torch.rand(1, 4, 4), torch.ones(1, 4, 4)), r"masks must be a bool tensor, got torch.fl"),
        (
            lambda: PxAP().update(torch.rand(1, 4, 4), torch.ones(1, 5, 5) > 0),
            r"masks must have shape \[1, 4, 4\], got \[1, 5, 5\]",
        ),
        (
            lambda: PrecisionAtEER().update(torch.rand(1, 4, 4), torch.ones(1, 4, 4) > 0, torch.ones(4, 4) > 0),
            r"ignore must have shape \[1, 4, 4\], got \[4, 4\]",
        ),
        (lambda: pointing_hit(torch.zeros(1, 3), BOX), r"points must have shape \[N, 2\], got \[1, 3\]"),
        (lambda: pointing_hit(torch.zeros(1, 2), BOX, tolerance=-1), r"tolerance must not be negative, got -1"),
        (
            lambda: pointing_hit(torch.full((1, 2), 9), torch.ones(1, 8, 8) > 0),
            r"points must lie within the masks of 8 x 8 pixels, got \[9.0, 9.0\]",
        ),
        (
            lambda: pointing_hit(torch.zeros(1, 2), torch.zeros(1, 8, 8) > 0),
            r"truth must hold an object for every image, got none for image 0",
        ),
        (
            lambda: PointingGame(2).update(torch.zeros(1, 2), BOX, torch.tensor([2])),
            r"labels must lie in \[0, 2\), got 2",
        ),
        (lambda: SingleProposal(2).update(BOX, BOX, torch.tensor([0, 1])), r"labels must have shape \[1\], got \[2\]"),
        (lambda: LesionSensitivity().update(torch.rand(1, 8, 8), BOX), r"regions must be bool \[N, H, W\], got \[1, "),
        (
            lambda: LesionSensitivity().update(torch.rand(1, 3, 3) > 2, [torch.ones(1, 4, 4) > 0]),
            r"lesions must be bool masks \['L', 3, 3\], got \[1, 4, 4\] of torch.bool for image 0",
        ),
    ],
)
def test_bad_input_is_told_in_a_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_on_a_device_all_is_the_same():
    maps, (parts, _) = blobs(10), ragged(10, seed=12)
    masks = torch.stack([as_mask(item[0]) for item in parts])
    for make, truth in ((MaxBoxAcc, parts), (MaxBoxAccV2, parts), (PxAP, masks), (PrecisionAtEER, masks)):
        here, there = make(), make()
        here.update(maps, truth)
        there.update(maps.cuda(), truth)
        assert there.compute().is_cuda
        assert float(there.compute()) == pytest.approx(float(here.compute()))
    points = localize.peak(maps)
    assert torch.equal(pointing_hit(points.cuda(), parts).cpu(), pointing_hit(points, parts))
