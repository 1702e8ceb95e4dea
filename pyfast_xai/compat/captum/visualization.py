"""Pictures of attributions by matplotlib, as `captum.attr.visualization` draws them."""

import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfast_xai.compat.captum.arguments import refuse
from pyfast_xai.explainers.common.explainer import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


class ImageVisualizationMethod(Enum):
    """Ways to show an attribution."""

    heat_map = 1
    blended_heat_map = 2
    original_image = 3
    masked_image = 4
    alpha_scaling = 5


class VisualizeSign(Enum):
    """Parts of an attribution that can be shown."""

    positive = 1
    absolute_value = 2
    negative = 3
    all = 4


_PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "all": lambda attr: attr,
    "positive": lambda attr: np.maximum(attr, 0),
    "negative": lambda attr: np.minimum(attr, 0),
    "absolute_value": np.abs,
}
_COLOURS = {"positive": "Greens", "negative": "Reds", "absolute_value": "Blues"}


def visualize_image_attr(
    attr: np.ndarray,
    original_image: np.ndarray | None = None,
    method: str = "heat_map",
    sign: str = "absolute_value",
    plt_fig_axis: "tuple[Figure, Axes] | None" = None,
    outlier_perc: float = 2,
    cmap: "str | Colormap | None" = None,
    alpha_overlay: float = 0.5,
    show_colorbar: bool = False,
    title: str | None = None,
    fig_size: tuple[int, int] = (6, 6),
    use_pyplot: bool = True,
) -> "tuple[Figure, Axes]":
    """Shows an attribution, alone or with its image.

    Channels are summed. The scale is the value at which the sum of sorted magnitudes reaches all but `outlier_perc` per
    cent of the whole; what is beyond is cut off.

    Args:
        attr: `[H, W, C]` or `[H, W]`.
        original_image: `[H, W, C]`, floats in [0, 1] or whole numbers up to 255; needed by all but "heat_map".
        method: "heat_map"; "blended_heat_map", over the image in grey; "original_image"; "masked_image", the image
            times the attribution; or "alpha_scaling", the image as transparent as the attribution is small.
        sign: "positive", "negative", "absolute_value" or "all"; a mask cannot show "all".
        plt_fig_axis: where to draw; None for a new figure.
        outlier_perc: per cent of the sum of magnitudes.
        cmap: colours; None for those of the sign: green, red, blue, or from red over white to green.
        alpha_overlay: how opaque a blended heat map is.
        show_colorbar: draw the scale below.
        title: title of the picture.
        fig_size: size of a new figure, in inches.
        use_pyplot: make the figure with pyplot and show it.

    Returns:
        The figure, and the axes that were drawn on.

    Raises:
        InputError: a method or a sign that does not exist, no image where one is needed, or an attribution of zeros.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.captum import visualization
        >>> attribution, photograph = np.random.rand(32, 32, 3), np.random.rand(32, 32, 3)
        >>> figure, axes = visualization.visualize_image_attr(
        ...     attribution, photograph, "blended_heat_map", "all", use_pyplot=False
        ... )
        >>> len(axes.images)
        2
    """
    from matplotlib.colors import LinearSegmentedColormap

    one_of("method", method, ImageVisualizationMethod.__members__)
    one_of("sign", sign, VisualizeSign.__members__)
    if original_image is None and method != "heat_map":
        refuse(f"original_image must be given for method {method!r}, got None")
    if sign == "all" and method in ("masked_image", "alpha_scaling"):
        refuse(f"sign must be another than 'all' for method {method!r}, which shows no signs, got 'all'")
    figure, axes = _axes(plt_fig_axis, use_pyplot, fig_size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks_position("none")
    axes.set_yticklabels([])
    axes.set_xticklabels([])
    axes.grid(visible=False)
    shown = _scaled(attr.sum(2) if attr.ndim == 3 else attr, sign, outlier_perc)
    default = (
        LinearSegmentedColormap.from_list("RdWhGn", ["red", "white", "green"]) if sign == "all" else _COLOURS[sign]
    )
    colours: Any = {"cmap": default if cmap is None else cmap, "vmin": -1 if sign == "all" else 0, "vmax": 1}
    heat = None
    if method == "heat_map":
        heat = axes.imshow(shown, **colours)
    else:
        assert original_image is not None
        image = _pixels(original_image * 255) if np.max(original_image) <= 1.0 else original_image
        if method == "original_image":
            axes.imshow(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        elif method == "blended_heat_map":
            axes.imshow(image.mean(2), cmap="gray")
            heat = axes.imshow(shown, alpha=alpha_overlay, **colours)
        elif method == "masked_image":
            axes.imshow(_pixels(image * shown[:, :, None]))
        else:
            axes.imshow(np.concatenate([image, _pixels(shown[:, :, None] * 255)], 2))
    if show_colorbar:
        _bar(figure, axes, heat)
    if title:
        axes.set_title(title)
    if use_pyplot:
        _show()
    return figure, axes


def visualize_image_attr_multiple(
    attr: np.ndarray,
    original_image: np.ndarray | None,
    methods: Sequence[str],
    signs: Sequence[str],
    titles: Sequence[str] | None = None,
    fig_size: tuple[int, int] = (8, 6),
    use_pyplot: bool = True,
    **kwargs: Any,
) -> "tuple[Figure, Axes | list[Axes]]":
    """Shows an attribution in several ways, side by side.

    Args:
        attr: `[H, W, C]` or `[H, W]`.
        original_image: see `visualize_image_attr`.
        methods: one for each picture.
        signs: one for each picture.
        titles: one for each picture; None for none.
        fig_size: size of the figure, in inches.
        use_pyplot: make the figure with pyplot and show it.
        **kwargs: keyword arguments of `visualize_image_attr`, for all pictures.

    Returns:
        The figure, and its axes: a list, or the axes themselves where there is one method.

    Raises:
        InputError: not one sign, and one title, for each method; or as `visualize_image_attr`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.captum import visualization
        >>> attribution, photograph = np.random.rand(32, 32, 3), np.random.rand(32, 32, 3)
        >>> figure, axes = visualization.visualize_image_attr_multiple(
        ...     attribution, photograph, ["original_image", "heat_map"], ["all", "positive"], use_pyplot=False
        ... )
        >>> len(axes)
        2
    """
    if len(methods) != len(signs) or (titles is not None and len(titles) != len(methods)):
        refuse(f"signs and titles must be one for each of {len(methods)} methods, got {len(signs)} signs")
    from matplotlib.figure import Figure

    if use_pyplot:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=fig_size)
    else:
        figure = Figure(figsize=fig_size)
    drawn = figure.subplots(1, len(methods), squeeze=True)
    axes = [drawn] if len(methods) == 1 else list(drawn)
    for i, (axis, method, sign) in enumerate(zip(axes, methods, signs, strict=True)):
        title = None if titles is None else titles[i]
        visualize_image_attr(
            attr, original_image, method, sign, plt_fig_axis=(figure, axis), use_pyplot=False, title=title, **kwargs
        )
    figure.tight_layout()
    if use_pyplot:
        _show()
    return figure, axes[0] if len(axes) == 1 else axes


def _axes(figure_and_axes: Any, use_pyplot: bool, size: tuple[int, int]) -> Any:
    if figure_and_axes is not None:
        figure, axes = figure_and_axes
        return figure, axes[0] if isinstance(axes, list) else axes
    if use_pyplot:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _show() -> None:
    from matplotlib import pyplot

    pyplot.show()


def _bar(figure: Any, axes: Any, heat: Any) -> None:
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    below = make_axes_locatable(axes).append_axes("bottom", size="5%", pad=0.1)
    if heat is None:
        below.axis("off")  # keeps its place beside others that have one
    else:
        figure.colorbar(heat, orientation="horizontal", cax=below)


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(image.astype(int), 0, 255)


def _scaled(attr: np.ndarray, sign: str, outlier_perc: float) -> np.ndarray:
    """Returns an attribution `[H, W]` in [-1, 1]."""
    if not 0 <= outlier_perc <= 100:
        refuse(f"outlier_perc must lie in [0, 100], got {outlier_perc}")
    part = _PARTS[sign](attr)
    sizes = np.sort(np.abs(part).flatten())
    sums = np.cumsum(sizes)
    scale = sizes[np.argmax(sums >= sums[-1] * 0.01 * (100.0 - outlier_perc))]
    if scale == 0:
        refuse(f"attr must be other than zero where its sign is {sign!r}, got nothing to show")
    if scale < 1e-5:
        warnings.warn("the attribution is close to 0 everywhere, and its picture may mislead", stacklevel=3)
    return np.clip(part / (-scale if sign == "negative" else scale), -1, 1)
