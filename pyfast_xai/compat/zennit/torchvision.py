"""zennit's canonizers for networks of torchvision, which have nothing to do here."""

from pyfast_xai.compat.zennit.canonizers import Canonizer, CompositeCanonizer, SequentialMergeBatchNorm


class VGGCanonizer(SequentialMergeBatchNorm):
    """Stands for the batch norms of VGG.

    Example:
        >>> from pyfast_xai.compat.zennit.torchvision import VGGCanonizer
        >>> canonizer = VGGCanonizer()
    """


class ResNetBottleneckCanonizer(Canonizer):
    """Stands for the sums of bottleneck blocks.

    Example:
        >>> from pyfast_xai.compat.zennit.torchvision import ResNetBottleneckCanonizer
        >>> canonizer = ResNetBottleneckCanonizer()
    """


class ResNetBasicBlockCanonizer(Canonizer):
    """Stands for the sums of basic blocks.

    Example:
        >>> from pyfast_xai.compat.zennit.torchvision import ResNetBasicBlockCanonizer
        >>> canonizer = ResNetBasicBlockCanonizer()
    """


class ResNetCanonizer(CompositeCanonizer):
    """Stands for the batch norms and sums of ResNet.

    Example:
        >>> from pyfast_xai.compat.zennit.torchvision import ResNetCanonizer
        >>> len(ResNetCanonizer().canonizers)
        3
    """

    def __init__(self) -> None:
        super().__init__([SequentialMergeBatchNorm(), ResNetBottleneckCanonizer(), ResNetBasicBlockCanonizer()])
