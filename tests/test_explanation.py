import io
import json

import numpy as np
import pytest
import torch
from case_ids import case_id
from PIL import Image

from pyfast_xai import Explanation, InputError, localize


@pytest.fixture
def explanation():
    heatmap = torch.zeros(3, 20, 30)
    heatmap[0, 4:8, 5:15] = 1.0
    heatmap[1, 10, 20] = 2.0
    heatmap[1, 0, 0] = 0.5
    return Explanation(
        method="fixations",
        heatmap=heatmap,
        target=torch.tensor([2, 0, 7]),
        score=torch.tensor([0.9, 0.25, 0.5]),
        points=[torch.tensor([[4, 5], [7, 14]]), torch.tensor([[10, 20]]), torch.empty(0, 2, dtype=torch.int64)],
        images=torch.rand(3, 3, 20, 30),
        labels=["cat", "dog", "bird"],
        box_rule=localize.Hull(),
    )


def test_boxes_are_the_hull_of_the_points(explanation):
    boxes = explanation.boxes()
    assert boxes[:2].tolist() == [[5, 4, 14, 7], [20, 10, 20, 10]]
    assert boxes[2].isnan().all()


@pytest.mark.parametrize(
    ("text", "rule", "function"),
    [
        pytest.param("segment:0.2", localize.Segment(0.2), lambda h: localize.largest_segment(h, 0.2), id="segment"),
        pytest.param("mass:0.05:1", localize.Mass(0.05, 1.0), lambda h: localize.mass_box(h, 0.05, 1.0), id="mass"),
    ],
)
def test_a_rule_makes_the_boxes(explanation, text, rule, function):
    expected = function(explanation.heatmap)
    torch.testing.assert_close(explanation.boxes(text), expected, equal_nan=True)
    torch.testing.assert_close(explanation.boxes(rule), expected, equal_nan=True)
    without_points = Explanation("eigen-cam", explanation.heatmap, box_rule=rule)
    torch.testing.assert_close(without_points.boxes(), expected, equal_nan=True)


def test_the_hull_needs_points(explanation):
    assert torch.equal(explanation[:2].boxes("hull"), localize.hull(explanation.points[:2]))
    with pytest.raises(InputError, match="box_rule must be one of maps, segment or mass, for a method without points"):
        Explanation("eigen-cam", explanation.heatmap).boxes("hull")


def test_peak(explanation):
    assert explanation.peak().tolist() == [[4, 5], [10, 20], [0, 0]]


def test_rows_can_be_taken(explanation):
    assert len(explanation) == 3
    last = explanation[-1]
    assert len(last) == 1
    assert last.target.tolist() == [7]
    assert len(last.points[0]) == 0
    assert [int(one.target) for one in explanation] == [2, 0, 7]
    assert explanation[1:].points[0].tolist() == [[10, 20]]
    with pytest.raises(IndexError, match=r"row must lie in \[-3, 3\), got 3"):
        explanation[3]


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        (np.int64(2), [7]),
        (np.int32(-1), [7]),
        (torch.tensor(1), [0]),
        (torch.tensor([2, 0]), [7, 2]),
        (np.array([2, -3]), [7, 2]),
        ([True, False, True], [2, 7]),
        (np.array([False, True, False]), [0]),
        (torch.tensor([True, False, True]), [2, 7]),
        (torch.zeros(3, dtype=torch.bool), []),
        ([], []),
        ((1, 1), [0, 0]),
        (slice(None, None, -1), [7, 0, 2]),
        (slice(0, 3, 2), [2, 7]),
        (range(1, 3), [0, 7]),
    ],
    ids=case_id,
)
def test_rows_can_be_named_in_every_way(explanation, rows, targets):
    explanation.outputs = ["logits", "values", "probabilities"]
    places = [[2, 0, 7].index(target) for target in targets]
    result = explanation[rows]
    assert result.target.tolist() == targets
    assert torch.equal(result.heatmap, explanation.heatmap[places])
    assert [item.tolist() for item in result.points] == [explanation.points[place].tolist() for place in places]
    assert result.outputs == [explanation.outputs[place] for place in places]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (3, r"row must lie in \[-3, 3\), got 3"),
        ([0, -4], r"row must lie in \[-3, 3\), got -4"),
        (np.int64(5), r"row must lie in \[-3, 3\), got 5"),
    ],
    ids=case_id,
)
def test_rows_that_do_not_exist(explanation, rows, words):
    with pytest.raises(IndexError, match=words):
        explanation[rows]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([True, False], r"rows must be a mask of 3 entries, got \[2\]"),
        (torch.ones(3, 3, dtype=torch.bool), r"rows must be a mask of 3 entries, got \[3, 3\]"),
        ([0.5], "rows must be an integer, a slice, integers or a mask, got torch.float32"),
        (torch.zeros(1, 1, dtype=torch.int64), "rows must be an integer, a slice, integers or a mask"),
        ("cat", "rows must be an integer, a slice, integers or a mask, got str"),
        (None, "rows must be an integer, a slice, integers or a mask, got NoneType"),
    ],
    ids=case_id,
)
def test_what_names_no_rows(explanation, rows, words):
    with pytest.raises(InputError, match=words):
        explanation[rows]


