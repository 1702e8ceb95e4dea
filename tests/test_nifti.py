"""NIfTI-1 files, read by the offsets of the format's definition (nifti1.h)."""

import gzip
import struct

import numpy as np
import pytest
import torch

from pyfast_xai import Explanation, InputError


def explanation():
    return Explanation("mine", torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)))


def read(content):
    """The numbers of a file of float32, and its matrix."""
    assert struct.unpack_from("<i", content, 0) == (348,)
    assert content[344:348] == b"n+1\0"
    rank, *shape = struct.unpack_from("<8h", content, 40)
    assert (rank, shape[3:]) == (3, [1, 1, 1, 1])
    assert struct.unpack_from("<2h", content, 70) == (16, 32)  # float32 of 32 bits
    offset, slope, intercept = struct.unpack_from("<3f", content, 108)
    assert (offset, slope, intercept) == (352, 1, 0)
    assert struct.unpack_from("<2h", content, 252) == (0, 2)  # no quaternion, the matrix
    numbers = np.frombuffer(content, "<f4", offset=352)
    spacing = struct.unpack_from("<8f", content, 76)[1:4]
    return (
        numbers.reshape(shape[:3], order="F"),
        np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4),
        spacing,
    )


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_heat_map_is_written_with_the_axes_of_the_volume(tmp_path, ending):
    affine = np.array([[0, 2.0, 0, -3], [1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    explanation().to_nifti(tmp_path / f"heat{ending}", 1, affine=affine)
    content = (tmp_path / f"heat{ending}").read_bytes()
    volume, matrix, spacing = read(gzip.decompress(content) if ending.endswith("gz") else content)
    assert np.array_equal(volume, explanation().heatmap[1].numpy())
    assert np.array_equal(matrix, affine[:3])
    assert spacing == (1.5, 2, 3)


def test_volumes_of_other_readers(tmp_path):
    explanation().to_nifti(tmp_path / "heat.nii", reverse=True)
    volume, matrix, _ = read((tmp_path / "heat.nii").read_bytes())
    assert np.array_equal(volume, explanation().heatmap[0].permute(2, 1, 0).numpy())
    assert np.array_equal(matrix, np.eye(4)[:3])


def test_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"path must end in '\.nii' or '\.nii\.gz', got 'heat\.npy'"):
        explanation().to_nifti(tmp_path / "heat.npy")
    with pytest.raises(InputError, match=r"affine must be a finite matrix \[4, 4\], got \[3, 3\]"):
        explanation().to_nifti(tmp_path / "heat.nii", affine=np.eye(3))
    with pytest.raises(InputError, match="heatmap must be that of volumes"):
        Explanation("mine", torch.rand(1, 4, 5)).to_nifti(tmp_path / "heat.nii")
    assert not list(tmp_path.iterdir())
