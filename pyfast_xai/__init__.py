"""Fast visual explanations of convolutional networks on PyTorch."""

__version__ = "0.1.0"
