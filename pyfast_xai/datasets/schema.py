"""The columns of a part, and what its file says of itself."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

VERSION = 1  # of the columns; changes when a reader of the old ones would misread the new ones

OK, ERROR = "ok", "error"

POINT = pa.struct([("y", pa.int32()), ("x", pa.int32())])
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

# Plain binary with shape and dtype beside it is what every reader takes; a tensor type is not.
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.int64()),
        ("label_error", pa.string()),
        ("target", pa.int64()),
        ("class_name", pa.string()),
        ("score", pa.float32()),
        ("topk_index", pa.list_(pa.int64())),
        ("topk_name", pa.list_(pa.string())),
        ("topk_score", pa.list_(pa.float32())),
        ("box", pa.list_(pa.float32())),
        ("box_in_picture", pa.list_(pa.float32())),
        ("points", pa.list_(POINT)),
        ("input_height", pa.int32()),
        ("input_width", pa.int32()),
        ("map", pa.binary()),
        ("map_dtype", pa.string()),
        ("map_shape", pa.list_(pa.int32())),
        ("map_scale", pa.float32()),
        ("map_offset", pa.float32()),
        ("map_kind", pa.string()),
        ("dominant_class", pa.binary()),
        ("dominant_class_dtype", pa.string()),
        ("decode_ms", pa.float32()),
        ("explain_ms", pa.float32()),
    ]
)

SWAPPED = [("swapped_index", pa.list_(pa.int64())), ("swapped_score", pa.list_(pa.float32()))]

_KEY, _HUGGING_FACE = b"pyfast_xai", b"huggingface"


@dataclass(frozen=True)
class PartInfo:
    """The metadata of a part.

    Attributes:
        fingerprint: of the run.
        shard: its number.
        start: index of the first row.
        stop: index after the last.
        errors: rows without an explanation.
        batch_size: images at a time, as the last of them went.
        version: of the columns.
    """

    fingerprint: str
    shard: int
    start: int
    stop: int
    errors: int
    batch_size: int
    version: int = VERSION


def columns(pictures: bool = False, swapped: bool = False) -> pa.Schema:
    """Returns the columns of all parts of a run.

    Args:
        pictures: with a column of maps as PNG, which Hugging Face's `datasets` opens as images.
        swapped: with columns of what the model answers with swapped colours.
    """
    optional = [*(SWAPPED if swapped else ()), *([("picture", PICTURE)] if pictures else ())]
    schema = pa.schema([*COLUMNS, *(pa.field(*column) for column in optional)])
    if not pictures:
        return schema
    features = {field.name: _feature(field.name, field.type) for field in schema}
    return schema.with_metadata({_HUGGING_FACE: json.dumps({"info": {"features": features}}).encode()})


def with_info(schema: pa.Schema, info: PartInfo) -> pa.Schema:
    """Returns the columns with what a part says of itself."""
    return schema.with_metadata({**(schema.metadata or {}), _KEY: json.dumps(asdict(info)).encode()})


def part_info(schema: pa.Schema) -> PartInfo | None:
    """Returns what a file says of itself; None for one that is no part of a run."""
    try:
        info = PartInfo(**json.loads((schema.metadata or {})[_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    numbers = (info.shard, info.start, info.stop, info.errors, info.batch_size, info.version)
    return info if all(type(number) is int for number in numbers) and isinstance(info.fingerprint, str) else None


def _feature(name: str, kind: Any) -> Any:
    """Returns a column as Hugging Face's `datasets` writes it down."""
    if name == "picture":
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature("", kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {kind.field(n).name: _feature("", kind.field(n).type) for n in range(kind.num_fields)}
    names = {pa.float32(): "float32", pa.int64(): "int64", pa.int32(): "int32", pa.binary(): "binary"}
    return {"dtype": names.get(kind, "string"), "_type": "Value"}
