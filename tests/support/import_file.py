"""Imports of Python files that belong to no package."""

import sys
from importlib.util import module_from_spec, spec_from_file_location


def import_file(path, name=None):
    """Runs a Python file and returns it as a module, named like the file, which is not left in `sys.modules`."""
    spec = spec_from_file_location(name or path.stem, path)
    module = module_from_spec(spec)
    replaced = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    finally:
        if replaced is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = replaced
    return module
