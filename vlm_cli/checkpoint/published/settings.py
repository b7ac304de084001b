"""Settings of a published checkpoint's configuration: each is read, has no effect, or is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["Settings", "check_settings_of"]


@dataclass(frozen=True)
class Settings:
    """What becomes of the settings of one configuration.

    Attributes:
        config: Transformers' class of the configuration. It ignores settings that it does not have, and so does vlm.
        read: settings that a layout carries over.
        without_effect: settings that change no output: of training, of random weights, of other tasks.
        fixed: setting -> the values that vlm can build.
    """

    config: type[PreTrainedConfig]
    read: Collection[str]
    without_effect: Collection[str] = ()
    fixed: Mapping[str, Collection[Any]] = field(default_factory=dict)

    def unknown(self, name: str) -> bool:
        """Say whether a setting is none of these."""
        return name not in (*self.read, *self.without_effect, *self.fixed)


def check_settings_of(checkpoint: str, part: str, given: Mapping[str, Any], settings: Settings) -> None:
    """Refuse settings that vlm cannot carry over.

    Args:
        checkpoint: its name.
        part: key of the configuration in config.json; "" for the file itself.
        given: the configuration.
        settings: what vlm knows about it.

    Raises:
        CheckpointError: naming the setting.
    """
    defaults = settings.config().to_dict()
    general = {*PreTrainedConfig().to_dict(), *vars(GenerationConfig())}
    where = f"{part}." if part else ""
    for name, value in given.items():
        if (possible := settings.fixed.get(name)) is not None:
            if value not in possible:
                choices = " or ".join(show(x) for x in possible)
                raise CheckpointError(f"{checkpoint!r} has {where}{name}={show(value)}; vlm builds only {choices}.")
        elif settings.unknown(name) and name not in general and name in defaults and value != defaults[name]:
            raise CheckpointError(
                f"{checkpoint!r} has {where}{name}={show(value)}, and vlm does not know what to do with another value "
                f"than {show(defaults[name])}."
            )
