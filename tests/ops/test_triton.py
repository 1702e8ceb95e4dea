import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
# The least shared memory of a program on the devices from compute capability 8.0 on: 99 KiB, on 8.6 and 8.9.
SHARED = 99 * 1024


def run(*command, **changed):
    # A process of its own: neither way to run Triton goes with what other tests have imported.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changed
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def agree(marked):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if interpret and versions[0] < (3, 9) and versions[1] >= (2, 4):
        pytest.skip("before Triton 3.9 its interpreter does not go with NumPy 2.4")
    print(run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(HERE / "triton_agree.py"), **interpret))


def test_kernels_agree_with_the_reference():
    agree("not extended")


@pytest.mark.extended
def test_kernels_agree_at_length():
    agree("extended")


def test_kernels_compile_and_fit(tmp_path):
    lines = [line.split() for line in run(str(HERE / "triton_compile.py"), "80", str(tmp_path)).splitlines()]
    assert {name for name, *_ in lines} >= {
        "_blur_kernel",
        "_conv_trace_kernel",
        "_count_chunk_kernel",
        "_count_kernel",
        "_diagonalise_kernel",
        "_iterate_kernel",
        "_linear_trace_kernel",
        "_mark_kernel",
        "_max_pool_backward_kernel",
        "_max_pool_forward_kernel",
        "_product_kernel",
        "_relu_backward_kernel",
        "_relu_forward_kernel",
        "_response_argmax_kernel",
        "_sign_bits_kernel",
        "_write_points_kernel",
    }
    for name, shared, *_ in lines:
        assert int(shared) <= SHARED, name


def test_triton_is_imported_with_the_first_op_alone():
    code = (
        "import sys, torch;"
        "before = 'triton' in sys.modules;"
        "from pyfast_xai.ops.registry import OPS;"
        "missing = [op.missing('triton', 'cuda') for op in OPS.values()];"
        "print('triton' in sys.modules and not before, missing.count(None))"
    )
    assert run("-c", code).split() == ["False", "11"]
