"""Find and replace modules of a model, as `pytorch_grad_cam.utils.find_layers` does."""

from collections.abc import Callable, Collection

from torch import nn


def replace_layer_recursive(model: nn.Module, old_layer: nn.Module, new_layer: nn.Module) -> bool:
    """Replaces the first occurrence of a module by another; returns whether there was one.

    Example:
        >>> from pyfast_xai.compat.grad_cam import replace_layer_recursive
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> replace_layer_recursive(model, model[1], nn.GELU())
        True
    """
    for name, layer in model.named_children():
        if layer is old_layer:
            model._modules[name] = new_layer
            return True
        if replace_layer_recursive(layer, old_layer, new_layer):
            return True
    return False


def replace_all_layer_type_recursive(model: nn.Module, old_layer_type: type[nn.Module], new_layer: nn.Module) -> None:
    """Puts a module in the place of all of a kind.

    Example:
        >>> from pyfast_xai.compat.grad_cam import replace_all_layer_type_recursive
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> replace_all_layer_type_recursive(model, nn.ReLU, nn.GELU())
        >>> model[1]
        GELU(approximate='none')
    """
    for name, layer in list(model._modules.items()):
        if isinstance(layer, old_layer_type):
            model._modules[name] = new_layer
        elif layer is not None:
            replace_all_layer_type_recursive(layer, old_layer_type, new_layer)


def find_layer_types_recursive(model: nn.Module, layer_types: Collection[type[nn.Module]]) -> list[nn.Module]:
    """Returns the modules of exactly some kinds, in the order in which they were registered.

    Example:
        >>> from pyfast_xai.compat.grad_cam import find_layer_types_recursive
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> find_layer_types_recursive(model, [nn.ReLU])
        [ReLU()]
    """
    return find_layer_predicate_recursive(model, lambda layer: type(layer) in layer_types)


def find_layer_predicate_recursive(model: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Returns the modules of which something is true, in the order in which they were registered.

    Example:
        >>> from pyfast_xai.compat.grad_cam import find_layer_predicate_recursive
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> find_layer_predicate_recursive(model, lambda layer: isinstance(layer, nn.ReLU))
        [ReLU()]
    """
    layers = []
    for layer in model._modules.values():
        if layer is not None:
            layers += [layer] if predicate(layer) else []
            layers += find_layer_predicate_recursive(layer, predicate)
    return layers
