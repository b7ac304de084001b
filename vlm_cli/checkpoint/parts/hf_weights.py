"""The tensors of a vision model in the files of a directory or a repository, alone or as a part of a larger model.

The names that all tensors of the vision model share at their beginning tell where it is:

    vision_model.embeddings.patch_embedding.weight      CLIP: `vision_model.`
    model.vision_tower.vision_model.embeddings.…        LLaVA: `model.vision_tower.vision_model.`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from vlm_cli.checkpoint.inside import read_index
from vlm_cli.checkpoint.parts.plain_types import PlainType
from vlm_cli.checkpoint.parts.tower import RepositoryWeights
from vlm_cli.checkpoint.torch_files import describe_load_error, read_shapes, read_torch_file
from vlm_cli.errors import VisionEncoderError, explain_reading

__all__ = ["VisionTensors"]


@dataclass(frozen=True)
class VisionTensors:
    """The tensors of a vision model in files.

    Attributes:
        prefix: the beginning of their names.
        files: the files that hold some.
        plain: what the model is under its plain name; None if the files have its own.
    """

    prefix: str
    files: tuple[Path, ...]
    plain: PlainType | None = None

    @classmethod
    def find(cls, weights: RepositoryWeights, wanted: Sequence[str], plain: PlainType | None = None) -> VisionTensors:
        """Find the tensors of a vision model; of files in shards, only those that hold some are fetched.

        Args:
            weights: where the files are.
            wanted: names of the model's tensors.
            plain: what the model is under its plain name, whose tensors these are.

        Raises:
            VisionEncoderError: if there are no weight files, or none of these tensors.
        """
        names = _names_by_file(weights)
        prefix = _find_prefix([name for held in names.values() for name in held], wanted)
        if prefix is None:
            raise VisionEncoderError(
                f"the weights in {weights.location!r} hold no tensors of a vision model of its configuration."
            )
        files = [file for file, held in names.items() if any(name.startswith(prefix) for name in held)]
        return cls(prefix, tuple(_fetch(weights, file) for file in files), plain)

    def shapes(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on the meta device, as `read` would return them."""
        found = {name: x for file in self.files for name, x in _unwrap(read_shapes(file)).items()}
        return _resize_positions(self._bare(found), wanted)

    def read(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the tensors, and no others of the files, under the names that they have in the vision model.

        Args:
            wanted: the model's tensors; position embeddings get the shape that they have there.

        Raises:
            VisionEncoderError: if a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for file in self.files:
            try:
                found |= _read_tensors(file, self.prefix)
            except Exception as error:
                raise VisionEncoderError(
                    f"cannot load the weights {str(file)!r}: {describe_load_error(error)}."
                ) from None
        return _resize_positions(self._bare(found), wanted)

    def _bare(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {k.removeprefix(self.prefix): x for k, x in found.items() if k.startswith(self.prefix)}
        return own if self.plain is None else self.plain.convert_tensors(own)


def _names_by_file(weights: RepositoryWeights) -> dict[str, list[str]]:
    """Return the names of tensors in each weight file; safetensors before PyTorch's files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path := _find(weights, f"{name}.index.json")) is not None:
            by_file: dict[str, list[str]] = {}
            for tensor, file in read_index(path).items():
                by_file.setdefault(file, []).append(tensor)
            return by_file
        if (path := _find(weights, name)) is not None:
            try:
                return {name: list(_unwrap(read_shapes(path)))}
            except Exception as error:
                raise VisionEncoderError(
                    f"cannot load the weights {str(path)!r}: {describe_load_error(error)}."
                ) from None
    raise VisionEncoderError(
        f"there is no file named model.safetensors or pytorch_model.bin in {weights.location!r}. Fetch it again, or "
        "add --random-weights."
    )


def _find(weights: RepositoryWeights, file: str) -> Path | None:
    """Return the path of a file; None if the directory or the repository does not have it.

    Raises:
        VisionEncoderError: if it cannot be fetched.
    """
    try:
        path = cached_file(
            weights.location, file, revision=weights.revision, _raise_exceptions_for_missing_entries=False
        )
    except Exception as error:
        raise VisionEncoderError(
            f"cannot fetch {file} of {weights.location!r}: {explain_reading(error)}. If this machine is offline, fetch "
            "it once where there is a network and copy the cache (HF_HOME); --random-weights needs no weights."
        ) from None
    return None if path is None else Path(path)


def _fetch(weights: RepositoryWeights, file: str) -> Path:
    if (path := _find(weights, file)) is None:
        raise VisionEncoderError(f"{weights.location!r} lacks the weight file {file!r}. Fetch it again.")
    return path


def _find_prefix(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Return the beginning that most tensors of a vision model have in files; None if the files hold none.

    >>> names = ["text.layers.0.weight", "vision.layers.0.weight", "vision.patch.weight"]
    >>> _find_prefix(names, ["layers.0.weight", "patch.weight"])
    'vision.'
    """
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    found: Counter[str] = Counter()
    for tensor in wanted:
        for name in ends.get(tensor.rpartition(".")[2], ()):
            if name == tensor or name.endswith(f".{tensor}"):
                found[name[: len(name) - len(tensor)]] += 1
    return min(found, key=lambda prefix: (-found[prefix], len(prefix)), default=None)


def _read_tensors(file: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of a file whose names have a beginning."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}
    return {name: x for name, x in _unwrap(read_torch_file(file)).items() if name.startswith(prefix)}


def _unwrap(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a file; some training programs put them into another dictionary."""
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return {str(name): x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, Mapping) else {}


def _resize_positions(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit position embeddings to another number of patches, as OpenCLIP does."""
    for name, x in found.items():
        target = wanted.get(name)
        if target is None or x.shape == target.shape or "pos" not in name:
            continue
        if x.ndim != target.ndim or x.shape[-1] != target.shape[-1] or x.shape[:-2] != target.shape[:-2]:
            continue
        found[name] = _resize(x, target.shape)
    return found


def _resize(x: Tensor, shape: torch.Size) -> Tensor:
    """Resize float[…, P + v, d] position embeddings of square grids; P tokens beside the patches keep theirs."""
    from math import isqrt

    beside = next((k for k in range(16) if _is_square(x.shape[-2] - k) and _is_square(shape[-2] - k)), None)
    if beside is None:
        return x
    if x.is_meta:
        return torch.empty(shape, device="meta")
    table = x.reshape(-1, x.shape[-1]).float()
    old, new = isqrt(len(table) - beside), isqrt(shape[-2] - beside)
    grid = table[beside:].T.reshape(1, -1, old, old)
    grid = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:beside], grid.flatten(2)[0].T]).reshape(shape).to(x.dtype)


def _is_square(count: int) -> bool:
    from math import isqrt

    return count > 0 and isqrt(count) ** 2 == count
