"""The CPU as a device that has never run some kernels, good and bad ones.

As a program it is the process in which they are proven.
"""

import importlib.machinery
import os
import signal
import sys
import time
import types

import torch

from pyfast_xai.kernels.reference import points_union as reference
from pyfast_xai.ops import registry

plain = reference.points_union


def slow_plain(points, size, capacity=None):
    time.sleep(0.02)
    return plain(points, size, capacity)


def wrong(points, size, capacity=None):
    return plain(points, size, capacity) + 1


def dies(points, size, capacity=None):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(points, size, capacity=None):
    time.sleep(600)


def raises(points, size, capacity=None):
    raise RuntimeError("no kernel image is available\nfor execution")


def slower(points, size, capacity=None):
    time.sleep(0.05)
    return plain(points, size, capacity)


def prints(points, size, capacity=None):
    os.write(1, b"an assertion of a device\n")
    return plain(points, size, capacity)


KERNELS = {kernel.__name__: kernel for kernel in (wrong, dies, hangs, raises, slower, prints)}


def install(*names):
    """Make the CPU a device that proves these kernels of `points_union` and has no other, the best first."""
    reference.points_union = slow_plain
    for name in names:
        folder = f"pyfast_xai.kernels.{name}"
        for path in (name, folder, f"{folder}.points_union"):
            sys.modules[path] = module = types.ModuleType(path)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(path, None), []
        module.points_union = KERNELS[name]
    registry.BACKENDS = (*registry.BACKENDS, *names)
    registry.TO_PROVE = (*registry.TO_PROVE, *names)
    registry.PREFERENCE = {**registry.PREFERENCE, "cpu": (*names, "reference")}
    op = registry.OPS["points_union"]
    registry.LIBRARY.impl("points_union", op._fall_back, "CPU", allow_override=True)


def program(*names):
    """The arguments of Python for the process that proves these kernels."""
    return [__file__, *names]


if __name__ == "__main__":
    torch.set_num_threads(1)
    install(*sys.argv[1:])
    from pyfast_xai.proof.__main__ import main

    main()
