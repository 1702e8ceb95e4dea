"""For tests and benchmarks alike: torchvision must import beside a CPU build of torch."""

import importlib.util
import sys
from pathlib import Path

import torch


def _complete_torchvision():
    # A CUDA build of torchvision beside a CPU build of torch cannot load its binary, and without these two schemas
    # the import of the package fails. The models need neither op.
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return None
    for binary in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(binary)
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision = _complete_torchvision()  # before anything imports torchvision
