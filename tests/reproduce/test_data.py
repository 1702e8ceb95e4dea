"""Where data sets are found, and what is said where they are not."""

import gzip
import json

import numpy as np
import pytest
import torch
from scipy.io import savemat

from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce import Data, clear
from pyfast_xai.reproduce import data as data_module


def test_pictures_of_a_collection_come_in_an_order_of_the_seed(root, boxes):
    every = Data(root, count=None).imagenet()
    assert sorted(item.path.name for item in every) == [f"{i}.png" for i in range(6)]
    repeated, other = Data(root, count=None).imagenet(), Data(root, count=None, seed=1).imagenet()
    assert [item.path for item in every] == [item.path for item in repeated] != [item.path for item in other]
    assert [item.path for item in Data(root, count=2).imagenet()] == [item.path for item in every[:2]]
    item = every[0]
    assert item.boxes.tolist() == [list(boxes[int(item.path.stem)])]
    assert item.label == int(item.path.stem) % 4


def test_networks_of_a_collection(root):
    (loaded,) = Data(root, names=("squeezenet1_1",)).networks(("vgg16",))
    assert (loaded.name, loaded.preprocess.shape) == ("squeezenet1_1", (32, 32))
    with pytest.raises(InputError, match=r"networks must be of the collection at .*, got 'vgg16'"):
        next(Data(root, names=("vgg16",)).networks(()))
    # Whole and in 0..1, as the collection's code says.
    shown = Data(root).inputs(Data(root).imagenet()[:1], loaded.preprocess)
    assert shown.shape == (1, 3, 32, 32)
    assert float(shown.max()) <= 1


def test_without_networks_of_its_own_those_of_the_paper_are_loaded(tmp_path, monkeypatch):
    requests = []

    def load_model(spec, weights):
        requests.append((spec, weights))
        return LoadedModel(torch.nn.Identity(), Preprocess(), None, spec)

    monkeypatch.setattr(data_module, "load_model", load_model)
    list(Data(tmp_path).networks(("vgg16", "alexnet")))
    assert requests == [("torchvision/vgg16", "DEFAULT"), ("torchvision/alexnet", "DEFAULT")]


def test_imagenet_as_it_is_published(tmp_path, picture, boxes):
    folder = tmp_path / "imagenet"
    picture(folder / "val/ILSVRC2012_val_00000001.png", boxes[0])
    (folder / "LOC_synset_mapping.txt").write_text("n01 tench\nn02 chow\n")
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 3 4 12 15 \nILSVRC2012_val_00000002,n01 0 0 1 1 \n"
    )
    (actual,) = Data(tmp_path).imagenet()
    assert (actual.label, actual.boxes.tolist()) == (1, [[3, 4, 12, 15]])


def test_voc_takes_the_test_pictures_only(tmp_path, picture, boxes):
    root = tmp_path / "VOC2007"
    for name in ("000001", "000002"):
        picture(root / f"JPEGImages/{name}.png", boxes[0])
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(
            "<annotation><object><name>dog</name><bndbox><xmin>4</xmin><ymin>5</ymin><xmax>13</xmax><ymax>16</ymax>"
            "</bndbox></object></annotation>"
        )
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/test.txt").write_text("000002\n")
    (actual,) = Data(tmp_path).voc()
    assert (actual.path.stem, actual.boxes.tolist(), list(actual.kinds)) == ("000002", [[3, 4, 12, 15]], ["dog"])


def test_graz_takes_the_place_of_coco(root, picture, boxes):
    assert len(Data(root).masked()) == 3
    picture(root / "graz02/bike/bike_001.image.png", boxes[0])
    for i in range(2):
        picture(root / f"graz02/bike/bike_001.mask.{i}.png", boxes[i])
    (actual,) = Data(root).masked()
    assert (actual.label, len(actual.shapes)) == ("bike", 2)


def test_crowds_are_left_out(root, boxes):
    item = next(item for item in Data(root).coco() if item.path.stem == "0")
    assert (list(item.kinds), item.boxes.tolist()) == (["square"], [list(boxes[0])])


def test_mnist_as_it_is_published(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("t10k", 3)):
        digits, images = rng.integers(0, 10, count, np.uint8), rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + digits.tobytes())
    fit, held, output = clear._mnist(Data(tmp_path))
    assert (fit[0].shape, held[0].shape, output) == ((5, 1, 28, 28), (3, 1, 28, 28), [])
    assert np.array_equal((held[0] * 255).round().byte().numpy()[:, 0], images)
    assert held[1].tolist() == digits.tolist()
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="data must hold MNIST's train-labels-idx1-ubyte"):
        clear._mnist(Data(tmp_path))


def test_svhn_as_it_is_published(tmp_path):
    (tmp_path / "svhn").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"svhn/{part}_32x32.mat", {"X": pixels, "y": np.array([[10], [3]], np.uint8)})
    (images, digits), _, _ = clear._svhn(Data(tmp_path))
    assert digits.tolist() == [0, 3]
    assert np.array_equal((images[1] * 255).round().byte().permute(1, 2, 0).numpy(), pixels[..., 1])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Data.imagenet, "data must hold ILSVRC 2012's validation set at imagenet/LOC_val_solution.csv"),
        (Data.voc, "data must hold PASCAL VOC 2007 at VOC2007/"),
        (Data.coco, "data must hold COCO at coco/annotations.json"),
        (Data.published_boxes, "data must hold the published boxes of CNN-Fixations at wsol/"),
        (clear._mnist, "data must hold MNIST"),
        (clear._svhn, "data must hold SVHN's cropped digits at svhn/train_32x32.mat"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, ask, message):
    with pytest.raises(InputError, match=message):
        ask(Data(tmp_path))


def test_a_folder_without_pictures(root):
    (root / "imagenet/annotations.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="data must hold pictures with annotations, got none"):
        Data(root).imagenet()
