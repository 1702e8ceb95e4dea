import io
import json

import numpy as np
import pytest
import torch
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
    )


def test_boxes_are_the_hull_of_the_points(explanation):
    boxes = explanation.boxes()
    assert boxes[:2].tolist() == [[5, 4, 14, 7], [20, 10, 20, 10]]
    assert boxes[2].isnan().all()


def test_a_threshold_cuts_the_map(explanation):
    torch.testing.assert_close(
        explanation.boxes(0.2), localize.largest_segment(explanation.heatmap, 0.2), equal_nan=True
    )
    assert explanation.boxes(0.2)[0].tolist() == [5, 4, 14, 7]
    without_points = Explanation("eigen-cam", explanation.heatmap, threshold=0.2)
    torch.testing.assert_close(without_points.boxes(), explanation.boxes(0.2), equal_nan=True)


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


def test_numpy_and_dlpack_share_the_map(explanation):
    assert np.array_equal(np.asarray(explanation), explanation.heatmap.numpy())
    assert np.asarray(explanation, dtype=np.float64).dtype == np.float64
    assert torch.from_dlpack(explanation).data_ptr() == explanation.heatmap.data_ptr()


def test_captions_name_class_and_probability(explanation):
    assert explanation.captions() == ["bird 90%", "cat 25%", "class 7 50%"]
    assert Explanation("eigen-cam", explanation.heatmap).captions() == ["eigen-cam"] * 3


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
