"""The class that responds most at every pixel."""

from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    return None


_op = Op("response_argmax(Tensor responses, Tensor classes, Tensor(a!) best, Tensor(b!) winner) -> ()", _fake)


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Fold the responses of some classes into the dominant response and class: CLEAR (Kumar, Wong and Taylor, 2017).

    The response of a class at a pixel is the sum over the channels, taken in their order. Where it exceeds `best`, it
    replaces it and its class becomes the winner; the first of equals stays, also across calls, and NaN never wins. A
    thousand classes can therefore come a few at a time, with the same result.

    Args:
        responses: `[K, N, C, H, W]` of K classes for each image, float16, bfloat16, float32 or float64, any strides.
        classes: the class of each, int64 `[K, N]`; a negative one is skipped.
        best: dominant response so far, `[N, H, W]`, contiguous, minus infinity at first; float32, or float64 for
            float64 responses. Changed in place.
        winner: dominant class so far, int64 `[N, H, W]`, contiguous, -1 at first. Changed in place.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> responses = torch.rand(2, 1, 3, 8, 8)  # two classes of one image
        >>> best, winner = torch.full((1, 8, 8), -torch.inf), torch.full((1, 8, 8), -1)
        >>> ops.response_argmax(responses, torch.tensor([[4], [9]]), best, winner)
        >>> torch.equal(best, responses.sum(2).amax(0)), winner.unique()
        (True, tensor([4, 9]))
    """
    _op(responses, classes, best, winner)
