import math

import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops


def density_slowly(points, images, height, width, sigma):
    out = np.zeros((images, height, width))
    rows, columns = np.mgrid[:height, :width]
    for point in points.tolist():
        image, y, x = np.unravel_index(point, out.shape)
        out[image] += np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    ("shape", "sigma"),
    [
        ((1, 1, 1), 1.0),
        ((2, 17, 31), 2.5),
        ((3, 33, 8), 0.3),
        ((1, 64, 50), 20.0),
        ((1, 5, 300), 7.0),
        ((1, 300, 3), 1),
    ],
)
@pytest.mark.parametrize("count", [1, 40])
def test_sum_of_gaussians(backend, shape, sigma, count):
    points = torch.randint(0, math.prod(shape), (count,))
    density = ops.point_density(points, *shape, sigma)
    assert density.dtype == torch.float32
    torch.testing.assert_close(density.double(), density_slowly(points, *shape, sigma), rtol=1e-5, atol=1e-6)


def test_height_one_at_a_lone_point(backend):
    density = ops.point_density(torch.tensor([3 * 9 + 4]), 1, 7, 9, 1.5)
    assert density[0, 3, 4] == 1
    assert density.argmax() == 3 * 9 + 4


def test_nothing_comes_back_from_the_border(backend):
    corner = ops.point_density(torch.tensor([0]), 1, 9, 9, 3.0)
    centre = ops.point_density(torch.tensor([8 * 17 + 8]), 1, 17, 17, 3.0)
    torch.testing.assert_close(corner[0], centre[0, 8:, 8:], rtol=1e-6, atol=1e-7)


def test_points_that_coincide_count_as_often_as_they_occur(backend):
    single = ops.point_density(torch.tensor([40]), 1, 9, 9, 2.0)
    thrice = ops.point_density(torch.tensor([40, 40, 40]), 1, 9, 9, 2.0)
    torch.testing.assert_close(thrice, 3 * single)


def test_images_do_not_mix(backend):
    points = torch.randint(0, 81, (10,))
    alone = ops.point_density(points, 1, 9, 9, 4.0)
    density = ops.point_density(points + 81, 3, 9, 9, 4.0)
    torch.testing.assert_close(density[1], alone[0])
    assert not density[[0, 2]].any()


def test_a_large_image_agrees_with_the_reference(backend):
    points = torch.randint(0, 2 * 301 * 457, (200,))
    with ops.backend("reference"):
        expected = ops.point_density(points, 2, 301, 457, 6.0)
    torch.testing.assert_close(ops.point_density(points, 2, 301, 457, 6.0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 5, 7), (1, 0, 7), (1, 5, 0)], ids=case_id)
def test_no_points(backend, shape):
    density = ops.point_density(torch.empty(0, dtype=torch.int64), *shape, 2.0)
    assert torch.equal(density, torch.zeros(shape))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("points", torch.tensor([70])),
        ("points", torch.tensor([-1])),
        ("points", torch.tensor([[1]])),
        ("points", torch.tensor([1.0])),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", math.nan),
        ("height", -5),
    ],
)
def test_bad_arguments_are_named(backend, argument, value):
    arguments = {"points": torch.tensor([1]), "images": 2, "height": 5, "width": 7, "sigma": 2.0} | {argument: value}
    with pytest.raises(RuntimeError, match=argument):
        ops.point_density(**arguments)


@pytest.mark.parametrize("points", [[0, 5, 5, 69], []], ids=["points", "none"])
def test_opcheck(points):
    arguments = (torch.tensor(points, dtype=torch.int64), 2, 5, 7, 1.5)
    torch.library.opcheck(torch.ops.pyfast_xai.point_density.default, arguments)
