"""Boxes with their reasons: the strongest detections in a picture, each with the heat map that explains it.

    python examples/detections.py --out reasons.png
    python examples/detections.py street.jpg --model PekingU/rtdetr_r18vd --activation sigmoid
    python examples/detections.py street.jpg --model facebook/detr-resnet-50

With --model, of Hugging Face, `pip install transformers`. Without, the detector is made of the trained network of the
demo: it looks for a digit in each cell of 96 x 96 pixels of a page of scenes, and nothing is downloaded.
"""

import argparse
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pyfast_xai import DetectionTarget, LayerCAM, demo, render
from pyfast_xai.demo import make_scenes


class DigitsOnAPage(nn.Module):
    """Returns one digit for each cell of a page, as the detectors of torchvision return what they find."""

    def __init__(self) -> None:
        super().__init__()
        net = demo.load()
        stages = net.stage1, net.pool1, net.stage2, net.pool2, net.stage3, net.pool3, net.block
        self.features, self.cells = nn.Sequential(*stages), nn.AvgPool2d(12)
        self.head = nn.Sequential(net.hidden, net.relu, net.classifier)

    def forward(self, pages: Tensor) -> list[dict[str, Tensor]]:
        pooled = self.cells(self.features(pages))  # [N, 80, rows, columns]
        scores, labels = self.head(pooled.movedim(1, -1)).flatten(1, 2).softmax(2).max(2)  # [N, cells]
        y, x = torch.meshgrid(*(torch.arange(count) * 96 for count in pooled.shape[-2:]), indexing="ij")
        boxes = torch.stack((x, y, x + 95, y + 95), -1).flatten(0, 1).to(pages.dtype)
        return [{"boxes": boxes, "scores": s, "labels": c} for s, c in zip(scores, labels, strict=True)]


def reasons(
    model: nn.Module, images: Tensor, count: int, names: Any = str, layer: str = "auto", **reading: Any
) -> Image.Image:
    """Returns a picture of the strongest detections in one image, each beside its name and over its heat map.

    Args:
        model: a detector in evaluation mode.
        images: `[1, 3, H, W]`.
        count: number of detections.
        names: gives the name of a class.
        layer: of the heat maps; "auto" takes all maps that enter the heads of the detector.
        **reading: how `DetectionTarget` reads what the model returns.
    """
    with torch.no_grad():
        target = DetectionTarget.strongest(model(images), count=count, **reading)
    explanation = LayerCAM(model, layer=layer)(images, target)  # a row for each detection, from one walk
    drawn = render.draw_boxes(explanation.overlay(), target.boxes[0])
    scores = target.probabilities[0].amax(1)
    titles = [f"{names(int(number))}, {score:.0%}" for number, score in zip(target.classes[0], scores, strict=True)]
    rows = range(0, count, 3)
    return render.montage(
        [list(drawn[row : row + 3]) for row in rows], titles=[titles[row : row + 3] for row in rows], side=288
    )


def of_transformers(path: str, name: str, count: int, activation: str) -> Image.Image:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(name, use_safetensors=True).eval()
    with Image.open(path) as picture:
        images = AutoImageProcessor.from_pretrained(name)(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    size = tuple(images.shape[2:])
    return reasons(model, images, count, model.config.id2label.get, size=size, activation=activation)


def of_digits(count: int) -> Image.Image:
    cells = make_scenes(6, seed=12).images
    page = torch.cat([torch.cat(list(cells[row : row + 3]), 2) for row in (0, 3)], 1)[None]  # [1, 3, 192, 288]
    return reasons(DigitsOnAPage().eval(), page, count, layer="features")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="needed with --model")
    parser.add_argument("--model", help="a detector of Hugging Face")
    parser.add_argument("--activation", choices=("softmax", "sigmoid"), default="softmax", help="of its logits")
    parser.add_argument("--count", type=int, default=3, help="detections that are explained")
    parser.add_argument("--out", default="reasons.png")
    given = parser.parse_args()
    if (given.image is None) != (given.model is None):
        parser.error("image and --model go together")
    made = (
        of_transformers(given.image, given.model, given.count, given.activation)
        if given.model
        else of_digits(given.count)
    )
    made.save(given.out)
