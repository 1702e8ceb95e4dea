"""What `make cuda-check` looks at: tables of resources, occupancy, loads, and what is worse than before."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "cuda_check.py").is_file():
    pytest.skip("bench/ is not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def check():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("cuda_check")
    sys.path.remove(str(ROOT / "bench"))


RESOURCES = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:145 CONSTANT[4]:256
 Function _ZN10pyfast_xai54_GLOBAL__N__da8cef87_15_points_union_cu_0a029e35_2136614look_up_kernelEPKllPl:
  REG:22 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_120
Resource usage:
 Function _relu_forward_kernel:
  REG:40 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resources_are_read(check):
    assert check.resources(RESOURCES) == [
        ("80", "look_up_kernel", 22, 0, 0),
        ("120", "_relu_forward_kernel", 40, 24, 1024),
    ]


# By NVIDIA's occupancy calculator.
OCCUPANCY = {
    "few registers": (("80", 32, 0, 256), 1.0),
    "128 registers": (("90", 128, 0, 256), 0.25),
    "small blocks": (("80", 16, 0, 32), 0.5),
    "shared memory": (("80", 32, 48 << 10, 128), 3 * 4 / 64),
    "a large block": (("120", 32, 0, 1024), 32 / 48),
    "odd registers": (("90", 33, 0, 128), 48 / 64),
}


@pytest.mark.parametrize("name", OCCUPANCY)
def test_occupancy(check, name):
    arguments, expected = OCCUPANCY[name]
    assert check.occupancy(*arguments) == pytest.approx(expected)


LOADS = {
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]": 128,
    "LDG.E.64 R4, [R2]": 64,
    "LDG.E R4, [R2.64] ; LDG.E.U8 R5, [R2]": 32,
    "STG.E.128 desc[UR4][R2.64], R4": 0,
    "@!P0 LDG.E.LTC128B.128 R8, desc[UR4][R2.64]": 128,
}


@pytest.mark.parametrize("sass", LOADS)
def test_widest_load(check, sass):
    assert check.widest_load(sass) == LOADS[sass]


def test_block_sizes_are_those_of_the_sources(check):
    sizes = check.block_sizes(path.read_text() for path in check.SOURCES.glob("*.cu"))
    launched = {
        name.split("<")[0]
        for path in check.SOURCES.glob("*.cu")
        for name in re.findall(r"(\w+)(?:<\w+>)?<<<", path.read_text())
    }
    assert set(sizes) == launched
    assert set(sizes.values()) <= {128, 256, 512}


@pytest.fixture
def kernel(check):
    return check.Kernel("triton", "_relu_forward_kernel", "90", 3, 32, 0, 0, 128, 1.0, 128)


WORSE = {
    "a spill": ({"local": 8}, "keeps 8 bytes a thread in local memory"),
    "fewer warps": ({"occupancy": 0.75}, "fills 75% of the warps, where it filled 100%"),
    "narrow loads": ({"load_bits": 32}, "loads 32 bits at once, not 128"),
}


@pytest.mark.parametrize("name", WORSE)
def test_what_is_worse_is_said(check, kernel, name):
    change, words = WORSE[name]
    (message,) = check.faults([replace(kernel, **change)], [kernel])
    assert words in message
    assert check.faults([kernel], [kernel]) == []


def test_a_table_does_not_excuse_a_spill(check, kernel):
    spills = replace(kernel, local=8)
    assert len(check.faults([spills], [spills])) == 1
    new = replace(kernel, name="_other_kernel")
    assert check.faults([new], [kernel]) == []
    assert len(check.faults([replace(new, local=8)], [kernel])) == 1


def test_every_spill_that_is_allowed_has_a_reason_and_is_there(check):
    for (compiler, name), (allowed, reason) in check.SPILLS.items():
        assert max(own.local for own in check.read() if (own.compiler, own.name) == (compiler, name)) == allowed
        assert reason
    assert check.faults(check.read(), check.read()) == []


def test_more_registers_alone_are_no_fault(check, kernel):
    assert check.faults([replace(kernel, registers=40)], [kernel]) == []


def test_of_variants_the_worst_counts(check, kernel):
    (actual,) = check.worst([replace(kernel, variants=1), replace(kernel, variants=1, local=4, occupancy=0.5)])
    assert (actual.variants, actual.local, actual.occupancy) == (2, 4, 0.5)


def test_a_table_is_read_as_it_was_written(check, kernel, tmp_path):
    check.write([kernel], tmp_path / "table.csv")
    assert check.read(tmp_path / "table.csv") == [kernel]


def test_the_table_has_every_capability(check):
    assert {item.capability for item in check.read()} == set(check.MULTIPROCESSORS)
