import re
import shutil
import subprocess
import sys
import tarfile
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


def test_source_distribution_has_what_a_build_needs_and_no_tests(tmp_path):
    pytest.importorskip("scikit_build_core")
    root = Path(__file__).parents[1]
    code = f"import scikit_build_core.build as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.stat().st_size < 2_000_000
    with tarfile.open(archive) as sdist:
        inside = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "csrc/generate.py", "kernels/checks.py"} <= inside
    assert {f"csrc/cpu/{path.name}" for path in (root / "csrc/cpu").glob("*.cpp")} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/", "bench/", "."))]


def test_files_beside_the_package_name_its_version():
    root = Path(__file__).parents[1]
    for name, pattern in {
        "CITATION.cff": r"^version: (.*)$",
        "recipe/recipe.yaml": r'version: "(.*)"',
        "pyproject.toml": r'^version = "(.*)"$',
    }.items():
        assert re.search(pattern, (root / name).read_text(), re.MULTILINE)[1] == pyfast_xai.__version__, name
