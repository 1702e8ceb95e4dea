"""Run the CUDA C++ kernels on a CPU: each `.cu` file, compiled for the host, with every access to memory checked.

Launches `kernel<<<grid, block, shared, stream>>>(...)` are rewritten as calls of the emulator, pointers of tensors as
registrations of their memory, and the ops are registered for CPU tensors in a namespace of their own.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import os
import re
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import torch

from pyfast_xai.ops import registry

NAME = "cuda_emulation"
HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
OPS = [path.stem for path in sorted((SOURCES / "cuda").glob("*.cu")) if "STABLE_TORCH_LIBRARY_IMPL" in path.read_text()]

_LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<(.+?)>>>\(", re.DOTALL)
_POINTER = re.compile(r"(\w+)\.(?:const|mutable)_data_ptr\(\)")


def translate(source, namespace=NAME):
    """C++ of a `.cu` file for the emulator, with its op in a namespace."""

    def launch(match):
        kernel, configuration = match.groups()
        name = kernel.split("<")[0]
        return f'::emulated::launch("{name}", [](auto... values) {{ {kernel}(values...); }}, {configuration})('

    source = _LAUNCH.sub(launch, source)
    source = _POINTER.sub(r"::emulated::data_of(\1)", source)
    source = source.replace("torch::stable::new_empty(", "::emulated::new_empty(")
    return source.replace(
        "STABLE_TORCH_LIBRARY_IMPL(pyfast_xai_cuda, CUDA, m)", f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m)"
    )


def with_fault(source, number, edit):
    """C++ in which a part of a text is another while a fault is switched on.

    Args:
        source: of a kernel.
        number: of the fault, from 1 on.
        edit: text that the source has in one place, with `@before => after@` for an expression or a statement in it.
    """
    head, before, after, tail = re.fullmatch("(.*)@(.*) => (.*)@(.*)", edit, re.DOTALL).groups()
    place = head + before + tail
    assert source.count(place) == 1, f"{place!r} is there {source.count(place)} times"
    faulty = f"::emulated::has_fault({number})"
    if before.endswith(";"):
        either = f"if ({faulty}) {{ {after} }} else {{ {before} }}"
    else:
        either = f"({faulty} ? ({after}) : ({before}))"
    return source.replace(place, head + either + tail)


def build(sources, folder):
    """Compile translated sources (name: text) into one library; its path."""
    torch_root = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-fPIC",
        "-fvisibility=hidden",
        "-w",
        "-DTORCH_TARGET_VERSION=0x020A000000000000",
    ]
    generated = folder / "generated"
    subprocess.run(
        [sys.executable, str(SOURCES / "generate.py"), str(SOURCES.parent / "kernels"), str(generated)], check=True
    )
    includes = [HERE / "include", generated, SOURCES, SOURCES / "include"]
    flags += [part for path in includes for part in ("-I", str(path))] + ["-isystem", str(torch_root / "include")]
    jobs, objects = [], []
    for name, text in {**sources, "emulator.cpp": (HERE / "emulator.cpp").read_text()}.items():
        path = folder / f"{Path(name).stem}.cpp"
        path.write_text(text)
        objects.append(path.with_suffix(".o"))
        actual = [] if name == "emulator.cpp" else ["-fsanitize=thread"]
        command = [os.environ.get("CXX", "g++"), *flags, *actual, "-c", str(path), "-o", str(objects[-1])]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        if job.returncode:
            raise RuntimeError(errors)
    library = folder / "emulated.so"
    link = [os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(library)]
    subprocess.run([*link, "-Wl,--no-as-needed", str(torch_root / "lib" / "libtorch.so")], check=True)
    return library


class Emulation:
    """The ops of a compiled emulation.

    Args:
        library: path of the compiled library.
        namespace: where its ops are registered.
    """

    def __init__(self, library, namespace=NAME):
        _define(namespace)
        torch.ops.load_library(library)
        self._ops = getattr(torch.ops, namespace)
        self._library = ctypes.CDLL(str(library))
        self._turn = threading.Lock()
        self._library.emulation_accesses.restype = ctypes.c_uint64

    def seed(self, seed):
        """Run threads and blocks in another order; 0 for their own."""
        self._library.emulation_seed(seed)

    def fault(self, number):
        """Switch on a fault that `with_fault` put in; 0 for none."""
        self._library.emulation_fault(number)

    @property
    def accesses(self):
        """How many accesses to shared and global memory were checked."""
        return self._library.emulation_accesses()

    def call(self, op, *args):
        with self._turn:  # an emulator runs one kernel at a time
            self._library.emulation_reset()
            return getattr(self._ops, op)(*args)


@functools.cache
def _define(namespace):
    library = torch.library.Library(namespace, "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.pyfast_xai, op).default._schema)
        library.define(schema.removeprefix("pyfast_xai::"))
    return library


@functools.cache
def emulation():
    """The kernels as they are in the repository, built and kept in the folder for temporary files by their text."""
    texts = {path.name: translate(path.read_text()) for path in (SOURCES / "cuda").glob("*.cu")}
    harness = [path for path in sorted(HERE.rglob("*")) if path.suffix in (".py", ".h", ".cpp", ".cuh")]
    read = [
        *texts.values(),
        *(
            path.read_text()
            for path in [*harness, *sorted(SOURCES.rglob("*.h")), *(SOURCES.parent / "kernels").glob("*.py")]
        ),
    ]
    digest = hashlib.sha256("\n".join([torch.__version__, *read]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"pyfast_xai_cuda_emulation_{os.getuid()}_{digest}")
    if not (folder / "emulated.so").exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(build(texts, Path(scratch)), folder / "emulated.so")
    return Emulation(folder / "emulated.so")


@contextlib.contextmanager
def serving():
    """Serve the ops that have CUDA C++ kernels from the emulated ones inside a `with` block, on the CPU."""
    folder = f"pyfast_xai.kernels.{NAME}"
    modules = {folder: types.ModuleType(folder)}
    for name, op in registry.OPS.items():
        modules[f"{folder}.{name}"] = module = types.ModuleType(f"{folder}.{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        setattr(module, name, functools.partial(emulation().call, name) if name in OPS else op.overload)
    modules[folder].__path__ = []
    backends, preference = registry.BACKENDS, registry.PREFERENCE
    sys.modules.update(modules)
    registry.BACKENDS = (*backends, NAME)
    registry.PREFERENCE = {**preference, "cpu": (*preference["cpu"], NAME)}
    try:
        with registry.backend(NAME):
            yield
    finally:
        registry.BACKENDS, registry.PREFERENCE = backends, preference
        for module in modules:
            del sys.modules[module]
