"""Small networks on which the peers are right, and what must not change.

Every rectifier of these is a module whose input goes nowhere else.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.modules import module as process_wide


class Plain(nn.Module):
    """A network in which layers can be named."""

    def __init__(self, inplace=False, classes=5, channels=3):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(inplace)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace)
        self.fc = nn.Linear(8, classes)

    def forward(self, x, shift=None, scale=1.0):
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.relu2(self.conv2(x)).mean((2, 3))
        x = self.fc(x)
        return x * scale if shift is None else (x + shift) * scale


class TwoInputs(nn.Module):
    """Pictures and vectors; two tensors come out of one layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(7, 4)
        self.both = Both()
        self.last = nn.Linear(8, 5)

    def forward(self, x, v, extra=None):
        x, v = self.both(self.relu(self.conv(x)).mean((2, 3)), self.fc(v))
        out = self.last(torch.cat([x, v], 1))
        return out if extra is None else out * extra


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x, v):
        return self.relu(x) + 1, v.tanh()


class Dense(nn.Module):
    """One output a position of a class: `[N, classes, positions]`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.conv2(self.relu(self.conv1(x)))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3, 4)))


NETWORKS = {kind.__name__: kind for kind in (Plain, TwoInputs, Dense, Volume)}


@pytest.fixture
def build():
    """A network by name, in evaluation mode and float64."""

    def make(name, dtype=torch.float64, **settings):
        return NETWORKS[name](**settings).eval().to(dtype)

    return make


HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]
PROCESS_HOOKS = [name for name, value in vars(process_wide).items() if name.startswith("_global") and "hooks" in name]


def _photograph(model, inputs):
    result = {"random numbers": torch.get_rng_state().tolist(), "modes": torch.is_grad_enabled()}
    for name, item in model.named_modules():
        result[name, "kept"] = (type(item), item.training, sorted(vars(item)), dict(item._modules))
        result[name, "hooks"] = [dict(getattr(item, hooks)) for hooks in HOOKS]
    for name, item in [*model.named_parameters(), *model.named_buffers(), *enumerate(inputs)]:
        gradient = None if item.grad is None else item.grad.tolist()
        result[name] = (id(item), item.tolist(), item.data_ptr(), item.requires_grad, gradient, item.stride())
    for name in PROCESS_HOOKS:
        value = getattr(process_wide, name)
        result[name] = dict(value) if hasattr(value, "keys") else value
    return result


@pytest.fixture
def unchanged():
    """A context that leaves a model, its inputs and the process as they were, also on an exception."""

    @contextlib.contextmanager
    def watch(model, *inputs):
        before = _photograph(model, inputs)
        try:
            yield
        finally:
            after = _photograph(model, inputs)
            assert not [name for name in before if before[name] != after[name]]
            assert before.keys() == after.keys()

    return watch
