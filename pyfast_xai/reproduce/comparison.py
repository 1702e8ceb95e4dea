"""All explainers side by side, by one protocol: no paper's table, but what someone who chooses one wants to know."""

from functools import partial

from pyfast_xai.evaluation import BASELINES, METRICS, Evaluation
from pyfast_xai.explainers import METHODS, RISE
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome
from pyfast_xai.reproduce.protocol import Make, measured

NETWORKS = ("resnet50", "vgg16", "googlenet", "mobilenet_v2")
PLACES = ("box-error", "best-box-error", "pointing")
ANSWERS = ("deletion", "insertion", "average-drop")
BOXES = ("box-error", "pointing")
SANITY = ("class-sensitivity", "randomization")

COMPARED = ("box-error", "pointing", "deletion", "insertion")
"""The metrics by which each method is compared with the centre, picture by picture."""

PAPERS = ("fixations", "eigen-cam", "saliency", "deconvnet", "guided-backprop", "clear")
RIVALS = ("input-x-gradient", "cam", "grad-cam", "grad-cam++", "guided-grad-cam", "excitation-backprop")
NEWER = ("consensus", "hires-cam", "layer-cam", "xgrad-cam", "lrp")
QUICK: dict[str, Make] = {**BASELINES, **{name: METHODS[name] for name in (*PAPERS, *RIVALS, *NEWER)}}
"""The quick methods of the papers, those that they compare themselves with, and the newer ones that are used most."""

POINTING: dict[str, Make] = {
    name: QUICK[name]
    for name in (
        *("centre", "fixations", "eigen-cam", "grad-cam", "grad-cam++", "layer-cam"),
        *("excitation-backprop", "consensus"),
    )
}
SLOW: dict[str, Make] = {
    **BASELINES,
    **{name: make for name, make in METHODS.items() if make.slow},
    "rise": partial(RISE, n_masks=2000),
}


def _table(data: Data, methods: dict[str, Make], metrics: tuple[str, ...], title: str) -> Outcome:
    pictures = data.imagenet()
    rows: list[list[str]] = []
    deviations: list[str] = []
    heads: list[str] = []
    for loaded, result in measured(data, NETWORKS, methods, metrics, pictures, deviations, resamples=1000):
        heads, added = rows_of_table(loaded.name, result)
        rows += added
        deviations.append(
            f"{loaded.name}: {result.pictures} pictures, {result.small} of them with small objects, "
            f"{result.threads} thread{'s' if result.threads > 1 else ''}."
        )
    deviations.append(
        "No paper has this table; ± is half of the 95 % interval over pictures. A difference from the centre is taken "
        "picture by picture, with its 95 % interval: one without zero is beyond chance."
    )
    return Outcome(title, heads, rows, deviations)


def rows_of_table(network: str, result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Returns the heads and the rows of a network: the figures, and the differences from those of the centre.

    Args:
        network: name that the rows begin with.
        result: has the centre among its methods.
    """
    columns, cells = result.table()
    compared = [metric for metric in COMPARED if metric in dict(result.columns())]
    heads = ["network", *columns, *(f"{METRICS[metric].title}, minus the centre's" for metric in compared)]
    return heads, [[network, *row, *(_difference(result, row[0], metric) for metric in compared)] for row in cells]


def _difference(result: Evaluation, method: str, metric: str) -> str:
    if method == "centre":
        return "-"
    paired = result.difference(method, "centre", metric)
    texts = [METRICS[metric].shown(number) for number in (paired.value, paired.low, paired.high)]
    value, low, high = (text if text.strip("-0.") else text.lstrip("-") for text in texts)  # no minus before zero
    return f"{value} ({low} to {high})"


def places(data: Data) -> Outcome:
    """Compares where quick explainers point."""
    return _table(data, QUICK, PLACES, "Quick explainers: do they show where the object is?")


def boxes(data: Data) -> Outcome:
    """Compares explainers by boxes of their own rules, which `--half held-out` did not choose."""
    return _table(data, POINTING, BOXES, f"Boxes and peaks on {data.half} pictures")


def answers(data: Data) -> Outcome:
    """Compares the model's outputs on what quick explainers show, on at most 100 pictures."""
    return _table(data.at_most(100), QUICK, ANSWERS + SANITY, "Quick explainers: do they show what the model uses?")


def slow(data: Data) -> Outcome:
    """Compares the explainers that take tens of forwards and more, on at most 50 pictures."""
    return _table(data.at_most(50), SLOW, PLACES + ANSWERS, "Slow explainers: places, and what the model makes of them")


EXPERIMENTS: dict[str, Experiment] = {"places": places, "boxes": boxes, "answers": answers, "slow": slow}
