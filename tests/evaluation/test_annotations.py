"""The formats that data sets come in, each written here as their makers write them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import read_annotations


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of 40 by 30 pixels in folders of their classes."""
    paths = []
    for name in ("cat/a.jpg", "dog/b.jpg"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(path)
        paths.append(path)
    return paths


def coco(*annotations, categories=((1, "cat"), (7, "dog"))):
    return {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "dog/b.jpg"}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"image_id": 5, "iscrowd": 0, **row} for row in annotations],
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco(tmp_path, pictures):
    table = coco(
        {"category_id": 1, "bbox": [2, 3, 4, 5], "segmentation": [[2, 3, 5, 3, 5, 7, 2, 7]]},
        {"category_id": 7, "bbox": [10, 10, 1, 1], "segmentation": []},
        {"category_id": 1, "bbox": [0, 0, 40, 30], "segmentation": {}, "iscrowd": 1},
        {"image_id": 6, "category_id": 7, "bbox": [0, 0, 40, 30]},
    )
    (first, second), without = read_annotations(write(tmp_path / "coco.json", table), pictures)
    assert without == []
    assert (first.path, first.label, list(first.kinds)) == (pictures[0], None, ["cat", "dog"])
    # x, y, width, height; four pixels from 2 end at 5.
    assert first.boxes.tolist() == [[2, 3, 5, 7], [10, 10, 10, 10]]
    assert (second.label, second.boxes.tolist()) == ("dog", [[0, 0, 39, 29]])
    mask = np.array(first.mask((40, 30)))
    assert set(np.unique(mask)) == {0, 255}
    assert (mask[3:8, 2:6] == 255).all()
    assert (mask == 255).sum() == 5 * 4
    cat, dog = first.of_class("cat"), first.of_class("dog")
    assert (cat.label, cat.boxes.tolist(), list(cat.kinds)) == ("cat", [[2, 3, 5, 7]], ["cat"])
    assert np.array_equal(np.array(cat.mask((40, 30))), mask)
    assert (dog.boxes.tolist(), dog.shapes, first.of_class("cow").boxes.shape) == ([[10, 10, 10, 10]], [], (0, 4))


def test_coco_run_lengths_go_down_the_columns(tmp_path, pictures):
    row = {"category_id": 1, "bbox": [0, 28, 2, 2], "segmentation": {"size": [30, 40], "counts": [28, 3, 1169]}}
    (first, *_), _ = read_annotations(write(tmp_path / "coco.json", coco(row)), pictures)
    expected = np.zeros((30, 40))
    expected[28:, 0] = expected[0, 1] = 255
    assert np.array_equal(np.array(first.mask((40, 30))), expected)


@pytest.mark.parametrize("counts", ["abc", [1, 2, 3]])
def test_run_lengths_that_do_not_fit(tmp_path, pictures, counts):
    row = {"category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": {"size": [30, 40], "counts": counts}}
    (first, *_), _ = read_annotations(write(tmp_path / "coco.json", coco(row)), pictures)
    with pytest.raises(InputError, match="annotations must have run lengths of 1200 pixels"):
        first.mask((40, 30))


def xml(name, *objects):
    rows = "".join(
        f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><ymin>{y1}</ymin><xmin>{x1}</xmin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for kind, hard, x1, y1, x2, y2 in objects
    )
    return f"<annotation><filename>{name}</filename>{rows}</annotation>"


def test_voc_counts_from_one_and_leaves_out_the_difficult(tmp_path, pictures):
    folder = tmp_path / "Annotations"
    folder.mkdir()
    write(folder / "a.xml", xml("else.jpg", ("cat", 0, 1, 1, 40, 30), ("cat", 1, 2, 2, 3, 3)))
    result, without = read_annotations(folder, pictures)
    assert without == [pictures[1]]
    assert [(item.path, item.label, item.boxes.tolist()) for item in result] == [(pictures[0], "cat", [[0, 0, 39, 29]])]


