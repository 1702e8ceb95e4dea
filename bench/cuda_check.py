"""What the compilers made of the CUDA and Triton kernels, without a GPU: registers, local memory, occupancy, loads.

    python bench/cuda_check.py --library build/cuda/_C_cuda.so
    python bench/cuda_check.py --library build/cuda/_C_cuda.so --write

Ends with 1 where a kernel spills registers, but for the bytes that `SPILLS` has with their reasons; where fewer warps
fit on a multiprocessor than `bench/data/machine_code.csv` says; or where `relu_*` no longer load whole vectors.
`--write` replaces the table.
"""

import argparse
import csv
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "data" / "machine_code.csv"
SOURCES = ROOT / "csrc" / "cuda"
TRITON = ROOT / "tests" / "ops" / "triton_compile.py"
# By compute capability, what a multiprocessor holds: warps, blocks, bytes of shared memory. CUDA C++ Programming Guide,
# "Compute Capabilities".
MULTIPROCESSORS = {
    "80": (64, 32, 164 << 10),
    "90": (64, 32, 228 << 10),
    "100": (64, 32, 228 << 10),
    "120": (48, 24, 100 << 10),
}
REGISTERS, WARP = 65536, 32
RESERVED = 1 << 10  # bytes of shared memory that a block takes besides its own
VECTORS = ("_relu_forward_kernel", "_relu_backward_kernel")  # they move bytes and do nothing else ...
VECTOR_BITS = 128  # ... so many at once, where sizes are multiples of 16


