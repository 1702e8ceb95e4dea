"""The errors of this library: one sentence each, which names the argument, what was expected and what came."""


class PyFastXaiError(Exception):
    """Base of all errors that this library raises on purpose.

    Example:
        >>> import torch
        >>> from pyfast_xai import PyFastXaiError, Saliency, demo
        >>> try:
        ...     Saliency(demo.load())(torch.rand(3, 96, 96))
        ... except PyFastXaiError as error:
        ...     print(error)
        images must have shape [N, C, H, W], got [3, 96, 96]: give images[None]
    """


class InputError(PyFastXaiError, ValueError):
    """An argument has the wrong shape, dtype, value or name.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo
        >>> Saliency(demo.load())(torch.rand(3, 96, 96))
        Traceback (most recent call last):
        pyfast_xai.errors.InputError: images must have shape [N, C, H, W], got [3, 96, 96]: give images[None]
    """


class BackendError(PyFastXaiError, RuntimeError):
    """A backend the user named cannot serve an op here.

    Example:
        >>> import torch
        >>> import pyfast_xai
        >>> from pyfast_xai import ops
        >>> with pyfast_xai.backend("cuda"):
        ...     ops.sign_bits(torch.ones(1, 64))
        Traceback (most recent call last):
        pyfast_xai.errors.BackendError: backend 'cuda' cannot serve sign_bits on cpu: it has no kernels for cpu
    """


class UnsupportedOpError(PyFastXaiError, NotImplementedError):
    """A reading met an ATen op it has no rule for.

    Example:
        >>> import torch
        >>> from pyfast_xai import CNNFixations
        >>> class Sorting(torch.nn.Module):
        ...     def forward(self, images):
        ...         return images.flatten(1).sort().values
        >>> CNNFixations(Sorting().eval())(torch.rand(1, 3, 4, 4))
        Traceback (most recent call last):
        pyfast_xai.errors.UnsupportedOpError: CNN-Fixations has no evidence rule for aten::sort, ...
    """
