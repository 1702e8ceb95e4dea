"""Speed and memory of `pyfast_xai.compat` beside the peers whose classes it stands for: `make bench-peers`.

Times are processor seconds of all threads, the least of runs taken in turns in one process, which others that use the
machine disturb least; memory is the increment of a process's peak over the loaded model, each in a process of its own.
Linux counts it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

Run = Callable[[], Any]


def features(library: Any, name: str, model: Any, images: Any, grid: int) -> Run:
    """The cells of a grid as features: 4 of 2 x 2, of which there are 8 samples or 2 orders, or 50 samples of more."""
    import torch

    side = torch.arange(224) * grid // 224
    settings: dict[str, Any] = {"feature_mask": (grid * side[:, None] + side)[None, None]}
    samples = {"KernelShap": 8 if grid == 2 else 50, "ShapleyValueSampling": 2}
    if name in samples:
        settings["n_samples"] = samples[name]
    target = list(range(len(images)))
    if library.__name__ == "pyfast_xai":
        method = getattr(library, name)(model, score="logit", accelerate=False, **settings)
        return lambda: method(images.clone(), target)
    method = getattr(library, name)(model)
    return lambda: method.attribute(images.clone(), target=target, **settings)


def captum(library: Any, name: str, model: Any, images: Any, grid: int) -> Run:
    if name in FEATURES:
        return features(library, name, model, images, grid)
    target = list(range(len(images)))
    layer = [model.layer4] if "Cam" in name else [model.layer3] if name.startswith("Layer") else []
    method = getattr(library, name)(model, *layer)
    settings: dict[str, Any] = {"target": target}
    if name == "Occlusion":
        window = (3, 224 // grid, 224 // grid)
        settings |= {"sliding_window_shapes": window, "strides": window, "perturbations_per_eval": 4}
    if name == "LayerIntegratedGradients":
        settings |= {"n_steps": 8, "internal_batch_size": 8}
    if name in ("DeepLiftShap", "GradientShap"):
        settings["baselines"] = images[:2].flip(3)
    if name == "GradientShap":
        settings["n_samples"] = 2
    if name == "IntegratedGradients":
        settings |= {"n_steps": 4, "internal_batch_size": 8}
    return lambda: method.attribute(images.clone(), **settings)


def grad_cam(library: Any, targets: Any, name: str, model: Any, images: Any) -> Run:
    if name == "GuidedBackpropReLUModel":
        return lambda: library.GuidedBackpropReLUModel(model, device="cpu")(images[:1].clone(), 3)
    chosen = [targets.ClassifierOutputTarget(i) for i in range(len(images))]
    # A mask for each of 256 channels, and not of 2048.
    layer = model.layer1 if name in ("ScoreCAM", "AblationCAM") else model.layer4

    def run() -> Any:
        with getattr(library, name)(model, [layer]) as cam:
            return cam(images, chosen)

    return run


def torchcam(library: Any, name: str, model: Any, images: Any) -> Run:
    def run() -> Any:
        with getattr(library, name)(model, "layer4") as extractor:
            return extractor(list(range(len(images))), model(images))

    return run


def zennit(package: str, name: str, model: Any, images: Any) -> Run:
    import importlib

    import torch

    composites, attribution = (importlib.import_module(f"{package}.{part}") for part in ("composites", "attribution"))
    canonizer = importlib.import_module(f"{package}.torchvision").ResNetCanonizer()
    composite = getattr(composites, name)(canonizers=[canonizer])

    def run() -> Any:
        with attribution.Gradient(model, composite) as attributor:
            return attributor(images.clone().requires_grad_(), torch.eye(1000)[: len(images)])

    return run


FEATURES = ("FeatureAblation", "KernelShap", "ShapleyValueSampling")
CASES = {
    "captum": (
        *("Saliency", "GuidedBackprop", "Deconvolution", "LayerGradCam", "GuidedGradCam"),
        *(
            "IntegratedGradients",
            "LayerIntegratedGradients",
            "Occlusion",
            "DeepLift",
            "DeepLiftShap",
            "GradientShap",
            *FEATURES,
        ),
        *(f"pyfast_xai.{name}" for name in FEATURES),
    ),
    "grad_cam": (
        *("GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM", "GradCAMElementWise", "EigenCAM"),
        *("EigenGradCAM", "FullGrad", "ScoreCAM", "AblationCAM", "GuidedBackpropReLUModel"),
    ),
    "torchcam": ("GradCAM", "GradCAMpp", "LayerCAM", "XGradCAM"),
    "zennit": ("EpsilonPlus",),
}


def prepare(
    peer: str, name: str, who: str, batch: int, threads: int = 1, grid: int = 2, accelerate: bool | str = False
) -> Run:
    """The call to measure."""
    import importlib

    import torch

    importlib.import_module("conftest")  # torchvision beside a CPU build of torch
    models = importlib.import_module("torchvision.models")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    # Captum's DeepLift takes no module twice, as torchvision's ResNets use their rectifiers.
    model = getattr(models, "vgg11" if name.startswith("DeepLift") else "resnet50")(weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    uses_compat = who == "pyfast_xai"
    importlib.import_module("pyfast_xai.compat").accelerate(accelerate)
    if peer == "captum" and uses_compat and name.startswith("pyfast_xai."):
        return features(importlib.import_module("pyfast_xai"), name.removeprefix("pyfast_xai."), model, images, grid)
    if peer == "captum":
        name = name.removeprefix("pyfast_xai.")
        library = importlib.import_module("pyfast_xai.compat.captum" if uses_compat else "captum.attr")
        return captum(library, name, model, images, grid)
    if peer == "grad_cam":
        library = importlib.import_module("pyfast_xai.compat.grad_cam" if uses_compat else "pytorch_grad_cam")
        targets = library if uses_compat else importlib.import_module("pytorch_grad_cam.utils.model_targets")
        return grad_cam(library, targets, name, model, images)
    if peer == "zennit":
        return zennit("pyfast_xai.compat.zennit" if uses_compat else "zennit", name, model, images)
    library = importlib.import_module("pyfast_xai.compat.torchcam" if uses_compat else "torchcam.methods")
    return torchcam(library, name, model, images)


def seconds(
    peer: str, name: str, batch: int, rounds: int, threads: int, grid: int, accelerate: bool | str
) -> tuple[float, float]:
    """Processor time of both, the least of some runs in turns."""
    runs = [prepare(peer, name, who, batch, threads, grid, accelerate) for who in ("pyfast_xai", peer)]
    used: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for times, run in zip(used, runs, strict=True):
            start = time.process_time()
            run()
            if turn:  # the first loads code and packs weights
                times.append(time.process_time() - start)
    return min(used[0]), min(used[1])


def increment(peer: str, name: str, who: str, batch: int) -> float:
    """Peak above the loaded model in this process, in MiB."""
    run = prepare(peer, name, who, batch)
    prepare(peer, name, who, 1)()  # libraries load their code on first use
    Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    before = peak()
    run()
    return (peak() - before) / 1024


def add_row(path: Path, peer: str, name: str, batch: int, threads: int, ours: float, other: float) -> None:
    """Adds the times of both to a table, with what they depend on."""
    import torch

    if not path.exists():
        path.write_text("date,instructions,threads,batch,peer,name,seconds,peer_seconds,ratio,load\n")
    setting = [time.strftime("%Y-%m-%d"), torch.backends.cpu.get_cpu_capability(), threads, batch, peer, name]
    load = f"{os.getloadavg()[0]:.0f}"
    row = ",".join(map(str, [*setting, f"{ours:.2f}", f"{other:.2f}", f"{ours / other:.2f}", load]))
    print(row, flush=True)
    with path.open("a") as file:
        file.write(row + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", choices=CASES)
    parser.add_argument("--names", nargs="*", help="some of the peer's classes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grid", type=int, default=2, help="features, or windows, along a side of the images")
    parser.add_argument("--auto", action="store_true", help="replay the model as by default, see compat.accelerate")
    parser.add_argument("--csv", type=Path, help="where rows of the times are added; memory is then left out")
    parser.add_argument("--one", nargs=3, metavar=("PEER", "NAME", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(increment(*options.one, options.batch)))
        return
    print(f"ResNet-50 (DeepLift: VGG-11), batch of {options.batch}, 224 x 224, threads: {options.threads}")
    if not options.csv:
        print("| | seconds here | there | times faster | MiB here | there |\n|---|---|---|---|---|---|")
    for peer, names in CASES.items():
        for name in names if options.peer in (None, peer) else ():
            if options.names and name not in options.names:
                continue
            accelerate = "auto" if options.auto else False
            ours, other = seconds(peer, name, options.batch, options.rounds, options.threads, options.grid, accelerate)
            if options.csv:
                shown = f"{name} of a {options.grid} x {options.grid} grid" if options.grid != 2 else name
                shown += " by default" if options.auto else ""
                add_row(options.csv, peer, shown, options.batch, options.threads, ours, other)
                continue
            command = [sys.executable, __file__, "--batch", str(options.batch), "--one", peer, name]
            memory = [
                json.loads(subprocess.run([*command, who], capture_output=True, text=True, check=True).stdout)
                for who in ("pyfast_xai", peer)
            ]
            print(
                f"| {peer} {name} | {ours:.2f} | {other:.2f} | {other / ours:.1f} "
                f"| {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
