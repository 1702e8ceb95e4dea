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
        ("winner", pa.binary()),
        ("winner_dtype", pa.string()),
        ("decode_ms", pa.float32()),
        ("explain_ms", pa.float32()),
    ]
)

SWAPPED = [("swapped_index", pa.list_(pa.int64())), ("swapped_score", pa.list_(pa.float32()))]

_KEY, _HUGGING_FACE = b"pyfast_xai", b"huggingface"


@dataclass(frozen=True)
class About:
    """What a part says of itself.

    Attributes:
        fingerprint: of the run.
        shard: its number.
        start: index of the first row.
        stop: index after the last.
        errors: rows without an explanation.
        batch: images at a time, as the last of them went.
        version: of the columns.
    """

    fingerprint: str
    shard: int
    start: int
    stop: int
    errors: int
    batch: int
    version: int = VERSION


def schema(about: About, pictures: bool = False, swapped: bool = False) -> pa.Schema:
    """The columns of a part.

    Args:
        about: the part.
        pictures: with a column of maps as PNG, which Hugging Face's `datasets` opens as images.
        swapped: with columns of what the model answers once colours have traded places.
    """
    more = [*(SWAPPED if swapped else ()), *([("picture", PICTURE)] if pictures else ())]
    columns = pa.schema([*COLUMNS, *(pa.field(*own) for own in more)])
    metadata = {_KEY: json.dumps(asdict(about)).encode()}
    if pictures:
        features = {field.name: _feature(field.name, field.type) for field in columns}
        metadata[_HUGGING_FACE] = json.dumps({"info": {"features": features}}).encode()
    return columns.with_metadata(metadata)


def about(found: pa.Schema) -> About | None:
    """What a file says of itself; None for one that is no part of a run."""
    try:
        told = json.loads((found.metadata or {})[_KEY])
        told = About(**told)
    except (KeyError, TypeError, ValueError):
        return None
    numbers = (told.shard, told.start, told.stop, told.errors, told.batch, told.version)
    return told if all(type(number) is int for number in numbers) and isinstance(told.fingerprint, str) else None


def _feature(name: str, kind: Any) -> Any:
    """A column as Hugging Face's `datasets` writes it down."""
    if name == "picture":
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature("", kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {kind.field(n).name: _feature("", kind.field(n).type) for n in range(kind.num_fields)}
    plain = {pa.float32(): "float32", pa.int64(): "int64", pa.int32(): "int32", pa.binary(): "binary"}
    return {"dtype": plain.get(kind, "string"), "_type": "Value"}
