"""Which layer of a vision encoder each of its parameters belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_cli.modeling.towers import Layers, find_stack

__all__ = ["number_layers"]


def number_layers(tower: nn.Module, layer: Layers = -1) -> dict[str, int]:
    """Count for each parameter of a tower the layers above its own, up to the last layer that is read.

    What stands before the first layer counts as a layer below it; what stands after the last layer counts as part of
    the last layer (as in timm's `param_groups_layer_decay`).

    Args:
        tower: from `build_tower`.
        layer: the layer whose features are read, counted from the end; of several, the last one counts.

    Returns:
        Name of a parameter -> number of layers, at least 0.

    Raises:
        ValueError: if the layers cannot be told apart.
    """
    encoders: Any = getattr(tower, "encoders", None)
    if encoders is not None:
        settings: Any = tower.features
        found: dict[str, int] = {}
        for i, (encoder, own) in enumerate(zip(encoders, settings, strict=True)):
            found |= {f"encoders.{i}.{name}": n for name, n in number_layers(encoder, own["layer"]).items()}
        return found
    places = _number_from_below(tower)
    last = max(places.values()) + 1 + (max(layer) if isinstance(layer, tuple) else layer)
    return {name: max(0, last - place) for name, place in places.items()}


def _number_from_below(tower: Any) -> dict[str, int]:
    """Return name of a parameter -> number of its layer, from 1; 0 stands for all that comes before."""
    trunk = getattr(tower, "trunk", None)
    if hasattr(trunk, "group_matcher"):
        return _number_by_timm(tower)
    layers = _find_layers(tower)
    if layers is None:
        raise ValueError("the layers of this vision encoder cannot be told apart")
    path, depth = layers
    places, is_after = {}, False
    names = [name for name, _ in tower.named_parameters()]
    direct = [name for name in names if "." not in name]  # `named_parameters` gives them first, wherever they are used
    for name in direct + [name for name in names if "." in name]:
        if name.startswith(f"{path}."):
            is_after = True
            places[name] = 1 + int(name[len(path) + 1 :].split(".")[0])
        else:
            places[name] = depth if is_after else 0
    return places


def _find_layers(tower: Any) -> tuple[str, int] | None:
    """Return the name and length of the list of layers; None if the tower is no single stack."""
    structure = getattr(tower, "structure", None)
    if structure is not None:
        is_stack = structure.layers is not None and structure.is_single_stack
        return (structure.layers, structure.depth) if is_stack else None
    stack = find_stack(tower)
    if stack is None:
        return None
    owner, name = stack
    path = next(path for path, module in tower.named_modules() if module is owner)
    return f"{path}.{name}", len(getattr(owner, name))


def _number_by_timm(tower: Any) -> dict[str, int]:
    """Number the parameters of a timm model as timm does for its own layer decay."""
    from timm.models import group_parameters

    found = group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)
    places = {f"trunk.{name}": int(place) for name, place in found.items()}
    last = max(places.values())
    return {name: places.get(name, last) for name, _ in tower.named_parameters()}  # the head is no layer of the trunk
