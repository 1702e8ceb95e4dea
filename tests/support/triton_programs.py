"""Programs of interpreted Triton kernels in another order than one after another.

The interpreter runs the programs of a grid in the order of their numbers, each to its end. A device keeps no order, and
runs many at a time.
"""

import contextlib
import math
import random
import threading

import pytest
from triton.runtime import interpreter

_MOST = 64  # programs that run at a time
_ACCESSES = (
    *("create_load", "create_store", "create_masked_load", "create_masked_store"),
    *("create_atomic_rmw", "create_atomic_cas"),
)


class _Programs:
    """Takes the programs of a grid as the interpreter comes to them, and runs them behind the last."""

    def __init__(self, kernel, count, begin):
        self._kernel, self._count, self._begin = kernel, count, begin
        self._waiting = []

    def __call__(self, **arguments):
        place = interpreter.interpreter_builder.grid_idx
        self._waiting.append((place, lambda: self._kernel(**arguments)))
        if len(self._waiting) == self._count:
            self._begin(self._waiting)


def _one_by_one(programs, drawn):
    for place, run in drawn.sample(programs, len(programs)):
        interpreter.interpreter_builder.set_grid_idx(*place)
        run()


class _Turns:
    """Runs programs as threads, of which one has its turn at a time; it passes on at each access to memory."""

    def __init__(self, programs, drawn):
        self._programs, self._drawn = programs, drawn
        self._turn = threading.Condition()
        self._alive = list(range(len(programs)))
        self._next = None
        self._errors = []
        self._own = threading.local()

    def run(self):
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(len(self._programs))]
        for thread in threads:
            thread.start()
        with self._turn:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work(self, number):
        _, run = self._programs[number]
        self._own.number = number
        self._wait()
        try:
            run()
        except BaseException as error:
            self._errors.append(error)
        with self._turn:
            self._alive.remove(number)
            self._pass_on()

    def access(self):
        """Lets another program go on."""
        with self._turn:
            self._pass_on()
        self._wait()

    def _pass_on(self):
        self._next = self._drawn.choice(self._alive) if self._alive else None
        self._turn.notify_all()

    def _wait(self):
        number = self._own.number
        with self._turn:
            self._turn.wait_for(lambda: self._next == number)
        interpreter.interpreter_builder.set_grid_idx(*self._programs[number][0])


@contextlib.contextmanager
def in_order(order, seed):
    """Runs the programs of each kernel inside a `with` block in another order.

    Args:
        order: "shuffled", each to its end; or "interleaved", up to 64 at a time, with another one at each access.
        seed: of the order.
    """
    drawn, builder = random.Random(seed), interpreter.interpreter_builder
    executing, turns = [], []
    call, set_grid_dim = interpreter.GridExecutor.__call__, builder.set_grid_dim

    def begin(programs):
        if order == "shuffled":
            _one_by_one(programs, drawn)
            return
        programs = drawn.sample(programs, len(programs))
        for first in range(0, len(programs), _MOST):
            turns.append(_Turns(programs[first : first + _MOST], drawn))
            turns[-1].run()
            turns.pop()

    def called(executor, *arguments, **settings):
        kernel = executor.fn
        executing.append(executor)
        try:
            return call(executor, *arguments, **settings)
        finally:
            executing.pop()
            executor.fn = kernel

    def with_grid(*sizes):
        set_grid_dim(*sizes)
        executing[-1].fn = _Programs(executing[-1].fn, math.prod(sizes), begin)

    def yielding(access):
        def accessed(*arguments, **settings):
            if turns:
                turns[-1].access()
            return access(*arguments, **settings)

        return accessed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", called)
        patch.setattr(builder, "set_grid_dim", with_grid, raising=True)
        for name in _ACCESSES:
            patch.setattr(builder, name, yielding(getattr(builder, name)))
        yield
