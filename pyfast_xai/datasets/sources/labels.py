"""Conversion of labels of any type to class indices."""

import datetime
import math
import numbers
import re
import reprlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_PLAIN = (numbers.Number, bytes, bytearray, datetime.date, datetime.time, datetime.timedelta, type(None))
_LEAST, _LARGEST = -(1 << 63), (1 << 63) - 1


def read_label(value: Any) -> tuple[int | None, str | None]:
    """Returns the class index of a label, or the reason why there is none.

    Whole numbers count whatever type holds them: Python, NumPy, tensors of one element, floats as pandas writes them
    beside a null, and text.

    Args:
        value: a label of any kind and size; None, NaN and empty text stand for no label.

    Returns:
        An index of 64 bits and None; None and None for no label; or None and one sentence.
    """
    try:
        return _index(value)
    except Exception as error:  # foreign objects raise what they like
        return None, f"label must be a whole number, got a {type(value).__name__} ({type(error).__name__})"


def _index(value: Any) -> tuple[int | None, str | None]:
    number = value
    if hasattr(value, "numel") or hasattr(value, "ndim"):
        size = value.numel() if hasattr(value, "numel") else value.size
        if size != 1:
            return None, f"label must be one whole number, got {size} of them"
        number = value.item()
    if isinstance(number, (bytes, bytearray)):
        number = bytes(number[:64]).decode("utf-8", "backslashreplace")
    if isinstance(number, str):
        text = number.strip()
        if not text:
            return None, None
        number = int(text) if _WHOLE.fullmatch(text) else float(text) if len(text) < 64 and _is_number(text) else text
    if number is None or (isinstance(number, numbers.Real) and number != number):
        return None, None
    # Decimals are registered as plain numbers only.
    if not isinstance(number, numbers.Number) or isinstance(number, complex):
        return None, f"label must be a whole number, got {_short(value)}"
    if not math.isfinite(number) or int(number) != number:  # type: ignore[arg-type,call-overload]
        return None, f"label must be a whole number, got {_short(value)}"
    index = int(number)  # type: ignore[call-overload]
    if not _LEAST <= index <= _LARGEST:
        return None, f"label must fit into 64 bits, got {_short(index)}"
    return index, None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which Python allows


class _Shown(reprlib.Repr):
    """Texts of values; of objects of other kinds the type, since an address is another one in every process."""

    def repr_instance(self, x: Any, level: int) -> str:
        return super().repr_instance(x, level) if isinstance(x, _PLAIN) else f"a {type(x).__name__}"


_shown = _Shown().repr


def _short(value: Any) -> str:
    text = _shown(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def label_columns(values: Any) -> tuple[pa.Array, pa.Array]:
    """Returns class indices and the reasons for those that are missing, as two Arrow columns.

    Args:
        values: an Arrow array of any type.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type):
        try:
            return pc.cast(values, pa.int64()), pa.nulls(len(values), pa.string())
        except pa.ArrowInvalid:  # one of them is larger
            pass
    pairs = [read_label(_as_python(value)) for value in values]
    return pa.array([label for label, _ in pairs], pa.int64()), pa.array([reason for _, reason in pairs], pa.string())


def _as_python(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception:  # dates out of range and the like
        return value
