"""The loop against the metrics called by hand, on a network whose answers are known."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pyfast_xai import Explanation, InputError, Saliency, metrics
from pyfast_xai.evaluation import METRICS, Annotation, Centre, Noise, evaluate
from pyfast_xai.evaluation.result import interval
from pyfast_xai.explainers import Explainer
from pyfast_xai.images import Preprocess
from pyfast_xai.localize import Segment

SIDE = 16
PREPROCESS = Preprocess(size=SIDE, resize=SIDE, mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")


class Oracle(Explainer):
    """Shows the white pixels."""

    method = paper = "oracle"

    def _explain(self, images, target, args, kwargs):
        return Explanation("oracle", images.mean(1), images=images, box_rule=Segment(0.5))


class Opposite(Oracle):
    def _explain(self, images, target, args, kwargs):
        return Explanation("opposite", 1 - images.mean(1), images=images, box_rule=Segment(0.5))


class Quadrants(nn.Module):
    """Which quarter of the picture is brightest."""

    def __init__(self):
        super().__init__()
        self.pool, self.scale = nn.AdaptiveAvgPool2d(2), nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.pool(x.mean(1, keepdim=True)).flatten(1) * self.scale


@pytest.fixture
def model():
    return Quadrants().eval()


@pytest.fixture
def annotated(tmp_path):
    """A white square in each quarter; the last is large."""
    result = []
    for label, box in enumerate([(1, 2, 5, 6), (9, 1, 14, 5), (2, 9, 6, 14), (3, 4, 15, 15)]):
        canvas = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8)
        canvas[box[1] : box[3] + 1, box[0] : box[2] + 1] = 255
        path = tmp_path / f"{label}.png"
        Image.fromarray(canvas.numpy()).save(path)
        x1, y1, x2, y2 = box
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        result.append(Annotation(path, label, torch.tensor([box]).float(), [label], outline))
    return result


PLACES = ["box-error", "top1-box-error", "max-box-acc", "pointing", "pointing-15", "pxap", "eer-precision"]


def test_a_perfect_map_scores_perfectly_and_its_opposite_does_not(model, annotated):
    result = evaluate(model, annotated, PREPROCESS, {"oracle": Oracle, "opposite": Opposite}, PLACES, batch_size=3)
    for name in PLACES:
        actual = result.figure("oracle", name)
        perfect = 0.0 if METRICS[name].better == "lower" else 1.0
        assert (actual.value, actual.low, actual.high, actual.pictures) == (perfect, perfect, perfect, 4), name
        if name != "pointing-15":  # wider than these pictures
            assert abs(result.figure("opposite", name).value - perfect) > 0.1, name
    assert (result.pictures, result.small) == (4, 3)
    assert result.figure("oracle", "box-error", "small").pictures == 3


def test_figures_are_those_of_the_metrics(model, annotated):
    names = ["deletion", "insertion", "average-drop", "increase", "road", "max-sensitivity"]
    result = evaluate(model, annotated, PREPROCESS, {"saliency": Saliency}, names, batch_size=2)
    images = torch.stack([PREPROCESS(Image.open(item.path))[0] for item in annotated])
    explain = Saliency(model)
    heat = explain(images, torch.arange(4)).heatmap
    drop = metrics.drop_increase(model, images, heat)
    expected = {
        "deletion": metrics.deletion(model, images, heat).auc,
        "insertion": metrics.insertion(model, images, heat).auc,
        "average-drop": drop.drop,
        "increase": drop.increase.float(),
        "road": metrics.road(model, images, heat).combined,
        "max-sensitivity": metrics.max_sensitivity(explain, images, torch.arange(4)),
    }
    for name, rows in expected.items():
        assert result.figure("saliency", name).value == pytest.approx(float(rows.mean()), abs=1e-5), name


def test_figures_of_faithfulness_and_complexity(model, annotated):
    images = torch.stack([PREPROCESS(Image.open(item.path))[0] for item in annotated])
    explain, target = Saliency(model), torch.arange(4)
    made = explain(images, target)
    heat, masks = made.heatmap, images[:, 0] > 0.5
    requests = (model, images, made.attribution, target)
    expected = {
        "region-perturbation": metrics.region_perturbation(
            model, images, heat, target, patch=16, score="probability"
        ).aopc,
        "irof": metrics.irof(model, images, heat, target),
        "faithfulness-correlation": metrics.faithfulness_correlation(*requests),
        "mu-fidelity": metrics.mu_fidelity(*requests),
        "arcc": metrics.arcc(model, explain, images, heat, target).score,
        "sparseness": metrics.sparseness(heat),
        "complexity": metrics.complexity(heat),
        "random-logit": metrics.random_logit(model, explain, images, target),
        "average-sensitivity": metrics.average_sensitivity(explain, images, target),
    }
    on_masks = {
        "relevance-mass": metrics.relevance_mass(heat, masks),
        "relevance-rank": metrics.relevance_rank(heat, masks),
        "mask-auc": metrics.mask_auc(heat, masks),
    }
    result = evaluate(model, annotated, PREPROCESS, {"saliency": Saliency}, [*expected, *on_masks])
    for name, rows in {**expected, **on_masks}.items():
        assert result.figure("saliency", name).value == pytest.approx(float(rows.mean()), abs=1e-5), name


def test_sanity_metrics_of_a_method_that_looks_at_nothing(model, annotated):
    names = ["class-sensitivity", "randomization"]
    result = evaluate(model, annotated, PREPROCESS, {"centre": Centre, "saliency": Saliency}, names)
    assert result.figure("centre", "class-sensitivity").value == 0
    assert result.figure("centre", "randomization").value == pytest.approx(1)
    # The gradients of two quarters have no pixel in common: unit maps are the square root of two apart.
    assert result.figure("saliency", "class-sensitivity").value == pytest.approx(2**0.5, abs=1e-5)


def test_differences_are_paired(model, annotated):
    """The bootstrap of the differences themselves, and a curve whose best threshold is each method's."""
    names = ["deletion", "best-box-error", "box-error"]
    methods = {"saliency": Saliency, "oracle": Oracle, "opposite": Opposite}
    result = evaluate(model, annotated, PREPROCESS, methods, names, batch_size=3)
    images = torch.stack([PREPROCESS(Image.open(item.path))[0] for item in annotated])
    areas = {
        name: metrics.deletion(model, images, make(model)(images, torch.arange(4)).heatmap).auc.double().numpy()
        for name, make in methods.items()
    }
    differences = areas["opposite"] - areas["saliency"]
    assert differences.std() > 0.01
    drawn = np.random.default_rng(1).integers(4, size=(4000, 4))
    low, high = np.quantile(differences[drawn].mean(1), [0.025, 0.975])
    actual = result.difference("opposite", "saliency", "deletion", resamples=4000)
    assert (actual.method, actual.metric, actual.subset, actual.pictures) == (
        "opposite - saliency",
        "deletion",
        "all",
        4,
    )
    assert actual.value == pytest.approx(differences.mean(), abs=1e-6)
    spread = high - low
    assert actual.low == pytest.approx(low, abs=0.1 * spread)
    assert actual.high == pytest.approx(high, abs=0.1 * spread)
    for name in names:
        for subset in ("all", "small"):
            one, other = (result.figure(method, name, subset).value for method in ("opposite", "oracle"))
            assert result.difference("opposite", "oracle", name, subset).value == pytest.approx(one - other), name
    same = result.difference("oracle", "oracle", "best-box-error")
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_difference_counts_the_pictures_that_both_have(model, annotated):
    bare = [Annotation(annotated[0].path), *annotated[1:]]
    result = evaluate(model, bare, PREPROCESS, {"oracle": Oracle, "opposite": Opposite}, ["box-error"])
    assert result.rows["oracle", "box-error"].isnan().tolist() == [True, False, False, False]
    assert result.difference("oracle", "opposite", "box-error").pictures == 3
    with pytest.raises(InputError, match="figure must be one that was measured, got 'box-error' of 'centre' on 'all'"):
        result.difference("oracle", "centre", "box-error")


