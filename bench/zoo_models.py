"""The models of the zoo: one small one of every family of the libraries that people use, with random weights."""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_judge import Specimen, liven
from zoo_thin import thinned

from pyfast_xai import DetectionTarget, ZeroShotClassifier
from pyfast_xai.explainers.common.detections import detections_in

CLASSES = 10
SIDES = (64, 96, 128, 160, 224, 256)  # of images, the first that a network takes
COUNTED = Path(__file__).parent / "data" / "zoo_timm.json"


@dataclass
class Entry:
    """A family of a library, its smallest model, and what builds it."""

    library: str
    family: str
    model: str
    build: Callable[[], Specimen]


def entries() -> list[Entry]:
    """Returns all models of the libraries that are installed."""
    return [
        *_timm(),
        *_segmentation_models(),
        *_ultralytics(),
        *_torchvision(),
        *_transformers(),
        *_open_clip(),
        *_monai(),
    ]


def _has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def specimen(model: nn.Module, images: Tensor, target: Any = None) -> Specimen:
    """Returns a model with lively weights in evaluation mode."""
    liven(model, images)
    return Specimen(model.eval(), images[:2], target)


def drawn(*size: int) -> Tensor:
    """Returns four images; the first two are explained."""
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(2))


def middle_of_class(output: Any) -> Tensor:
    """Returns the mean score of class 1 over the middle of a map of classes, `[N]`."""
    scores = output
    while not isinstance(scores, Tensor):
        if isinstance(scores, (list, tuple)):
            scores = scores[0]
        else:
            scores = next(scores[name] for name in ("out", "logits") if name in scores)
    height, width = scores.shape[2:]
    return scores[:, 1, height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None].mean((1, 2))


