"""zennit's abstract types of modules."""

from typing import Any

from torch import nn


class _Any(type):
    """A type that instances of other types are instances of."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__dict__.get("types", ())) or type.__instancecheck__(cls, instance)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, cls.__dict__.get("types", ())) or type.__subclasscheck__(cls, subclass)


class ConvolutionTranspose(metaclass=_Any):
    """Transposed convolutions."""

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ConvolutionStandard(metaclass=_Any):
    """Convolutions that are not transposed."""

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Convolution(metaclass=_Any):
    """Convolutions."""

    types = (*ConvolutionStandard.types, *ConvolutionTranspose.types)


class Linear(metaclass=_Any):
    """Convolutions and linear layers."""

    types = (*Convolution.types, nn.Linear)


class BatchNorm(metaclass=_Any):
    """Batch norms."""

    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class AvgPool(metaclass=_Any):
    """Average pools."""

    types = (
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    )


class MaxPool(metaclass=_Any):
    """Max-pools."""

    types = (
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    )


class Activation(metaclass=_Any):
    """Elementwise activation functions."""

    types = (
        *(nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.PReLU),
        *(nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink),
        *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    )
