"""Every experiment runs on a collection that is small enough, and its figures are those of the metrics."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn
from torch.nn import functional

from pyfast_xai import CLEAR, CNNFixations, Saliency, metrics
from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import BASELINES, METRICS
from pyfast_xai.reproduce import (
    EXPERIMENTS,
    Data,
    backprop,
    captions,
    clear,
    comparison,
    eigen_cam,
    fgvis,
    fixations,
    saliency,
)
from pyfast_xai.reproduce.data import tuning_pictures
from pyfast_xai.reproduce.outcome import Outcome, percent
from pyfast_xai.reproduce.protocol import like


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Searches of a few iterations and masks."""
    quick = {
        "integrated-gradients": {"n_steps": 2}, "smoothgrad": {"n_samples": 2}, "fgvis": {"n_iterations": 2},
        "occlusion": {"window": 16, "stride": 16}, "rise": {"n_masks": 4},
        "lime": {"n_samples": 8, "feature_mask": "slic"},
        "meaningful-perturbation": {"n_iterations": 2}, "ss-cam": {"n_samples": 1}, "is-cam": {"n_steps": 1},
        "smooth-grad-cam++": {"n_samples": 1}, "sess": {"n_scales": 1},
    }  # fmt: skip

    def shortened(make):
        return lambda model, **settings: make(model, **{**settings, **quick.get(make.method, {})})

    for module, names in ((fgvis, ("FGVis", "Occlusion", "LIME")),):
        for name in names:
            monkeypatch.setattr(module, name, shortened(getattr(module, name)))
    slow = {name: shortened(make) for name, make in comparison.METHODS.items() if make.slow}
    monkeypatch.setattr(comparison, "SLOW", {**BASELINES, **slow})
    monkeypatch.setattr(fgvis, "RISE", lambda model, n_masks: comparison.METHODS["rise"](model, n_masks=4))
    monkeypatch.setattr(backprop, "FILTERS", (4, 1024))
    monkeypatch.setattr(saliency, "LEAST", 3)
    monkeypatch.setattr(captions, "STEPS", 40)


# Experiments that need special data have separate tests.
RUN = [
    (paper, name)
    for paper, known in EXPERIMENTS.items()
    for name in known
    if name not in ("table-1-boxes", "table-1-svhn", "table-1-mnist", "dogs", "sketches")
    and (paper, name) != ("fgvis", "table-3")
]


@pytest.mark.filterwarnings("ignore:.*Applied workaround:UserWarning")
@pytest.mark.parametrize(("paper", "name"), RUN)
def test_experiment_runs(data, tmp_path, paper, name, monkeypatch):
    # A small random network is sure of nothing.
    sure = fgvis._sure
    monkeypatch.setattr(fgvis, "_sure", lambda loaded, data, count: sure(loaded, data, count, least=0.0))
    output = []
    data = Data(
        data.root, data.count, data.names, data.batch_size, progress=lambda doing, count: output.append((doing, count))
    )
    before = torch.get_rng_state()
    outcome = EXPERIMENTS[paper][name](data)
    assert torch.equal(torch.get_rng_state(), before)
    assert outcome.rows or outcome.pictures
    for row in outcome.rows:
        assert len(row) == len(outcome.heads), row
        assert not any("nan" in cell for cell in row), row
    paths = outcome.write(tmp_path / "out", name)
    assert all(path.stat().st_size > 0 for path in paths)
    if outcome.rows:
        assert output
        assert {path.suffix for path in paths} >= {".md", ".csv"}


def cell(outcome, head, **where):
    """The one cell under a head whose row begins so."""
    row = next(r for r in outcome.rows if r[: len(where)] == list(where.values()))
    return row[list(outcome.heads).index(head)]


