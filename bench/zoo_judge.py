"""Judges every explainer on one model: what is served, what is refused and why, and what is wrong."""

import contextlib
import copy
import hashlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyfast_xai import METHODS, DetectionTarget, Explanation, InputError, UnsupportedOpError
from pyfast_xai.explainers.common.targets import logits_in, take_targets

# Of methods that take tens of forwards or more, a few: the model is what is judged, not the map.
SETTINGS: dict[str, dict[str, Any]] = {
    "fgvis": {"n_iterations": 6, "progress": False},  # fewer win no game
    "smoothgrad": {"n_samples": 2},
    "integrated-gradients": {"n_steps": 2},
    "gradient-shap": {"n_samples": 2},
    "rise": {"n_masks": 4, "progress": False},
    "lime": {"n_samples": 8, "feature_mask": 4, "progress": False},
    **{name: {"feature_mask": 2, "progress": False} for name in ("feature-ablation", "feature-permutation")},
    "shapley-values": {"feature_mask": 2, "baseline": "mean", "progress": False},
    **{
        name: {"feature_mask": 2, "n_samples": 10, "baseline": "mean", "progress": False}
        for name in ("kernel-shap", "shapley-value-sampling")
    },
    **{"blur-ig": {"n_steps": 2, "max_sigma": 2.0}, "guided-ig": {"n_steps": 2}, "d-rise": {"n_masks": 4, "cells": 4}},
    "meaningful-perturbation": {"n_iterations": 2, "initial_mask": "random", "progress": False},
    "extremal-perturbation": {"n_iterations": 2, "progress": False},
    "fem": {"k": 1.0},  # the last map of a small image has few positions
    "score-cam": {"progress": False},
    "ss-cam": {"n_samples": 1, "progress": False},
    "is-cam": {"n_steps": 1, "progress": False},
    **{"smooth-grad-cam++": {"n_samples": 2}, "xrai": {"n_steps": 2}},
    "sess": {"n_scales": 2},
    "clear": {"candidates": 3},
    **{"hsic": {"feature_mask": 2, "n_samples": 8}, "sobol": {"feature_mask": 2, "n_designs": 2}},
}
# One of each way through the library is judged accelerated, too.
ACCELERATED = ("saliency", "guided-backprop", "grad-cam", "eigen-cam", "fixations", "excitation-backprop", "lrp")
# Everything runs in float64, so that rows differ by rounding alone. A random network may amplify it a thousandfold.
TOLERANCE = 1e-6
MODEL = "the model itself"
EXPLAINERS = (*METHODS, MODEL)


@dataclass
class Specimen:
    """A model to be judged.

    Attributes:
        model: with random weights, in evaluation mode.
        images: `[2, C, H, W]` that it takes.
        target: of the explanations; None for the largest output.
        mixes_rows: the network attends over the images of a batch, so that a row alone differs.
    """

    model: nn.Module
    images: Tensor
    target: Any = None
    mixes_rows: bool = False


@dataclass
class Verdict:
    """What became of an explainer: "served", "refused", "not applicable", "not tried", "wrong" or "failed"; and why."""

    explainer: str
    verdict: str
    reason: str = ""


def judge(specimen: Specimen, explainers: tuple[str, ...] = EXPLAINERS, seconds: float = 0) -> Iterator[Verdict]:
    """Yields the verdicts on explainers, each of which may take some seconds of CPU time; 0 for any."""
    model, images = specimen.model.double().eval(), specimen.images.double()
    before = _photograph(model)
    for name in explainers:
        if name == MODEL:
            continue
        try:
            with _limited(seconds):
                verdict = _explained(name, model, images, specimen.target, specimen.mixes_rows)
        except _OutOfTimeError:
            verdict = "not tried", f"takes more than {seconds:g} s"
        yield Verdict(name, *verdict)
    if MODEL in explainers:
        yield Verdict(MODEL, *_unchanged(model, images, before))


