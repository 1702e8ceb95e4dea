"""The reasons for which a test may be skipped where all of them are wanted, as in CI: `PYFAST_XAI_ALL_TESTS=1`."""

import re

# Packages that no extra of the tests installs.
PACKAGES = {
    "accelerate": "moves weights of large models to and from a device",
    "cupyx": "needs a device",
    "fiftyone": "hundreds of MB, and a database",
    "moto": "a server of S3",
    "s3fs": "as moto",
    "quantus": "its requirements would replace the pinned ones; its numbers are those of the oracles",
    "ultralytics": "under the AGPL; a YOLO is tried by hand",
    "timm": "torchvision has networks of these kinds",
    "yaml": "checks what FiftyOne's export writes",
}
REASONS = (
    # Hardware and systems.
    r"needs a device|needs two devices|needs 40 GiB|there is a device|no Triton for this device",
    r"an assertion on a device has no numbers|PyTorch speaks of .*|the patterns are of x86 assembly",
    r"processes do not fork here|this system does not fork|this system has no /proc",
    r"root may write everywhere|root reads everything|the allocator of this system keeps memory by itself",
    r"this PyTorch has no oneDNN|weights are packed by oneDNN|convolutions are not packed, .*",
    r"needs readelf of binutils|objdump is not installed|before Triton 3.9 its interpreter .*",
    # A kernel that was not written: each op has the backends that serve it best.
    r"(.*: )?(no kernel was written for it|it has no kernels for \w+|the compiled library has no such kernel)",
    r"no \w+ on [\w-]+",
    # Methods to which a test does not apply.
    r"knows no classes|its forward stops before.*|not here",
    # Data that no package brings.
    r"no data at .*; set PYFAST_XAI_DATA",
    r"bench/ is not part of a source distribution|runs from the source tree",
)


def allowed(reason: str) -> bool:
    """Returns whether a test may be skipped for this reason."""
    reason = reason.removeprefix("Skipped: ")
    if missing := re.match(r"could not import '(\w+)", reason):
        return missing[1] in PACKAGES
    if missing := re.match(r"(\w+) is not installed$", reason):
        return missing[1] in PACKAGES
    return any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in REASONS)
