"""Writes docs/gpu-expectations.md: the least time of each kernel on a GPU, worked out from bytes and operations.

    python bench/gpu_expectations.py

Nothing is measured here, and no device is needed.
"""

import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from cuda_check import Kernel, read  # noqa: E402
from gpu.architectures import HERE, SIZE  # noqa: E402

from pyfast_xai.proof.examine import SIZES, network_calls  # noqa: E402
from pyfast_xai.proof.networks import Call  # noqa: E402

PAGE = ROOT / "docs" / "gpu-expectations.md"
# Bytes a second of the memory, and float32 operations a second without tensor cores, of NVIDIA's data sheets (SXM).
DEVICES = {"H100": (3.35e12, 67e12), "H200": (4.8e12, 67e12)}
NETWORKS = ("vgg16", "resnet50")
BATCH = SIZES[0].images
# Where the time will go, by reading the kernels.
BOTTLENECKS = {
    "relu_forward": "Memory. Each element is read and written once, in whole vectors; nothing is left to gain but by"
    " fusing it with the convolution before.",
    "relu_backward": "Memory, as in `relu_forward`; the bits are a sixteenth of the traffic in bfloat16.",
    "max_pool_forward": "Memory, if the overlap of windows is found in the L1 cache: a 3 x 3 window with stride 2 reads"
    " each element 2.25 times.",
    "max_pool_backward": "Memory, with the same reuse of the gradients and their bytes in the L1 cache.",
    "response_argmax": "Memory. Classes pass one after another, so that each thread waits for its loads in turn;"
    " occupancy hides that.",
    "conv_trace": "Latency. A point is one warp that adds products channel by channel; fields that lie apart are read"
    " from L2 or memory, and the operations are few.",
    "linear_trace": "Memory, for the list of results, which is as long as the inputs.",
    "points_union": "Memory: the bitmap is cleared, read twice and the list written. A sort of as many 64-bit keys"
    " moves 256 bytes a point and more.",
    "point_density": "Operations: two passes of a separable Gaussian, served from L1 and L2.",
    "sign_bits": "Memory: the weight is read once. Plain PyTorch writes and reads 64-bit words for every element, some"
    " twenty times the traffic.",
    "leading_singular": "Latency. A matrix is one program, whose passes follow one another; there are 132"
    " multiprocessors for 256 matrices, so that the Gram matrix stays in L2.",
}


def elements(name: str) -> dict[str, int]:
    """Returns how many elements pass the rectifiers and go into the pools of a network, for a batch."""
    counts = {"relu": 0, "pool": 0, "pooled": 0}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.ReLU):
            counts["relu"] += output.numel()
        else:
            counts["pool"] += inputs[0].numel()
            counts["pooled"] += output.numel()

    with torch.device("meta"):
        model = HERE[name]().eval()
        for module in model.modules():
            if isinstance(module, nn.ReLU | nn.MaxPool2d):
                module.register_forward_hook(count)
        model(torch.empty(BATCH, 3, SIZE, SIZE))
    return counts


def least(traffic: float, operations: float, device: str) -> str:
    """Returns the least time of some bytes and operations, in microseconds."""
    bandwidth, rate = DEVICES[device]
    time = 1e6 * max(traffic / bandwidth, operations / rate)
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def row(call: Call) -> str:
    bound = "memory" if call.traffic / DEVICES["H100"][0] >= call.operations / DEVICES["H100"][1] else "operations"
    dtype = str(call.dtype).removeprefix("torch.")
    times = " | ".join(least(call.traffic, call.operations, device) for device in DEVICES)
    return f"| {call.shape} | {dtype} | {call.traffic / 1e6:.4g} | {call.operations / 1e6:.4g} | {times} | {bound} |"


def machine_code(op: str, kernels: list[Kernel]) -> str:
    """Returns what compilers made of the kernels of an op for sm_90, in a sentence each."""
    source = ROOT / "kernels" / "triton" / f"{op}.py"
    sentences = []
    for kernel in kernels:
        path = source if kernel.compiler == "triton" else ROOT / "csrc" / "cuda" / f"{op}.cu"
        if kernel.capability == "90" and path.is_file() and f" {kernel.name}(" in path.read_text():
            loads = f", loads of up to {kernel.load_bits} bits" if kernel.load_bits else ""
            sentences.append(
                f"`{kernel.name}` ({kernel.compiler}): {kernel.registers} registers, {kernel.local} bytes of local"
                f" memory, {kernel.occupancy:.0%} of the warps{loads}."
            )
    return " ".join(sentences)


def page() -> str:
    kernels = read()
    lines = [
        "# What a GPU could do",
        "",
        "**All of this is computed, nothing is measured.** `python bench/gpu_expectations.py` writes this page from",
        "the bytes that a kernel must move at least, the operations it must do, and the data sheets of two devices:",
        "; ".join(
            f"{name}, {1e-12 * bandwidth:.3g} TB/s and {1e-12 * rate:.3g} T/s in float32"
            for name, (bandwidth, rate) in DEVICES.items()
        )
        + ".",
        "A kernel cannot be faster than the longer of the two times.",
        f"Batches have {BATCH} images of {SIZE} x {SIZE}. Registers and warps are those of `make cuda-check` for",
        "sm_90, of the worst variant of a kernel.",
        "",
        "## Whole networks",
        "",
        "All rectifiers and pools of a network, in bfloat16: what saliency adds to convolutions and their adjoints.",
        "",
        "| network | op | MB | least µs, H100 | least µs, H200 |",
        "|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        counts = elements(name)
        rectifiers = 4 * counts["relu"] + counts["relu"] // 8
        pools = 2 * counts["pool"] + 3 * counts["pooled"]
        for op, traffic in (
            *(("relu_forward", rectifiers), ("relu_backward", rectifiers)),
            *(("max_pool_forward", pools), ("max_pool_backward", pools)),
        ):
            times = " | ".join(least(traffic, 0, device) for device in DEVICES)
            lines.append(f"| {name} | `{op}` | {traffic / 1e6:.4g} | {times} |")
    for op, words in BOTTLENECKS.items():
        compiled = machine_code(op, kernels)
        lines += ["", f"## {op}", "", words, "", *([compiled, ""] if compiled else [])]
        lines += ["| shape | dtype | MB | millions of operations | least µs, H100 | least µs, H200 | bound by |"]
        lines += ["|---|---|---|---|---|---|---|", *map(row, network_calls(op, "cuda", SIZES[0]))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
