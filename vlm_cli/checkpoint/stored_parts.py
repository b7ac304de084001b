"""Where the tensors of a part are, to be read one by one: in weight files, or in a part that must be loaded first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vlm_cli.checkpoint.backbones import Backbone, locate_language_model, locate_tower
from vlm_cli.checkpoint.delta import PREFIXES
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.tower import OutsideWeights, SeveralWeights, Tower
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, load_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.offline import cache_alone

__all__ = ["FileTensors", "PartTensors", "TensorSource", "open_backbone", "open_named_part"]


class TensorSource(Protocol):
    """Named tensors of a VLM, read one by one."""

    def names(self) -> Iterable[str]:
        """Return the names of the tensors, as a VLM has them."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""

    def release(self) -> None:
        """Forget what was loaded; a later `read` loads it again."""


@dataclass(frozen=True)
class FileTensors:
    """Tensors in weight files; nothing stays in memory.

    Attributes:
        files: the files.
        prefix: what a VLM puts before the names in the files.
    """

    files: PublishedCheckpoint
    prefix: str = ""

    def names(self) -> Iterable[str]:
        return [f"{self.prefix}{name}" for name in self.files.tensors]

    def read(self, name: str) -> Tensor:
        return self.files.read_tensor(name.removeprefix(self.prefix))

    def release(self) -> None:
        pass


@dataclass
class PartTensors:
    """Tensors of a pretrained part whose files have other names or another layout, so that the part is loaded.

    Attributes:
        load: loads the part and returns its tensors.
        prefix: what a VLM puts before their names.
    """

    load: Callable[[], Mapping[str, Tensor]]
    prefix: str
    _loaded: Mapping[str, Tensor] | None = field(default=None, init=False, repr=False)

    def names(self) -> Iterable[str]:
        return [f"{self.prefix}{name}" for name in self._tensors()]

    def read(self, name: str) -> Tensor:
        return self._tensors()[name.removeprefix(self.prefix)]

    def release(self) -> None:
        self._loaded = None

    def _tensors(self) -> Mapping[str, Tensor]:
        if self._loaded is None:
            with cache_alone(), torch.random.fork_rng(devices=[]):
                self._loaded = self.load()
        return self._loaded


def open_backbone(
    config: VLMConfig, part: str, backbone: Backbone, wanted: Mapping[str, Tensor], *, trust_remote_code: bool
) -> TensorSource:
    """Open the pretrained weights that the record of a delta directory names. Nothing is downloaded.

    Args:
        config: of the VLM.
        part: "vision_encoder" or "language_model".
        backbone: where the weights are.
        wanted: name -> tensor on the meta device, of the VLM's part.
        trust_remote_code: whether the language model's own code may run.

    Raises:
        Exception: if they are not on this machine, or cannot be read.
    """
    with cache_alone():
        if backbone.kind == "model":
            return FileTensors(PublishedCheckpoint.open(backbone.location, revision=backbone.revision))
        if part == "language_model":
            return _open_language_model(locate_language_model(backbone, trust_remote_code), wanted)
        with ExitStack() as downloads:
            return _open_tower(locate_tower(config, backbone, frozenset(), downloads))


def open_named_part(
    config: VLMConfig, part: str, wanted: Mapping[str, Tensor], *, trust_remote_code: bool
) -> tuple[str, TensorSource]:
    """Open the pretrained weights that a composition names. Nothing is downloaded.

    Args:
        config: of the VLM.
        part: "vision_encoder" or "language_model".
        wanted: as of `open_backbone`.
        trust_remote_code: whether the language model's own code may run.

    Returns:
        What the composition calls them, and their tensors.

    Raises:
        Exception: if it names none, or they are not on this machine, or cannot be read.
    """
    with cache_alone():
        if part == "language_model":
            options = config.composition.language_model
            found = find_language_model(options, trust_remote_code=trust_remote_code)
            return options.name, _open_language_model(found, wanted)
        encoder = config.composition.vision_encoder
        name = encoder.name if encoder.pretrained is None else f"{encoder.name}:{encoder.pretrained}"
        tower = find_tower(encoder)
        if tower.weights is None:
            raise CheckpointError(f"the composition names no weights of {name}")
        return name, _open_tower(tower)


def _open_language_model(source: LanguageModelSource, wanted: Mapping[str, Tensor]) -> TensorSource:
    """Open a language model: its files themselves, if they have the tensors under the model's own names."""
    prefix = PREFIXES["language_model"]
    is_plain = "gguf_file" not in source.keywords and getattr(source.config, "quantization_config", None) is None
    if is_plain:
        files = PublishedCheckpoint.open(source.location, revision=source.keywords.get("revision"))
        found = FileTensors(files, prefix)
        shapes = {f"{prefix}{k}": x.shape for k, x in files.tensors.items() if x.file.suffix == ".safetensors"}
        if all(shapes.get(name) == tuple(x.shape) for name, x in wanted.items()):
            return found
    return PartTensors(lambda: source.load().state_dict(), prefix)


def _open_tower(tower: Tower) -> TensorSource:
    towers = tower.weights.towers if isinstance(tower.weights, SeveralWeights) else (tower,)
    if any(isinstance(x.weights, OutsideWeights) for x in towers):
        raise CheckpointError("a package of its own loads them, and may fetch them")
    return PartTensors(lambda: load_tower(tower).state_dict(), PREFIXES["vision_encoder"])
