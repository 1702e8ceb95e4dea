"""Random programs of tensor operations: each reading of a recording of them is compared with autograd.

`python tests/fuzz/programs.py --seconds 60` draws programs for as long as it is told to, and prints each that fails as
a script that runs by itself. What autograd itself gets wrong, as finite differences show, is no failure.
"""

import argparse
import contextlib
import logging
import random
import sys
import time
import warnings
from dataclasses import dataclass, field

import operations
import torch

from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence.points import Points, marking
from pyfast_xai.rules.gradient import (
    DECONVNET,
    EXCITATION,
    GUIDED,
    LINEAR,
    NEAREST,
    GradientRules,
    backward_pass,
    rectifies,
)
from pyfast_xai.rules.gradient.bounds import Bounding, Clipped, bounds_of
from pyfast_xai.tape import Value, key, record

HEADER = """
import torch
from torch import nn
from torch.nn import functional as F

aten = torch.ops.aten


def const(seed, *shape):
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((numbers * 12.9898 + seed * 78.233).sin() * 43758.5453 % 3 - 1.5).view(shape)


def layer(seed, kind, *sizes, **settings):
    made = kind(*sizes, **settings).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(const(seed + i, *parameter.shape) / 2)
    return made.requires_grad_(False)
"""

# Limits on the values of a program: larger ones are drawn again, so that rounding stays small.
MOST, LARGEST = 3000, 1e3
TOLERANCE = 1e-9


@dataclass
class Program:
    """A function of some tensors, as source.

    Attributes:
        seed: of the inputs and of the random numbers of the forward pass.
        inputs: expressions of the inputs.
        lines: statements; the inputs are `x0`, `x1` and so on.
        returned: names of what is returned, in one vector.
    """

    seed: int
    inputs: list[str]
    lines: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)

    @property
    def source(self):
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        parts = ", ".join(
            f"torch.view_as_real({name}.resolve_conj()).flatten()" if name[0] == "z" else f"{name}.flatten()"
            for name in self.returned
        )
        body = "".join(f"        {line}\n" for line in self.lines)
        return (
            f"class Program(nn.Module):\n    def forward(self, {names}):\n{body}        return torch.cat([{parts}])\n"
        )

    def build(self):
        """Returns the module and its inputs."""
        scope = {}
        exec(HEADER + self.source, scope)
        return scope["Program"]().eval(), [eval(expression, scope) for expression in self.inputs]

    def script(self):
        """Returns the program as a script that compares its gradient with autograd's."""
        return f"""{HEADER}
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.tape import record


{self.source}

model, inputs = Program().eval(), [{", ".join(self.inputs)}]
torch.manual_seed({self.seed})
leaves = [x.clone().requires_grad_() for x in inputs]
result = model(*[leaf * 1 for leaf in leaves])
seed = const(0, *result.shape)
expected = torch.autograd.grad(result, leaves, seed, allow_unused=True, materialize_grads=True)
torch.manual_seed({self.seed})
rules = GradientRules()
tape = record(model, *inputs, policy=rules)
print("outputs differ by", float((tape.result - result.detach()).abs().max()))
for i, (a, b) in enumerate(zip(backward_pass(rules, tape, {{tape.outputs: seed[None]}}, tape.inputs), expected)):
    print("gradients of input", i, "differ by", float((a[0] - b).abs().max()), "of", float(b.abs().max()))
"""


INPUTS = [
    *("const({k}, 2, 4, 6, 6)", "const({k}, 1, 4, 6, 6)", "const({k}, 1, 4, 2, 4)", "const({k}, 3, 1, 4, 4)"),
    *("const({k}, 2, 4, 6, 6).to(memory_format=torch.channels_last)", "const({k}, 2, 4)", "const({k}, 2, 6, 4)"),
    *("const({k}, 1, 4, 6, 6).to(memory_format=torch.channels_last)", "const({k}, 4, 2, 6, 6).transpose(0, 1)"),
]