def test_noise_is_at_chance(model, annotated):
    result = evaluate(model, annotated, PREPROCESS, ["saliency"], ["pxap"])
    chance = evaluate(model, annotated, PREPROCESS, {"noise": Noise}, ["pxap"])
    share = sum(len(item.boxes) and float((item.boxes[0, 2:] - item.boxes[0, :2] + 1).prod()) for item in annotated)
    assert chance.figure("noise", "pxap").value == pytest.approx(share / (4 * SIDE**2), abs=0.08)
    assert result.figure("saliency", "pxap").value > chance.figure("noise", "pxap").value


def test_order_and_batch_change_nothing(model, annotated):
    names = ["box-error", "deletion", "pxap", "max-box-acc", "randomization"]
    single = evaluate(model, annotated, PREPROCESS, {"saliency": Saliency}, names, batch_size=4)
    other = evaluate(model, annotated[::-1], PREPROCESS, {"saliency": Saliency}, names, batch_size=1)
    for name in names:
        assert single.figure("saliency", name).value == pytest.approx(other.figure("saliency", name).value, abs=1e-6)


def test_pictures_without_what_a_metric_needs_do_not_count(model, annotated):
    bare = [Annotation(annotated[0].path), *annotated[1:]]
    result = evaluate(model, bare, PREPROCESS, {"oracle": Oracle}, ["box-error", "pxap", "deletion"], batch_size=1)
    assert [result.figure("oracle", name).pictures for name in ("box-error", "pxap", "deletion")] == [3, 3, 4]
    with pytest.raises(InputError, match="annotations must have a boxes and label of a picture for 'top1-box-error'"):
        evaluate(model, bare[:1], PREPROCESS, {"oracle": Oracle}, ["top1-box-error"])


