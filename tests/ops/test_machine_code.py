"""What the compiler made of the kernels: a loop that moves its vectors through the stack is many times slower."""

import re
import shutil
import subprocess
from importlib.resources import as_file, files

import pytest
import torch

from pyfast_xai.ops import instruction_set
from pyfast_xai.ops.registry import BINARIES

pytestmark = pytest.mark.skipif(not BINARIES["cpp"], reason="there is no compiled library")

ARITHMETIC = re.compile(r"v?(fn?m(add|sub)\d*|mul|add|sub)p[sd]$")
MULTIPLY_ADD = re.compile(r"vfmadd\d*ps$")
STACK = re.compile(r"\(%rsp|-0x[0-9a-f]+\(%rbp")
REGISTER = re.compile(r"%[xyz]mm\d+")


def loops(library):
    """The instructions of each innermost loop of a library, as pairs of a name and its operands."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", text.stdout, re.MULTILINE)
    code = [(int(address, 16), name, operands) for address, name, operands in lines]
    position = {address: i for i, (address, _, _) in enumerate(code)}
    inner = -1  # where the last loop started
    for end, (address, name, operands) in enumerate(code):
        target = re.match(r"[0-9a-f]+\b", operands) if name.startswith("j") else None
        start = position.get(int(target[0], 16)) if target else None
        if start is not None and int(target[0], 16) <= address and start > inner:
            inner = start
            yield [(name, operands) for _, name, operands in code[start : end + 1]]


def of_vectors(loop):
    return [(name, operands) for name, operands in loop if REGISTER.search(operands)]


@pytest.fixture(scope="module")
def hot_loops():
    """The innermost loops of the compiled library that compute with vectors."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if instruction_set() == "NEON":
        pytest.skip("the patterns are of x86 assembly")
    with as_file(files("pyfast_xai") / "_C.so") as library:
        result = [of_vectors(loop) for loop in loops(library)]
    return [loop for loop in result if sum(bool(ARITHMETIC.match(name)) for name, _ in loop) >= 4]


def test_no_kernel_moves_its_vectors_through_the_stack(hot_loops):
    assert len(hot_loops) > 20
    for loop in hot_loops:
        computed = sum(bool(ARITHMETIC.match(name)) for name, _ in loop)
        moved = sum(bool(STACK.search(operands)) for _, operands in loop)
        # Transforms of whole windows keep theirs between two passes, which takes three moves for five sums.
        assert moved <= 0.75 * computed, loop


@pytest.mark.parametrize(("register", "sums"), [("%ymm", 12), ("%zmm", 24)], ids=["AVX2", "AVX-512"])
def test_products_of_matrices_stay_in_registers(hot_loops, register, sums):
    full = [
        loop
        for loop in hot_loops
        if sum(bool(MULTIPLY_ADD.match(name)) and register in operands for name, operands in loop) == sums
        and len(loop) <= 2 * sums
    ]
    assert full
    assert not any(STACK.search(operands) for loop in full for _, operands in loop)


def test_the_copy_for_this_processor_runs():
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "SSE2"}.get(capability)
    if expected is None:
        pytest.skip(f"PyTorch speaks of {capability}")
    assert instruction_set() == expected