def middle_feature(output: Tensor) -> Tensor:
    """Returns one channel of tokens `[N, T, C]`, averaged over them, `[N]`."""
    return output[:, :, output.shape[2] // 2].mean(1)


def strongest(model: nn.Module, images: Tensor, **settings: Any) -> DetectionTarget:
    """Returns the strongest detection of each of the first two images as a target."""
    with torch.no_grad():
        read = {"size": settings.get("size"), "activation": settings.get("activation", "softmax")}
        result = detections_in(model(images[:2]), **read, classes=settings.get("n_classes"))
    boxes, classes = [], []
    for one in result:
        wide = ((one.boxes[:, 2:] - one.boxes[:, :2]) > 1).all(1)  # others, cut off at the edge, overlap nothing
        best = int((one.probabilities.amax(1) * wide).argmax())
        low, high = one.boxes[best].view(2, 2)
        boxes.append(torch.cat([low, torch.maximum(high, low + 1)]).detach())
        classes.append(int(one.probabilities[best].argmax()))
    return DetectionTarget(torch.stack(boxes), classes, **settings)


# timm


def count_timm() -> None:
    """Writes the smallest model of every module of timm, counted on the meta device, which takes ten minutes."""
    import timm

    result = {}
    for module in sorted(timm.list_modules()):
        sizes = []
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    model = timm.create_model(name, num_classes=CLASSES)
                except (NotImplementedError, RuntimeError):  # a network that reads numbers while it is made
                    continue
            sizes.append((sum(parameter.numel() for parameter in model.parameters()), name))
        if sizes:
            result[module] = min(sizes)[1]
    COUNTED.write_text(json.dumps(result, indent=0) + "\n")


# What makes a family's smallest model smaller still; of the others it is small enough or cannot be changed.
_TOKENS = {"embed_dim": 48, "depth": 2, "num_heads": 3}
_STAGES = {"depths": (1, 1, 1, 1)}
_WIDTHS = (16, 32, 48, 64)
_WINDOWS = {"embed_dim": 32, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
REDUCED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("beit", "deepseek_vit", "eva", "naflexvit", "qwen3_vit", "vision_transformer_hybrid"), _TOKENS),
    "cait": {"embed_dim": 48, "depth": 2, "depth_token_only": 1},
    "coat": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    "convit": {"depth": 3, "local_up_to_layer": 2},
    "crossvit": {"depth": ((1, 1, 1),)},
    "csatv2": {"depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
    "davit": {"depths": (1, 1, 1, 1), "embed_dims": _WIDTHS, "num_heads": (1, 2, 3, 4)},
    "densenet": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "dpn": {"k_sec": (1, 1, 1, 1)},
    "efficientformer": {"depths": (1, 1, 1, 2), "embed_dims": _WIDTHS},
    "efficientformer_v2": {"depths": (1, 1, 1, 2), "embed_dims": _WIDTHS},
    "efficientvim": {"depths": (1, 1, 1)},
    "efficientvit_msra": {"depth": (1, 1, 1)},
    "fastvit": {"layers": (1, 1, 1, 1)},
    "gemma4_vit": {**_TOKENS, "head_dim": 16, "num_kv_heads": 3, "intermediate_size": 96},
    "hiera": {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "hieradet_sam2": {"embed_dim": 16, "num_heads": 1},
    "lowformer": {"depth_list": (0, 1, 1, 1, 1), "width_list": (8, 16, 32, 48, 64), "head_widths": (96, 96)},
    "mobilenetv5": {"channel_multiplier": 0.125},
    "nasnet": {"num_features": 192, "stem_size": 8},
    "nextvit": {"depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)},
    "rdnet": {"num_init_features": 16, "growth_rates": (16, 16, 24, 24, 24, 24, 32), "num_blocks_list": (1,) * 7},
    "repvit": {"depth": (1, 1, 1, 1), "embed_dim": _WIDTHS},
    "res2net": {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)},
    "resnest": {"channels": _WIDTHS},
    "resnetv2": {"layers": (1, 1, 1, 1), "channels": _WIDTHS},
    "senet": {"layers": (1, 1, 1, 1)},
    "sequencer": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
    "shvit": {"depth": (1, 1, 1)},
    "sknet": {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)},
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"), _WINDOWS),
    "tiny_vit": {"depths": (1, 1, 1, 1), "embed_dims": _WIDTHS, "num_heads": (1, 2, 3, 4)},
    "tnt": {"depth": 2, "embed_dim": 48, "inner_dim": 12, "num_heads_outer": 3, "num_heads_inner": 2},
    "tresnet": {"layers": (1, 1, 1, 1), "width_factor": 0.25},
    "twins": {"depths": (1, 1, 2, 1), "embed_dims": _WIDTHS, "num_heads": (1, 2, 3, 4)},
    "vision_transformer_sam": {**_TOKENS, "global_attn_indexes": (1,)},
    "visformer": {"embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3},
    "xcit": {"depth": 2},
}


def _byoanet() -> dict[str, Any]:
    block = importlib.import_module("timm.models.byobnet").ByoBlockCfg
    stages = [block(type="self_attn", d=1, c=16 * 2**stage, s=1 + bool(stage), gs=0, br=1.0) for stage in range(4)]
    return {"blocks": tuple(stages), "stem_chs": 16, "self_attn_kwargs": {"block_size": 2, "halo_size": 1}}


def _mvitv2() -> dict[str, Any]:
    config = importlib.import_module("timm.models.mvitv2").MultiScaleVitCfg
    return {"cfg": config(depths=(1, 1, 1, 1), embed_dim=(16, 32, 32, 64), num_heads=(1, 2, 2, 4))}


def _vitamin() -> dict[str, Any]:
    module = importlib.import_module("timm.models.vitamin")
    convolutions = module.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = {"embed_dim": (16, 32, 48), "depths": (1, 1, 1), "stem_width": 16, "head_type": "1d"}
    return {**_TOKENS, "embed_cfg": module.VitCfg(**stem, conv_cfg=convolutions)}


# The families whose settings are objects of timm.
CONFIGURED: dict[str, Callable[[], dict[str, Any]]] = {"byoanet": _byoanet, "mvitv2": _mvitv2, "vitamin": _vitamin}

# Families whose widths are fixed by their classes, and what these are divided by.
THINNED = {
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4", "selecsls", "vgg"), 8),
    **dict.fromkeys(("xception", "xception_aligned"), 8),
    "pnasnet": 6,
    "hrnet": 4,
}

# The families whose models take no such settings: the class and all of its settings, at 64 pixels.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "convmixer": ("ConvMixer", {"dim": 32, "depth": 3, "kernel_size": 7, "patch_size": 7}),
    "focalnet": ("FocalNet", {"embed_dim": 16, **_STAGES}),
    "gcvit": ("GlobalContextVit", {"img_size": 64, "embed_dim": 16, "num_heads": (1, 2, 4, 8), **_STAGES}),
    "metaformer": ("MetaFormer", {"dims": _WIDTHS, **_STAGES}),
    "mlp_mixer": ("MlpMixer", {"img_size": 64, "num_blocks": 2, "embed_dim": 48}),
    "mvitv2": ("MultiScaleVit", {"img_size": (64, 64)}),
    "nest": ("Nest", {"img_size": 64, "depths": (1, 1, 2), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3)}),
    "volo": (
        "VOLO",
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4)},
    ),
}


def _timm() -> Iterator[Entry]:
    if _has("timm"):
        for family, name in json.loads(COUNTED.read_text()).items():
            if family in BUILT:
                yield Entry("timm", family, BUILT[family][0], functools.partial(_class_of_timm, family))
            else:
                yield Entry("timm", family, name, functools.partial(_of_timm, family, name))


