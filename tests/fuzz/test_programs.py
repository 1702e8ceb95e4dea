"""Every reading of random programs, against autograd; `make fuzz` draws as many as one likes."""

import logging

import programs
import pytest
import torch

from pyfast_xai.rules.gradient import EXCITATION, GRADIENT, Rule, derivative

TEMPLATES = [template for family in programs.operations.FAMILIES.values() for template in family]
# Operations that some versions of PyTorch run as a part of another operation, for excitation backprop.
PARTS = {
    *("aten::_native_batch_norm_legit_no_training", "aten::native_batch_norm", "aten::relu6"),
    *("aten::group_norm", "aten::instance_norm", "aten::layer_norm", "aten::rms_norm"),
    *("aten::softmax", "aten::log_softmax"),
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(logging.getLogger("pyfast_xai"), "level", logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about what a program does
def test_operations_one_by_one_and_every_rule_is_met():
    recorded, never = set(), []
    for template in TEMPLATES:
        for seed in range(300):
            program = programs.program_of(template, seed)
            if program is None:
                continue
            try:
                recorded |= programs.check(program)
            except programs.InvalidError:
                continue
            except Exception as error:
                raise AssertionError(f"{template} (seed {seed}):\n{program.script()}") from error
            break
        else:
            never.append(template)
    assert not never
    assert not (set(GRADIENT) | derivative.WHOLE) - recorded
    assert not set(EXCITATION) - PARTS - recorded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_programs(first):
    for seed in range(first, first + 25):
        program = programs.draw(seed)
        message = programs.failure(program)
        assert message is None, f"{message}\n{programs.shrunk(program).script()}"


def test_a_wrong_gradient_is_found_and_made_small(monkeypatch):
    monkeypatch.setitem(GRADIENT, "aten::silu", Rule(lambda ctx, x: ctx.propagate(x, ctx.grad * 2)))
    lines = ["v0 = x0 * 2", "v1 = F.silu(v0)", "v2 = v0.flatten(1)", "v3 = v1.sum(1)"]
    program = programs.Program(0, ["const(0, 2, 4, 6, 6)"], lines, ["v2", "v3"])
    assert programs.failure(program).startswith("FailureError: gradient: gradient of input 0 is off by")
    small = programs.shrunk(program)
    assert "v1 = F.silu(v0)" in small.lines
    assert len(small.lines) < len(lines)
    scope = {}
    exec(small.script(), scope)  # prints what differs
    assert (scope["a"][0] - scope["b"]).abs().max() > 0.1
