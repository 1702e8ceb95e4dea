import math

import pytest
import torch

from pyfast_xai.kernels.reference import normals
from pyfast_xai.kernels.reference.normals import normals as drawn

CPU = torch.device("cpu")


def test_the_hash_is_splitmix():
    """The first numbers of the published generator with seed 0."""
    state = torch.arange(1, 4) * normals._signed(0x9E3779B97F4A7C15)
    result = [int(number) % 2**64 for number in normals._mixed(state)]
    assert result == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed", [0, 1, -2, 2**63 - 1])
def test_they_are_normal(seed):
    numbers = drawn(300, 200, seed, CPU).flatten().sort().values
    assert numbers.dtype == torch.float64
    assert numbers.isfinite().all()
    # The distance of Kolmogorov and Smirnov; a thousandth of samples exceed this.
    share = torch.arange(1, len(numbers) + 1) / len(numbers)
    distance = (0.5 * (1 + torch.erf(numbers / math.sqrt(2))) - share).abs().max()
    assert distance < 1.95 / math.sqrt(len(numbers))


def test_seeds_and_places_have_nothing_in_common():
    drawings = [drawn(60, 50, seed, CPU) for seed in (-1, 0, 1, 2)]
    lines = torch.stack([part.flatten() for item in drawings for part in (item, item.roll(1, 0), item.roll(1, 1))])
    correlated = torch.corrcoef(lines) - torch.eye(len(lines))
    assert correlated.abs().max() < 5 / math.sqrt(3000)
    assert all(torch.equal(item, drawn(60, 50, seed, CPU)) for item, seed in zip(drawings, (-1, 0, 1, 2), strict=True))


def test_no_generator_is_touched():
    before = torch.get_rng_state()
    drawn(3, 4, 5, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(3, 4, 5, torch.device("meta")).shape == (3, 4)
