"""What `bench/gpu_check.py` does, a step a file. Every step runs in a process of its own."""
