"""`pyfast-xai methods`."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def methods() -> None:
    """List the explainers."""
    from pyfast_xai.explainers import METHODS

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    table.add_column("what it shows")
    table.add_column("paper")
    for name, explainer in METHODS.items():
        first = (explainer.__doc__ or "").strip().splitlines()[0]
        table.add_row(Text(name, style="bold"), Text(first), Text(explainer.paper))
    Console(highlight=False).print(table)
