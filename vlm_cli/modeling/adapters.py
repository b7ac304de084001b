"""Put PEFT's adapters (LoRA, DoRA, rsLoRA) beside the linear layers of a part, find them there, and merge them.

PEFT puts a layer of its own in the place of a layer W, which becomes `W.base_layer`; the adapter's matrices stand
beside it. Only `add_adapter` imports PEFT: what stands in a model is found by what PEFT's layers have.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlm_cli.composition.adapters import AdapterSettings
from vlm_cli.errors import UsageError
from vlm_cli.quiet import quiet_libraries

__all__ = [
    "ADAPTER",
    "adapter_parameters",
    "add_adapter",
    "has_adapter",
    "is_frozen",
    "list_layers",
    "merge_adapters",
    "named_as_peft",
    "plain_tensors",
    "set_adapter_training",
]

ADAPTER = "default"  # PEFT's name for the only adapter of a part
_BASE = ".base_layer."


# -- finding -----------------------------------------------------------------------------------------------------------


def adapter_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers inside a module, with their names."""
    for name, layer in module.named_modules():
        if hasattr(layer, "adapter_layer_names") and hasattr(layer, "base_layer"):
            yield name, layer


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of all adapters inside a module, with their names."""
    for name, layer in adapter_layers(module):
        for kind in layer.adapter_layer_names:
            held = getattr(layer, kind, None)
            if isinstance(held, nn.Module):
                for own, parameter in held.named_parameters():
                    yield ".".join(filter(None, (name, kind, own))), parameter


def named_as_peft(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapter inside a module, under the names that PEFT gives them in a file."""
    found: dict[str, Tensor] = {}
    for name, x in adapter_parameters(module):
        name = name.replace(f".{ADAPTER}", "")
        found[name.removesuffix(".weight") if "lora_magnitude_vector" in name else name] = x
    return found


def has_adapter(module: nn.Module) -> bool:
    """Tell whether a module has an adapter inside."""
    return next(adapter_layers(module), None) is not None


