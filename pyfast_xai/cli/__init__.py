"""The `pyfast-xai` command, one file a subcommand.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from typing import Annotated

import typer

from pyfast_xai.cli import (
    backends,
    demo,
    evaluate,
    explain,
    layers,
    maintain,
    methods,
    prove,
    report,
    reproduce,
    run,
    tune,
)
from pyfast_xai.memory import keep_freed_memory

app = typer.Typer(
    help="Fast visual explanations of CNNs and vision transformers.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images failed, the others are done; 130, 143 stopped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(explain.explain, evaluate.evaluate, reproduce.reproduce),
    *(run.run, maintain.status, maintain.verify, maintain.retry, maintain.export, report.report),
    *(demo.demo, backends.backends, prove.prove, tune.tune, methods.methods, layers.layers),
):
    app.command()(command)


def program() -> None:
    """Runs the command as a separate process."""
    keep_freed_memory()
    app(prog_name="pyfast-xai")


def _version(requested: bool) -> None:
    if requested:
        from pyfast_xai import __version__

        typer.echo(f"pyfast-xai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fast visual explanations of CNNs and vision transformers."""