def _explained(name: str, model: nn.Module, images: Tensor, target: Any, mixes_rows: bool) -> tuple[str, str]:
    settings = {"window": images.shape[2] // 2, "stride": images.shape[2] // 2, "progress": False}
    settings = settings if name == "occlusion" else SETTINGS.get(name, {})
    if callable(target) and not METHODS[name].takes_functions:
        return "not applicable", "explains classes alone"
    if METHODS[name].needs_detections and not isinstance(target, DetectionTarget):
        return "not applicable", "explains detections alone"
    if images.dim() not in METHODS[name].ranks:
        return "not applicable", "explains pictures alone"

    try:
        with _logged() as messages:
            explainer = METHODS[name](model, **settings)
            whole = explainer(images, target)
    except (InputError, UnsupportedOpError) as error:
        return _refusal(name, _line(error))
    except Exception as error:  # the verdict is what is looked for
        return "failed", f"{type(error).__name__}: {_line(error)}"
    heat = whole.heatmap
    if heat.shape != (len(images), *images.shape[2:]):
        return "wrong", f"{list(heat.shape)} for {len(images)} images"
    if not bool(heat.isfinite().all()):
        return "wrong", "not finite"
    # A heat map shows the positive part alone.
    signed = next(part for part in (whole.signed_map, whole.attribution, heat) if part is not None)
    if _is_constant(signed) or (_is_constant(heat) and not messages):
        return ("refused", _line(messages[0])) if messages else ("wrong", "constant without a word")
    if name == "feature-permutation":  # what it compares with are the other images
        return "served", ""
    try:
        reason = ""
        if not mixes_rows:
            alone = explainer(images[1:], take_targets(target, len(images), torch.tensor([1])))
            reason = _differs(alone, whole, slice(1, 2), "the row alone")
        if not reason and name in ACCELERATED:
            repeated = METHODS[name](model, **settings, accelerate=True)(images, target)
            reason = _differs(repeated, whole, slice(None), "accelerated")
    except Exception as error:  # as above
        return "failed", f"alone or accelerated, {type(error).__name__}: {_line(error)}"
    if not reason and name == "saliency":
        reason = _off_autograd(whole, model, images, target)
    return ("wrong", reason) if reason else ("served", "")


def _is_constant(maps: Tensor) -> bool:
    """Returns whether one of the maps has one number everywhere."""
    return bool((maps.flatten(1).amax(1) == maps.flatten(1).amin(1)).any())


def _refusal(name: str, message: str) -> tuple[str, str]:
    """Returns a refusal as "not applicable" where the method was not made for such a network."""
    foreign = (
        (METHODS[name].needs_attention, "attention"),
        (name == "cam", ""),
    )
    return ("not applicable" if any(one and word in message for one, word in foreign) else "refused"), message


def _differs(result: Explanation, expected: Explanation, rows: slice, what: str) -> str:
    for field in ("signed_map", "attribution", "heatmap"):
        ours, theirs = getattr(result, field, None), getattr(expected, field, None)
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            if ours.shape != theirs[rows].shape:
                return f"{what}: {field} {list(ours.shape)} instead of {list(theirs[rows].shape)}"
            off = float((ours - theirs[rows]).abs().max() / theirs[rows].abs().max().clamp_min(1e-300))
            return f"{what}: {field} differs by {off:.1e} of the largest" if off > TOLERANCE else ""
    return ""


def _off_autograd(result: Explanation, model: nn.Module, images: Tensor, target: Any) -> str:
    leaf = images.clone().requires_grad_()
    with torch.enable_grad():
        output = copy.deepcopy(model)(leaf)
        if callable(target):
            score = target(output)
        else:
            logits = logits_in(output)
            score = logits.reshape(len(images), -1).gather(1, result.target[:, None])
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
    off = float((result.attribution - gradient).abs().max() / gradient.abs().max().clamp_min(1e-300))
    return f"differs from autograd by {off:.1e} of the largest" if off > 1e-7 else ""


def _photograph(model: nn.Module) -> dict[str, Any]:
    """Returns all that must not change: numbers, modes, hooks and which attributes there are."""
    shown: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest = hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        shown[name] = (digest, tensor.requires_grad, tensor.dtype, tuple(tensor.stride()))
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        shown[f"{name} "] = (module.training, *map(len, hooks))
    return shown


def _unchanged(model: nn.Module, images: Tensor, before: dict[str, Any]) -> tuple[str, str]:
    """Returns whether the model is as it was, and can be trained."""
    after = _photograph(model)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed:
        return "wrong", f"changed: {', '.join(changed[:3])}"
    for name, module in model.named_modules():
        for attribute, held in vars(module).items():
            if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(held)):
                return "wrong", f"{name}.{attribute} is an inference tensor"
    try:
        with torch.enable_grad():
            leaves = pytree.tree_leaves(model(images))
            score = sum(leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
            score.backward()
    except Exception as error:  # as above
        return "failed", f"training, {type(error).__name__}: {_line(error)}"
    if not any(parameter.grad is not None for parameter in model.parameters()):
        return "wrong", "no gradient arrives at any weight"
    return "served", ""


def liven(model: nn.Module, images: Tensor) -> None:
    """Gives a model with random weights numbers of which outputs depend on images, as training would.

    Weights and scales that are constant or nearly zero become random, and batch norms take their statistics from the
    images.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            if not flat.numel() or not parameter.is_floating_point() or bool((flat != flat[0]).any()):
                continue
            drawn = torch.rand(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_((drawn - 0.5) * 2 * 3**0.5 / max(1, parameter[0].numel()) ** 0.5)
            elif float(flat[0]) == 0:
                parameter.copy_((drawn - 0.5) * 0.2)
            else:
                parameter.copy_(0.5 + drawn)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        model.eval()
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = None
            module.reset_running_stats()
            module.train()
        for _ in range(2 if norms else 0):
            model(images)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
        model.eval()


class _OutOfTimeError(BaseException):
    """The CPU time of an explainer is over; no `except Exception` catches it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the block after some seconds of CPU time, which other processes do not shorten."""

    def stop(*_: Any) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Yields a list that gets what the library logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pyfast_xai")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
