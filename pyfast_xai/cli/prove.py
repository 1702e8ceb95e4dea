"""`pyfast-xai prove`."""

from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfast_xai.cli.messages import FAILED, one_sentence, printable, refuse


def prove(
    names: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Ops; all where none is named.")] = None,
    device: Annotated[str, typer.Option(help="The device to prove them on.")] = "cuda",
) -> None:
    """Prove the kernels on a device: each against plain PyTorch, then timed at the shapes of real networks.

    A kernel serves there by itself if it is right and faster than plain PyTorch. The verdict is kept on disk. Kernels
    run in a process of its own, which may crash or hang without harm.
    """
    with one_sentence():
        _prove(names or [], device)


def _prove(names: list[str], device: str) -> None:
    import torch

    from pyfast_xai.ops.registry import OPS
    from pyfast_xai.tuning import proofs

    for name in names:
        if name not in OPS:
            refuse(f"OP must be one of {', '.join(OPS)}, got {name!r}")
    try:
        target = torch.device(device)
    except RuntimeError:
        refuse(f"--device must name a device such as cuda or cuda:1, got {device!r}")
    if target.type == "cuda" and not torch.cuda.is_available():
        refuse("there is no CUDA device, or no PyTorch for CUDA, to prove kernels on")
    kernels = {name: op.to_prove(target.type) for name, op in OPS.items() if not names or name in names}
    skipped = [name for name, own_proofs in kernels.items() if not own_proofs]
    console, rows, impossible = Console(highlight=False), [], {}

    def listen(message: dict[str, Any]) -> None:
        if message["kind"] == "row":
            rows.append(message)
        elif message["kind"] == "impossible":
            impossible[message["op"]] = message["reason"]
        elif message["kind"] == "stage":
            status.update(printable(f"{message['op']} on {message['backend']}"))
        elif message["kind"] == "skipped":
            console.print(
                Text(
                    printable(f"{message['op']} on {message['backend']}: no memory for {message['reason']}"),
                    style="dim",
                )
            )

    with console.status("starting") as status:
        own_proofs = proofs.machine_proofs()
        proven = own_proofs.prove_all(
            {name: backends for name, backends in kernels.items() if backends}, target, listen
        )

    table = _table("op", "shape", "dtype", "backend", "ms", "of the least time", "times plain PyTorch")
    for row in rows:
        share = "" if row["share"] is None else f"{100 * row['share']:.0f} % ({row['of']})"
        cells = (row["op"], row["shape"], row["dtype"], row["backend"], f"{row['median_ms']:.3g}", share)
        table.add_row(*cells, f"{row['ratio']:.2f}")
    console.print(table)
    table = _table("op", "backend", "verdict")
    for name, backends in kernels.items():
        for backend in backends if name in proven else ():
            against, note = own_proofs.judge(proven[name], name, backend, target)
            text = note if against is None else f"not chosen: {against}"
            table.add_row(name, backend, Text(printable(text), style="bold" if against is None else ""))
    console.print(table)
    if skipped:
        console.print(Text(f"plain PyTorch alone: {', '.join(skipped)}"))
    for name, reason in impossible.items():
        console.print(Text(printable(f"{name} could not be proven: {reason}"), style="red"))
    if impossible:
        raise typer.Exit(FAILED)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
