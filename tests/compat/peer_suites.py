"""The peers' own test suites, run on our classes: `make peer-suites`.

The tests are fetched when this runs and are no part of this repository: from source distributions on PyPI, from git
where these hold no tests, or from a folder with `captum`, `grad-cam`, `torchcam` and `zennit` that `PEER_SUITES` names.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent


@dataclass
class Suite:
    """Tests of a peer.

    Attributes:
        peer: its name on PyPI.
        version: whose tests these are.
        files: those that test what is replaced.
        only: what pytest selects of them.
        git: where they are, for a source distribution without tests.
        expected: tests that fail, and why: a regular expression of the name and the reason, and a text.
    """

    peer: str
    version: str
    files: tuple[str, ...]
    only: str = ""
    git: tuple[str, str] | None = None
    expected: dict[str, str] = field(default_factory=dict)


CAPTUM = ("https://github.com/meta-pytorch/captum", "v0.9.0")
SUITES = [
    Suite(
        "captum",
        "0.9.0",
        ("tests/attr", "tests/metrics"),
        # Language models, statistics and loops over data sets are not replaced.
        "not (llm or stat or summarizer or dataloader)",
        CAPTUM,
        {
            r"test_lrp_creator_activation": "TypeError for a layer without a rule, which here has one",
            r"test_lrp_repeated_module|test_reusable_modules": "modules may run twice; there RuntimeError",
            r"test_lrp_multi_inputs": "there each part of a sum has the relevance of the whole sum; here they share it",
            r"softmax_classification_batch": "float32 loses differences of logits of 1e5; float64 adds up",
            r"InputLayerWrapper": "looks behind a decorator, `attribute.__wrapped__`",
            r"min_examples_in_group": "sets what is private, `_min_examples_per_batch_grouped`",
            r"test_feature_permutation.*future": "torch.futures.Future is returned, there its base class",
            r"test_occlusion.*futures_not_implemented": "which here is implemented",
        },
    ),
    Suite(
        "grad-cam",
        "1.5.7",
        ("tests",),
        expected={
            r"accepts_3d_activations": "calls a method on None with arrays; here it takes tensors",
            r"htcore_is_single_underscore": "reads the source text of a base",
        },
    ),
    Suite(
        "torchcam",
        "0.5.0",
        (
            *("tests/test_methods_activation.py", "tests/test_methods_gradient.py", "tests/test_methods_core.py"),
            *("tests/test_utils.py", "tests/test_methods_transformer.py", "tests/test_metrics.py"),
        ),
        "",
        ("https://github.com/frgfm/torch-cam", "v0.5.0"),
        {
            r"test_cam_eval_mode_restores_state": "calls a private method, `_eval_mode`",
            r"test_cam_normalize": "calls a private function, `_normalize`",
            r"Regex pattern did not match": "the same kind of error, in other words",
            r"has no attribute '(_masked_input_chunk|_backprop|_compute_curves|hook_\w+)'": "reads what is private",
            r"has no attribute 'is_nested'": "hands None to attention, which PyTorch's own error names",
            r"assert .* == .*(RefineCAM\(|SmoothGradCA)": "compares the text of `repr`",
            r"lifecycle_repr.* assert 1 == 2": "counts hooks on the layer, of which one is enough here",
            r"legrad_rejects_incompatible": (
                "attention that returns wrong weights or tokens: weights are read from what was computed here, and the "
                "module is not asked for them"
            ),
        },
    ),
    Suite(
        "zennit",
        "0.5.1",
        ("tests/test_rules.py", "tests/test_attribution.py"),
        # The others test hooks and canonizers that rewrite modules, of which there are none.
        "",
        expected={
            r"\[(Softmax|Tanh|Sigmoid)-": "a rectifier's rule on what does not rectify, which here keeps its gradient",
            r"test_gradient_attributor_inactive": "reads hooks of a composite, of which there are none",
        },
    ),
]


def fetch(suite: Suite, into: Path) -> Path:
    """The folder with the tests of a peer."""
    options = os.environ.get("PEER_SUITES")
    if options:
        return Path(options) / suite.peer
    target = into / f"{suite.peer}-{suite.version}"
    if target.is_dir():
        return target
    into.mkdir(parents=True, exist_ok=True)
    if suite.git is not None:
        url, tag = suite.git
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "--branch", tag, url, str(target)], check=True)
        return target
    with tempfile.TemporaryDirectory() as folder:
        expected = f"{suite.peer}=={suite.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*pip, expected], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        shutil.move(next(path for path in Path(folder).iterdir() if path.is_dir()), target)
    return target


def run(suite: Suite, source: Path, log: Path, seconds: float, arguments: list[str]) -> list[tuple[str, str, str]]:
    """Name, outcome and reason of every test. `log` has a line for each test as soon as it ends."""
    with tempfile.TemporaryDirectory() as folder:
        # Away from the peer's source, which would be imported in place of what is installed.
        shutil.copytree(source / "tests", Path(folder) / "tests")
        _picture(Path(folder) / "examples")
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "peer_stand_ins", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", "-o", "filterwarnings=", f"--junitxml={report}", "-k", suite.only, *suite.files]
        command += ["-m", "not extended"]  # zennit's word for more seeds of the same
        paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"PEER_STAND_INS": suite.peer, "PEER_TEST_SECONDS": str(seconds)}
        with log.open("w") as output:
            subprocess.run([*command, *arguments], cwd=folder, env=environment, stdout=output, stderr=output)
        if not report.is_file():
            sys.exit(f"{suite.peer}: pytest did not run\n{log.read_text()[-6000:]}")
        return [_outcome(case) for case in ElementTree.parse(report).getroot().iter("testcase")]


def _picture(folder: Path) -> None:
    """The picture that tests of pytorch-grad-cam read, whatever is on it."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "both.png")


def _outcome(case: ElementTree.Element) -> tuple[str, str, str]:
    name = f"{case.get('classname')}.{case.get('name')}"
    for outcome in ("failure", "error", "skipped"):
        result = case.find(outcome)
        if result is not None:
            message = (result.get("message") or "").strip().splitlines()
            return name, outcome, message[0] if message else ""
    return name, "passed", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", help="some of them")
    parser.add_argument("--into", type=Path, default=Path("out/peer-suites"), help="where tests are fetched to")
    parser.add_argument("--pytest", action="append", default=[], help="an argument for pytest")
    parser.add_argument("--seconds", type=float, default=600, help="a test that runs longer fails")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    surprises = 0
    for suite in SUITES:
        if options.peers and suite.peer not in options.peers:
            continue
        log = options.into / f"{suite.peer}-{suite.version}.log"
        print(f"{suite.peer} {suite.version}: {log} has each test as it ends", flush=True)
        outcomes = run(suite, fetch(suite, options.into), log, options.seconds, options.pytest)
        counts = {kind: sum(one == kind for _, one, _ in outcomes) for kind in ("passed", "skipped")}
        failed = [(name, reason) for name, outcome, reason in outcomes if outcome in ("failure", "error")]
        output = f"{counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped"
        print(f"{suite.peer} {suite.version}: {output}")
        for name, reason in failed:
            why = next((why for pattern, why in suite.expected.items() if re.search(pattern, f"{name} {reason}")), None)
            surprises += why is None
            print(f"  {name}: {why or f'UNEXPECTED {reason}'}")
    sys.exit(1 if surprises else 0)


if __name__ == "__main__":
    main()
