"""`python -m pyfast_xai.proof`: reads a request from standard input and writes messages, a line of JSON each."""

import json
import os
import sys

import torch

from pyfast_xai.proof.examine import DeviceLostError, Examination


def main() -> None:
    """Examines the kernels of the request."""
    request = json.load(sys.stdin)
    # Output of kernels, such as of a device-side assertion, goes to standard error.
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    examination = Examination(
        device,
        request["rounds"],
        lambda message: print(json.dumps(message), file=messages, flush=True),  # another process reads it
        request["small"],
    )
    try:
        with torch.inference_mode():
            examination.run(request["ops"])
    except DeviceLostError as error:
        sys.exit(str(error))  # the failure was reported; another process continues


if __name__ == "__main__":
    main()
