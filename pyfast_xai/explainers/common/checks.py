"""Checks of images and models, whose errors say how to mend them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.tape.module_hooks import exported_modules, modules_of

SHAPES = {3: "[N, C, L]", 4: "[N, C, H, W]", 5: "[N, C, D, H, W]"}


def check_model(model: Any) -> None:
    """Refuses what is no module.

    Raises:
        InputError: with what came, and how to make a module of it.
    """
    if isinstance(model, nn.Module):
        return
    hint = ""
    if isinstance(model, str):
        hint = ": give load_model(name).model"
    elif isinstance(model, Mapping):
        hint = ": load the weights into their module by load_state_dict"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        hint = f": give an instance of {model.__name__}"
    raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")


def check_images(model: nn.Module, images: Tensor, ranks: Sequence[int] = (4,)) -> tuple[float, float]:
    """Refuses what an explainer cannot work with.

    Args:
        model: to be explained.
        images: what the user gave.
        ranks: numbers of dimensions that the explainer takes.

    Returns:
        The smallest and the largest value of the images.

    Raises:
        InputError: naming the argument, the expected value and the actual one.
    """
    if not isinstance(images, Tensor):
        stacked = isinstance(images, (list, tuple)) and any(isinstance(image, Tensor) for image in images)
        way = "give torch.stack(images)" if stacked else "make one with Preprocess(...).batch(images)"
        hint = "" if images is None else f": {way}"
        raise InputError(f"images must be a tensor [N, C, H, W], got {type(images).__name__}{hint}")
    volumes = images.dim() == 5 and 5 not in ranks and 5 in _ranks_of(model, (4, 5))
    ranks = [4] if images.dim() == 4 else _ranks_of(model, ranks)
    if images.dim() not in ranks:
        shapes = " or ".join(SHAPES[rank] for rank in sorted(ranks, key=lambda rank: abs(rank - 4)))
        hint = ": give images[None]" if images.dim() == 3 and 4 in ranks else ""
        hint = ": videos and volumes are explained by saliency, lrp or grad-cam, for example" if volumes else hint
        raise InputError(f"images must have shape {shapes}, got {list(images.shape)}{hint}")
    if not images.is_floating_point():
        hint = ": give images / 255, normalised as the model was trained" if images.dtype == torch.uint8 else ""
        raise InputError(f"images must have a floating-point dtype, got {images.dtype}{hint}")
    if images.numel() == 0:
        raise InputError(f"images must hold at least one image, got shape {list(images.shape)}")
    # Both are NaN where any number is.
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (float("-inf") < low and high < float("inf")):
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        raise InputError(f"images must be finite, got NaN or infinity in image {bad[0]} ({len(bad)} of {len(images)})")
    exported = exported_modules(model)
    for module, name in modules_of(model).items():
        if module.training and module not in exported:
            place = f"module {name!r} of it" if name else "it"
            raise InputError(f"model must be in evaluation mode (call model.eval()), got {place} in training mode")
    return low, high


def _ranks_of(model: nn.Module, ranks: Sequence[int]) -> Sequence[int]:
    """Returns which numbers of dimensions a model seems to take, by its convolutions.

    A network of images with convolutions along one axis as well, as of channels, takes no signals.
    """
    kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    layer_ranks = {rank for module in modules_of(model) for rank, kind in kinds.items() if isinstance(module, kind)}
    if 5 in layer_ranks:
        return [rank for rank in ranks if rank == 5] or ranks
    return [rank for rank in ranks if rank == 4] if 4 in layer_ranks else ranks


def misfit(model: nn.Module, images: Tensor, error: Exception) -> str | None:
    """Returns why a model that raised an error may not be able to take some images; None where they seem to fit."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if devices and images.device not in devices:
        place = tensors[0].device
        return (
            f"images must be on the device of the model, {place}, got {images.device}: give images.to({str(place)!r})"
        )
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if dtypes and images.dtype not in dtypes and "type" in str(error):
        dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
        return f"images must have the dtype of the model, {dtype}, got {images.dtype}: convert them, or use autocast"
    if images.shape[1] > 4 >= images.shape[3]:
        return (
            f"images must have shape [N, C, H, W], got {list(images.shape)}, which looks like [N, H, W, C]: give "
            "images.permute(0, 3, 1, 2)"
        )
    return None
