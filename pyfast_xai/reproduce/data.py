"""The data sets of the papers, and the networks that are applied to them.

A folder holds any of these:

    imagenet/LOC_val_solution.csv, LOC_synset_mapping.txt and val/*.JPEG    ILSVRC 2012, validation
    VOC2007/Annotations, JPEGImages, ImageSets/Main/test.txt                PASCAL VOC 2007
    graz02/<class>/*.image.png and *.mask.*.png                             Graz-02 (INRIA's masks)
    coco/annotations.json and *.jpg                                         COCO or a part of it
    fundus_codras/retinal.names, *.jpg and *.txt                            IDRiD fundus pictures, boxes of lesions
    wsol/cnn_fixations_boxes.npz, ilsvrc_val_ground_truth.npz               published boxes and ground truth
    mnist/*-ubyte[.gz] or mnist.npz                                         MNIST
    svhn/train_32x32.mat, test_32x32.mat                                    SVHN, cropped digits
    StanfordDogs/Images, train_list.mat, test_list.mat                      Stanford Dogs
    sketches/<class>/*.png                                                  TU-Berlin sketches

A small collection of its own networks may take the place of ILSVRC: `models.py` with `load(name)`, which gives a module
and `{"size", "prep"}`, and `preprocess(pixels, prep)`; and `imagenet/annotations.json`, a list of `{"file", "cls",
"boxes"}`. That file is run as Python. Without it networks are torchvision's, with their published weights.
"""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation, read_annotations
from pyfast_xai.images import Preprocess, find_images, load_image
from pyfast_xai.models import LoadedModel, load_model
from pyfast_xai.progress import Progress, ProgressCallback

COLLECTION = ("resnet50_abm_pruned_int8", "googlenet_abm_pruned_int8", "squeezenet1_1", "mobilenet_v2_coral_int8")
Half = Literal["all", "tuning", "held-out"]
HALVES: tuple[Half, ...] = ("all", "tuning", "held-out")


def tuning_pictures() -> frozenset[str]:
    """Returns the ILSVRC pictures by which defaults were chosen, as file names without suffix.

    They are 300 drawn from 600. All others are held out: no default was chosen by them.
    """
    return frozenset((files("pyfast_xai.reproduce") / "tuning_pictures.txt").read_text().split())


