"""Kernels that another process imports, and that may take it down."""

import os
import signal
import time

import torch


def doubled(values: torch.Tensor) -> torch.Tensor:
    return values * 2


def raises(values: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such instruction")


def crashes(values: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return values


def hangs(values: torch.Tensor) -> torch.Tensor:
    time.sleep(600)
    return values
