"""The tests of a file without pytest, on a machine that lacks it: as much of its language as the GPU tests speak."""

import contextlib
import fnmatch
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class SkipError(Exception):
    """A test that says it cannot run here."""


class Param(tuple):
    """The values of `pytest.param`."""

    id: str | None = None


def param(*values: Any, id: str | None = None, marks: Any = ()) -> Param:
    made = Param(values)
    made.id = id
    return made


class _Mark:
    """`pytest.mark`: keeps what changes how a test is run, passes over the rest."""

    def parametrize(self, names: Any, cases: Any, ids: Any = None) -> Callable[[Any], Any]:
        split = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def mark(test: Any) -> Any:
            test.__dict__.setdefault("_cases", []).insert(0, (split, list(cases), ids))
            return test

        return mark

    def skipif(self, condition: bool, reason: str = "") -> Callable[[Any], Any]:
        def mark(test: Any) -> Any:
            if condition:
                test.__dict__["_skipped"] = reason
            return test

        mark.skipped = reason if condition else None  # type: ignore[attr-defined]
        return mark

    def filterwarnings(self, *_: str) -> Callable[[Any], Any]:
        return lambda test: test

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda test: test


class Raises:
    """`pytest.raises`."""

    def __init__(self, kind: type[BaseException] | tuple[type[BaseException], ...], match: str | None = None) -> None:
        self._kind, self._match = kind, match
        self.value: BaseException | None = None

    def __enter__(self) -> "Raises":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            raise AssertionError(f"{self._kind} was not raised")
        if not isinstance(error, self._kind):
            return False
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self._match!r}")
        self.value = error
        return True


class MonkeyPatch:
    """Attributes that are put back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self._before.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())


def skip(reason: str = "") -> None:
    raise SkipError(reason)


def importorskip(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SkipError(str(error)) from error


def fixture(function: Any = None, *, params: Any = (None,), autouse: bool = False, **_: Any) -> Any:
    def mark(actual: Any) -> Any:
        actual._fixture = (list(params), autouse)
        return actual

    return mark if function is None else mark(function)


def stand_in() -> types.ModuleType:
    """A module to be imported as pytest."""
    module = types.ModuleType("pytest")
    contents = {"mark": _Mark(), "param": param, "raises": Raises, "skip": skip, "importorskip": importorskip}
    vars(module).update(contents, fixture=fixture, MonkeyPatch=MonkeyPatch)
    return module


def load(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"plain_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def cases(test: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of every run of a test, with a name."""
    marks = vars(test).get("_cases", [])
    for chosen in itertools.product(*(item for _, item, _ in marks)):
        arguments: dict[str, Any] = {}
        labels = []
        for (names, _, ids), values in zip(marks, chosen, strict=True):
            several = values if isinstance(values, Param) or len(names) > 1 else (values,)
            arguments.update(zip(names, several, strict=True))
            label = getattr(values, "id", None)
            labels.append(label or "-".join(str(ids(item) if callable(ids) else item) for item in several))
        yield "-".join(labels), arguments


class Runner:
    """Runs tests with the fixtures of their file and of those around it."""

    def __init__(self, fixtures: dict[str, Any]) -> None:
        self._fixtures = fixtures
        self.passed, self.failed, self.skipped = 0, 0, 0

    def run(self, name: str, test: Any) -> None:
        expected = self._closure([*inspect.signature(test).parameters])
        several = [item for item in expected if item in self._fixtures]
        for chosen in itertools.product(*(self._fixtures[item]._fixture[0] for item in several)):
            for label, arguments in cases(test):
                values = dict(zip(several, chosen, strict=True))
                parts = [label, *(str(item) for item in chosen if item is not None)]
                self._one(f"{name}[{'-'.join(filter(None, parts))}]", test, values, arguments)

    def _closure(self, names: list[str]) -> list[str]:
        """Fixtures a test needs, those of others first, and those that every test gets."""
        result: list[str] = []

        def need(name: str) -> None:
            if name in self._fixtures and name not in result:
                for other in inspect.signature(self._fixtures[name]).parameters:
                    need(other)
                result.append(name)

        for name in [*(item for item, function in self._fixtures.items() if function._fixture[1]), *names]:
            need(name)
        return result

    def _one(self, name: str, test: Any, params: dict[str, Any], arguments: dict[str, Any]) -> None:
        patch = MonkeyPatch()
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(patch.undo)
                ready: dict[str, Any] = {"monkeypatch": patch, **arguments}
                for item, value in params.items():
                    options = {
                        other: types.SimpleNamespace(param=value) if other == "request" else ready[other]
                        for other in inspect.signature(self._fixtures[item]).parameters
                    }
                    made = self._fixtures[item](**options)
                    if inspect.isgenerator(made):
                        stack.callback(next, made, None)
                        made = next(made)
                    ready[item] = made
                if "_skipped" in vars(test):
                    raise SkipError(vars(test)["_skipped"])
                test(**{item: ready[item] for item in inspect.signature(test).parameters})
        except SkipError:
            self.skipped += 1
        except Exception:
            self.failed += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-4)}", flush=True)
        else:
            self.passed += 1


def main(path: Path, chosen: str) -> None:
    """Run the tests of a file whose names contain one of some words.

    Args:
        path: of the file.
        chosen: words, with " or " between; empty for all.

    Raises:
        SystemExit: a test failed, or there was none.
    """
    sys.modules["pytest"] = stand_in()
    around = path.resolve().parent
    while not (around / "conftest.py").is_file() and around != around.parent:
        around = around.parent
    contents = {**load(around / "conftest.py"), **load(path)}
    fixtures = {name: item for name, item in contents.items() if hasattr(item, "_fixture")}
    words = [word.strip() for word in chosen.split(" or ")]
    marks = contents.get("pytestmark", [])
    runner = Runner(fixtures)
    if any(getattr(mark, "skipped", None) for mark in (marks if isinstance(marks, list) else [marks])):
        print("this file needs a device")
        return
    for name, test in contents.items():
        if name.startswith("test_") and callable(test) and any(fnmatch.fnmatch(name, f"*{word}*") for word in words):
            runner.run(name, test)
    print(f"{runner.passed} passed, {runner.failed} failed, {runner.skipped} skipped")
    if runner.failed or not runner.passed + runner.skipped:
        raise SystemExit(1)
