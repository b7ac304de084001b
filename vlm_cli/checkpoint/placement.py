"""Where the weights of a model go that no single device holds: GPUs, then memory, then the files on disk.

What each call enters and leaves (vision encoder, vision tokenizer, fusion, added tokens, and the language model without
its layers) stays together on the first device. The decoder layers fill what is left of it, then the next device, and so
on. accelerate moves activations between devices, and reads a layer on disk each time it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import get_max_memory
from torch import nn

from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig, stored_dtype
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM
from vlm_cli.report.tables import human_bytes

__all__ = ["DISK", "describe_places", "places_for", "spread"]

DISK = "disk"


def places_for(
    config: VLMConfig, dtype: torch.dtype | str, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, int | str]:
    """Choose a device for each module by the memory that this machine has free.

    Args:
        config: of the model.
        dtype: of the weights; "auto" takes that of the files.
        max_memory: what weights may take of devices, as numbers of bytes or as "20GB"; None takes nine tenths of what
            is free.

    Raises:
        CheckpointError: if the first device does not hold the parts that stay together.
    """
    if isinstance(dtype, str):
        dtype = stored_dtype(config) or torch.float32
    memory = get_max_memory(None if max_memory is None else dict(max_memory))
    with meta_device():
        model = VLM(config)
    return spread(model, dtype, {device: size for device, size in memory.items() if device != DISK})


def spread(model: VLM, dtype: torch.dtype, memory: Mapping[int | str, int]) -> dict[str, int | str]:
    """Choose a device for each module, as `device_map` of Transformers.

        layers of 4 GB each, 3 GB of other weights, {0: 12 GB, "cpu": 5 GB}  ->  the others and layer 0 on GPU 0,
        which keeps 4 GB free for the layers on disk, layer 1 in memory, all other layers on disk

    Args:
        model: on the meta device.
        dtype: of the weights.
        memory: bytes of each device for weights, in the order in which devices fill: numbers of GPUs, then "cpu".

    Raises:
        CheckpointError: if the first device does not hold the parts that stay together.
    """
    layers = decoder_layers(model.lang_model, model.config.composition.language_model.decoder_layers)
    sizes = [_bytes_of(layer, dtype) for layer in layers]
    together = _bytes_of(model, dtype) - sum(sizes)
    devices = list(memory)
    left = dict(memory)
    if together + sum(sizes) > sum(left.values()):
        left[devices[0]] -= max(sizes)  # a layer on disk runs there
    if together > left[devices[0]]:
        raise CheckpointError(
            f"the vision half, the fusion and the language model's tables take {human_bytes(together)}, a layer from "
            f"disk up to {human_bytes(max(sizes))}, and {_name(devices[0])} has {human_bytes(memory[devices[0]])} for "
            f"them. Give it more: --max-memory {devices[0]}=SIZE. Or choose a smaller --dtype."
        )
    found: dict[str, int | str] = dict.fromkeys(_modules_without(model, layers), devices[0])
    left[devices[0]] -= together
    names = {id(module): name for name, module in model.named_modules()}
    at = 0
    for layer, size in zip(layers, sizes, strict=True):
        while at < len(devices) and size > left[devices[at]]:
            at += 1
        where = devices[at] if at < len(devices) else DISK
        found[names[id(layer)]] = where
        if where != DISK:
            left[where] -= size
    return found


def describe_places(model: VLM) -> str | None:
    """Say how many bytes of a loaded model are where: "12.1 MB on the CPU, 3.0 MB on disk"; None on one device."""
    places: dict[str, int | str] | None = getattr(model, "hf_device_map", None)
    if places is None:
        return None
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        where = next(place for module, place in places.items() if f"{name}.".startswith(f"{module}."))
        found[_name(where)] = found.get(_name(where), 0) + parameter.numel() * parameter.dtype.itemsize
    return ", ".join(f"{human_bytes(size)} on {where}" for where, size in found.items())


def _name(device: int | str) -> str:
    return f"GPU {device}" if isinstance(device, int) else {"cpu": "the CPU", DISK: "disk"}.get(device, device)


def _bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize


def _modules_without(module: nn.Module, left_out: nn.ModuleList, name: str = "") -> Iterator[str]:
    """Yield the names of modules, and of parameters beside them, that cover a model except the elements of a list."""
    if name:
        yield from (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if child is left_out:
            continue
        if any(x is left_out for x in child.modules()):
            yield from _modules_without(child, left_out, path)
        else:
            yield path
