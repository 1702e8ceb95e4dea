"""The proof of kernels on a device: each against plain PyTorch on corner cases, then timed at shapes of real networks.

`python -m pyfast_xai.proof` is the process that runs kernels which a device has never run; `pyfast_xai.tuning.proofs`
starts it, monitors it and stores the verdicts.
"""