class Drawing:
    """A program that grows: its statements run as they are drawn, and what does not fit is drawn anew."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        count = self.random.choice([1, 1, 1, 2, 3])
        self.program = Program(seed, [self._filled(self.random.choice(INPUTS[: 9 if i else 5])) for i in range(count)])
        self.names = [f"x{i}" for i in range(count)]
        self.read = set()
        self._begin()

    def _begin(self):
        """Runs what there is so far."""
        self.scope = {}
        exec(HEADER, self.scope)
        for i, expression in enumerate(self.program.inputs):
            self.scope[f"x{i}"] = eval(expression, self.scope)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            exec("\n".join(self.program.lines), self.scope)

    def _filled(self, template, **names):
        numbers = {
            "i": self.random.randint(-3, 3),
            "p": self.random.randint(1, 3),
            "s": round(self.random.uniform(-1.5, 1.5), 2),
            "k": self.random.randint(0, 99),
        }
        return template.format(**numbers, **names)

    def _name(self, kinds):
        """A tensor, of which the latest are the likeliest."""
        fitting = [name for name in self.names if name[0] in kinds]
        return fitting[-1 - min(int(self.random.expovariate(0.6)), len(fitting) - 1)] if fitting else None

    def add(self, template, kind=None):
        """Returns whether the operation was added."""
        kind = kind or ("z" if template in operations.FAMILIES["complex"] else "v")
        z = self._name("z")
        if "{z}" in template and z is None:
            return False
        out = f"{kind}{len(self.program.lines)}"
        names = {"a": self._name("xv"), "b": self._name("xv"), "z": z, "o": out}
        line = self._filled(template if "{o}" in template else "{o} = " + template, **names)
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                exec(line, self.scope)
            value = self.scope[out]
            fits = isinstance(value, torch.Tensor) and value.is_complex() == (kind == "z") and value.numel() <= MOST
            fits = fits and value.dtype in (torch.float64, torch.complex128) and bool(torch.isfinite(value).all())
            fits = fits and (not value.numel() or float(value.abs().max()) < LARGEST)
            fits = fits and (value.numel() or not any(self.scope[name].numel() == 0 for name in self.names))
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError, ZeroDivisionError):
            fits = False
        if not fits:
            if template in operations.FAMILIES["writes"]:
                self._begin()  # it may have written to others
            return False
        self.program.lines.append(line)
        self.read.update(
            name for name in (names["a"], names["b"], names["z"]) if name and name in line.split("=", 1)[1]
        )
        self.names.append(out)
        return True

    def finished(self):
        """Returns the program, which returns all that nothing reads."""
        unread = [name for name in self.names if name not in self.read]
        self.program.returned = unread or self.names[-1:]
        return self.program


def draw(seed, length=10):
    """Returns a random program."""
    drawing = Drawing(seed)
    weights = {"elementwise": 4, "sums and products": 4, "moves": 6, "maps": 4, "writes": 3, "complex": 1.5}
    families = list(operations.FAMILIES)
    for _ in range(20 * length):
        family = drawing.random.choices(families, [weights.get(name, 2) for name in families])[0]
        drawing.add(drawing.random.choice(operations.FAMILIES[family]))
        if len(drawing.program.lines) == length:
            break
    return drawing.finished()


def program_of(template, seed):
    """Returns a program of a few operations with this one in their middle, or None where it did not fit."""
    drawing = Drawing(seed)
    drawing.add(
        drawing.random.choice(["{a} * 2", "{a}.flatten(1)", "{a}.flatten(2)", "{a}.mean((-1, -2))", "{a}.tanh()"])
    )
    if "{z}" in template:
        drawing.add("torch.fft.fft({a})", "z")
    if not drawing.add(template):
        return None
    return drawing.finished()


class FailureError(AssertionError):
    """What a reading of a program gives is not what it should."""


class InvalidError(Exception):
    """Autograd cannot differentiate the program itself."""


def run(program, seeds):
    """Returns the result and the gradients by autograd.

    Raises:
        InvalidError: a tensor that autograd needs is written to, an operation that it does not know.
    """
    model, inputs = program.build()
    torch.manual_seed(program.seed)
    leaves = [x.clone().requires_grad_() for x in inputs]
    try:
        result = model(*[leaf * 1 for leaf in leaves])
        if not result.requires_grad:
            return result, [torch.zeros(len(seeds(result)), *leaf.shape, dtype=leaf.dtype) for leaf in leaves]
        each = [
            torch.autograd.grad(result, leaves, seed, retain_graph=True, allow_unused=True, materialize_grads=True)
            for seed in seeds(result)
        ]
    except RuntimeError as error:
        raise InvalidError(str(error)) from error
    return result.detach(), [torch.stack(parts) for parts in zip(*each, strict=True)]


def check(program):
    """Compares all readings of a program with autograd; returns the names of the operations that ran.

    Raises:
        FailureError: naming what differs.
        InvalidError: autograd cannot differentiate the program itself.
    """
    targets = 1 + program.seed % 2

    def seeds(result):
        generator = torch.Generator().manual_seed(program.seed)
        return torch.randn(targets, *result.shape, dtype=result.dtype, generator=generator)

    result, expected = run(program, seeds)
    if not all(torch.isfinite(part).all() for part in expected):
        raise InvalidError("infinite gradients")
    model, inputs = program.build()
    before = [x.clone() for x in inputs]
    tapes = {}

    def gradients(policy, recorder=record):
        torch.manual_seed(program.seed)
        tape = tapes["last"] = recorder(model, *inputs, policy=policy)
        if not isinstance(tape.outputs, Value):
            return [torch.zeros(targets, *x.shape, dtype=x.dtype) for x in inputs]
        return backward_pass(policy, tape, {tape.outputs: seeds(result)}, tape.inputs)

    def compare(name, results):
        for i, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
            error = float((ours - theirs).abs().max()) if ours.numel() else 0.0
            scale = max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
            if not error <= TOLERANCE * scale and not _autograd_is_wrong(program, seeds(result), i, ours):
                raise FailureError(f"{name}: gradient of input {i} is off by {error:.3g} of {scale:.3g}")

    compare("gradient", gradients(GradientRules()))
    tape = tapes["last"]
    with torch.no_grad():
        torch.manual_seed(program.seed)
        plain = model(*[x.clone() for x in inputs])
    if not torch.equal(tape.result, plain):
        raise FailureError(f"output is off by {float((tape.result - plain).abs().max()):.3g}")
    if not all(map(torch.equal, inputs, before)):
        raise FailureError("an input was written to")

    rectified = any(map(rectifies, tape))
    pools = any(key(node.op) in NEAREST for node in tape)
    overlays = {} if rectified else {"guided": GUIDED, "deconvnet": DECONVNET, "linear": LINEAR}
    if not pools:
        overlays["nearest"] = NEAREST
    for name, overlay in overlays.items():
        compare(name, gradients(GradientRules(overlay)))
    if tape.not_replayable is None:
        bounds = bounds_of(record(model, *inputs, policy=Bounding()))
        compare("bounds", gradients(Clipped(bounds)))
        compare("forward bounds", gradients(Clipped(bounds, "forward")))
    replayed = ReplayedModel(model)
    for _ in range(2):
        compare(
            "replay", gradients(GradientRules(), lambda _, *options, policy: replayed.record(*options, policy=policy))
        )
    with contextlib.suppress(UnsupportedOpError):
        gradients(GradientRules(EXCITATION))
    _check_evidence(program, model, inputs)
    return {key(node.op) for node in tape}


def _autograd_is_wrong(program, seeds, i, ours):
    """Whether finite differences agree with this gradient of an input."""
    model, inputs = program.build()
    direction = torch.randn(inputs[i].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = torch.empty_like(inputs[i]).copy_(direction)
    ends = []
    for step in (1e-6, -1e-6):
        moved = [x + step * direction if j == i else x.clone() for j, x in enumerate(inputs)]
        torch.manual_seed(program.seed)
        with torch.no_grad():
            ends.append(model(*moved))
    slopes = ((ends[0] - ends[1]) / 2e-6 * seeds).flatten(1).sum(1)
    result = (ours * direction).flatten(1).sum(1)
    return bool(torch.allclose(slopes, result, rtol=1e-5, atol=1e-6))


def _check_evidence(program, model, inputs):
    """Points lie on the input, each once, and the same wherever absent ones are marked."""
    torch.manual_seed(program.seed)
    tape = record(model, *inputs, policy=evidence.policy)
    if not isinstance(tape.outputs, Value) or not tape.outputs.numel or not inputs[0].dim():
        return
    start = torch.randperm(tape.outputs.numel, generator=torch.Generator().manual_seed(program.seed))[:5]
    result = []
    try:
        for mode in (contextlib.nullcontext, marking):
            with mode():
                points = evidence.walk(tape, {tape.outputs: Points(start)}, tape.inputs[0], evidence.Options())
            there = points.index >= 0
            negative = torch.zeros_like(there) if points.negative is None else points.negative
            result.append(sorted(zip(points.index[there].tolist(), negative[there].tolist(), strict=True)))
    except UnsupportedOpError:
        return
    if len(set(result[0])) < len(result[0]) or any(index >= inputs[0].numel() for index, _ in result[0]):
        raise FailureError(f"evidence lies beside the input or twice on a pixel: {result[0]}")
    if result[0] != result[1]:
        raise FailureError(f"evidence depends on how absent points are kept: {result}")


def failure(program):
    """Returns what is wrong with the readings of a program, or None."""
    try:
        check(program)
    except InvalidError:
        return None
    except UnsupportedOpError as error:
        return None if "view of another dtype" in str(error) else f"UnsupportedOpError: {error}"
    except Exception as error:  # whatever is raised is a finding
        return f"{type(error).__name__}: {error}"
    return None


def shrunk(program):
    """Returns the program without the lines that its failure does not need."""
    kind = failure(program).split(":")[0]
    for i in reversed(range(len(program.lines))):
        lines = program.lines[:i] + program.lines[i + 1 :]
        gone = program.lines[i].split(" = ")[0]
        returned = [name for name in program.returned if name != gone] or [lines[-1].split(" = ")[0]] if lines else []
        smaller = Program(program.seed, program.inputs, lines, returned)
        if returned and (failure(smaller) or "").split(":")[0] == kind and "NameError" not in (failure(smaller) or ""):
            program = smaller
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=None, help="seed of the first program")
    parser.add_argument("--length", type=int, default=12, help="operations in a program")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pyfast_xai").setLevel(logging.ERROR)
    first = int(time.time()) if options.first is None else options.first
    end, seed, failed, valid = time.monotonic() + options.seconds, first, 0, 0
    while time.monotonic() < end:
        program = draw(seed, options.length)
        message = failure(program)
        if message is not None:
            failed += 1
            print(f"# seed {seed}: {message}\n{shrunk(program).script()}", flush=True)
        valid += 1
        seed += 1
    print(f"{valid} programs from seed {first} on, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
