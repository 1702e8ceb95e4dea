"""Non-maximum suppression in plain PyTorch, for torchvision beside a build of torch that cannot load its binary."""

import importlib

import torch
from torch import Tensor


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Returns the numbers of the boxes that stay, `[K]` int64, the best first: each overlaps no better one of them.

    Args:
        dets: `[N, 4]` floating boxes (x1, y1, x2, y2).
        scores: `[N]`.
        iou_threshold: boxes with a larger intersection over union overlap.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = dets[order]
    low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = both / (areas[:, None] + areas - both) > iou_threshold
    stays = torch.ones(len(boxes), dtype=torch.bool)
    for number in range(len(boxes)):
        if stays[number]:
            stays[number + 1 :] &= ~overlaps[number, number + 1 :]
    return order[stays]


def provide() -> None:
    """Makes detectors work on the CPU where torchvision has no kernels; nothing is compiled for them."""
    from torchvision import extension
    from torchvision.ops import boxes

    roi_align = importlib.import_module("torchvision.ops.roi_align")

    if not extension._has_ops() and not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        _library.impl("nms", nms, "CPU")
        boxes._assert_has_ops = lambda: None
        roi_align._roi_align = roi_align._roi_align.__wrapped__


_library = torch.library.Library("torchvision", "IMPL")
