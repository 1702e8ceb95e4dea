"""The dtype of sums."""

import torch
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Returns the dtype to which `dtype` is widened before arithmetic; exact, so comparisons do not change."""
    return tl.float64 if dtype == torch.float64 else tl.float32