def _class_of_timm(family: str) -> Specimen:
    name, settings = BUILT[family]
    settings = settings | (CONFIGURED[family]() if family in CONFIGURED else {})
    torch.manual_seed(0)
    module = importlib.import_module(f"timm.models.{family}")
    return specimen(getattr(module, name)(num_classes=CLASSES, **settings), drawn(3, 64, 64))


def _of_timm(family: str, name: str) -> Specimen:
    import timm

    reduced = {**REDUCED.get(family, {}), **(CONFIGURED[family]() if family in CONFIGURED else {})}
    for side in SIDES:
        for settings in ({"img_size": side, "depth": 3}, {"img_size": side}, {}):
            torch.manual_seed(0)
            try:
                with thinned(THINNED.get(family, 1), (CLASSES,)):
                    model = timm.create_model(
                        name, pretrained=False, num_classes=CLASSES, **{**settings, **reduced}
                    ).eval()
                images = drawn(*model.default_cfg["input_size"][:1], side, side)
                with torch.no_grad():
                    output = model(images)
            except Exception:  # whatever a network says to a size that it does not take
                continue
            made = specimen(model, images, middle_feature if output.dim() == 3 else None)  # an encoder has no classes
            made.mixes_rows = name == "csatv2"  # its spatial attention multiplies queries and keys of all images
            return made
    raise ValueError(f"{name} takes images of none of the sides {SIDES}")


def _torchvision() -> Iterator[Entry]:
    if _has("torchvision"):
        yield from importlib.import_module("zoo_torchvision").entries()


# Transformers: small configurations of every classifier of images

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_VIT = {**_BLOCKS, "image_size": 64, "patch_size": 16}
_SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    **{name: {**_VIT, "use_relative_position_bias": True} for name in ("Beit", "Data2VecVision")},
    **dict.fromkeys(("DeiT", "Dinov2", "Dinov2WithRegisters", "IJepa", "ViT", "ViTMSN"), _VIT),
    "Bit": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_groups": 8},
    "CLIP": {"vision_config": _VIT},
    "MetaClip2": {"vision_config": _VIT},
    "Siglip": {"vision_config": _VIT},
    "ConvNext": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
    "ConvNextV2": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
    "Cvt": {"depth": [1, 2, 3]},
    "DonutSwin": _SWIN,
    "EfficientNet": {"image_size": 96, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "FocalNet": {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
    },
    "HGNetV2": {},
    "Hiera": {"image_size": [96, 96], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "Levit": {"image_size": 96, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
    "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 4},
    "MobileNetV2": {"depth_multiplier": 0.25, "min_depth": 4},
    "MobileViT": {"image_size": 96, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96]},
    "MobileViTV2": {"image_size": 96, "width_multiplier": 0.5},
    "PoolFormer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "PPLCNet": {},
    "Pvt": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4],
    },
    "PvtV2": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4],
    },
    "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "Segformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
    "SwiftFormer": {"image_size": 96, "depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 48]},
    "Swin": _SWIN,
    "Swinv2": _SWIN,
    "TextNet": {},
}


def _transformers() -> Iterator[Entry]:
    if _has("transformers"):
        for name, settings in OF_TRANSFORMERS.items():
            yield Entry(
                "Transformers",
                name,
                f"{name}ForImageClassification",
                functools.partial(_of_transformers, name, settings),
            )
        for name, build in (("Detr", _detr), ("RTDetr", _rt_detr), ("Yolos", _yolos)):
            yield Entry("Transformers detection", name, f"{name}ForObjectDetection", build)


def _of_transformers(name: str, settings: dict[str, Any]) -> Specimen:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    side = settings.get("image_size", settings.get("vision_config", {}).get("image_size", 96))
    side = side[0] if isinstance(side, list) else side
    return specimen(model, drawn(3, side, side))


def _yolos() -> Specimen:
    import transformers

    torch.manual_seed(0)
    config = transformers.YolosConfig(**{**_VIT, "image_size": [64, 96]}, num_detection_tokens=6, num_labels=CLASSES)
    made = specimen(transformers.YolosForObjectDetection(config), drawn(3, 64, 96))
    made.target = strongest(made.model.double(), made.images.double(), size=(64, 96))
    return made


_SMALL_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_SMALL_DETR: dict[str, Any] = {
    **{"num_labels": CLASSES, "d_model": 32, "num_queries": 8, "encoder_layers": 1, "decoder_layers": 2},
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone"), False),
}


