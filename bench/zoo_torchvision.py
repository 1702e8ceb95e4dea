"""torchvision's families in the zoo, with fewer blocks and channels where their classes allow."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_nms import provide
from zoo_judge import Specimen
from zoo_models import CLASSES, Entry, drawn, middle_of_class, specimen, strongest

SIDE = 64


def entries() -> Iterator[Entry]:
    """Yields the classifiers of images and of videos, the segmenters and the detectors."""
    for family, (name, build) in CLASSIFIERS.items():
        yield Entry("torchvision", family, name, functools.partial(_classifier, name, build))
    for name, build in VIDEOS.items():
        yield Entry("torchvision video", name, name, functools.partial(_video, build))
    for name, build in SEGMENTERS.items():
        yield Entry("torchvision segmentation", name, name, functools.partial(_segmenter, build))
    for name, build in DETECTORS.items():
        yield Entry("torchvision detection", name, name, functools.partial(_detector, build))


def _classifier(name: str, build: Callable[[], nn.Module] | None) -> Specimen:
    torch.manual_seed(0)
    side = {"inception_v3": 96, "alexnet": 96}.get(name, SIDE)
    return specimen(build() if build else models.get_model(name, num_classes=CLASSES), drawn(3, side, side))


def _video(build: Callable[[], nn.Module]) -> Specimen:
    torch.manual_seed(0)
    return specimen(build(), drawn(3, 8, 32, 32))


def _segmenter(build: Callable[[], nn.Module]) -> Specimen:
    torch.manual_seed(0)
    return specimen(build(), drawn(3, SIDE, SIDE), middle_of_class)


def _detector(build: Callable[[], nn.Module]) -> Specimen:
    provide()
    torch.manual_seed(0)
    made = specimen(build().eval(), drawn(3, SIDE, 96).sigmoid())
    if isinstance(made.model, detection.FCOS):  # random distances to the sides of boxes are often none
        nn.init.constant_(made.model.head.regression_head.bbox_reg.bias, 2)
    made.target = strongest(made.model.double(), made.images.double())
    return made


# Classifiers


def _without_auxiliaries(name: str) -> nn.Module:
    return models.get_model(name, num_classes=CLASSES, init_weights=False, aux_logits=False)


def _with_narrow_classifier(model: nn.Module) -> nn.Module:
    """Returns a network whose hidden layers behind the convolutions have 64 features instead of 4096."""
    places = [number for number, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    widths = (model.classifier[places[0]].in_features, 64, 64, CLASSES)
    for number, place in enumerate(places):
        model.classifier[place] = nn.Linear(widths[number], widths[number + 1])
    return model


def _alexnet() -> nn.Module:
    with torch.device("meta"):
        model = models.AlexNet()
    return _with_narrow_classifier(model).to_empty(device="cpu").apply(_drawn_anew)


def _vgg() -> nn.Module:
    with torch.device("meta"):
        model = models.VGG(models.vgg.make_layers([16, "M", 32, "M", 32, 48, "M", 512, "M"], batch_norm=True))
    return _with_narrow_classifier(model).to_empty(device="cpu").apply(_drawn_anew)


def _drawn_anew(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _convnext() -> nn.Module:
    widths = (16, 32, 48, 64)
    return models.ConvNeXt(
        [
            models.convnext.CNBlockConfig(width, after, 1)
            for width, after in zip(widths, (*widths[1:], None), strict=True)
        ],
        num_classes=CLASSES,
    )


def _efficientnet() -> nn.Module:
    blocks, last = models.efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.25)
    return models.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=last)


def _efficientnet_v2() -> nn.Module:
    fused, plain = models.efficientnet.FusedMBConvConfig, models.efficientnet.MBConvConfig
    blocks = [
        fused(1, 3, 1, 16, 16, 1),
        fused(4, 3, 2, 16, 24, 1),
        plain(4, 3, 2, 24, 32, 1),
        plain(6, 3, 2, 32, 48, 1),
    ]
    return models.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=64)


def _regnet(squeezed: float | None) -> nn.Module:
    parameters = models.regnet.BlockParams.from_init_params(6, 24, 16.0, 2.5, 8, se_ratio=squeezed)
    return models.RegNet(parameters, num_classes=CLASSES)


def _resnet(block: type[nn.Module] = models.resnet.BasicBlock, **settings: Any) -> nn.Module:
    return models.ResNet(block, [1, 1, 1, 1], **{"num_classes": CLASSES, **settings})


def _bottlenecks(**settings: Any) -> nn.Module:
    return _resnet(models.resnet.Bottleneck, **settings)


def _swin(block: type[nn.Module], merging: type[nn.Module]) -> nn.Module:
    return models.SwinTransformer(
        **{"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [2, 2, 4], "window_size": [4, 4]},
        **{"num_classes": CLASSES, "block": block, "downsample_layer": merging, "stochastic_depth_prob": 0.0},
    )


_MODULES = models.swin_transformer
CLASSIFIERS: dict[str, tuple[str, Callable[[], nn.Module] | None]] = {
    "alexnet": ("alexnet", _alexnet),
    "convnext": ("convnext_tiny", _convnext),
    "densenet": (
        "densenet121",
        lambda: models.DenseNet(8, (2, 2, 2, 2), num_init_features=16, num_classes=CLASSES),
    ),
    "efficientnet": ("efficientnet_b0", _efficientnet),
    "efficientnet_v2": ("efficientnet_v2_s", _efficientnet_v2),
    "googlenet": ("googlenet", functools.partial(_without_auxiliaries, "googlenet")),
    "inception_v3": ("inception_v3", functools.partial(_without_auxiliaries, "inception_v3")),
    "maxvit": (
        "maxvit_t",
        lambda: models.MaxVit((SIDE, SIDE), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES),
    ),
    "mnasnet": ("mnasnet0_5", None),
    "mobilenet_v2": ("mobilenet_v2", None),
    "mobilenet_v3": ("mobilenet_v3_small", None),
    "regnet_x": ("regnet_x_400mf", functools.partial(_regnet, None)),
    "regnet_y": ("regnet_y_400mf", functools.partial(_regnet, 0.25)),
    "resnet": ("resnet18", _resnet),
    "resnext": ("resnext50_32x4d", functools.partial(_bottlenecks, groups=32, width_per_group=4)),
    "shufflenet_v2": ("shufflenet_v2_x0_5", None),
    "squeezenet": ("squeezenet1_1", None),
    "swin": ("swin_t", functools.partial(_swin, _MODULES.SwinTransformerBlock, _MODULES.PatchMerging)),
    "swin_v2": ("swin_v2_t", functools.partial(_swin, _MODULES.SwinTransformerBlockV2, _MODULES.PatchMergingV2)),
    "vgg": ("vgg11_bn", _vgg),
    "vit": ("vit_b_32", lambda: models.VisionTransformer(SIDE, 16, 3, 4, 32, 64, num_classes=CLASSES)),
    "wide_resnet": ("wide_resnet50_2", functools.partial(_bottlenecks, width_per_group=128)),
}

# Classifiers of videos


def _residual_video(convolution: type[nn.Module]) -> nn.Module:
    resnet = models.video.resnet
    convolutions = [resnet.Conv3DSimple, *[convolution] * 3]
    return models.video.resnet.VideoResNet(resnet.BasicBlock, convolutions, [1, 1, 1, 1], resnet.BasicStem, CLASSES)


def _swin3d() -> nn.Module:
    return models.video.SwinTransformer3d(
        **{"patch_size": [2, 4, 4], "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": [2, 4, 4]},
        **{"num_classes": CLASSES, "stochastic_depth_prob": 0.0},
    )


VIDEOS: dict[str, Callable[[], nn.Module]] = {
    "mc3_18": lambda: _residual_video(models.video.resnet.Conv3DNoTemporal),
    "r3d_18": lambda: _residual_video(models.video.resnet.Conv3DSimple),
    "swin3d_t": _swin3d,
}

# Segmenters on a small residual network


def _features() -> nn.Module:
    return models._utils.IntermediateLayerGetter(_resnet(), {"layer2": "out"})


SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "deeplabv3_resnet50": lambda: segmentation.DeepLabV3(
        _features(), segmentation.deeplabv3.DeepLabHead(128, CLASSES, (2, 4, 6))
    ),
    "fcn_resnet50": lambda: segmentation.FCN(_features(), segmentation.fcn.FCNHead(128, CLASSES)),
    "lraspp_mobilenet_v3_large": lambda: segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ),
}

# Detectors on a small residual network

_SIZES = {"min_size": SIDE, "max_size": 96}
_FEW = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 10, "box_detections_per_img": 5}


def _pyramid(first: int, extra: nn.Module | None = None, width: int = 32) -> nn.Module:
    layers = {f"layer{number}": str(number - first) for number in range(first, 5)}
    return BackboneWithFPN(_resnet(), layers, [64, 128, 256, 512][first - 1 :], width, extra)


def _ssd() -> nn.Module:
    boxes = detection.anchor_utils.DefaultBoxGenerator([[2], [2, 3], [2]])
    pyramid = _pyramid(3)
    pyramid.out_channels = [32, 32, 32]  # of its three maps: this class wants a list
    return detection.ssd.SSD(pyramid, boxes, (SIDE, SIDE), CLASSES, topk_candidates=50, detections_per_img=5)


def _ssdlite() -> nn.Module:
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    model.transform.fixed_size = (SIDE, SIDE)
    return model


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn_resnet50_fpn": lambda: detection.FasterRCNN(_pyramid(1), CLASSES, **_SIZES, **_FEW),
    "fcos_resnet50_fpn": lambda: detection.FCOS(
        _pyramid(2, LastLevelP6P7(64, 64), 64), CLASSES, **_SIZES, topk_candidates=50, detections_per_img=5
    ),  # 64 channels: a group norm of 32 groups takes no single number
    "keypointrcnn_resnet50_fpn": lambda: detection.KeypointRCNN(_pyramid(1), CLASSES, **_SIZES, **_FEW),
    "maskrcnn_resnet50_fpn": lambda: detection.MaskRCNN(_pyramid(1), CLASSES, **_SIZES, **_FEW),
    "retinanet_resnet50_fpn": lambda: detection.RetinaNet(
        _pyramid(2, LastLevelP6P7(32, 32)), CLASSES, **_SIZES, topk_candidates=50, detections_per_img=5
    ),
    "ssd300_vgg16": _ssd,
    "ssdlite320_mobilenet_v3_large": _ssdlite,
}
