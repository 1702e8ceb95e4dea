"""The output of a model for each image, which targets are called with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import named_logits


def rows_of(output: Any) -> Any:
    """Returns what a model returned as one entry an image.

    A tensor, a list or a tuple is that already. Of a dict, and of an object of Transformers, it is the entry "logits"
    or "out"; of a tuple that a dict or a tuple ends, as of a detector's raw maps, the first entry.

    Args:
        output: what the model returned.

    Raises:
        InputError: a dict with neither.
    """
    if isinstance(output, (Mapping, tuple)):
        named = named_logits(output)
        if isinstance(named, Tensor):
            return named
    if isinstance(output, Mapping):
        raise InputError(
            f"model must return one output an image, or a dict with 'logits' or 'out', got {sorted(map(str, output))}"
        )
    if isinstance(output, tuple) and output and not all(isinstance(entry, Tensor) for entry in output):
        return rows_of(output[0])
    return output
