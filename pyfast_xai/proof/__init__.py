"""The proof of kernels on a device: each against plain PyTorch on corner cases, then timed at shapes of real networks.

`python -m pyfast_xai.proof` is the process in which kernels run that a device has never run; `pyfast_xai.tuning.proofs`
starts it, watches it and keeps what it finds out.
"""
