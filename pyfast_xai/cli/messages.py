"""Messages to people: one sentence where a command fails, and text that cannot disturb a terminal."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

# Exit codes, which `pyfast-xai --help` lists.
FAILED, USAGE, SOME_FAILED = 1, 2, 3


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """End with one line instead of a traceback where the fault lies with what was given or what is installed."""
    from pyfast_xai.errors import BackendError, InputError, UnsupportedOpError

    try:
        yield
    except (InputError, BackendError, UnsupportedOpError, OSError) as error:
        console = Console(stderr=True, highlight=False)
        message = " ".join(str(error).split())
        console.print(Text.assemble(("error  ", "bold red"), printable(message)), soft_wrap=True)
        raise typer.Exit(USAGE if isinstance(error, InputError) else FAILED) from None


def refuse(message: str) -> NoReturn:
    from pyfast_xai.errors import InputError

    raise InputError(message)


def printable(text: Any) -> str:
    """Returns `text` with bytes that are no text, and control characters, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