def test_labels_by_name_and_as_targets(model, annotated):
    names = ["nw", "ne", "sw", "se"]
    named = [Annotation(item.path, names[item.label].upper(), item.boxes) for item in annotated]
    recorded = []

    class Spy(Oracle):
        def __call__(self, images, target=None):
            recorded.append(target.tolist())
            return super().__call__(images, target)

    wrong = [Annotation(named[0].path, "se", named[0].boxes), *named[1:]]
    result = evaluate(model, wrong, PREPROCESS, {"spy": Spy}, ["top1-box-error"], labels=names, target="label")
    assert recorded == [[3, 1, 2, 3]]
    assert result.figure("spy", "top1-box-error").value == 0.25
    with pytest.raises(InputError, match="annotations must have a class of the model where target is 'label', got 'x'"):
        evaluate(model, [Annotation(named[0].path, "x")], PREPROCESS, {"o": Oracle}, ["deletion"], target="label")
    with pytest.raises(InputError, match=r"labels in \[0, 4\), got 4"):
        evaluate(model, [Annotation(named[0].path, 4)], PREPROCESS, {"o": Oracle}, ["deletion"])


def test_a_picture_that_cannot_be_read_is_listed(model, annotated, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    result = evaluate(
        model, [Annotation(tmp_path / "bad.png"), *annotated], PREPROCESS, {"oracle": Oracle}, ["box-error"]
    )
    assert result.pictures == 4
    assert [name for name, _ in result.errors] == [str(tmp_path / "bad.png")]
    with pytest.raises(InputError, match="pictures that can be read, got 1 that cannot"):
        evaluate(model, [Annotation(tmp_path / "bad.png")], PREPROCESS, {"oracle": Oracle}, ["box-error"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["salency"]}, "methods must be one of .*'salency'"),
        ({"methods": []}, "methods must hold at least one"),
        ({"metrics": ["iou"]}, "metrics must be one of 'box-error'.*'iou'"),
        ({"metrics": []}, "metrics must hold at least one"),
        ({"annotations": []}, "annotations must hold at least one"),
        ({"target": "top"}, "target must be one of 'predicted', 'label', got 'top'"),
    ],
)
def test_bad_arguments(model, annotated, change, message):
    options = {"annotations": annotated, "methods": ["saliency"], "metrics": ["box-error"], **change}
    with pytest.raises(InputError, match=message):
        evaluate(model, preprocess=PREPROCESS, **options)


def test_objects_beyond_the_crop_count_as_missed(model, tmp_path):
    Image.new("RGB", (64, 16)).save(tmp_path / "wide.png")
    far = Annotation(tmp_path / "wide.png", None, torch.tensor([[0.0, 0, 5, 15]]))
    result = evaluate(model, [far], PREPROCESS, {"centre": Centre}, ["max-box-acc", "box-error", "pointing"])
    values = [result.figure("centre", name).value for name in ("max-box-acc", "box-error", "pointing")]
    assert values == [0, 1, 0]


def test_boxes_are_compared_in_pixels_of_the_picture(model, tmp_path):
    """A picture three times as large, twice as wide: the crop shows its middle."""
    canvas = torch.zeros(48, 96, 3, dtype=torch.uint8)
    canvas[6:24, 30:60] = 255
    Image.fromarray(canvas.numpy()).save(tmp_path / "a.png")
    actual = Annotation(tmp_path / "a.png", None, torch.tensor([[30.0, 6, 59, 23]]))
    result = evaluate(model, [actual], PREPROCESS, {"oracle": Oracle}, ["box-error", "max-box-acc", "pointing"])
    assert [figure.value for figure in result.figures if figure.subset == "all"] == [0, 1, 1]


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        rows = torch.rand(60, generator=generator, dtype=torch.float64)
        _, low, high = interval(rows, lambda total, count: total / count, 500, seed)
        covered += low <= 0.5 <= high
    # The percentile bootstrap of a mean of 60: a little under 95 %.
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_of_a_figure_that_is_no_mean():
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    value, low, high = interval(rows, lambda total, count: (total / count[:, None]).amax(1), 2000)
    assert value == 0.75
    assert 0.25 < low < value <= high <= 1


def test_files(model, annotated, tmp_path):
    pytest.importorskip("matplotlib")
    result = evaluate(
        model, annotated, PREPROCESS, {"oracle": Oracle, "centre": Centre}, ["box-error", "deletion"], resamples=50
    )
    paths = result.write(tmp_path / "out")
    assert [path.name for path in paths] == ["evaluation.csv", "evaluation.json", "box-error.png", "deletion.png"]
    table = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [(row["method"], row["metric"], row["subset"]) for row in table][:3] == [
        ("oracle", "box-error", "all"), ("oracle", "box-error", "small"), ("oracle", "deletion", "all"),
    ]  # fmt: skip
    assert json.loads(paths[1].read_text())["pictures"] == 4
    with Image.open(paths[2]) as plot:
        assert plot.width > 1000
    heads, rows = result.table()
    assert heads[2:] == ["box error, % ↓", "box error, %, small ↓", "deletion AUC ↓"]
    assert rows[0][2] == "0.0 ± 0.0"
    assert result.markdown().count("\n") == 4
    with pytest.raises(InputError, match="figure must be one that was measured, got 'pxap'"):
        result.figure("oracle", "pxap")