def test_table_1_is_the_metric_on_the_same_pictures(data):
    outcome = fixations.table_1(data)
    loaded = next(data.networks(()))
    pictures = data.imagenet()
    images = data.inputs(pictures, loaded.preprocess)
    explanation = CNNFixations(loaded.model)(images)
    placed = torch.cat([loaded.preprocess.boxes_in(box[None], (40, 40)) for box in explanation.boxes()])
    truth = [item.boxes for item in pictures]
    labels = torch.tensor([item.label for item in pictures])
    top = metrics.localization_error(placed, truth, explanation.target, labels)
    agnostic = metrics.localization_error(placed, truth)
    row = {"network": "squeezenet1_1", "method": "CNN-Fixations"}
    assert cell(outcome, "top-1 box error", **row) == percent(float(top))
    assert cell(outcome, "box error", **row) == percent(float(agnostic))
    assert {r[1] for r in outcome.rows} == set(fixations.METHODS)


def test_differences_from_the_centre_are_those_of_the_table(data):
    outcome = comparison.boxes(data)
    heads = list(outcome.heads)
    assert {row[1] for row in outcome.rows} == set(comparison.POINTING)
    for metric in comparison.BOXES:
        title = METRICS[metric].title
        figures, differences = (
            heads.index(f"{title} {'↓' if metric == 'box-error' else '↑'}"),
            heads.index(f"{title}, minus the centre's"),
        )
        centre = next(row for row in outcome.rows if row[1] == "centre")
        assert centre[differences] == "-"
        for row in outcome.rows:
            if row is not centre:
                one, other = (float(cells[figures].split()[0]) for cells in (row, centre))
                value, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row[differences]).groups())
                assert value == pytest.approx(one - other, abs=0.11)
                assert low <= value <= high


def test_comparisons_take_as_many_pictures_as_their_tables_have(data, monkeypatch):
    taken = {}

    def record(data, methods, metrics, title):
        taken[title] = data.count
        return Outcome(title, [], [])

    monkeypatch.setattr(comparison, "_table", record)
    for name in ("places", "answers", "slow"):
        EXPERIMENTS["comparison"][name](replace(data, count=None))
    assert list(taken.values()) == [None, 100, 50]
    for name in ("places", "answers", "slow"):
        EXPERIMENTS["comparison"][name](replace(data, count=7))
    assert list(taken.values()) == [7, 7, 7]


def test_halves_share_no_picture(data, monkeypatch):
    data = replace(data, count=None)
    every = {item.path for item in data.imagenet()}
    first = sorted(path.stem for path in every)[0]
    monkeypatch.setattr("pyfast_xai.reproduce.data.tuning_pictures", lambda: frozenset({first}))
    tuning, rest = ({item.path for item in replace(data, half=half).imagenet()} for half in ("tuning", "held-out"))
    assert [path.stem for path in tuning] == [first]
    assert (tuning | rest, tuning & rest) == (every, set())


def test_tuning_pictures_are_named():
    names = tuning_pictures()
    assert len(names) == 300
    assert all(re.fullmatch(r"ILSVRC2012_val_\d{8}", name) for name in names)


def test_papers_figures_stand_beside_the_family(root):
    outcome = fixations.table_1(Data(root, count=2, names=("googlenet_small",)))
    assert cell(outcome, outcome.heads[2], network="googlenet_small", method="Grad-CAM") == "74.3"
    assert like("resnet50_abm", fixations.NETWORKS) == 3
    assert like("squeezenet1_1", fixations.NETWORKS) is None
    assert eigen_cam.TABLE_1["Eigen-CAM"][like("googlenet", eigen_cam.NETWORKS)] == 46.28


def test_a_method_that_cannot_is_left_out_and_named(root):
    text = (root / "models.py").read_text().replace("nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)",
        "nn.Flatten(), nn.Linear(12 * 256, 4)")  # fmt: skip
    (root / "models.py").write_text(text)
    outcome = fixations.table_1(Data(root, count=2, names=("squeezenet1_1",)))
    assert "CAM" not in {row[1] for row in outcome.rows}
    assert any(output.startswith("CAM is left out on squeezenet1_1: ") for output in outcome.deviations)


