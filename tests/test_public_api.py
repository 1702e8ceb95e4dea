import subprocess
import sys

import pytest

import pyfast_xai


def test_every_public_name_is_there():
    assert sorted(pyfast_xai.__all__) == [
        "BackendError", "CAM", "CLEAR", "CNNFixations", "DeconvNet", "EigenCAM", "ExcitationBackprop", "Explainer",
        "Explanation", "FGVis", "GradCAM", "GradCAMPlusPlus", "GuidedBackprop", "GuidedGradCAM", "InputError",
        "InputXGradient", "IntegratedGradients", "LIME", "MeaningfulPerturbation", "Occlusion", "RISE", "Saliency",
        "SmoothGrad", "UnsupportedOpError", "__version__", "backend", "keep_freed_memory", "record", "replay",
    ]  # fmt: skip
    for name in pyfast_xai.__all__:
        assert getattr(pyfast_xai, name) is not None
    assert set(pyfast_xai.__all__) <= set(dir(pyfast_xai))


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'SaliencyMaps'"):
        pyfast_xai.SaliencyMaps  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pyfast_xai; print([m for m in ('torch', 'numba', 'scipy', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_explaining_imports_no_compiler():
    code = (
        "import sys, torch, pyfast_xai;"
        "before = set(sys.modules);"
        "pyfast_xai.CNNFixations(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval());"
        "print([m for m in ('numba', 'triton', 'matplotlib', 'typer') if m in set(sys.modules) - before])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