def test_ilsvrc_xml_has_synsets_and_counts_from_zero(tmp_path, pictures):
    write(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench\nn02112137 chow\nn03895866 coach\n")
    folder = tmp_path / "val"
    folder.mkdir()
    write(folder / "b.xml", xml("b", ("n02112137", 0, 0, 5, 39, 29)))
    result, _ = read_annotations(folder, pictures)
    assert [(item.path, item.label, item.boxes.tolist()) for item in result] == [(pictures[1], 1, [[0, 5, 39, 29]])]


def test_ilsvrc_csv(tmp_path, pictures):
    write(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench\nn02112137 chow\n")
    table = (
        "ImageId,PredictionString\na,n02112137 1 2 3 4 n02112137 5 6 7 8 \nb,n01440764 0 0 9 9 \nc,n01440764 0 0 1 1 \n"
    )
    result, _ = read_annotations(write(tmp_path / "LOC_val_solution.csv", table), pictures)
    assert [item.label for item in result] == [1, 0]
    assert result[0].boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_folder_of_choe(tmp_path, pictures):
    folder = tmp_path / "metadata"
    folder.mkdir()
    write(folder / "class_labels.txt", "cat/a.jpg,3\ndog/b.jpg,4\n")
    write(folder / "localization.txt", "cat/a.jpg,1,2,3,4\ncat/a.jpg,5,6,7,8\ndog/b.jpg,0,0,39,29\n")
    result, _ = read_annotations(folder, pictures)
    assert [(item.label, len(item.boxes)) for item in result] == [(3, 2), (4, 1)]


def test_masks(tmp_path, pictures):
    folder = tmp_path / "masks"
    folder.mkdir()
    mask = np.zeros((30, 40), np.uint8)
    mask[:10], mask[10:12] = 1, 255
    Image.fromarray(mask).save(folder / "a.png")
    indexed = Image.new("P", (40, 30))
    indexed.putpalette([200, 0, 0] * 256)
    indexed.frombytes(mask.tobytes())
    indexed.save(folder / "b.png")
    (grey, actual), _ = read_annotations(folder, pictures)
    # 255 is an object in a grey mask and nothing in an indexed one.
    assert (np.array(grey.mask((40, 30))) == 255).sum() == 12 * 40
    assert (np.array(actual.mask((40, 30))) == 255).sum() == 10 * 40
    with pytest.raises(InputError, match="masks of the size of the picture"):
        grey.mask((30, 40))


def test_own_list(tmp_path, pictures):
    rows = [{"file": "dog/b.jpg", "label": 4, "boxes": [[1, 2, 3, 4]]}]
    (result,), without = read_annotations(write(tmp_path / "list.json", rows), pictures)
    assert (result.path, result.label, list(result.kinds), without) == (pictures[1], 4, [4], [pictures[0]])
    assert result.boxes.dtype == torch.float32


def test_names_that_fit_several_pictures_fit_none(tmp_path):
    paths = []
    for name in ("x/a.jpg", "y/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir()
        Image.new("RGB", (4, 4)).save(path)
        paths.append(path)
    result, without = read_annotations(write(tmp_path / "l.json", [{"file": "a.jpg", "boxes": []}]), paths)
    assert (result, without) == ([], paths)
    (result,), _ = read_annotations(write(tmp_path / "l.json", [{"file": "y/a.jpg", "boxes": []}]), paths)
    assert result.path == paths[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "readable"),
        ("a.json", "[]", "at least one picture"),
        ("a.json", "{}", "COCO's or a list"),
        ("a.json", '[{"boxes": []}]', "KeyError: 'file'"),
        ("a.json", '[{"file": "a.jpg", "boxes": [[1, 2]]}]', "boxes of four numbers"),
        ("a.xml", "<annotation><object>", "ParseError"),
        ("a.xml", "<annotation><object><name>n</name></object></annotation>", "ValueError"),
        ("a.csv", "x,y\n1,2\n", "KeyError"),
        ("a.txt", "", "a folder or a file of .json, .xml, .csv"),
        ("none.json", None, "a folder or a file of"),
        ("", None, "a folder with XML, PNG or localization.txt"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, pictures, name, content, message):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "empty" / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path, pictures)
    assert str(caught.value).startswith("annotations must")
    assert "\n" not in str(caught.value)


def test_entities_of_xml_are_not_expanded_without_end(tmp_path, pictures):
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "x" * 10}">' for i in range(10))
    bomb = f"<!DOCTYPE a [{entities}]><annotation><object><name>&e9;</name></object></annotation>"
    with pytest.raises(InputError, match="annotations must be readable"):
        read_annotations(write(tmp_path / "a.xml", bomb), pictures)