def test_published_boxes(root):
    (root / "wsol").mkdir()
    truth = np.array([[0, 0, 9, 9], [10, 10, 19, 19], [0, 0, 1, 1]], np.int16)
    np.savez(root / "wsol/ilsvrc_val_ground_truth.npz", label=np.array([1, 2], np.int16), box_xyxy=truth,
        box_offset=np.array([0, 2, 3], np.int32))  # fmt: skip
    actual = {}
    for name in ("alexNet", "vgg16", "googleNet", "resNet152"):
        actual[f"{name}_label"] = np.array([1, 1], np.int16)
        actual[f"{name}_box_xyxy"] = np.array([[10, 10, 19, 19], [0, 0, 1, 1]], np.int16)
    np.savez(root / "wsol/cnn_fixations_boxes.npz", **actual)
    outcome = fixations.table_1_boxes(Data(root))
    # Both boxes are right, one class is not.
    assert [row[2:] for row in outcome.rows] == [["50.00", "0.00"]] * 4


def test_real_published_boxes_give_the_papers_table(real_data):
    outcome = fixations.table_1_boxes(Data(real_data))
    for _, paper, measured, _ in outcome.rows:
        assert float(measured) == pytest.approx(float(paper), abs=0.05)


def test_single_proposals_of_a_perfect_method(data, monkeypatch):
    class Bright(Saliency):
        """Its box is the bright square."""

        def __call__(self, images, target=None):
            result = super().__call__(images, target)
            result.heatmap = (images[:, 0] > 0.6).float()
            return result

    monkeypatch.setattr(fixations, "METHODS", {"CNN-Fixations": Bright})
    outcome = fixations.table_3(data)
    assert outcome.rows[0][2:] == [".32/.36", "1.00/1.00"]


def test_sketches(data, picture, boxes):
    with pytest.raises(InputError, match="data must hold the sketches of TU-Berlin"):
        fixations.sketches(data)
    for n, kind in enumerate(("cup", "cat", "cat")):
        picture(data.root / f"sketches/{kind}/{n}.png", boxes[n])
    assert fixations.sketches(data).pictures["squeezenet1_1"].width > 300


def test_dogs(root, picture, boxes, monkeypatch):
    monkeypatch.setattr(clear, "DOGS", ((4,), ((1, 10),)))
    folder = root / "StanfordDogs"
    with pytest.raises(InputError, match=r"data must hold Stanford Dogs at StanfordDogs/train_list\.mat"):
        clear.dogs(Data(root))
    for part, count in (("train", 80), ("test", 6)):
        files = np.empty((count, 1), dtype=object)
        for n in range(count):
            files[n, 0] = f"n{n % 12}/{part}{n}.jpg"
            if n % 12 < 10:  # the others are of breeds that are left out
                picture(folder / "Images" / files[n, 0], boxes[n % 6])
        savemat(folder / f"{part}_list.mat", {"file_list": files, "labels": np.arange(count)[:, None] % 12 + 1})
    outcome = clear.dogs(Data(root, batch_size=4))
    assert outcome.rows[0][0] == "58.74"
    assert 0 <= float(outcome.rows[0][1]) <= 100


def test_figure_7_is_the_distance_between_unit_maps(data):
    outcome = backprop.figure_7(data)
    loaded = next(data.networks(()))
    images = data.inputs(data.imagenet(), loaded.preprocess)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cat([torch.rand(n, 4, generator=generator).topk(2, 1).indices for n in (3, 1)])
    first, second = (Saliency(loaded.model)(images, pairs[:, i]).attribution.double().flatten(1) for i in (0, 1))
    distance = (functional.normalize(first, dim=1) - functional.normalize(second, dim=1)).norm(dim=1).mean()
    assert float(outcome.rows[0][2]) == pytest.approx(float(distance), abs=1e-3)
    assert [row[1] for row in outcome.rows] == ["trained", "random"]


