import re
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch

from pyfast_xai.cli import settings
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS, Explainer


class Example(Explainer):
    def __init__(
        self,
        model: torch.nn.Module,
        *,
        game: Literal["deletion", "none"] = "deletion",
        steps: int = 3,
        rate: float | None = None,
        fast: bool | None = None,
        at: str | None = None,
        layer: str | Sequence[str] = "auto",
        baseline: float | torch.Tensor = 0.0,
        tokens: tuple[int, int] | None = None,
        progress: bool | Callable[[int], None] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        pass


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.setitem(METHODS, "an-example", Example)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("game=deletion", "deletion"),
        ("game=none", "none"),
        ("steps=7", 7),
        ("rate=7", 7.0),
        ("rate=1e-3", 0.001),
        ("rate=none", None),
        ("fast=true", True),
        ("fast=false", False),
        ("fast=none", None),
        ("at=conv1", "conv1"),
        ("at=7", "7"),
        ("at=a=b.c", "a=b.c"),
        ("at=", ""),
        ("layer=block.2", "block.2"),
        ("baseline=0.5", 0.5),
    ],
)
def test_value_is_read_as_the_annotation_says(given, value):
    read = settings.read([f"an-example.{given}"], ["fixations", "an-example"])
    assert read == {"fixations": {}, "an-example": {given.partition("=")[0]: value}}
    assert type(read["an-example"][given.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("steps=many", "an-example.steps must be a whole number, got 'many'"),
        ("steps=none", "an-example.steps must be a whole number, got 'none'"),
        ("steps=1.5", "an-example.steps must be a whole number, got '1.5'"),
        ("rate=fast", "an-example.rate must be none or a number, got 'fast'"),
        ("fast=1", "an-example.fast must be none or true or false, got '1'"),
        ("game=chess", "an-example.game must be 'deletion' or 'none', got 'chess'"),
        ("progress=true", "got 'an-example.progress=true'"),
        (
            "tokens=3",
            r"setting of an-example \(game, steps, rate, fast, at, layer, baseline\), got 'an-example.tokens=3'",
        ),
    ],
)
def test_what_cannot_be_set_is_one_sentence(given, message):
    with pytest.raises(InputError, match=message):
        settings.read([f"an-example.{given}"], ["an-example"])


@pytest.mark.parametrize("given", ["", "an-example", "an-example.steps", "steps=3", "=", "."])
def test_what_is_no_setting(given):
    with pytest.raises(InputError, match=r"set must look like METHOD\.NAME=VALUE, got"):
        settings.read([given], ["an-example"])


def test_method_must_have_been_chosen():
    with pytest.raises(InputError, match=r"a chosen method, fixations or eigen-cam, got 'an-example.steps=3'"):
        settings.read(["an-example.steps=3"], ["fixations", "eigen-cam"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_settings(method):
    with pytest.raises(InputError, match=rf"set must name a setting of {re.escape(method)} \(\w+"):
        settings.read([f"{method}.nonsense=1"], [method])
