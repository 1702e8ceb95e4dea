"""LeGrad (Bousselham et al., 2024) as torch-cam calls it."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.compat.torchcam.extractors import Extractor, InputTypeError, Layer, normalized_maps, scores_of
from pyfast_xai.errors import InputError


class LeGrad(Extractor):
    """The positive gradients of the scores of some blocks at their attention (Bousselham et al., 2024).

    With s the score of the class that the model's head makes of the tokens of a block, and A its attention, the map is
    the mean over blocks, heads and queries of max(ds/dA, 0), for the tokens that are positions. The gradient is that at
    what the attention returns times the values, so that fused attention is seen as it is.

    Args:
        model: whose blocks are watched.
        target_layer: one or several blocks, or their names, each with an `nn.MultiheadAttention` named
            `self_attention`.
        score_projection: returns scores `[N, classes]` of tokens `[N, T, C]`; None for the mean of the tokens through
            `encoder.ln` and `heads`, as torchvision's transformers have them.
        prefix_tokens: tokens in front that are no positions.
        grid_shape: (h, w) of the positions; None for a square.
        enable_hooks: watch from the start.

    Raises:
        InputError: a block without such attention, a model without such a head, or a setting out of range.

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> from pyfast_xai.compat.torchcam import LeGrad
        >>> model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10).eval()
        >>> with LeGrad(model, list(model.encoder.layers)) as extractor:
        ...     scores = model(torch.rand(2, 3, 32, 32))
        ...     maps = extractor(3, scores)
        >>> [map.shape for map in maps]
        [torch.Size([2, 4, 4])]
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | list[Layer],
        *,
        score_projection: Callable[[Tensor], Tensor] | None = None,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,
    ) -> None:
        if target_layer is None or target_layer == []:
            raise InputError(f"target_layer must be at least one block for LeGrad, got {target_layer!r}")
        if not isinstance(prefix_tokens, int):
            raise InputTypeError(f"prefix_tokens must be an int, got {type(prefix_tokens).__name__}")
        if prefix_tokens < 0:
            raise InputError(f"prefix_tokens must not be negative, got {prefix_tokens}")
        if grid_shape is not None:
            pair = isinstance(grid_shape, tuple) and len(grid_shape) == 2
            if not pair or not all(isinstance(size, int) for size in grid_shape):
                raise InputTypeError(f"grid_shape must be a tuple of two ints, got {grid_shape!r}")
            if min(grid_shape) < 1:
                raise InputError(f"grid_shape must be positive, got {grid_shape!r}")
        if score_projection is not None and not callable(score_projection):
            raise InputTypeError(f"score_projection must be a function, got {type(score_projection).__name__}")
        self._project = _torchvision_head(model) if score_projection is None else score_projection
        self.prefix_tokens, self.grid_shape = prefix_tokens, grid_shape
        super().__init__(model, target_layer, enable_hooks=enable_hooks)
        extractor = weakref.ref(self)
        try:
            for i, name in enumerate(self.target_names):
                attention = _attention_of(name, self.submodule_dict[name])
                self.hook_handles.append(attention.register_forward_hook(_WatchAttention(extractor, i)))
        except InputError:
            self.remove_hooks()
            raise

    def reset_hooks(self) -> None:
        """Clears the recorded attention."""
        super().reset_hooks()
        # Of each block what its attention was given and returned.
        self._attentions: list[tuple[Tensor, Tensor] | None] = [None] * len(self.target_names)

    def _see_attention(self, layer: int, module: nn.MultiheadAttention, args: Any, output: Any) -> None:
        if not self._hooks_enabled:
            return
        name = self.target_names[layer]
        if len(args) < 3 or args[0] is not args[1] or args[0] is not args[2] or args[0].dim() != 3:
            raise InputError(
                f"target_layer must be self-attention over tokens [N, T, C], got other attention in {name!r}"
            )
        if module.training and module.dropout > 0:
            raise InputError(f"target_layer must not drop attention, got {name!r} in training mode")
        returned = output[0]
        if torch.is_grad_enabled() and not returned.requires_grad:  # nothing below has a gradient
            returned.requires_grad_()
        self._attentions[layer] = (args[0].detach(), returned)

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: Any = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Computes the map, in a list; see `Extractor`."""
        tokens = self._check(class_idx, scores, targets)
        retain_graph = bool(kwargs.get("retain_graph", False))
        maps = []
        for i, (name, record) in enumerate(zip(self.target_names, self._attentions, strict=True)):
            assert record is not None
            block, last = self._hook_outputs[i], i == len(self.target_names) - 1
            assert block is not None
            try:
                with torch.enable_grad():
                    total = scores_of(class_idx, self._project(block), None, len(tokens[i])).sum()
                    (slope,) = torch.autograd.grad(total, record[1], retain_graph=retain_graph or not last)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the score of {name!r} is not connected to its attention: the forward must run with gradients "
                    f"enabled ({error})"
                ) from error
            attention = _attention_of(name, self.submodule_dict[name])
            relevance = _at_attention(attention, record[0], slope).clamp_min(0).mean((1, 2))[:, self.prefix_tokens :]
            maps.append(relevance.unflatten(1, self._grid(relevance.shape[1])))
        mean = torch.stack(maps).mean(0).detach()
        return [normalized_maps(mean) if normalized else mean]

    def _grid(self, count: int) -> tuple[int, int]:
        side = math.isqrt(max(count, 0))
        height, width = self.grid_shape or (side, side)
        if count < 1 or height * width != count:
            raise InputError(f"grid_shape must hold {count} tokens, got {self.grid_shape or 'no square of as many'}")
        return height, width


def _at_attention(attention: nn.MultiheadAttention, tokens: Tensor, slope: Tensor) -> Tensor:
    """Returns the gradient at the attention `[N, heads, T, T]` of the one at what is returned, `[N, T, C]`."""
    width, heads = attention.embed_dim, attention.num_heads
    with torch.no_grad():
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
        values = functional.linear(tokens, attention.in_proj_weight[2 * width :], bias)
        at_heads = slope @ attention.out_proj.weight
        at_heads, values = (tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (at_heads, values))
        return at_heads @ values.mT


def _torchvision_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    norm, heads = getattr(getattr(model, "encoder", None), "ln", None), getattr(model, "heads", None)
    if not isinstance(norm, nn.Module) or not isinstance(heads, nn.Module):
        raise InputError("score_projection must be given for others than torchvision's transformers, got None")
    return lambda tokens: heads(norm(tokens.mean(1)))


def _attention_of(name: str, block: nn.Module) -> nn.MultiheadAttention:
    attention = getattr(block, "self_attention", None)
    if not isinstance(attention, nn.MultiheadAttention):
        raise InputTypeError(f"target_layer must have an nn.MultiheadAttention self_attention, got none in {name!r}")
    plain = attention.batch_first and attention.in_proj_weight is not None and not attention.add_zero_attn
    if not plain or attention.bias_k is not None or attention.bias_v is not None:
        raise InputError(
            "target_layer must attend batch first, with one projection for queries, keys and values and no further "
            f"tokens, got {name!r}"
        )
    return attention


class _WatchAttention:
    """A forward hook that does not keep its extractor alive."""

    def __init__(self, extractor: "weakref.ref[LeGrad]", layer: int) -> None:
        self._extractor, self._layer = extractor, layer

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        extractor = self._extractor()
        if extractor is not None:
            extractor._see_attention(self._layer, module, args, output)
