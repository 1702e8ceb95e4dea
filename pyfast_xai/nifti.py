"""One volume as the bytes of a NIfTI-1 file, which viewers of medical images open."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyfast_xai.errors import InputError

_HEADER = 348  # bytes of a header of version 1
_START = 352  # where the numbers begin, behind four bytes that say that no extension follows
_FLOAT32 = 16
_MILLIMETRES, _ALIGNED = 2, 2  # the unit of lengths; "aligned to coordinates of the scanner"


def write_nifti(path: str | Path, volume: np.ndarray, affine: Any = None) -> None:
    """Writes a volume as a NIfTI-1 file.

    Args:
        path: ends in ".nii", or ".nii.gz" for a compressed file.
        volume: `[I, J, K]`, written as float32.
        affine: `[4, 4]`, from indices of voxels to millimetres; None for the identity.

    Raises:
        InputError: another ending, or a volume or a matrix of another shape.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"path must end in '.nii' or '.nii.gz', got {path.name!r}")
    if volume.ndim != 3:
        raise InputError(f"volume must have three axes, got {list(volume.shape)}")
    matrix = np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise InputError(f"affine must be a finite matrix [4, 4], got {list(matrix.shape)}")
    content = _header(volume.shape, matrix) + volume.astype("<f4").tobytes(order="F")
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def _header(shape: Sequence[int], matrix: np.ndarray) -> bytes:
    """Returns the header of NIfTI-1 with its four bytes of extension flags, little-endian."""
    header = bytearray(_START)
    struct.pack_into("<i", header, 0, _HEADER)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, _FLOAT32, 32)
    voxel = np.linalg.norm(matrix[:3, :3], axis=0)
    struct.pack_into("<8f", header, 76, 1.0, *voxel, 1.0, 1.0, 1.0, 1.0)
    struct.pack_into("<3f", header, 108, _START, 1.0, 0.0)  # offset, slope and intercept
    struct.pack_into("<b", header, 123, _MILLIMETRES)
    struct.pack_into("<2h", header, 252, 0, _ALIGNED)  # no quaternion; the rows of the matrix count
    struct.pack_into("<12f", header, 280, *matrix[:3].flatten())
    header[344:348] = b"n+1\0"
    return bytes(header)
