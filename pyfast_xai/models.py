"""A model from a short name, with the preprocessing it was trained with and the names of its classes."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess

logger = logging.getLogger("pyfast_xai")

SPECS = "'digits', 'torchvision/<name>', 'timm/<name>', 'package.module:callable' or a file of a whole model"

# Beginnings of names by which torchvision's networks are known where it is not installed.
_FAMILIES = (
    *("alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "mobilenet", "resnet", "resnext"),
    *("squeezenet", "swin", "vgg", "vit_", "wide_resnet"),
)

# Heads that only training uses, and published files contain.
_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to be explained.

    Attributes:
        model: in evaluation mode, on the CPU.
        preprocess: makes its input from a PIL image.
        labels: names of its outputs; None where they are not known.
        name: what the user called it; of a file its name and the beginning of its SHA-256.
    """

    model: nn.Module
    preprocess: Preprocess
    labels: list[str] | None
    name: str


def load_model(
    spec: str, weights: str | Path | None = None, num_classes: int | None = None, *, trust: bool = False
) -> LoadedModel:
    """Build a network and fill it.

    Args:
        spec: `digits`, the small network of the demo; `torchvision/<name>`; `timm/<name>` where timm is installed;
            `package.module:callable`, called without arguments to give a module (the working folder is searched
            too); or, where it is trusted, a file of a whole model: `torch.save(model)`, TorchScript (`.pt`) or
            `torch.export` (`.pt2`).
        weights: a safetensors file or a state dict saved by `torch.save`; "DEFAULT" or the name of published
            weights. None leaves a torchvision or timm network random, and says so.
        num_classes: outputs of a torchvision or timm network whose weights do not say; None for its own number.
        trust: load files that hold more than tensors. **They run whatever their author wrote into them**, with all
            that you may do on this machine. False loads tensors only.

    Raises:
        InputError: a name that does not exist, weights that cannot be read or do not fit, or a file that would have
            to be trusted.

    Example:
        >>> from pyfast_xai import load_model
        >>> loaded = load_model("digits")
        >>> type(loaded.model).__name__, loaded.labels
        ('DigitsNet', ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'])
    """
    if spec == "digits":
        return _digits(weights, num_classes, trust)
    family, slash, name = spec.partition("/")
    if slash and family == "torchvision":
        return _torchvision(name, weights, num_classes, trust)
    if slash and family == "timm":
        return _timm(name, weights, num_classes, trust)
    if os.path.isfile(spec):
        return _whole(spec, weights, num_classes, trust)
    if ":" in spec:
        return _imported(spec, weights, num_classes, trust)
    raise InputError(f"model must be {SPECS}, got {spec!r}{_zoo_name(spec)}")


def _zoo_name(name: str) -> str:
    """Returns a hint where a name without a family is that of a known network."""
    requested = name.lower().replace("-", "_")
    try:
        available = importlib.import_module("torchvision.models").list_models()
    except (ImportError, RuntimeError):  # not there, or another torch's
        available = [requested] if requested.startswith(_FAMILIES) else []
    close = difflib.get_close_matches(requested, available, 1, cutoff=0.75)
    if close:
        return f"; did you mean 'torchvision/{close[0]}'?"
    with contextlib.suppress(ImportError, RuntimeError):
        timm = importlib.import_module("timm")
        if timm.is_model(requested):
            return f"; did you mean 'timm/{requested}'?"
    return ""


def _digits(weights: str | Path | None, num_classes: int | None, trust: bool) -> LoadedModel:
    from pyfast_xai import demo

    _no_count("digits", num_classes)
    model = demo.load()
    if weights not in (None, "DEFAULT"):
        _fill(model, read_weights(str(weights), trust=trust), "digits", str(weights))
    preprocess = Preprocess(96, mean=(0.0,) * 3, std=(1.0,) * 3)
    return LoadedModel(model, preprocess, [str(digit) for digit in range(10)], "digits")


def _imported(spec: str, weights: str | Path | None, num_classes: int | None, trust: bool) -> LoadedModel:
    path, _, attribute = spec.partition(":")
    _no_count(spec, num_classes)
    with _working_folder():
        try:
            model = importlib.import_module(path)
            for part in attribute.split("."):
                model = getattr(model, part)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise InputError(f"model must be {SPECS}, got {spec!r} ({_line(error)})") from error
        # A ready module is callable too, but takes images.
        if not isinstance(model, nn.Module):
            if not callable(model):
                raise InputError(f"model {spec!r} must be callable, got {type(model).__name__}")
            try:
                model = model()
            except Exception as error:
                raise InputError(
                    f"model {spec!r} must be callable without arguments, got {type(error).__name__}: {_line(error)}"
                ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r} must give a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        _fill(model, read_weights(str(weights), trust=trust), spec, str(weights))
    return LoadedModel(model.eval(), Preprocess(224, resize=256), None, spec)


