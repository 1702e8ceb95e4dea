"""What an explanation costs, as a multiple of the same model's forward on the same images.

Forward and explanation take turns; the figure is the median of their ratios. Random weights: the cost does not depend
on what a network has learnt, but for how many points are traced.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpu.architectures import LAST, SIZE, network
from gpu.steps import Rows
from pyfast_xai import CLEAR, CNNFixations, EigenCAM, FGVis, GuidedBackprop, Saliency, ops
from pyfast_xai.proof.clock import Clock

BATCH = 64
ITERATIONS = 10  # of FGVis; what comes before and behind them is shared among them
ROUNDS = 9
BUDGET = 2.5  # seconds for the rounds of one method

METHODS: dict[str, Callable[..., Any]] = {
    "fixations": CNNFixations,
    "eigen-cam": EigenCAM,
    "saliency": Saliency,
    "guided-backprop": GuidedBackprop,
    "fgvis": lambda model, **settings: FGVis(
        model, n_iterations=ITERATIONS, patience=ITERATIONS, progress=False, **settings
    ),
    "clear": CLEAR,
}
SHARES = {"fgvis": ITERATIONS}
SHAPES = {"fgvis": "an iteration"}


def paired(clock: Clock, forward: Callable[[], Any], explain: Callable[[], Any], shares: int) -> dict[str, Any]:
    """Time both in turn."""
    forwards, ratios, explained = [], [], []
    for _ in range(2):  # compile, choose algorithms, fill pools of memory
        forward()
        explain()
    start = time.perf_counter()
    while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - start < BUDGET):
        forwards.append(clock.wall(forward))
        explained.append(clock.wall(explain) / shares)
        ratios.append(explained[-1] / forwards[-1])
    ratios.sort()
    fifth = len(ratios) // 5
    return {
        "median_ms": 1e3 * statistics.median(explained),
        "forward_ms": 1e3 * statistics.median(forwards),
        "forwards": statistics.median(ratios),
        "low": ratios[fifth],
        "high": ratios[-1 - fifth],
        "rounds": len(ratios),
    }


def measure(rows: Rows, kind: str, small: bool, name: str) -> None:
    """A row for each method on one network: by proven kernels, by the reference, and by peers where they are."""
    clock = Clock(kind)
    batch, size = (1, 32) if small else (BATCH, SIZE)
    dtype = torch.bfloat16
    model = network(name).to(kind, dtype).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=kind).to(dtype).contiguous(memory_format=torch.channels_last)
    methods = dict(list(METHODS.items())[1:3]) if small else METHODS

    def row(method: str, backend: str, dtype: torch.dtype, model: nn.Module, images: Any, explain: Any) -> None:
        common = {"kind": "explainer", "name": method, "network": name, "shape": SHAPES.get(method, "")}
        common |= {"batch": batch, "dtype": str(dtype).removeprefix("torch."), "backend": backend}

        def forward() -> None:
            with torch.inference_mode():
                model(images)

        try:
            rows.add(**common, **paired(clock, forward, explain, SHARES.get(method, 1)))
        except Exception as error:
            rows.add(**common, error=f"{type(error).__name__}: {str(error)[:300]}")
            if kind == "cuda":
                torch.cuda.empty_cache()

    for method, build in methods.items():
        explainer = build(model, accelerate=False)
        row(method, "best", dtype, model, images, lambda explain=explainer: explain(images))
    if not small:
        try:
            _peers(row, name, kind, batch, size)
        except Exception as error:  # not ours: a peer that cannot be imported here
            rows.add(kind="peer", name="peers", network=name, error=f"{type(error).__name__}: {str(error)[:300]}")
    for method, build in methods.items():
        with ops.backend("reference"):
            explainer = build(model, accelerate=False)
            row(method, "reference", dtype, model, images, lambda explain=explainer: explain(images))


def _peers(row: Callable[..., None], name: str, kind: str, batch: int, size: int) -> None:
    """The packages that others use, in float32, which is what they are made for; and ours beside them."""
    present = {item: importlib.util.find_spec(item) is not None for item in ("captum", "pytorch_grad_cam")}
    if not any(present.values()):
        return
    model = network(name).to(kind)
    images = torch.randn(batch, 3, size, size, device=kind)
    target = torch.arange(batch, device=kind)
    dtype = images.dtype
    if present["captum"]:
        attr = importlib.import_module("captum.attr")
        theirs = {"saliency": ("Saliency", {"abs": False}), "guided-backprop": ("GuidedBackprop", {})}
        for method, (peer, settings) in theirs.items():
            if method == "guided-backprop" and name == "densenet121":
                continue  # Captum does not see the functional rectifiers of this network
            item = METHODS[method](model, accelerate=False)
            row(method, "best", dtype, model, images, lambda explain=item: explain(images, target))
            explain = getattr(attr, peer)(model)
            row(
                *(method, "captum", dtype, model, images),
                lambda explain=explain, settings=settings: explain.attribute(
                    images.clone().requires_grad_(), target=target, **settings
                ),
            )
    if present["pytorch_grad_cam"]:
        item = EigenCAM(model, accelerate=False)
        row("eigen-cam", "best", dtype, model, images, lambda: item(images))
        peer = importlib.import_module("pytorch_grad_cam").EigenCAM
        with peer(model, [LAST[name](model)]) as explain:
            row("eigen-cam", "pytorch-grad-cam", dtype, model, images, lambda: explain(images, targets=None))
