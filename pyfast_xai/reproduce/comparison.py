"""All explainers side by side, by one protocol: no paper's table, but what someone who chooses one wants to know."""

from functools import partial

from pyfast_xai.evaluation import BASELINES
from pyfast_xai.explainers import METHODS, RISE
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome
from pyfast_xai.reproduce.protocol import Make, measured

NETWORKS = ("resnet50", "vgg16", "googlenet", "mobilenet_v2")
PLACES = ("box-error", "best-box-error", "pointing")
ANSWERS = ("deletion", "insertion", "average-drop")
BOXES = ("box-error", "pointing")
SANITY = ("class-sensitivity", "randomization")

QUICK: dict[str, Make] = {**BASELINES, **{name: make for name, make in METHODS.items() if not make.slow}}
POINTING: dict[str, Make] = {
    name: QUICK[name]
    for name in ("centre", "fixations", "eigen-cam", "grad-cam", "grad-cam++", "excitation-backprop", "consensus")
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
        columns, cells = result.table()
        heads = ["network", *columns]
        rows += [[loaded.name, *row] for row in cells]
        deviations.append(
            f"{loaded.name}: {result.pictures} pictures, {result.small} of them with small objects, "
            f"{result.threads} thread{'s' if result.threads > 1 else ''}."
        )
    deviations.append("No paper has this table; ± is half of the 95 % interval over pictures.")
    return Outcome(title, heads, rows, deviations)


def places(data: Data) -> Outcome:
    """Compares where fast explainers point."""
    return _table(data, QUICK, PLACES, "Quick explainers: do they show where the object is?")


def boxes(data: Data) -> Outcome:
    """Compares explainers by boxes of their own rules, which `--half held-out` did not choose."""
    return _table(data, POINTING, BOXES, f"Boxes and peaks on {data.half} pictures")


def answers(data: Data) -> Outcome:
    """Compares the model's outputs on what fast explainers show."""
    return _table(data.at_most(40), QUICK, ANSWERS + SANITY, "Quick explainers: do they show what the model uses?")


def slow(data: Data) -> Outcome:
    """Compares the explainers that take tens of forwards and more."""
    return _table(data.at_most(16), SLOW, PLACES + ANSWERS, "Slow explainers: places, and what the model makes of them")


EXPERIMENTS: dict[str, Experiment] = {"places": places, "boxes": boxes, "answers": answers, "slow": slow}
