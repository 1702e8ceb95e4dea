"""A small detector in the forms in which detectors answer, and its scores written out for every detection."""

import torch
from torch import nn

from pyfast_xai import DetectionTarget

DOUBLE = torch.float64
SIZE, CLASSES = (24, 32), 3


class Detector(nn.Module):
    """A head on 3 x 4 cells whose boxes depend on the image, in the forms in which detectors answer."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh())
        self.head = nn.Conv2d(8, 4 + CLASSES + 1, 1)

    def numbers(self, images):
        """Returns centres and sides as shares of the image, and logits, `[N, 12, ...]`."""
        rows = self.head(self.features(images)).flatten(2).mT
        y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        middle = torch.stack([(x + 0.5) / 4, (y + 0.5) / 3], -1).flatten(0, 1).to(rows)
        return torch.cat([middle + rows[..., :2] / 20, 0.3 + rows[..., 2:4].sigmoid() / 5], -1), rows[..., 4:]

    def forward(self, images):
        shares, logits = self.numbers(images)
        scale = torch.tensor(SIZE).flip(0).repeat(2)
        if self.form == "queries":
            return {"logits": logits, "pred_boxes": shares}
        if self.form == "anchors":
            return torch.cat([shares * scale, logits[..., :-1].sigmoid(), logits[..., -1:]], -1).mT, {"feats": shares}
        boxes = corners(shares * scale)
        scores, labels = logits[..., :-1].sigmoid().max(-1)
        if self.form == "end to end":
            return torch.cat([boxes, scores[..., None], labels[..., None]], -1)
        saved = scores > scores.mean(1, keepdim=True)  # another number in each image
        return [
            {"boxes": boxes[n, saved[n]], "scores": scores[n, saved[n]], "labels": labels[n, saved[n]]}
            for n in range(len(images))
        ]


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlap(a, b):
    a, b = a.tolist(), b.tolist()
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in range(2)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def slow_score(model, image, box, number):
    """Returns the score of one image, which can be differentiated."""
    shares, logits = model.numbers(image[None])
    boxes = corners(shares[0] * torch.tensor(SIZE).flip(0).repeat(2))
    if model.form == "queries":
        probabilities = logits[0].softmax(-1)[:, :-1]
    else:
        probabilities = logits[0, :, :-1].sigmoid()
        if model.form != "anchors":  # one label each
            best = probabilities.max(-1, keepdim=True).values
            probabilities = torch.where(probabilities == best, probabilities, 0)
            if model.form == "dicts":
                probabilities = torch.where(best > best.mean(), probabilities, 0)
    products = [overlap(box, item) * row[number] for item, row in zip(boxes, probabilities, strict=True)]
    return torch.stack(products).max()


FORMS = ("queries", "anchors", "end to end", "dicts")
ARGUMENTS = {"queries": {"size": SIZE}, "anchors": {"n_classes": CLASSES}}


def case(form):
    torch.manual_seed(3)
    model, images = Detector(form).to(DOUBLE).eval(), torch.randn(3, 3, *SIZE, dtype=DOUBLE)
    boxes = torch.tensor([[2.0, 3, 14, 13], [10, 8, 30, 20], [20, 10, 31, 23]], dtype=DOUBLE)
    with torch.no_grad():  # a class that is there in the neighbourhood of each box
        classes = [
            max(range(CLASSES), key=lambda k: float(slow_score(model, image, box, k)))
            for image, box in zip(images, boxes, strict=True)
        ]
    return model, images, DetectionTarget(boxes, classes, **ARGUMENTS.get(form, {}))