def is_frozen(module: nn.Module) -> bool:
    """Tell whether no parameter of a module trains, adapters aside."""
    adapters = {id(x) for _, x in adapter_parameters(module)}
    return not any(p.requires_grad and id(p) not in adapters for p in module.parameters())


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model without its adapters, under their names without PEFT; tied ones under each name."""
    adapters = {name for name, _ in adapter_parameters(model)}
    state = model.state_dict(keep_vars=True)
    return {name.replace(_BASE, "."): x for name, x in state.items() if name not in adapters}


def set_adapter_training(module: nn.Module, mode: bool) -> None:
    """Let the adapters inside a module drop out inputs, or not; what they stand beside stays as it is."""
    for _, layer in adapter_layers(module):
        for dropout in getattr(layer, "lora_dropout", {}).values():
            dropout.train(mode)


# -- adding ------------------------------------------------------------------------------------------------------------


def add_adapter(module: nn.Module, part: str, settings: AdapterSettings) -> None:
    """Put an adapter beside layers of a part, in place. It starts as the identity, and trains.

    Args:
        module: the part. Its own parameters keep whether they train.
        part: the part's name, for messages.
        settings: of the adapter.

    Raises:
        UsageError: if no layer, or no layer of a name, can have one, or PEFT is not installed.
    """
    layers = find_targets(module, part, settings.targets)
    try:
        with quiet_libraries():  # torchao, which PEFT imports, warns at every start
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("adapters need the package peft, which is missing: pip install 'vlm-cli[lora]'") from None
    trains = {id(p): p.requires_grad for p in module.parameters()}
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.scale) if settings.scale.is_integer() else settings.scale,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=_shorten(module, layers),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        fan_in_fan_out=all(isinstance(module.get_submodule(name), Conv1D) for name in layers),
        task_type="CAUSAL_LM" if part == "language_model" else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Transformers no longer likes PEFT to ask
        inject_adapter_in_model(config, module, ADAPTER)
    assert set(dict(adapter_layers(module))) == set(layers), "PEFT matched other layers than vlm"
    for parameter in module.parameters():  # PEFT freezes all but its own
        parameter.requires_grad_(trains.get(id(parameter), True))


def find_targets(module: nn.Module, part: str, words: tuple[str, ...]) -> list[str]:
    """Find the layers that get an adapter.

    Args:
        module: the part.
        part: the part's name, for messages.
        words: names, or ends of names after a dot; none takes all layers that can have one, but an output head.

    Raises:
        UsageError: naming the layers that there are.
    """
    layers = list_layers(module)
    if not layers:
        is_empty = next(module.parameters(), None) is None
        what = "has no parameters in this composition" if is_empty else "has no linear layer"
        whole = "" if is_empty else f", or train it whole: --trainable {part},…"
        raise UsageError(f"{part} can have no adapter: it {what}. Leave out --lora {part}{whole}")
    if not words:
        head = _module_of(module, "get_output_embeddings")
        return [name for name in layers if module.get_submodule(name) is not head]
    found: dict[str, None] = {}
    for word in words:
        here = [name for name in layers if _is_named(name, word)]
        if not here:
            raise UsageError(f"{_why_not(module, part, word)} {part} has: {_summarise(layers)}.")
        found |= dict.fromkeys(here)
    return list(found)


def list_layers(module: nn.Module) -> list[str]:
    """List the layers of a part that can have an adapter.

    Left out are layers whose weights another module reads without calling them, as torch's attention does, and those
    that share their weights with a table.
    """
    tied = _tied(module)
    inside = tuple(f"{name}." for name, x in module.named_modules() if isinstance(x, nn.MultiheadAttention))
    return [
        name
        for name, x in module.named_modules()
        if isinstance(x, (nn.Linear, Conv1D)) and name and x.weight not in tied and not name.startswith(inside)
    ]


def _why_not(module: nn.Module, part: str, word: str) -> str:
    """Say why no layer that can have an adapter has this name."""
    named = [x for name, x in module.named_modules() if _is_named(name, word)]
    if any(p in _tied(module) for x in named for p in x.parameters(recurse=False)):
        return f"{word} shares its weights with another table of {part}, and an adapter would change only one of them."
    if named:
        return f"{word} of {part} ({type(named[0]).__name__}) is no linear layer that an adapter can stand beside."
    return f"{part} has no layer {word!r}."


def _is_named(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _module_of(module: nn.Module, getter: str) -> nn.Module | None:
    """Return a table of a model of Transformers; None of another module."""
    found = getattr(module, getter, None)
    return found() if found is not None else None


def _tied(module: nn.Module) -> set[nn.Parameter]:
    """The weights that the input table and the output head share."""
    tables = [_module_of(module, f"get_{side}_embeddings") for side in ("input", "output")]
    weights = [getattr(x, "weight", None) for x in tables]
    shared = weights[0] if weights[0] is weights[1] else None
    return {shared} if isinstance(shared, nn.Parameter) else set()


def _summarise(layers: list[str]) -> str:
    """List the last words of names, with how often each occurs."""
    counts = Counter(name.rpartition(".")[2] for name in layers)
    return ", ".join(f"{word} ({count})" for word, count in counts.items())


def _shorten(module: nn.Module, layers: list[str]) -> list[str]:
    """Name layers by their last words, if these name no other module; otherwise in full."""
    words = sorted({name.rpartition(".")[2] for name in layers})
    named = [name for name, _ in module.named_modules() if any(_is_named(name, word) for word in words)]
    return words if sorted(named) == sorted(layers) else layers


# -- merging -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapters(module: nn.Module) -> None:
    """Add all adapters inside a module to the weights beside which they stand, and take PEFT's layers away.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    for name, layer in list(adapter_layers(module)):
        layer.merge(safe_merge=True)
        module.set_submodule(name, layer.get_base_layer())
    for owner in module.modules():
        if hasattr(owner, "peft_config"):
            del owner.peft_config
