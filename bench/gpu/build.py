"""The package of this tree with libraries for this machine, in a folder of its own: the tree stays as it is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gpu.machine import compiler

LEAST_CMAKE = (3, 26)


def assemble(root: Path, package: Path) -> None:
    """Copy the Python of the package, without the libraries of other builds."""
    shutil.rmtree(package, ignore_errors=True)
    left = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(root / "pyfast_xai", package, ignore=left)


def program(name: str) -> str | None:
    """A program beside this Python, else on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def cmake() -> str | None:
    """A CMake that is new enough."""
    for candidate in (program("cmake"), shutil.which("cmake")):
        if candidate is not None:
            message = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
            result = re.search(r"(\d+)\.(\d+)", message)
            if result and tuple(map(int, result.groups())) >= LEAST_CMAKE:
                return candidate
    return None


def architecture() -> str:
    """Of this machine's device, e.g. 90; of an H100 where there is none."""
    if not torch.cuda.is_available():
        return "90"
    return "".join(map(str, torch.cuda.get_device_capability(0)))


def compile_all(root: Path, work: Path, package: Path) -> None:
    """Build `_C_cuda` and `_C` and put them into the package; the first alone is built where CMake cannot be used.

    Args:
        root: of the repository.
        work: folder for what the build leaves.
        package: the assembled package.

    Raises:
        SystemExit: `_C_cuda` was not built.
    """
    nvcc, tool = compiler(), cmake()
    if nvcc is None:
        raise SystemExit("there is no nvcc on the PATH or in /usr/local/cuda/bin")
    ninja, make = program("ninja"), program("make")
    if tool is None or (ninja or make) is None:
        print("no CMake of 3.26 or later with ninja or make: compiling _C_cuda with nvcc alone", flush=True)
        _by_nvcc(root, package, nvcc)
        return
    build = work / "cmake"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    configured = subprocess.run(
        [
            *(tool, "-S", str(root), "-B", str(build), *generator),
            *("-DPYFAST_XAI_EXT=ON", "-DPYFAST_XAI_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"),
        ],
        check=False,
    )
    if configured.returncode:
        print("the configuration failed: compiling _C_cuda with nvcc alone", flush=True)
        _by_nvcc(root, package, nvcc)
        return
    for library in ("_C_cuda", "_C"):
        command = [tool, "--build", str(build), "--target", library, "--parallel", str(os.cpu_count() or 1)]
        done = subprocess.run(command, check=False)
        if done.returncode == 0:
            shutil.copy(build / f"{library}.so", package)
        elif library == "_C_cuda":
            raise SystemExit("_C_cuda did not compile")


def _by_nvcc(root: Path, package: Path, nvcc: str) -> None:
    """The compilation of CMakeLists.txt, written out."""
    home = Path(torch.__file__).parent
    command = [
        *(nvcc, "-std=c++20", "-O3", "-shared", "-cudart", "static", f"-arch=sm_{architecture()}", "-lineinfo"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000"),
        *("-I", str(root / "csrc"), "-I", str(root / "csrc" / "include"), "-isystem", str(home / "include")),
        *map(str, sorted((root / "csrc" / "cuda").glob("*.cu"))),
        *("-o", str(package / "_C_cuda.so"), "-Xlinker", "--no-as-needed", "-L", str(home / "lib"), "-ltorch"),
    ]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("_C_cuda did not compile")
