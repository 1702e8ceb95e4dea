"""Guided backprop as pytorch-grad-cam calls it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.acceleration import Replaying
from pyfast_xai.compat.recording import Recording, evaluating, read_call
from pyfast_xai.errors import InputError
from pyfast_xai.rules.gradient import GUIDED


class GuidedBackpropReLUModel(Replaying):
    """Gradient that is negative neither above nor below any rectifier (Springenberg et al., 2015).

    Args:
        model: any; it is put in evaluation mode for the length of a call, and its layers stay as they are.
        device: where the images are sent; the model's own, which is not moved.

    Raises:
        InputError: another device than the model's.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import GuidedBackpropReLUModel
        >>> GuidedBackpropReLUModel(demo.load())(torch.rand(1, 3, 96, 96), target_category=3).shape
        (96, 96, 3)
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        parameter = next(model.parameters(), None)
        model_device = torch.device("cpu") if parameter is None else parameter.device
        if device is not None and torch.device(device).type != model_device.type:
            raise InputError(f"device must be that of the model, {model_device}, got {device}")
        self.device = model_device

    def __call__(self, input_img: Tensor, target_category: int | Sequence[int] | None = None) -> np.ndarray:
        """Explains an image, or a batch.

        Args:
            input_img: `[N, C, H, W]`, as the model takes them.
            target_category: the class, or one an image; None for the largest output of each.

        Returns:
            `[H, W, C]` for one image, as there, signed and not scaled; `[N, H, W, C]` for several.

        Raises:
            InputError: images or classes that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        if input_img.dim() != 4:
            raise InputError(f"input_img must be [N, C, H, W], got {list(input_img.shape)}")
        images = input_img.detach().to(self.device)
        with evaluating(self.model):
            gradient = read_call(
                *(self.model, (images,)),
                lambda recording: _of_classes(recording, target_category),
                self._replays,
                overlay=GUIDED,
            )
        result = gradient.permute(0, 2, 3, 1).to(torch.promote_types(gradient.dtype, torch.float32)).cpu().numpy()
        return result[0] if len(result) == 1 else result


def _of_classes(recording: Recording, classes: int | Sequence[int] | None) -> Tensor:
    scores = recording.output
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        received = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"model must return [N, classes], got {received}")
    chosen = scores.argmax(1) if classes is None else torch.as_tensor(classes).to(scores.device)
    if chosen.dim() > 1 or (chosen.dim() == 1 and len(chosen) != len(scores)):
        raise InputError(f"target_category must be an int or one for each of {len(scores)} images")
    chosen = chosen.expand(len(scores))
    if bool(((chosen < -scores.shape[1]) | (chosen >= scores.shape[1])).any()):
        raise InputError(f"target_category must lie below {scores.shape[1]}, got {chosen.tolist()}")
    place = (chosen % scores.shape[1])[:, None]
    to = recording.inputs[0]
    assert to is not None
    return recording.gradients(lambda output: output.gather(1, place), [to])[0]