def test_an_attack_that_changes_nothing_has_no_figures(data, monkeypatch):
    monkeypatch.setattr(backprop.metrics, "fgsm", lambda model, images, epsilon: images)
    assert backprop.adversarial(data).rows == [["squeezenet1_1", "0 of 4", "-", "-", "-"]]


def test_random_networks_are_those_of_the_paper():
    with torch.random.fork_rng():
        model = backprop.three_layers(64)
        assert [tuple(w.shape) for w in model.parameters()] == [(64, 3, 7, 7), (64,), (10, 64 * 29 * 29), (10,)]
        weight = model[0].weight.detach()
        assert float(weight.abs().max()) <= 0.2
        # The deviation of a Gaussian cut at two deviations.
        assert float(weight.std()) == pytest.approx(0.088, rel=0.03)
        assert not model[0].bias.any()


def test_networks_of_the_appendix():
    shapes = {
        "MNIST": (clear.MNIST, 1, [32, 32, 32, 32, 64, 10], 1),
        "SVHN": (clear.SVHN, 3, [32] * 3 + [64] * 3 + [128, 128, 10], 2),
        "DOGS": (clear.DOGS, 3, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 8 + [10], 5),
    }
    for stages, channels, filters, pools in shapes.values():
        model = clear.all_convolutional(stages, channels)
        convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        assert [item.out_channels for item in convolutions] == filters
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in model) == pools
        assert convolutions[-1].kernel_size == (1, 1)
        # Its last convolution is read as it is.
        assert isinstance(model[-3], nn.Conv2d)


def test_clear_on_digits(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 64 * 6).astype(np.int64)
    images = rng.integers(0, 40, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 5 + 2 * label, 4:24] = 255
    np.savez(tmp_path / "mnist.npz", x=images, y=labels)
    monkeypatch.setattr(clear, "HELD_OUT", 64)
    monkeypatch.setattr(clear, "MNIST", ((8,), (16, (1, 10))))
    outcome = clear.table_1_mnist(Data(tmp_path, count=32))
    assert outcome.rows[0] == ["paper", "-", "-", "99.26", "79.89", "43.45"]
    assert len(outcome.rows) == 1 + 3 * 3 * 2
    # The whole image is the same whatever is strong.
    assert len({row[3] for row in outcome.rows[1:]}) == 1
    assert all(0 <= float(value) <= 100 for row in outcome.rows[1:] for value in row[3:])
    assert "maps" in outcome.pictures
    assert any("320 digits" in output for output in outcome.deviations)


def test_training_learns():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (640,), generator=generator)
    images = torch.rand(640, 1, 12, 12, generator=generator) * 0.3
    images[labels == 1, :, 3:9, 3:9] += 0.7
    model = clear.train(clear.all_convolutional(((16,), ((1, 2),)), 1), images, labels, 30, Data(__file__))
    assert float((model(images).argmax(1) == labels).float().mean()) > 0.95
    assert not model.training
    assert CLEAR(model, candidates=None)(images[:2]).dominant_class.shape == (2, 12, 12)


def test_partial_training_starts_from_the_trained_map(data):
    outcome = backprop.partial_training(data)
    assert outcome.rows[0] == ["squeezenet1_1", "all trained", "1.000", "1.000", "1.000"]
    loaded = next(data.networks(()))
    changed = backprop._with_random(loaded.model, ["3"], 0)
    assert torch.equal(changed[0].weight, loaded.model[0].weight)
    assert not torch.equal(changed[3].weight, loaded.model[3].weight)


def test_outcome_as_text():
    outcome = Outcome("Title", ["a", "b"], [["1", "2"]], ["One thing."])
    assert (
        outcome.markdown() == "Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNot as in the paper:\n\n- One thing.\n"
    )
    assert re.fullmatch(r"12\.3", percent(0.123))
    assert percent(float("nan")) == "-"
