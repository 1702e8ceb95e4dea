"""Ids of test cases: short, and the same in every process."""

from torch import Tensor


def case_id(value):
    """Returns what tells a case from others: tensors by their shapes, functions by their names."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={case_id(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return f"({', '.join(map(case_id, value))})"
    if callable(value) and not isinstance(value, type) and hasattr(value, "__name__"):
        return value.__name__
    return " ".join(str(value).split())[:80]
