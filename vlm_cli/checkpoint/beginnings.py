"""Where the parts of a built model began: the weights from which training moved them, if they are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.delta import PREFIXES, own_tensors
from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.checkpoint.stored import StoredModel
from vlm_cli.checkpoint.stored_parts import TensorSource, open_named_part
from vlm_cli.errors import explain_reading
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.offline import cache_alone
from vlm_cli.plain_data import read_json

__all__ = ["Beginning", "Beginnings"]

#: Opens a model by its name, as `StoredModel.open` with a model on the meta device.
Opener = Callable[[str], StoredModel]


@dataclass
class Beginning:
    """The weights from which a part started.

    Attributes:
        place: what the record calls them; None if none are known.
        reason: why they cannot be compared; empty if they can.
        source: their tensors, under the names of the VLM.
    """

    place: str | None
    reason: str = ""
    source: TensorSource | None = None
    _names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.source is not None:
            self._names = frozenset(self.source.names())

    def read(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return a tensor as it began, in a dtype, since rounding is no training; None if there is no such tensor."""
        if self.source is None or name not in self._names:
            return None
        return self.source.read(name).detach().to(dtype)

    def release(self) -> None:
        """Forget a part that was loaded to read its tensors."""
        if self.source is not None:
            self.source.release()


class Beginnings:
    """Finds where each part of a model began. Nothing is downloaded.

    A vision encoder and a language model began with the pretrained weights that the record of a delta directory or the
    composition names. Where these are not on this machine, and for the other parts, the model counts with which the
    training run began.

    Args:
        model: the model.
        open_model: opens another one.
        trust_remote_code: whether the language model's own code may run.
    """

    def __init__(self, model: StoredModel, open_model: Opener, *, trust_remote_code: bool = False) -> None:
        self.model, self.trust_remote_code = model, trust_remote_code
        self.run = _Run.read(model, open_model)

    def find(self, part: str) -> Beginning:
        """Return where a part began; a pretrained part may be loaded into memory until `Beginning.release`."""
        pretrained = _find_pretrained(self.model, part, self.trust_remote_code) if part in PREFIXES else None
        if pretrained is not None and (pretrained.source is not None or self.run.source is None):
            return pretrained
        return Beginning(self.run.place, self.run.reason, self.run.source)


def _find_pretrained(model: StoredModel, part: str, trust_remote_code: bool) -> Beginning:
    """Return the pretrained weights of a vision encoder or language model."""
    if part in model.backbones:
        place, source = str(model.backbones[part]), model.backbone(part)
        return Beginning(place, "" if source else model.missing[part], source)
    prefix = PREFIXES[part]
    wanted = {k: x for k, x in own_tensors(model.model).items() if k.startswith(prefix)}
    options: Any = getattr(model.model.config.composition, part)
    try:
        place, source = open_named_part(model.model.config, part, wanted, trust_remote_code=trust_remote_code)
        return Beginning(place, "", source)  # asks for the names, so that a part which cannot be loaded is noticed
    except Exception as error:
        return Beginning(options.name, _explain(options.name, error))


def _explain(name: str, error: Exception) -> str:
    """Say why weights cannot be compared: what is not here needs no more words."""
    from huggingface_hub import try_to_load_from_cache

    is_here = Path(name).exists() or (is_hub_id(name) and isinstance(try_to_load_from_cache(name, "config.json"), str))
    return explain_reading(error) if is_here or ":" in name else "which is not on this machine"


@dataclass(frozen=True)
class _Run:
    """The model with which a training run began: its name, its tensors, or why they are not known."""

    place: str | None
    reason: str = ""
    source: TensorSource | None = None

    @classmethod
    def read(cls, model: StoredModel, open_model: Opener) -> _Run:
        """Find it in the record of an adapter's model, or in the record of the run."""
        base = next((x.location for x in model.backbones.values() if x.kind == "model"), None)
        base = base or _begun_with(Path(model.name))
        if base is None:
            return cls(None, "no record says what it started from")
        try:
            with cache_alone():
                return cls(base, "", _Whole(open_model(base)))
        except Exception as error:
            return cls(base, _explain(base, error))


@dataclass
class _Whole:
    """All tensors of another model."""

    model: StoredModel

    def names(self) -> Mapping[str, Any]:
        return self.model.tensors

    def read(self, name: str) -> Tensor:
        return self.model.read(name)

    def release(self) -> None:
        self.model.release()


def _begun_with(folder: Path) -> str | None:
    """Return the name of the model with which a run began, from the record in its output; None without a record."""
    try:
        job = read_json(folder / RUN_FILE)["job"]
        name = job.get("base") or job.get("model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return name if isinstance(name, str) and name else None
