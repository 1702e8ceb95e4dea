"""Feature masks as Captum takes them: for each input, which of its elements belong together."""

import warnings

import torch
from torch import Tensor

from pyfast_xai.compat.captum.arguments import refuse

FeatureMask = None | Tensor | tuple[Tensor, ...]


def masks_for(feature_mask: FeatureMask, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns a mask for each input, with as many dimensions, `[1 or N, ...]`; each element its own feature for None.

    Raises:
        InputError: another number of masks, or one that does not broadcast to its input.
    """
    if feature_mask is None:
        starts = [0]
        for tensor in inputs:
            starts.append(starts[-1] + tensor[:1].numel())
        return tuple(
            torch.arange(start, stop, device=tensor.device).view(tensor[:1].shape)
            for start, stop, tensor in zip(starts, starts[1:], inputs, strict=False)
        )
    masks = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(masks) != len(inputs):
        refuse(f"feature_mask must be one for each of {len(inputs)} inputs, got {len(masks)}")
    return tuple(map(_shaped, masks, inputs))


def numbered_masks(feature_mask: FeatureMask, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int]:
    """Returns masks whose smallest number is 0, and the number of features, one more than the largest."""
    masks = masks_for(feature_mask, inputs)
    low = min(int(mask.min()) for mask in masks if mask.numel())
    if low != 0:
        warnings.warn(f"feature_mask begins at {low} and was shifted to begin at 0", stacklevel=3)
        masks = tuple(mask - low for mask in masks)
    return masks, features_in(masks)


def features_in(masks: tuple[Tensor, ...]) -> int:
    """Returns one more than the largest number in masks."""
    return 1 + max(int(mask.max()) for mask in masks if mask.numel())


def _shaped(mask: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        refuse(f"feature_mask must be a tensor or a tuple of tensors, got {type(mask).__name__}")
    whole = mask.to(tensor.device)[(None,) * (tensor.dim() - mask.dim())]
    fits = whole.dim() == tensor.dim() and all(n in (1, m) for n, m in zip(whole.shape, tensor.shape, strict=True))
    if not fits:
        refuse(f"feature_mask must broadcast to the input, {list(tensor.shape)}, got {list(mask.shape)}")
    return whole