def _whole(path: str, weights: str | Path | None, num_classes: int | None, trust: bool) -> LoadedModel:
    from pyfast_xai import trusted

    _no_count(path, num_classes)
    if not trust:
        raise InputError(
            f"model {path!r} must be trusted by --trust-model (trust=True), for loading a whole model runs what is in "
            "its file, got the file alone"
        )
    model, size = trusted.network(_unsafe(path, "model"), path)
    if weights is not None:
        _fill(model, read_weights(str(weights), trust=trust), path, str(weights))
    preprocess = Preprocess(224, resize=256) if size is None else Preprocess(size, resize=round(min(size) * 8 / 7))
    # The digest covers code and all else that a list of layers does not show.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(block)
    return LoadedModel(model, preprocess, None, f"{Path(path).name}@{digest.hexdigest()[:12]}")


def _unsafe(path: str | Path, argument: str) -> Any:
    """Returns the contents of a file that is trusted."""
    from pyfast_xai import trusted

    try:
        with _working_folder():  # a pickle says where its classes are
            return trusted.read(path)
    except Exception as error:  # the code in the file may raise anything
        raise InputError(
            f"{argument} {str(path)!r} must be {trusted.kind(path)} that can be loaded here, "
            f"got {type(error).__name__}: {_line(error)}"
        ) from error


@contextlib.contextmanager
def _working_folder() -> Iterator[None]:
    """Adds the working folder as the last place to import from, which an installed command does not search."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        # The import may have changed the list.
        for i in reversed(range(len(sys.path))):
            if sys.path[i] == folder:
                del sys.path[i]
                break


def _torchvision(name: str, weights: str | Path | None, num_classes: int | None, trust: bool) -> LoadedModel:
    try:
        from torchvision import models
    except ImportError as error:
        raise InputError("model 'torchvision/…' needs torchvision: pip install torchvision") from error
    except RuntimeError as error:
        raise InputError(f"torchvision must fit the installed torch {torch.__version__}, got {_line(error)}") from error
    available = models.list_models()
    if name not in available:
        raise InputError(f"model must be one of torchvision's, got {name!r}{_close(name, available)}")
    try:
        published = list(models.get_model_weights(name))
        default = models.get_model_weights(name)["DEFAULT"] if published else None
    except (KeyError, ValueError):  # a network without published weights
        published, default = [], None

    state, source = None, None
    if weights is not None and Path(weights).is_file():
        state = read_weights(weights, trust=trust)
        # A downloaded file keeps its name, and with it what is known of its training.
        source = next((entry for entry in published if Path(entry.url).name == Path(weights).name), None)
    elif weights is not None:
        tag = str(weights).rpartition(".")[2]
        source = default if tag == "DEFAULT" else next((e for e in published if e.name == tag), None)
        if source is None:
            names = ", ".join(["a file", *(["DEFAULT"] if published else []), *(e.name for e in published)])
            raise InputError(f"weights of torchvision/{name} must be one of {names}, got {str(weights)!r}")
        state = _download(source)

    model: Any = _build(models, name, state, source, num_classes)
    if state is None:
        _warn_random(f"torchvision/{name}")
    else:
        _fill(model, _renamed(name, state), f"torchvision/{name}", str(weights))
    for head in _AUXILIARY.get(name, ()):
        setattr(model, head, None)
        model.aux_logits = False

    recipe = source or default
    labels = None if recipe is None else recipe.meta.get("categories")
    if state is None or (source is None and num_classes is not None):
        labels = None
    return LoadedModel(model.eval(), _recipe(recipe), None if labels is None else list(labels), f"torchvision/{name}")


def _build(models: Any, name: str, state: Any, source: Any, num_classes: int | None) -> nn.Module:
    """Returns a torchvision network with the settings that its weights were made with."""
    settings: dict[str, Any] = {}
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in accepted:  # a detector would fetch its backbone else
        settings["weights_backbone"] = None
    if name in _AUXILIARY:
        settings["init_weights"] = False  # takes longer than everything else together
        settings["aux_logits"] = state is not None and any(key.startswith(_AUXILIARY[name]) for key in state)
        settings["transform_input"] = source is not None
    if "aux_loss" in accepted:
        settings["aux_loss"] = state is not None and any(key.startswith("aux_classifier.") for key in state)
    if source is not None:
        if source.meta.get("categories"):
            settings["num_classes"] = len(source.meta["categories"])
        if name.startswith("vit_"):
            settings["image_size"] = source.meta["min_size"][0]
    if num_classes is not None:
        settings["num_classes"] = num_classes
    return models.get_model(name, weights=None, **settings)


def _recipe(weights: Any) -> Preprocess:
    """Returns the preprocessing of published torchvision weights; the usual one where there are none."""
    preset = None if weights is None else weights.transforms()
    if preset is None or not hasattr(preset, "mean"):
        if weights is not None:  # detectors normalise by themselves
            return Preprocess(480, mean=(0.0,) * 3, std=(1.0,) * 3)
        return Preprocess(224, resize=256)
    resize = preset.resize_size[0]
    crop = getattr(preset, "crop_size", preset.resize_size)[0]
    return Preprocess(crop, resize, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)


def _renamed(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of published DenseNet files, which name layers as an early release did."""
    if not name.startswith("densenet"):
        return state
    pattern = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
    return {pattern.sub(r"\1\2", key): tensor for key, tensor in state.items()}


