"""Delta directories: a model without the tensors that its pretrained parts (its backbones) hold already.

For each part whose tensors were left out, `config.json` says under `backbones` where they are, at which commit, and
their hash. `delta.safetensors` holds all other tensors. Loading fails if a tensor is in neither, or a hash differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from vlm_cli.checkpoint.backbones import (
    Backbone,
    hash_tensors,
    pin_language_model,
    pin_tower,
)
from vlm_cli.checkpoint.inside import read_index
from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.tower import SeveralWeights
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, load_tower
from vlm_cli.composition import SeveralEncoderOptions
from vlm_cli.errors import CheckpointError, UsageError, VLMError, first_line
from vlm_cli.modeling.adapters import adapter_parameters, plain_tensors
from vlm_cli.modeling.vlm import VLM

__all__ = [
    "DELTA_FILE",
    "PREFIXES",
    "count_delta_bytes",
    "own_tensors",
    "read_held",
    "write_delta",
    "write_files",
]

DELTA_FILE = "delta.safetensors"  # Transformers loads no file of this name, so it cannot leave the other tensors random

#: Part that can be pretrained -> how the names of its tensors begin.
PREFIXES = {
    "vision_encoder": f"{VLM.PART_PREFIXES['vision_encoder']}visual.",
    "language_model": VLM.PART_PREFIXES["language_model"],
}


def count_delta_bytes(model: VLM, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of the tensors in a delta directory of this model after training. The model may be on meta."""
    parts = model.config.composition
    encoder = parts.vision_encoder
    named = encoder.pretrained is not None or encoder.name.startswith(("hf:", "timm:", "hf-hub:", "local-dir:"))
    named = named and not isinstance(encoder, SeveralEncoderOptions)
    frozen = [part for part in PREFIXES if part not in parts.trainable and (part == "language_model" or named)]
    left_out = tuple(PREFIXES[part] for part in frozen)
    held = [x for name, x in own_tensors(model).items() if not (left_out and name.startswith(left_out))]
    held += [x for _, x in adapter_parameters(model)]
    return sum(x.numel() * (dtype if dtype and x.is_floating_point() else x.dtype).itemsize for x in held)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a file of the model holds, adapters aside: tied ones once, under their first name."""
    names: dict[int, str] = {}
    state = plain_tensors(model)
    for name, x in state.items():
        names.setdefault(id(x), name)
    return {name: state[name] for name in names.values()}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_delta(
    model: VLM,
    out: Path,
    *,
    unchanged: Collection[str] = (),
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write `delta.safetensors`, `config.json` and `generation_config.json` into `out`.

    Each pretrained part is loaded again and compared tensor by tensor, so that the delta keeps every tensor that was
    trained or replaced.

    Args:
        model: the model.
        out: an existing directory.
        unchanged: parts that hold exactly their pretrained weights; they are not loaded again.
        trust_remote_code: whether the language model's own code may run.
        max_shard_size: largest size of one weight file, such as "5GB".
        progress: called with the name of each step before it begins.

    Returns:
        The pinned pretrained parts, and the numbers of tensors and bytes that were written and left out.

    Raises:
        UsageError: if no tensor can be left out.
        CheckpointError: if a pretrained part cannot be found.
    """
    held = own_tensors(model)
    pinned: dict[str, Backbone] = {}
    for part, prefix in PREFIXES.items():
        if part not in unchanged:
            progress(f"comparing with the pretrained {part.replace('_', ' ')}")
        try:
            found = _pin(model, part, trust_remote_code, load=part not in unchanged)
        except VLMError as error:
            raise CheckpointError(
                f"{error} To leave out what it holds, a delta needs the pretrained {part.replace('_', ' ')} at hand; "
                "run the command where it is found, or write a full directory, as for a published checkpoint (build "
                "--from) that brought its own."
            ) from None
        if found is None:
            continue
        backbone, pretrained = found
        same = {
            name: x
            for name, x in held.items()
            if name.startswith(prefix)
            and (pretrained is None or _is_equal(x, pretrained.get(name.removeprefix(prefix))))
        }
        if same:
            size = sum(x.nbytes for x in same.values())
            pinned[part] = replace(backbone, sha256=hash_tensors(same.items()), tensors=len(same), bytes=size)
            held = {name: x for name, x in held.items() if name not in same}
    if not pinned:
        raise UsageError(
            "no tensor of this model equals that of a pretrained part, so a delta directory would hold all of it. "
            "Write a full one."
        )
    progress("writing what differs")
    return write_files(model, out, held, pinned, max_shard_size)


def write_files(
    model: VLM, out: Path, held: Mapping[str, Tensor], pinned: Mapping[str, Backbone], max_shard_size: str
) -> dict[str, Any]:
    """Write the files of a delta.

    Args:
        model: the model.
        out: an existing directory.
        held: the tensors that `delta.safetensors` gets.
        pinned: part -> where the others are.
        max_shard_size: largest size of one weight file, such as "5GB".

    Returns:
        As of `write_delta`.
    """
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {name: x.detach() for name, x in held.items()},
        out,
        filename_pattern=DELTA_FILE.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.backbones = {part: asdict(backbone) for part, backbone in pinned.items()}
    try:
        model.config.save_pretrained(out)
    finally:
        del model.config.backbones
    model.generation_config.save_pretrained(out)
    return {
        "backbones": {part: asdict(replace(backbone, model_config=None)) for part, backbone in pinned.items()},
        "tensors": len(held),
        "tensor_bytes": sum(x.nbytes for x in held.values()),
        "bytes_left_out": sum(backbone.bytes for backbone in pinned.values()),
    }


def _is_equal(x: Tensor, pretrained: Tensor | None) -> bool:
    """Tell whether a tensor of the model equals the pretrained tensor to the last bit, in the model's dtype."""
    if pretrained is None or x.shape != pretrained.shape:
        return False
    return torch.equal(x, pretrained.to(x) if x.is_floating_point() else pretrained)


def _pin(
    model: VLM, part: str, trust_remote_code: bool, *, load: bool
) -> tuple[Backbone, Mapping[str, Tensor] | None] | None:
    """Find out where a pretrained part is, and read its tensors if `load`; None if the composition names no weights."""
    if part == "language_model":
        source = find_language_model(model.config.composition.language_model, trust_remote_code=trust_remote_code)
        return pin_language_model(source), source.load(model.dtype).state_dict() if load else None
    encoder = model.config.composition.vision_encoder
    tower = find_tower(encoder)
    if tower.weights is None or isinstance(tower.weights, SeveralWeights):  # a record has one location
        return None
    backbone, tower = pin_tower(encoder.name, tower)
    return backbone, load_tower(tower).state_dict() if load else None


def read_held(name: str, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors that a delta directory itself holds: name -> tensor.

    Raises:
        CheckpointError: if they cannot be read.
    """
    from safetensors.torch import load_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(name, f"{DELTA_FILE}.index.json", **optional, **keywords)
        shards = {DELTA_FILE} if index is None else set(read_index(Path(index)).values())
        held: dict[str, Tensor] = {}
        for shard in sorted(shards):
            file = cached_file(name, shard, **keywords)
            assert file is not None  # a file that is missing raises
            held |= load_file(file)
        return held
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot load the delta in {name!r}: {first_line(error)}.") from None
