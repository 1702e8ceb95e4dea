"""Pictures of attributions here and in Captum: the same numbers, colours and axes."""

import inspect

import numpy as np
import pytest

from pyfast_xai.compat.captum import visualization as ours
from pyfast_xai.errors import InputError

pytest.importorskip("matplotlib").use("Agg")
METHODS = ["heat_map", "blended_heat_map", "original_image", "masked_image", "alpha_scaling"]
SIGNS = ["positive", "negative", "absolute_value", "all"]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("captum.attr").visualization


def drawn(figure, axes):
    shown = []
    for image in axes.images:
        colors = image.cmap(np.linspace(0, 1, 7))
        shown.append((np.asarray(image.get_array()), colors, image.get_clim(), image.get_alpha()))
    return axes.get_title(), len(figure.axes), shown


def same(one, other):
    assert one[:2] == other[:2]
    for item, there in zip(one[2], other[2], strict=True):
        np.testing.assert_allclose(item[0], there[0])
        np.testing.assert_allclose(item[1], there[1])
        assert item[2:] == there[2:]


@pytest.fixture
def attr():
    return np.random.default_rng(0).normal(size=(9, 7, 3))


@pytest.mark.parametrize("scale", [1.0, 255], ids=["floats", "bytes"])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("method", METHODS)
def test_one_picture(method, sign, scale, attr, theirs):
    if sign == "all" and method in ("masked_image", "alpha_scaling"):
        with pytest.raises(InputError, match="sign must be another than 'all'"):
            ours.visualize_image_attr(attr, np.ones((9, 7, 3)), method, sign, use_pyplot=False)
        return
    image = np.random.default_rng(1).uniform(size=(9, 7, 3)) * scale
    image = image if scale == 1.0 else image.astype(np.uint8)
    settings = {"outlier_perc": 5, "show_colorbar": True, "title": "a cat", "use_pyplot": False, "alpha_overlay": 0.3}
    same(*(drawn(*library.visualize_image_attr(attr, image, method, sign, **settings)) for library in (ours, theirs)))


def test_without_channels_and_with_colours(attr, theirs):
    settings = {"sign": "all", "cmap": "viridis", "use_pyplot": False}
    same(*(drawn(*library.visualize_image_attr(attr[:, :, 0], **settings)) for library in (ours, theirs)))


@pytest.mark.parametrize("count", [1, 3])
def test_several_pictures(count, attr, theirs):
    image = np.random.default_rng(1).uniform(size=(9, 7, 3))
    methods, signs, titles = METHODS[:count], ["all", "positive", "negative"][:count], ["a", "b", "c"][:count]
    figures = []
    for library in (ours, theirs):
        figure, axes = library.visualize_image_attr_multiple(
            attr, image, methods, signs, titles, fig_size=(4, 3), use_pyplot=False, show_colorbar=True
        )
        assert isinstance(axes, list) == (count > 1)
        figures.append((figure, axes if count > 1 else [axes]))
    for item, there in zip(figures[0][1], figures[1][1], strict=True):
        same(drawn(figures[0][0], item), drawn(figures[1][0], there))


def test_what_cannot_be_shown(attr):
    with pytest.raises(InputError, match="original_image must be given for method 'masked_image'"):
        ours.visualize_image_attr(attr, None, "masked_image", use_pyplot=False)
    with pytest.raises(InputError, match="method must be one of 'heat_map'"):
        ours.visualize_image_attr(attr, None, "heatmap", use_pyplot=False)
    with pytest.raises(InputError, match="sign must be one of 'positive'"):
        ours.visualize_image_attr(attr, None, sign="both", use_pyplot=False)
    with pytest.raises(InputError, match="attr must be other than zero where its sign is 'positive'"):
        ours.visualize_image_attr(-np.ones((3, 3)), None, sign="positive", use_pyplot=False)
    with pytest.raises(InputError, match="one for each of 2 methods, got 1 signs"):
        ours.visualize_image_attr_multiple(attr, attr, METHODS[:2], ["all"], use_pyplot=False)


@pytest.mark.parametrize("name", ["visualize_image_attr", "visualize_image_attr_multiple"])
def test_signatures(name, theirs):
    actual, there = (inspect.signature(getattr(library, name)).parameters for library in (ours, theirs))
    assert [(p.name, p.default) for p in actual.values()] == [(p.name, p.default) for p in there.values()]
