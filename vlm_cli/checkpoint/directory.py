"""Load a directory that holds a whole model, without a network.

config.json              configuration of the model, its parts and its tokens
composition.yaml         the composition, from which `vlm build --config` builds the model anew
model.safetensors        all tensors; a delta directory has delta.safetensors instead, see delta.py
generation_config.json   how answers end and are sampled
tokenizer, processor     files of Transformers
README.md                the model card
vlm_manifest.json        sizes and hashes of the files that are loaded, see vlm_cli/manifest.py
vlm_shim.py              lets Transformers find our classes, see vlm_cli/shim.py
*.py                     code of the language model, if it has its own
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.full import cannot_load, load_full
from vlm_cli.checkpoint.inside import check_folder, read_index
from vlm_cli.checkpoint.whole import check_fetched_files, check_files
from vlm_cli.errors import (
    CheckpointError,
    CompositionError,
    PluginError,
    UntrustedCodeError,
    first_line,
)
from vlm_cli.registry import ENCODER_TYPES, FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS
from vlm_cli.schema import show

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig

    from vlm_cli.checkpoint.backbones import BackbonePlaces
    from vlm_cli.modeling.config import VLMConfig
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = [
    "load",
    "read_config",
    "read_generation_config",
    "read_processor",
    "read_tensors",
]


def load(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    backbones: Mapping[str, str] | None = None,
    allow_hosts: Collection[str] = (),
    verify: bool = False,
    **keywords: Any,
) -> tuple[VLM, VLMProcessor]:
    """Load the model of a directory or hub id, in evaluation mode, and its processor.

    `vlm_cli.load` does the same and knows the name "demo", too.

    Args:
        name: directory that `vlm build` wrote, or the hub id of such a directory.
        dtype: of the weights; "auto" keeps the dtype of the files.
        device: where the model goes; a `device_map` among the keywords replaces it. "auto" spreads the decoder layers
            over GPUs, memory and disk, as `max_memory` or else the free memory allows.
        trust_remote_code: whether the language model's own code from the directory may run.
        backbones: for a delta directory, part -> where its pretrained weights are now, if they moved.
        allow_hosts: for a delta directory, hosts that its backbones may come from beside the hub.
        verify: whether to compare the hashes of all weight files with the manifest of the directory.
        keywords: `revision`, `token`, `local_files_only`, … of Transformers' `from_pretrained`.

    Raises:
        CheckpointError: if the directory cannot be read, lacks tensors, or does not hold the weights that it was
            written with.
    """
    config = read_config(name, trust_remote_code=trust_remote_code, verify=verify, **keywords)
    model, processor = _load(name, config, dtype, device, trust_remote_code, backbones, allow_hosts, keywords)
    check_fetched_files(name, keywords, verify=verify)
    return model, processor


def _load(
    name: str,
    config: VLMConfig,
    dtype: torch.dtype | str,
    device: str,
    trust_remote_code: bool,
    backbones: Mapping[str, str] | None,
    allow_hosts: Collection[str],
    keywords: Mapping[str, Any],
) -> tuple[VLM, VLMProcessor]:
    """Load the model that a configuration describes, and its processor; the arguments are those of `load`."""
    from vlm_cli.checkpoint.pairing import check_pair
    from vlm_cli.checkpoint.schemas.generation_config import check_generation_config

    processor = read_processor(name, trust_remote_code=trust_remote_code, **keywords)
    check_pair(config, processor, name)
    check_generation_config(name, **keywords)
    if config.is_delta:
        from vlm_cli.checkpoint.backbones import BackbonePlaces

        places = BackbonePlaces(backbones or {}, frozenset(allow_hosts))
        return _load_delta(name, config, dtype, trust_remote_code, places, keywords).to(device), processor
    if backbones:
        raise CheckpointError(
            f"{name!r} holds all of its tensors, so that `backbones`, which is for delta directories, has no effect. "
            "Leave it out."
        )
    if keywords.get("device_map") == "auto":
        from vlm_cli.checkpoint.placement import places_for

        keywords = {**keywords, "device_map": places_for(config, dtype, keywords.get("max_memory"))}
    model = load_full(name, config, dtype, trust_remote_code, keywords)
    if "distributed_config" in keywords:
        return model, processor  # each process holds its part, on its own device
    if "device_map" not in keywords:
        return model.to(device), processor
    if any(p.is_meta for p in model.vision_encoder.parameters()):
        # Weights on disk are read when a module's `forward` is called, but OpenCLIP's towers also read weights of
        # modules that they do not call.
        raise CheckpointError(
            "the vision encoder cannot run from disk. Keep it in memory: device_map={'vision_encoder': 'cpu', …}."
        )
    return model, processor


def _load_delta(
    name: str,
    config: VLMConfig,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    places: BackbonePlaces,
    keywords: Mapping[str, Any],
) -> VLM:
    """Load the model of a delta directory.

    Raises:
        CheckpointError: if a pretrained part or a tensor is missing, or a keyword is not about where files are.
    """
    from vlm_cli.checkpoint.assembling import assemble
    from vlm_cli.trust import HUB_ARGUMENTS

    if other := [key for key in keywords if key not in HUB_ARGUMENTS]:
        raise CheckpointError(
            f"{name!r} is a delta directory, which cannot be loaded with {', '.join(other)}. Leave it out, or make a "
            "full directory: model.save_pretrained(…) of the loaded model."
        )
    model = assemble(name, config, dtype=dtype, trust_remote_code=trust_remote_code, places=places, **keywords)
    model.generation_config = read_generation_config(name, **keywords) or model.generation_config
    return model.eval()


def read_config(name: str, *, trust_remote_code: bool = False, verify: bool = False, **keywords: Any) -> VLMConfig:
    """Read the configuration of a model from a directory or hub id. The files of a directory are compared first.

    Raises:
        CheckpointError: if there is none, if it is not that of a VLM, if the model needs a package that is not
            installed, or if a weight file is another one than the manifest of the directory says.
        UntrustedCodeError: if a file of the model asks for code that may not run.
    """
    from vlm_cli.checkpoint.parts.remote_code import adopt_from_directory
    from vlm_cli.checkpoint.schemas.reading import check_is_mapping
    from vlm_cli.checkpoint.schemas.vlm_config import check_vlm_config
    from vlm_cli.modeling.config import VLMConfig
    from vlm_cli.trust import check_code

    check_folder(Path(name))
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").exists():
        raise CheckpointError(
            f"{name!r} holds a PEFT adapter and no model. Load the model that it was trained on with vlm_cli.load, add "
            "the adapter with peft.PeftModel.from_pretrained, and write what merge_and_unload() returns: vlm_cli.save."
        )
    check_files(Path(name), verify=verify)
    check_is_mapping(name, "config.json", **keywords)
    try:
        check_code(name, trust_remote_code=trust_remote_code, **keywords)
        data, _ = VLMConfig.get_config_dict(name, **keywords)
    except UntrustedCodeError:
        raise
    except Exception as error:
        raise CheckpointError(cannot_load(name, error)) from None
    if not data:
        raise CheckpointError(f"{name!r} is no VLM: it has no config.json. `vlm build` writes one.")
    if data.get("model_type") != "vlm":
        raise CheckpointError(
            f"{name!r} holds a model of type {show(data.get('model_type'))}, not a VLM that `vlm build` wrote; so says "
            f"model_type in config.json. To compose a VLM with it: vlm build OUT --family flamingo --language-model "
            f"{name}. To import a published VLM: vlm build OUT --from {name}"
        )
    try:
        check_vlm_config(data, name)
        _check_parts(name, data)
        if trust_remote_code:
            adopt_from_directory(data.get("text_config") or {}, name, **keywords)
        return VLMConfig.from_dict(data)  # fails if another version wrote a composition that this one cannot read
    except (CheckpointError, PluginError):
        raise
    except CompositionError as error:
        problems = " ".join(f"composition: {problem}" for problem in error.problems[:8])
        raise CheckpointError(f"config.json of {name!r} is not valid: {problems}") from None
    except Exception as error:
        raise CheckpointError(cannot_load(name, error)) from None


def _check_parts(name: str, data: Mapping[str, Any]) -> None:
    """Check that the parts of a configuration are registered.

    Raises:
        CheckpointError: if packages that the model was built with are not installed.
    """
    composition = data.get("composition") or {}
    encoder = (data.get("vision_config") or {}).get("type")
    types = {
        VISION_ENCODERS: None if encoder in ENCODER_TYPES else encoder,
        VISION_TOKENIZERS: (composition.get("vision_tokenizer") or {}).get("type"),
        FUSIONS: (composition.get("fusion") or {}).get("type"),
    }
    missing = [f"{registry.kind} {x!r}" for registry, x in types.items() if x is not None and x not in registry]
    if missing:
        raise CheckpointError(
            f"cannot load {name!r}: config.json names parts, and this environment lacks what it was built with: "
            f"{', '.join(missing)}. Install the package that provides it, and run the same command again."
        )


def read_processor(name: str, *, trust_remote_code: bool = False, **keywords: Any) -> VLMProcessor:
    """Read the processor of a directory or hub id.

    Raises:
        CheckpointError: if it cannot be read.
    """
    from vlm_cli.checkpoint.schemas.processor_files import check_processor_files
    from vlm_cli.processor import VLMProcessor
    from vlm_cli.trust import load_pretrained

    check_processor_files(name, **keywords)
    try:
        return load_pretrained(VLMProcessor, name, trust_remote_code=trust_remote_code, **keywords)
    except UntrustedCodeError:
        raise
    except Exception as error:
        raise CheckpointError(cannot_load(name, error)) from None


def read_generation_config(name: str, **keywords: Any) -> GenerationConfig | None:
    """Read how the model of a directory or hub id ends and samples its answers; None if the directory does not say.

    Raises:
        CheckpointError: for a value that Transformers refuses.
    """
    from vlm_cli.checkpoint.schemas.generation_config import check_generation_config
    from vlm_cli.trust import load_generation_config

    check_generation_config(name, **keywords)
    try:
        return load_generation_config(name, **keywords)
    except OSError:
        return None
    except ValueError as error:
        raise CheckpointError(f"generation_config.json of {name!r} is not valid: {first_line(error)}") from None


def read_tensors(
    name: str, tensors: Sequence[str], *, file: str = "model.safetensors", **keywords: Any
) -> dict[str, Tensor]:
    """Read a few tensors of a directory or cached hub id, and leave the others on disk.

    Args:
        name: directory or hub id.
        tensors: names of the tensors. The result has them without the name of the part, up to the first dot.
        file: name of the weight file; of several files, the name without its number.
        keywords: `revision`, … of Transformers' `from_pretrained`.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    if not tensors:
        return {}
    try:
        index = cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False, **keywords)
        weight_map = read_index(Path(index)) if index else {}
        found = {}
        for tensor in tensors:
            shard = cached_file(name, weight_map.get(tensor, file), **keywords)
            with safe_open(shard, "pt") as opened:
                found[tensor.partition(".")[2]] = opened.get_tensor(tensor)
        return found
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(cannot_load(name, error)) from None
