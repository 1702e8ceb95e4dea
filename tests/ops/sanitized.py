"""Run pytest on a library that was built with a sanitizer: `sanitized.py RUNTIME LIBRARY ARGUMENTS_OF_PYTEST...`.

The runtime, such as `libasan.so`, must be in the process before anything allocates, and so before Python.
"""

import os
import subprocess
import sys

OPTIONS = {
    # Python and torch keep memory until they end; a size that nobody has is to be refused, as without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Only what was built for it can say which of its accesses are ordered.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:halt_on_error=1",
}


def start(runtime, arguments):
    names = (runtime, "libstdc++.so")  # exceptions pass through the runtime, which must find who throws them
    compiler = os.environ.get("CXX", "c++")
    preload = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(preload), "PYFAST_XAI_SANITIZED": runtime}
    os.execve(sys.executable, [sys.executable, __file__, runtime, *arguments], environment)


def run(library, arguments):
    import pytest
    import torch

    loaded, load = [], torch.ops.load_library

    def load_sanitized(path):
        loaded.append(os.path.basename(path))
        load(library if loaded[-1] == "_C.so" else path)

    torch.ops.load_library = load_sanitized
    status = pytest.main(["--capture=no", *arguments])  # a report comes as the process ends, and must not be held back
    assert "_C.so" in loaded, "the library was never loaded"
    return status


if __name__ == "__main__":
    if "PYFAST_XAI_SANITIZED" in os.environ:
        sys.exit(run(os.path.abspath(sys.argv[2]), sys.argv[3:]))
    start(sys.argv[1], sys.argv[2:])
