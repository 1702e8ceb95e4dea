"""Trained networks and photographs, which are not part of the repository."""

import json
import os
from pathlib import Path

from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce import Data


def folder() -> Path:
    """Where they are."""
    return Path(os.environ.get("PYFAST_XAI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def loaded(name: str) -> LoadedModel:
    return next(Data(folder(), names=(name,)).networks(()))


def photographs(count: int | None = None) -> list[Path]:
    """The first of the squashed ILSVRC pictures."""
    rows = json.loads((folder() / "imagenet" / "annotations.json").read_text())
    return [folder() / "imagenet" / row["file"] for row in rows if row["file"].startswith("val227")][:count]