def _detr() -> Specimen:
    import transformers

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(**_SMALL_RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(**_SMALL_DETR, backbone_config=backbone)
    made = specimen(transformers.DetrForObjectDetection(config), drawn(3, 64, 96))
    made.target = strongest(made.model.double(), made.images.double(), size=(64, 96))
    return made


def _rt_detr() -> Specimen:
    import transformers

    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(**_SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        **_SMALL_DETR,
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        decoder_in_channels=[32, 32, 32],
    )
    made = specimen(transformers.RTDetrForObjectDetection(config), drawn(3, 64, 96))
    made.target = strongest(made.model.double(), made.images.double(), size=(64, 96), activation="sigmoid")
    return made


# open_clip


def _open_clip() -> Iterator[Entry]:
    if _has("open_clip"):
        yield Entry("open_clip", "ViT", "CLIP", _of_open_clip)


def _of_open_clip() -> Specimen:
    model = importlib.import_module("open_clip.model")
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    clip = model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    tokens = torch.randint(1, 49, (CLASSES, 8), generator=torch.Generator().manual_seed(3))
    liven(clip.visual, drawn(3, 64, 64))
    return Specimen(ZeroShotClassifier(clip, tokens).eval(), drawn(3, 64, 64)[:2], None)


# Segmenters


def _segmentation_models() -> Iterator[Entry]:
    names = (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
        "PAN",
        "UPerNet",
    )
    if _has("segmentation_models_pytorch"):
        for name in (*names, "Segformer"):
            yield Entry("segmentation-models-pytorch", name, f"{name}(resnet18)", functools.partial(_of_smp, name))


def _of_smp(name: str) -> Specimen:
    module = importlib.import_module("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(module, name)("resnet18", encoder_weights=None, classes=CLASSES)
    return specimen(model, drawn(3, 96, 96), middle_of_class)


OF_MONAI: dict[str, dict[str, Any]] = {
    "UNet": {"in_channels": 1, "out_channels": CLASSES, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1},
    "BasicUNet": {"in_channels": 1, "out_channels": CLASSES, "features": (8, 8, 16, 16, 32, 8)},
    "AttentionUnet": {"in_channels": 1, "out_channels": CLASSES, "channels": (8, 16, 32), "strides": (2, 2)},
    "SegResNet": {"in_channels": 1, "out_channels": CLASSES, "init_filters": 8},
    "VNet": {"in_channels": 1, "out_channels": CLASSES},
    "DenseNet121": {"in_channels": 1, "out_channels": CLASSES},
    "SEResNet50": {"in_channels": 1, "num_classes": CLASSES},
    "ViT": {
        **{"in_channels": 1, "img_size": (64, 64), "patch_size": 16, "hidden_size": 32, "mlp_dim": 64, "num_layers": 2},
        **{"num_heads": 4, "classification": True, "num_classes": CLASSES, "post_activation": ""},
    },
}


def _monai() -> Iterator[Entry]:
    if _has("monai"):
        for name, settings in OF_MONAI.items():
            yield Entry("MONAI", name, name, functools.partial(_of_monai, name, settings))


def _of_monai(name: str, settings: dict[str, Any]) -> Specimen:
    networks = importlib.import_module("monai.networks.nets")
    torch.manual_seed(0)
    side = settings.get("img_size", (96,))[0]
    model = getattr(networks, name)(spatial_dims=2, **settings)
    dense = "classification" not in settings and name not in ("DenseNet121", "SEResNet50")
    return specimen(model, drawn(1, side, side), middle_of_class if dense else None)


def _ultralytics() -> Iterator[Entry]:
    if _has("ultralytics"):
        for name in (
            "yolov3-tiny",
            "yolov5n",
            "yolov6n",
            "yolov8n",
            "yolov9t",
            "yolov10n",
            "yolo11n",
            "yolo12n",
            "yolo26n",
        ):
            yield Entry("Ultralytics", name, name, functools.partial(_of_ultralytics, name))
        yield Entry(
            "Ultralytics", "yolo11n-cls", "yolo11n-cls", functools.partial(_classifier_of_ultralytics, "yolo11n-cls")
        )


def _of_ultralytics(name: str) -> Specimen:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    torch.manual_seed(0)
    made = specimen(tasks.DetectionModel(f"{name}.yaml", nc=CLASSES, verbose=False), drawn(3, 96, 128).sigmoid())
    made.target = strongest(made.model.double(), made.images.double(), n_classes=CLASSES)
    return made


def _classifier_of_ultralytics(name: str) -> Specimen:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    torch.manual_seed(0)
    return specimen(tasks.ClassificationModel(f"{name}.yaml", nc=CLASSES, verbose=False), drawn(3, 96, 96).sigmoid())
