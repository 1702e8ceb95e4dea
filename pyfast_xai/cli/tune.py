"""`pyfast-xai tune`."""

import math
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli import arguments, options
from pyfast_xai.cli.messages import one_sentence, printable, refuse
from pyfast_xai.cli.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from pyfast_xai.explainers import Explainer
    from pyfast_xai.tuning import Site, Verdict

_MOST_CALLS = 64  # for a verdict


def tune(
    model: options.ModelArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="The explainers: repeat the option, or separate names by commas; `pyfast-xai methods` lists them.",
            show_default="fixations,eigen-cam,grad-cam,saliency",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(help="The batch sizes that are tried, separated by commas.", rich_help_panel=options.SPEED),
    ] = "1,8",
    size: options.Size = None,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    device: options.Device = None,
    trust_model: options.TrustModel = False,
) -> None:
    """Time a network on this machine: which kernels are the fastest, and whether replays are faster than recording.

    The verdicts are kept on disk, where explainers of later processes find them. The images are noise.
    """
    with one_sentence():
        names = arguments.methods(method or "fixations,eigen-cam,grad-cam,saliency")
        _tune(options.Network(model, weights, num_classes, size, trust_model=trust_model), names, batch, device)


def _tune(network: options.Network, names: list[str], batch: str, device: str | None) -> None:
    import torch

    from pyfast_xai import tuning
    from pyfast_xai.explainers import METHODS

    if not tuning.enabled():
        refuse("PYFAST_XAI_TUNING must be on to tune, got off")
    batches = _counts(batch)
    loaded, device_name = arguments.network(network), arguments.device(device)
    loaded.model.to(device_name)
    verdicts_before, size = set(tuning.known_verdicts()), loaded.preprocess.size
    height, width = (size, size) if isinstance(size, int) else size
    table = _table("method", "images", "recorded, ms", "replayed, ms", "serves")
    with Bar(len(names) * len(batches), "tuning") as bar:
        for count in batches:
            images = torch.randn(count, 3, height, width, device=device_name)
            for name in names:
                winner, verdict = _judged(METHODS[name](loaded.model), images)
                times = ["", ""] if verdict is None else [_ms(verdict, variant) for variant in ("recorded", "replayed")]
                table.add_row(name, str(count), *times, Text(winner, style="bold"))
                bar.advance(1)
    console = Console(highlight=False)
    console.print(table)
    verdicts = tuning.known_verdicts()
    console.print(_kernels({site: verdict for site, verdict in verdicts.items() if site not in verdicts_before}, names))
    console.print(Text(printable(f"{len(verdicts)} verdicts on this machine, see `pyfast-xai backends`")))


def _counts(value: str) -> list[int]:
    try:
        counts = [int(part) for part in value.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        refuse(f"batch must be numbers of images separated by commas, got {value!r}")
    return list(dict.fromkeys(counts))


def _judged(explainer: "Explainer", images: "Tensor") -> "tuple[str, Verdict | None]":
    """Returns which way serves explanations of such images, and the verdict if both could be timed."""
    from pyfast_xai.explainers.common.replay_trial import ReplayTrial

    if explainer._trial is None:
        return "its parts decide", None
    trial = explainer._trial = ReplayTrial(explainer.model, fold=explainer.folds, job=explainer.method, share=math.inf)
    for _ in range(_MOST_CALLS):
        explainer(images)
        verdicts = trial.verdicts()
        if verdicts:
            return next(iter(verdicts.values()))
    return "recorded", None


def _ms(verdict: "Verdict", variant: str) -> str:
    runs = verdict.seconds.get(variant)
    return f"{1e3 * min(runs):.3g}" if runs else ""


def _kernels(verdicts: "dict[Site, Verdict]", methods: Collection[str]) -> Table:
    """Returns a table of how many contests of an op each kernel won."""
    wins = Counter((site.op, verdict.fastest()) for site, verdict in verdicts.items() if site.op not in methods)
    table = _table("contests of", "won by", "times")
    for (op, kernel), times in sorted(wins.items()):
        table.add_row(op, Text(kernel, style="bold"), str(times))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