# What the collection calls mean and standard deviation of pixels in 0..1.
_NORMALISED = {
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tf": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class _Defined(Preprocess):
    """Pixels as the collection's own code wants them, where that is more than mean and standard deviation."""

    definitions: Any = None
    prep: str = ""

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        shown = self.shown(image)
        return self.definitions.preprocess(255 * shown[None], self.prep)[0], shown


@dataclass(frozen=True)
class Data:
    """A folder of data sets, and how much of it is to be used.

    Attributes:
        root: the folder.
        count: pictures at most; None for all.
        names: names of networks; empty for those of the paper, or all of a collection.
        batch_size: images at a time.
        device: device of the networks.
        seed: seed of the order of pictures, and of the random numbers of an experiment.
        progress: called with what is being done and how many pictures of it are.
        half: half of the ILSVRC pictures: those by which defaults were chosen ("tuning", see `tuning_pictures`), those
            that are held out, or all.
    """

    root: Path
    count: int | None = 200
    names: tuple[str, ...] = ()
    batch_size: int = 16
    device: str = "cpu"
    seed: int = 0
    progress: Callable[[str, int], None] | None = None
    half: Half = "all"

    def at_most(self, count: int) -> "Data":
        """Returns the data with fewer pictures, for experiments that take long."""
        return replace(self, count=count if self.count is None else min(count, self.count))

    def advance(self, title: str, pictures: int) -> None:
        """Reports further pictures as done."""
        if self.progress is not None:
            self.progress(title, pictures)

    def progress_of(self, title: str) -> ProgressCallback:
        """Returns a callback that reports the pictures which are done since its last call."""
        reported = 0

        def report(progress: Progress) -> None:
            nonlocal reported
            self.advance(title, progress.done - reported)
            reported = progress.done

        return report

    @property
    def has_networks(self) -> bool:
        """Returns whether the folder has networks of its own."""
        return (self.root / "models.py").is_file()

    def networks(self, paper: Sequence[str]) -> Iterator[LoadedModel]:
        """Yields the trained networks on the device, one by one.

        Args:
            paper: names of torchvision that come next to those of the paper.
        """
        for name in self.names or (COLLECTION if self.has_networks else paper):
            loaded = self._collected(name) if self.has_networks else load_model(f"torchvision/{name}", "DEFAULT")
            loaded.model.to(self.device)
            yield loaded

    def _collected(self, name: str) -> LoadedModel:
        definitions = _module(self.root / "models.py")
        try:
            # Weights are drawn before they are replaced.
            with torch.random.fork_rng(devices=[]):
                model, about = definitions.load(name)
        except (KeyError, OSError) as error:
            raise InputError(f"networks must be of the collection at {str(self.root)!r}, got {name!r}") from error
        size = about["size"]
        # Its pictures are square already, and what is not is shown whole.
        prep = about["prep"]
        if prep in _NORMALISED:
            mean, std = _NORMALISED[prep]
            preprocess = Preprocess(size, mean=mean, std=std, crop="squash")
        else:
            preprocess = _Defined(size=size, crop="squash", definitions=definitions, prep=prep)
        return LoadedModel(model, preprocess, None, name)

    def imagenet(self) -> list[Annotation]:
        """Returns ILSVRC validation pictures with class and boxes, in random order."""
        folder = self.root / "imagenet"
        if (folder / "annotations.json").is_file():
            rows = json.loads((folder / "annotations.json").read_text())
            # Only the part that is complete and of one size, where it is told apart.
            selected = [row for row in rows if row["file"].startswith("val227")] or rows
            annotations = [
                Annotation(folder / r["file"], r["cls"], torch.tensor(r["boxes"]).float(), [r["cls"]] * len(r["boxes"]))
                for r in selected
            ]
        else:
            table = self._file("imagenet/LOC_val_solution.csv", "ILSVRC 2012's validation set")
            annotations, _ = read_annotations(table, find_images([folder / "val"]))
        if self.half != "all":
            tuning = tuning_pictures()
            annotations = [entry for entry in annotations if (entry.path.stem in tuning) == (self.half == "tuning")]
        return self._some(annotations)

    def voc(self) -> list[Annotation]:
        """Returns the test pictures of PASCAL VOC 2007."""
        root = self._file("VOC2007/ImageSets/Main/test.txt", "PASCAL VOC 2007").parents[2]
        names = set((root / "ImageSets/Main/test.txt").read_text().split())
        pictures = [path for path in find_images([root / "JPEGImages"]) if path.stem in names]
        return self._some(read_annotations(root / "Annotations", pictures)[0])

    def masked(self) -> list[Annotation]:
        """Returns the pictures with masks of their objects: Graz-02, or COCO where that is not there."""
        graz = self.root / "graz02"
        if graz.is_dir():
            annotations = []
            for picture in sorted(graz.rglob("*.image.png")):
                stem = picture.name.removesuffix(".image.png")
                masks = sorted(picture.parent.glob(f"{stem}.mask.*.png"))
                kind = picture.parent.name
                annotations.append(Annotation(picture, kind, shapes=masks, shape_kinds=[kind] * len(masks)))
            return self._some(annotations)
        return self.coco()

    def coco(self) -> list[Annotation]:
        """Returns COCO pictures with boxes and masks; crowds are left out."""
        free = self.root / "coco_ccby"
        if not (free / "annotations.json").is_file():
            table = self._file("coco/annotations.json", "COCO")
            return self._some(read_annotations(table, find_images([table.parent]))[0])
        annotations = []
        for row in json.loads((free / "annotations.json").read_text()):
            objects = [item for item in row["objects"] if not item["iscrowd"]]
            boxes = [(x, y, x + w - 1, y + h - 1) for x, y, w, h in (item["bbox_xywh"] for item in objects)]
            kinds = [item["category"] for item in objects]
            shapes: list[Any] = []
            shape_kinds: list[str] = []
            for item in objects:
                outline = item["segmentation"]
                outlines = [outline] if isinstance(outline, dict) else outline
                shapes += outlines
                shape_kinds += [item["category"]] * len(outlines)
            corners = torch.tensor(boxes).float().view(-1, 4)
            annotations.append(Annotation(free / row["file"], None, corners, kinds, shapes, shape_kinds))
        return self._some(annotations)

    def fundus(self) -> list[Annotation]:
        """Returns fundus pictures with boxes around their lesions."""
        names = self._file("fundus_codras/retinal.names", "IDRiD's fundus pictures with boxes")
        kinds = names.read_text().split()
        annotations = []
        for picture in sorted(names.parent.glob("*.jpg")):
            width, height = load_image(picture).size
            lines = [line.split() for line in picture.with_suffix(".txt").read_text().splitlines() if line]
            sides = torch.tensor([[float(share) for share in line[1:]] for line in lines]).view(-1, 4)
            sides *= torch.tensor([width, height] * 2)
            boxes = torch.cat([sides[:, :2] - sides[:, 2:] / 2, sides[:, :2] + sides[:, 2:] / 2 - 1], 1)
            annotations.append(Annotation(picture, None, boxes, [kinds[int(line[0])] for line in lines]))
        return self._some(annotations)

    def published_boxes(self) -> tuple[Any, Any]:
        """Returns CNN-Fixations' boxes, and ILSVRC's, as NumPy archives."""
        import numpy as np

        names = ("wsol/cnn_fixations_boxes.npz", "wsol/ilsvrc_val_ground_truth.npz")
        published, truth = (np.load(self._file(name, "the published boxes of CNN-Fixations")) for name in names)
        return published, truth

    def folder_of(self, name: str, contents: str) -> Path:
        """Returns a folder or file of a data set.

        Raises:
            InputError: it is not there.
        """
        return self._file(name, contents)

    def inputs(self, annotations: Sequence[Annotation], preprocess: Preprocess) -> Tensor:
        """Returns the inputs of a network for some pictures, `[N, C, H, W]`."""
        return torch.stack([preprocess(load_image(entry.path))[0] for entry in annotations]).to(self.device)

    def shown(self, annotations: Sequence[Annotation], preprocess: Preprocess) -> Tensor:
        """Returns the pictures for display, `[N, 3, H, W]` in 0..1."""
        return torch.stack([preprocess(load_image(entry.path))[1] for entry in annotations])

    def _file(self, name: str, contents: str) -> Path:
        path = self.root / name
        if not path.exists():
            raise InputError(f"data must hold {contents} at {name}, got {str(self.root)!r} without it")
        return path

    def _some(self, annotations: list[Annotation]) -> list[Annotation]:
        if not annotations:
            raise InputError(f"data must hold pictures with annotations, got none in {str(self.root)!r}")
        shuffled = list(annotations)
        random.Random(self.seed).shuffle(shuffled)
        return shuffled[: self.count]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyfast_xai_collection", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
