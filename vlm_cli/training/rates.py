"""Learning rates and weight decay per part, and lower rates for the lower layers of the vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm_cli.errors import UsageError
from vlm_cli.flags import OTHERS
from vlm_cli.modeling.tower_layers import number_layers
from vlm_cli.modeling.vlm import VLM

__all__ = ["PerPart", "check_parts", "group_parameters", "highest_rate", "rates_now", "rates_of_parts"]

#: One number for all parts, or part -> number; the key `others` then stands for the parts that have no key.
PerPart = float | Mapping[str, float]


def group_parameters(
    model: VLM,
    learning_rate: PerPart,
    *,
    default_rate: float,
    weight_decay: PerPart | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimizer, with `lr`, `weight_decay` and `part` for each group.

    The groups depend on which parts have a number of their own, and not on the numbers. So a run that is resumed with
    other numbers finds its groups again. A group of several parts has no `part`.

    Args:
        model: a `VLM` whose trainable parts are set.
        learning_rate: the highest of the run.
        default_rate: of a part to which `learning_rate` gives none.
        weight_decay: decay of parts; a part without a number has that of the composition.
        layer_decay: the rate of each layer of the vision encoder is that of the layer above it, times this number.

    Raises:
        UsageError: if `layer_decay` is given and the encoder's layers cannot be told apart.
    """
    named_rates, named_decays = _named(learning_rate), _named(weight_decay)
    depths = {} if layer_decay is None else _count_layers_above(model)
    part_of = {p: part for part, module in model.part_modules().items() for p in module.parameters()}
    groups = []
    for group in model.parameter_groups():
        split: dict[tuple[str | None, int], list[nn.Parameter]] = {}
        for p in group["params"]:
            part = part_of[p]
            own = part if part in named_rates or part in named_decays or p in depths else None
            split.setdefault((own, depths.get(p, 0)), []).append(p)
        for (own, above), params in split.items():
            rate = named_rates.get(own, _others(learning_rate, default_rate)) * (layer_decay or 1.0) ** above
            decay = named_decays.get(own, group["weight_decay"])
            groups.append({**group, "params": params, "lr": rate, "weight_decay": decay, "part": own})
    return groups


def rates_of_parts(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return the highest rate of the run of each part that has groups of its own, and of the `others`.

    Args:
        groups: of an optimizer that has a scheduler.
    """
    found: dict[str, float] = {}
    for group in groups:
        part = group["part"] or OTHERS
        found[part] = max(found.get(part, 0.0), float(group["initial_lr"]))
    return found


def rates_now(groups: list[dict[str, Any]], highest: float | None) -> dict[str, float]:
    """Return the rate now of each part that has its own, as entries of the log; none if no part has.

    Args:
        groups: of an optimizer that has a scheduler.
        highest: the highest rate now; None in an entry without rates.
    """
    rates = rates_of_parts(groups)
    if highest is None or len(rates) < 2:
        return {}
    return {f"learning_rate/{part}": highest * rate / max(rates.values()) for part, rate in rates.items()}


def highest_rate(learning_rate: PerPart, *, default: float) -> float:
    """Return the highest of the rates that a user gave.

    >>> highest_rate({"fusion": 1e-3, "language_model": 2e-5}, default=1e-4)
    0.001
    """
    return max(_named(learning_rate).values(), default=_others(learning_rate, default))


def check_parts(options: Mapping[str, PerPart | None], layer_decay: float | None, trainable: tuple[str, ...]) -> None:
    """Check that each part to which the user gives a number trains.

    Args:
        options: spelling of an option -> its value.
        layer_decay: as for `group_parameters`.
        trainable: the parts that train.

    Raises:
        UsageError: naming the option and the part.
    """
    trained = ", ".join(trainable)
    for option, value in options.items():
        for part in _named(value):
            if part not in trainable:
                raise UsageError(
                    f"{option} gives a number to {part}, which does not train. These parts train: {trained}. Add "
                    f"--trainable {','.join([*trainable, part])} to train it."
                )
    if layer_decay is not None and "vision_encoder" not in trainable:
        raise UsageError(
            f"--layer-decay is about the layers of the vision encoder, which does not train. These parts train: "
            f"{trained}. Add --trainable {','.join([*trainable, 'vision_encoder'])}, or leave out --layer-decay."
        )


def _named(value: PerPart | None) -> dict[Any, float]:
    return {k: x for k, x in value.items() if k != OTHERS} if isinstance(value, Mapping) else {}


def _others(value: PerPart, default: float) -> float:
    return value.get(OTHERS, default) if isinstance(value, Mapping) else value


def _count_layers_above(model: VLM) -> dict[nn.Parameter, int]:
    """Count for each parameter of the vision encoder the layers between it and the last layer that is read."""
    encoder = model.vision_encoder
    try:
        numbers = number_layers(encoder.visual, encoder.layer)
    except ValueError as error:
        raise UsageError(f"--layer-decay cannot be used: {error}. Leave out --layer-decay.") from None
    return {p: numbers[name] for name, p in encoder.visual.named_parameters()}
