"""The dtype of sums."""

import torch
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What elements of `dtype` are widened to before arithmetic; exact, so comparisons stay what they were."""
    return tl.float64 if dtype == torch.float64 else tl.float32