def test_a_mask_of_the_scores_takes_rows(explanation):
    assert explanation[explanation.score > 0.4].target.tolist() == [2, 7]


def test_images_are_held_without_their_graph(explanation):
    images = torch.rand(3, 3, 20, 30, requires_grad=True)
    assert not Explanation("any", explanation.heatmap, images=images * 2).images.requires_grad
    assert images.requires_grad


def test_repr_is_one_line(explanation):
    assert repr(explanation) == "Explanation(fixations, 3 images 20x30, target [2, 0, 7])"
    assert repr(explanation[:1]) == "Explanation(fixations, 1 image 20x30, target [2])"
    assert repr(Explanation("eigen-cam", torch.zeros(9, 4, 5))) == "Explanation(eigen-cam, 9 images 4x5)"
    many = Explanation("saliency", torch.zeros(9, 4, 5), target=torch.arange(9), kind="neuron")
    assert repr(many) == "Explanation(saliency, 9 images 4x5, neuron [0, 1, 2, ...])"


def test_numpy_copies_as_it_is_told(explanation):
    shared, copied = np.array(explanation, copy=False), np.array(explanation, copy=True)
    assert np.shares_memory(shared, explanation.heatmap.numpy())
    assert not np.shares_memory(copied, explanation.heatmap.numpy())
    assert np.array_equal(shared, copied)
    assert np.array(explanation, dtype=np.float64).dtype == np.float64
    assert np.shares_memory(explanation.__array__(np.float32, copy=None), shared)
    assert not np.shares_memory(explanation.__array__(np.float32, copy=True), shared)
    with pytest.raises(ValueError, match="copy"):
        explanation.__array__(np.float64, copy=False)


def test_numpy_and_dlpack_share_the_map(explanation):
    assert np.array_equal(np.asarray(explanation), explanation.heatmap.numpy())
    assert np.asarray(explanation, dtype=np.float64).dtype == np.float64
    assert torch.from_dlpack(explanation).data_ptr() == explanation.heatmap.data_ptr()


def test_captions_name_class_and_probability(explanation):
    assert explanation.captions() == ["bird 90%", "cat 25%", "class 7 50%"]
    assert Explanation("eigen-cam", explanation.heatmap).captions() == ["eigen-cam"] * 3


def test_captions_of_a_neuron_have_its_number_and_activation(explanation):
    explanation.kind = "neuron"
    explanation.score = torch.tensor([3.456, -0.5, 1200.0])
    assert explanation.captions() == ["neuron 2 3.46", "neuron 0 -0.5", "neuron 7 1.2e+03"]


def test_captions_of_values_are_numbers(explanation):
    explanation.outputs = ["values", "logits", "probabilities"]
    assert explanation.captions() == ["bird 0.9", "cat 25%", "class 7 50%"]


def test_overlay_draws_on_images_of_another_size(explanation):
    ground = torch.zeros(3, 3, 40, 60)
    shown = explanation.overlay(ground)
    assert shown.shape == (3, 3, 40, 60)
    assert shown.min() >= 0
    assert shown.max() <= 1
    # The one point of the second image, at twice the scale.
    assert shown[1, :, 21, 41].max() > 0.5
    # Nothing was found in the third.
    assert shown[2].max() < 0.2


def test_pictures_need_images(explanation):
    explanation.images = None
    with pytest.raises(InputError, match="images must be given"):
        explanation.overlay()
    assert explanation._repr_png_() is None


