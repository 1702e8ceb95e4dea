import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

import pytest

import pyfast_xai
from pyfast_xai.ops import library

LIBRARIES = [name for name in ("_C", "_C_cuda") if (files("pyfast_xai") / f"{name}.so").is_file()]
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf of binutils")


def readelf(option, name):
    path = str(files("pyfast_xai") / f"{name}.so")
    return subprocess.run(["readelf", "--wide", option, path], check=True, capture_output=True, text=True).stdout


@needs_readelf
@pytest.mark.parametrize("name", LIBRARIES)
def test_library_needs_no_python_symbol(name):
    symbols = [line.split()[7] for line in readelf("--dyn-syms", name).splitlines() if len(line.split()) >= 8]
    assert "torch_library_impl" in {symbol.split("@")[0] for symbol in symbols}
    assert not [symbol for symbol in symbols if re.match(r"_?Py", symbol)]


@needs_readelf
@pytest.mark.parametrize("name", LIBRARIES)
def test_library_needs_the_stable_abi_of_torch_only(name):
    # A C++ symbol of torch or c10 would tie the binary to one torch release.
    undefined = [line for line in readelf("--dyn-syms", name).splitlines() if " UND " in line]
    assert not [line for line in undefined if re.search(r"_ZNK?(2at|3c10|5torch)", line)]


@needs_readelf
@pytest.mark.parametrize("name", LIBRARIES)
def test_library_links_neither_python_nor_cudart(name):
    dynamic = readelf("--dynamic", name)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [entry for entry in needed if re.match(r"lib(python|cudart|c10)", entry)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_library_that_cannot_be_loaded_raises(tmp_path, monkeypatch):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "files", lambda package: tmp_path)
    with pytest.raises(OSError, match=r"_C\.so"):
        library.load("_C")


def test_absent_library_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "files", lambda package: tmp_path)
    assert library.load("_C") is False


def test_version_agrees_with_the_metadata():
    try:
        installed = distribution("pyfast-xai")
    except PackageNotFoundError:
        pytest.skip("runs from the source tree")
    assert installed.version == pyfast_xai.__version__


def test_wheel_serves_every_python():
    try:
        wheel = distribution("pyfast-xai").read_text("WHEEL")
    except PackageNotFoundError:
        pytest.skip("runs from the source tree")
    tags = re.findall(r"^Tag: (.+)$", wheel, re.MULTILINE)
    assert tags
    assert all(tag.startswith("py3-none-") for tag in tags)


def test_kernels_are_part_of_the_package():
    kernels = files("pyfast_xai") / "kernels"
    assert Path(str(kernels / "reference" / "conv_trace.py")).is_file()
