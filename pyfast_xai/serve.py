"""A model that answers and says why, for servers: one module, any number of threads.

from pyfast_xai.serve import Explained

model = Explained(model, "grad-cam")
logits, explanation = model(images)
"""

from collections.abc import Callable

from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.targets import Target, logits_of
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.explanation import Explanation
from pyfast_xai.tape.module_hooks import unwrap

Made = str | Explainer | Callable[[nn.Module], Explainer]


class Explained(nn.Module):
    """A model with its explainer: the forward pass returns both answers.

    Where the method runs the whole model on the images themselves, its outputs are those of that same forward pass.
    Methods that stop at a layer, or run on other images only, cost one forward pass more: Eigen-CAM, fixations of a
    layer, LIME, occlusion, RISE and their like.

    Several threads may call it at once and get what one after the other would. The outputs are those of the model, up
    to rounding where a CPU runs it in channels_last.

    Args:
        model: in evaluation mode. It is never changed, and stays a submodule: `to`, `state_dict` and hooks reach it.
        explainer: name of a method, what makes one of a model (such as a class), or one that was made for `model`.

    Raises:
        InputError: no such method, or an explainer of another model.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.serve import Explained
        >>> logits, explanation = Explained(demo.load(), "grad-cam")(torch.rand(2, 3, 96, 96))
        >>> logits.shape, explanation.heatmap.shape
        (torch.Size([2, 10]), torch.Size([2, 96, 96]))
    """

    def __init__(self, model: nn.Module, explainer: Made = "grad-cam") -> None:
        super().__init__()
        if isinstance(explainer, str):
            if explainer not in METHODS:
                raise InputError(f"explainer must be one of {', '.join(METHODS)}, got {explainer!r}")
            explainer = METHODS[explainer](model)
        elif not isinstance(explainer, Explainer):
            explainer = explainer(model)
        if explainer.model is not unwrap(model):
            raise InputError(f"explainer must be made for the model, got a {explainer.method} of another one")
        self.model = explainer.model
        self.explainer = explainer
        self.training = self.model.training

    def forward(self, images: Tensor, target: Target = None) -> tuple[Tensor, Explanation]:
        """Runs the model, and explains its output.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: the class to explain: None for the one with the largest output, an int for all images, one an
                image, or `[N, K]` for K an image where the method takes them.

        Returns:
            The outputs `[N, classes]`, without gradient, and the explanation: N rows, or N times K, image by image.

        Raises:
            InputError: images or a target that do not fit, or a model that returns no tensor.
        """
        explanation = self.explainer(images, target)
        logits = explanation.logits
        if logits is None:  # the method stops below the outputs
            logits = outside_inference_mode(logits_of(self.explainer.record(images))[1])
        else:
            logits = logits[:: len(explanation) // len(images)]
        return logits, explanation