def _download(weights: Any) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"weights {weights} must be fetched from {weights.url}, got {_line(error)}") from error


def _timm(name: str, weights: str | Path | None, num_classes: int | None, trust: bool) -> LoadedModel:
    try:
        import timm
    except ImportError as error:
        raise InputError("model 'timm/…' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise InputError(f"model must be one of timm's, got {name!r}{_close(name, timm.list_models())}")
    settings: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model = timm.create_model(name, pretrained=weights == "DEFAULT", **settings)
    if weights is None:
        _warn_random(f"timm/{name}")
    elif weights != "DEFAULT":
        _fill(model, read_weights(str(weights), trust=trust), f"timm/{name}", str(weights))
    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    preprocess = Preprocess(
        (height, width),
        int(min(height, width) / data["crop_pct"]),
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        "squash" if data["crop_mode"] == "squash" else "center",
    )
    return LoadedModel(model.eval(), preprocess, None, f"timm/{name}")


def read_weights(path: str | Path, *, trust: bool = False) -> dict[str, Tensor]:
    """Reads the tensors of a weight file, by name; nothing in the file is run, unless it is trusted.

    Args:
        path: safetensors, or a state dict saved by `torch.save`, also inside of "state_dict" or "model", also of a
            compiled or data-parallel module.
        trust: take the tensors of any other pickle, of TorchScript and of exported programs, too. Reading them runs
            whatever is in them. What can be read without that is, also where it is trusted.

    Raises:
        InputError: no such file, not a file of tensors, or one of more than tensors that is not trusted.
    """
    quoted = repr(str(path))
    state: Any
    if not os.path.isfile(path):
        raise InputError(f"weights must be a file, got {quoted}")
    tensors_only = str(path).lower().endswith(".safetensors")
    try:
        if tensors_only:
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if tensors_only or not trust:
            message = f"weights {quoted} must be safetensors or a saved state dict, got {_content_of(path, error)}"
            raise InputError(message) from error
        state = _unsafe(path, "weights")
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in ("state_dict", "model", "model_state_dict") if key in state), None)
        if inner is None:
            break
        state = inner
    if trust and not isinstance(state, dict) and hasattr(state, "state_dict"):
        # A method of modules, a property of exported programs.
        state = dict(state.state_dict() if callable(state.state_dict) else state.state_dict)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = f"a {type(state).__name__}"
        raise InputError(f"weights {quoted} must hold named tensors and nothing else, got {kind} of other things")
    for key, tensor in state.items():
        # Indices of a sparse tensor are not checked when it is loaded, and lead anywhere in memory.
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "a quantized one" if tensor.is_quantized else f"one of layout {tensor.layout}"
            raise InputError(f"weights {quoted} must hold dense tensors, got {kind} at {key!r}")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _content_of(path: str | Path, error: Exception) -> str:
    """Returns what a file contains instead of tensors, and how to load it."""
    from pyfast_xai import trusted

    content, message = trusted.kind(path), str(error)
    if content == trusted.PICKLE:
        if not message.startswith("Weights only load failed"):
            return f"something else ({_line(error)})"
        forbidden = re.search(
            r"unsupported (?:global|class|operand).*?(?= was not| whose|\n|$)", message, re.IGNORECASE
        )
        content += " with more than tensors" + (f" ({forbidden[0]})" if forbidden else "")
    return f"{content}, which --trust-model (trust=True) loads, running what is in it"


def _fill(model: nn.Module, state: dict[str, Tensor], name: str, path: str) -> None:
    """Load `state` into `model`, all of it.

    Raises:
        InputError: naming the first key that is missing, of another shape or kind, or not of the model.
    """
    current = model.state_dict()
    requirement = f"weights {path!r} must fit {name}"
    for key, tensor in current.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):  # older files have no such counter, and evaluation needs none
                continue
            raise InputError(f"{requirement}, got no tensor {key!r}{_close(key, state)}")
        if not isinstance(tensor, Tensor):
            continue
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{requirement}, got {key!r} of shape {list(state[key].shape)} instead of {list(tensor.shape)}"
            )
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise InputError(f"{requirement}, got {key!r} of dtype {state[key].dtype} instead of {tensor.dtype}")
    extra = next((key for key in state if key not in current), None)
    if extra is not None:
        raise InputError(f"{requirement}, got a tensor {extra!r} it does not have{_close(extra, current)}")
    model.load_state_dict(state, strict=False)


def _warn_random(name: str) -> None:
    logger.warning("model %s has RANDOM weights, so its explanations mean nothing; name a file or DEFAULT", name)


def _no_count(name: str, num_classes: int | None) -> None:
    if num_classes is not None:
        raise InputError(f"num_classes must be None for {name!r}, whose classes are fixed, got {num_classes}")


def _close(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), 3)
    return f"; close names are {', '.join(map(repr, close))}" if close else ""


def _line(error: BaseException) -> str:
    """Returns the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
