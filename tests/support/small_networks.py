"""Networks of torchvision's families, small enough for float64, with weights of the size that trained ones have."""

from torch import nn


def _resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def _densenet():
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)


def _efficientnet():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)]
    return EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=32)


def _convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5, layer_scale=0.5)


def _vit():
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def _swin():
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0,
    )  # fmt: skip


FAMILIES = {
    "resnet": _resnet,
    "densenet": _densenet,
    "efficientnet": _efficientnet,
    "convnext": _convnext,
    "vit": _vit,
    "swin": _swin,
}


def small(family, *, biases=True):
    """Returns a network of images `[N, 3, 16, 16]` and five classes, in float64 and evaluation mode.

    Args:
        family: of `FAMILIES`.
        biases: False for zeros wherever something constant is added.
    """
    net = FAMILIES[family]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            if biases:
                module.running_mean.normal_(std=0.3)
    for name, weight in net.named_parameters():
        if name.endswith("bias") or name in ("class_token", "encoder.pos_embedding"):
            weight.data.normal_(std=0.3) if biases else weight.data.zero_()
        elif "relative_position_bias" in name:
            weight.data.normal_(std=0.3)
        elif weight.dim() > 1:
            weight.data.normal_(std=(2 / weight[0].numel()) ** 0.5)
    return net.double().eval()