def test_plot_says_what_it_shows(explanation):
    plain = explanation.plot()
    assert plain.width > 3 * 256
    titled, boxed = explanation.plot(title=""), explanation.plot(boxes=True)
    assert titled.height < plain.height  # no line for the method
    yellow = (np.array(boxed).astype(int) - [255, 217, 26]).__abs__().max(2) < 12
    # Around the one picture with a box of some size, and in the key.
    assert yellow[: 256 + 60].sum() > 100
    assert yellow[256 + 60 :].sum() > 10
    assert np.array_equal(np.array(explanation.plot(boxes=explanation.boxes())), np.array(boxed))
    for change in ({"labels": ["a", "b"]}, {"colormap": "gray"}, {"alpha": 0.9}, {"columns": 1}):
        assert explanation.plot(**change).tobytes() != plain.tobytes()
    with pytest.raises(InputError, match=r"boxes must have shape \[3, 4\], got \[1, 4\]"):
        explanation.plot(boxes=torch.zeros(1, 4))


@pytest.mark.parametrize(("count", "side"), [(1, 448), (2, 352), (3, 256)])
def test_few_pictures_are_drawn_large(explanation, count, side):
    assert explanation[:count].plot(columns=1).width > side


def test_plot_on_axes(explanation):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 3)
    assert explanation.plot(ax=axes, title="mine") is axes
    assert [item.get_title() for item in axes] == ["mine: bird 90%", "mine: cat 25%", "mine: class 7 50%"]
    assert all(len(item.images) == 1 for item in axes)
    whole = figure.add_subplot()
    assert explanation.plot(ax=whole) is whole
    with pytest.raises(InputError, match="ax must be one for all or one for each of 3 images, got 2"):
        explanation.plot(ax=list(axes[:2]))
    pyplot.close(figure)


def test_what_is_signed_is_drawn_so(explanation):
    with pytest.raises(InputError, match="signed must be False for fixations"):
        explanation.overlay(signed=True)
    signed = Explanation("any", explanation.heatmap, images=torch.full((3, 3, 20, 30), 0.5))
    signed.attribution = explanation.heatmap[:, None] * torch.tensor([1.0, -3.0, 1.0]).view(1, 3, 1, 1)
    shown = signed.overlay(signed=True)
    against = shown[0, :, 5, 8]
    assert against[2] > against[0] + 0.1
    signed.signed_map = explanation.heatmap
    speaking = signed.overlay(signed=True)[0, :, 5, 8]
    assert speaking[0] > speaking[2] + 0.1


def test_notebooks_show_a_picture_with_a_text(explanation):
    page = explanation._repr_html_()
    assert '<img alt="Heat maps of fixations for bird 90%, cat 25%, class 7 50%" src="data:image/png;base64,' in page
    assert "of 3 images" not in page
    explanation.labels = ["cat", "dog", '"><script>']
    assert "<script>" not in explanation._repr_html_()
    many = Explanation.concatenate([explanation] * 6)
    assert "<p>16 of 18 images: plot() draws all of them.</p>" in many._repr_html_()
    explanation.images = None
    assert explanation._repr_html_() is None


def test_notebooks_show_a_picture(explanation):
    with Image.open(io.BytesIO(explanation._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 100


def test_saved_files(explanation, tmp_path):
    paths = explanation.save(tmp_path / "new", names=["a", "b", "c"])
    assert [path.name for path in paths] == [*(f"{n}.fixations.png" for n in "abc"), "fixations.json"]
    with Image.open(paths[0]) as picture:
        assert picture.size == (30, 20)
    rows = json.loads(paths[-1].read_text())
    assert rows[0] == {
        "name": "a",
        "method": "fixations",
        "size": [20, 30],
        "target": 2,
        "score": pytest.approx(0.9),
        "box": [5, 4, 14, 7],
        "points": [[4, 5], [7, 14]],
    }
    assert rows[2]["box"] is None
    with pytest.raises(InputError, match="names must be one for each of 3 images, got 1"):
        explanation.save(tmp_path, names=["a"])


def test_rows_by_number(explanation):
    picked = explanation[[2, 0]]
    assert picked.target.tolist() == [7, 2]
    assert torch.equal(picked.heatmap, explanation.heatmap[[2, 0]])
    assert [len(points) for points in picked.points] == [0, 2]
    assert len(explanation[[]]) == 0


def test_a_picture_is_no_folder(explanation, tmp_path):
    with pytest.raises(InputError, match=r"folder must be a folder .*: give plot\(\).save\("):
        explanation.save(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_ground_that_does_not_fit(explanation):
    with pytest.raises(InputError, match=r"to draw on, got ndarray: make one with Preprocess"):
        explanation.overlay(np.zeros((20, 30, 3)))
    with pytest.raises(InputError, match="images must be one for each of 3 rows, got 2"):
        explanation.overlay(torch.zeros(2, 3, 20, 30))