# Bytes a thread that a kernel may spill, on any device, and why. What is not here spills nothing.
SPILLS = {
    ("nvcc", "select_kernel"): (8, "two registers, on sm_100 alone, of a kernel that all warps fit in"),
    ("triton", "_max_pool_forward_kernel"): (8, "two registers of the worst of four variants, on sm_90 and sm_100"),
    ("triton", "_product_kernel"): (16, "four registers of the worst of 192 variants, on sm_80 and sm_120"),
    ("triton", "_iterate_kernel"): (
        624,
        "a basis of 32 vectors on 1024 places and its product are 128 registers of 512 threads, all that there are."
        " On sm_90 these take 488 bytes, 16 vectors on 1024 places 40 and in float64 on 512 places 8, 16 vectors on"
        " up to 512 places none. The other route, products one after another, launches some thousand kernels instead",
    ),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel for a compute capability; of several variants the worst.

    Attributes:
        compiler: "nvcc" or "triton".
        name: of the function.
        capability: such as "90".
        variants: how many were compiled: one for each dtype and set of options.
        registers: of a thread.
        local: bytes of a thread in local memory: registers that were spilled, and arrays.
        shared: bytes of a block in shared memory.
        threads: of a block.
        occupancy: share of the warps of a multiprocessor that fit at the same time.
        load_bits: of the widest load of a thread from global memory; 0 where it is not looked at.
    """

    compiler: str
    name: str
    capability: str
    variants: int
    registers: int
    local: int
    shared: int
    threads: int
    occupancy: float
    load_bits: int = 0


def occupancy(capability: str, registers: int, shared: int, threads: int) -> float:
    """Share of the warps of a multiprocessor that blocks of a kernel fill."""
    most_warps, most_blocks, most_shared = MULTIPROCESSORS[capability]
    warps = math.ceil(threads / WARP)
    of_a_warp = math.ceil(registers * WARP / 256) * 256  # registers come in units of 256 a warp ...
    by_registers = REGISTERS // max(of_a_warp, 1) // 4 * 4 // warps  # ... and each of four schedulers has its own
    by_shared = most_shared // (math.ceil((shared + RESERVED) / 128) * 128)
    return min(most_blocks, most_warps // warps, by_registers, by_shared) * warps / most_warps


def worst(variants: Iterable[Kernel]) -> list[Kernel]:
    """One for each compiler, name and capability."""
    kinds: dict[tuple[str, str, str], list[Kernel]] = {}
    for item in variants:
        kinds.setdefault((item.compiler, item.name, item.capability), []).append(item)
    return [
        Kernel(
            *key,
            variants=len(group),
            registers=max(item.registers for item in group),
            local=max(item.local for item in group),
            shared=max(item.shared for item in group),
            threads=max(item.threads for item in group),
            occupancy=round(min(item.occupancy for item in group), 4),
            load_bits=max(item.load_bits for item in group),
        )
        for key, group in kinds.items()
    ]


RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MANGLED = re.compile(r"(?<=\d)[a-z][a-z_]*_kernel")


def resources(text: str) -> list[tuple[str, str, int, int, int]]:
    """Capability, name, registers, local and shared bytes of each kernel in what `cuobjdump -res-usage` prints."""
    result, capability = [], ""
    for part in re.split(r"(?=arch = sm_)|(?=Function )", text):
        arch = re.match(r"arch = sm_(\d+)", part)
        capability = arch[1] if arch else capability
        used = RESOURCES.match(part)
        if used:
            name = MANGLED.search(used[1])
            registers, stack, shared, local = map(int, used.groups()[1:])
            result.append((capability, name[0] if name else used[1], registers, stack + local, shared))
    return result


def widest_load(sass: str) -> int:
    """Bits of the widest load from global memory in machine code."""
    loads = re.findall(r"\bLDG\.E((?:\.\w+)*)", sass)
    widths = [max([32, *(int(part) for part in parts.split(".") if part in ("64", "128", "256"))]) for parts in loads]
    return max(widths, default=0)


def block_sizes(sources: Iterable[str]) -> dict[str, int]:
    """Threads of a block by the name of a kernel, as the sources say."""
    sizes: dict[str, int] = {}
    for text in sources:
        constants = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+)\b", text)}
        for bound, name in re.findall(r"__launch_bounds__\((\w+)\)\s*(\w+)\(", text):
            sizes[name] = constants[bound]
    return sizes


def program(name: str) -> str:
    """A program of the CUDA toolkit, of the PATH or as it comes with Triton."""
    result = shutil.which(name)
    spec = find_spec("triton")
    if result is None and spec is not None and spec.origin is not None:
        result = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    if result is None:
        raise SystemExit(f"{name} is needed, from the CUDA toolkit or from Triton, and was not found")
    return result


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
    return done.stdout


def of_nvcc(library: Path) -> list[Kernel]:
    """The kernels of a compiled library."""
    sizes = block_sizes(path.read_text() for path in SOURCES.glob("*.cu"))
    return [
        Kernel(
            "nvcc",
            name,
            capability,
            1,
            registers,
            local,
            shared,
            sizes[name],
            occupancy(capability, registers, shared, sizes[name]),
        )
        for capability, name, registers, local, shared in resources(
            printed(program("cuobjdump"), "-res-usage", str(library))
        )
        if capability in MULTIPROCESSORS
    ]


def of_triton(capability: str) -> list[Kernel]:
    """Triton's kernels, compiled for a capability."""
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for line in printed(sys.executable, str(TRITON), capability, folder).splitlines():
            name, shared, warps, cubin = line.split()
            (_, _, registers, local, _), *_ = resources(printed(program("cuobjdump"), "-res-usage", cubin))
            bits = widest_load(printed(program("cuobjdump"), "-sass", cubin)) if name in VECTORS else 0
            threads = WARP * int(warps)
            share = occupancy(capability, registers, int(shared), threads)
            result.append(Kernel("triton", name, capability, 1, registers, local, int(shared), threads, share, bits))
    return result


def faults(result: Iterable[Kernel], expected: Iterable[Kernel]) -> list[str]:
    """What is worse than expected, a sentence each."""
    known = {(item.compiler, item.name, item.capability): item for item in expected}
    message = []
    for item in result:
        where = f"{item.name} of {item.compiler} for sm_{item.capability}"
        before = known.get((item.compiler, item.name, item.capability), item)
        allowed, _ = SPILLS.get((item.compiler, item.name), (0, ""))
        if item.local > allowed:
            message.append(f"{where} keeps {item.local} bytes a thread in local memory, where {allowed} are allowed")
        if item.occupancy < before.occupancy:
            message.append(f"{where} fills {item.occupancy:.0%} of the warps, where it filled {before.occupancy:.0%}")
        if item.name in VECTORS and item.load_bits < VECTOR_BITS:
            message.append(f"{where} loads {item.load_bits} bits at once, not {VECTOR_BITS}")
    return message


def read(path: Path = TABLE) -> list[Kernel]:
    """The table."""
    kinds = {field.name: field.type for field in fields(Kernel)}
    with path.open(newline="") as file:
        return [Kernel(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(kernels: Iterable[Kernel], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(item) for item in kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="the compiled CUDA library; without it Triton's kernels alone")
    parser.add_argument("--capabilities", nargs="+", default=list(MULTIPROCESSORS), choices=list(MULTIPROCESSORS))
    parser.add_argument("--write", action="store_true", help="replace the table by what was found")
    options = parser.parse_args()
    kernels = of_nvcc(options.library) if options.library else []
    if find_spec("triton") is not None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels += [item for group in pool.map(of_triton, options.capabilities) for item in group]
    result = sorted(worst(kernels), key=lambda item: (item.compiler, item.name, int(item.capability)))
    print(
        f"{'kernel':30} {'compiler':8} {'sm':>4} {'registers':>9} {'local':>6} {'shared':>7} {'warps':>6} {'load':>5}"
    )
    for item in result:
        print(
            f"{item.name:30} {item.compiler:8} {item.capability:>4} {item.registers:9} {item.local:6} {item.shared:7}"
            f" {item.occupancy:6.0%} {item.load_bits or '':>5}"
        )
    if options.write:
        write(result)
        return 0
    message = faults(result, read())
    print("\n".join(message) if message else "nothing is worse than in the table")
    return 1 if message else 0


if __name__ == "__main__":
    sys.exit(main())
