"""Adapters on the disk, in the layout of PEFT: a folder for each part that has one.

    OUT/adapters/language_model/adapter_config.json         settings
    OUT/adapters/language_model/adapter_model.safetensors   tensors; their names begin inside of the part

So `peft.PeftModel.from_pretrained(PART, FOLDER)` reads an adapter, whether PART stands in a VLM or alone. The settings
come with a directory, and maybe from a stranger: what vlm does not know is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.inside import resolve_inside
from vlm_cli.checkpoint.size_limits import limited_size
from vlm_cli.composition.adapters import MAX_RANK, AdapterSettings
from vlm_cli.errors import CheckpointError, UsageError, VLMError, explain_reading
from vlm_cli.modeling.adapters import ADAPTER, add_adapter, named_as_peft
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.printable import count_of
from vlm_cli.schema import check, choice, list_of, mapping, number, show, text, truth, whole

__all__ = ["ADAPTERS_FOLDER", "attach_adapters", "read_adapter_tensors", "write_adapters"]

ADAPTERS_FOLDER = "adapters"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in a file of PEFT

_SETTINGS = mapping(
    {
        "peft_type": choice("LORA"),
        "r": whole(1, MAX_RANK),
        "lora_alpha": number(0, 1e6),
        "target_modules": list_of(text(most=1_000)),
    },
    {"lora_dropout": number(0, 1), "use_dora": truth(), "use_rslora": truth()},
)
#: Settings that say where an adapter came from, how it began, or what PEFT finds out anyway.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights"),
        *("peft_version", "task_type", "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out"),
    }
)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_adapters(model: VLM, out: Path, bases: Mapping[str, str]) -> int:
    """Write the adapter of each part that has one.

    Args:
        model: the model.
        out: its directory.
        bases: part -> where the tensors are that the adapter stands beside.

    Returns:
        The bytes of the tensors.
    """
    from safetensors.torch import save_file

    size = 0
    for part in model.config.adapters:
        module: Any = model.part_modules()[part]
        folder = out / ADAPTERS_FOLDER / part
        folder.mkdir(parents=True)
        config = module.peft_config[ADAPTER]
        config.base_model_name_or_path, config.inference_mode = bases[part], True
        config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in each process
        config.save_pretrained(str(folder))
        tensors = {f"{_PREFIX}{name}": x.detach().contiguous() for name, x in named_as_peft(module).items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        size += sum(x.nbytes for x in tensors.values())
    return size


# -- reading -----------------------------------------------------------------------------------------------------------


def attach_adapters(name: str, model: VLM, *, weights: bool = True, **keywords: Any) -> None:
    """Put the adapters of a directory or hub id beside the parts of its model.

    Args:
        name: directory or hub id.
        model: its model, which names the parts in `config.adapters`; on the meta device without `weights`.
        weights: whether to read the tensors, too.
        keywords: `revision`, … of Transformers' `from_pretrained`.

    Raises:
        CheckpointError: if an adapter cannot be read, or is not one for this model.
    """
    for part in model.config.adapters or ():
        module, where = model.part_modules()[part], f"{ADAPTERS_FOLDER}/{part}"
        settings = _read_settings(name, f"{where}/{_CONFIG}", keywords)
        file = _find(name, f"{where}/{_WEIGHTS}", keywords) if weights else None
        try:
            with limited_size(f"the adapter of {name!r}", [file] if file else []), torch.random.fork_rng(devices=[]):
                add_adapter(module, part, settings)
        except UsageError as error:
            raise CheckpointError(f"{name!r} has an adapter of its {part.replace('_', ' ')}: {error}") from None
        if file is not None:
            _fill(f"{where}/{_WEIGHTS} of {name!r}", named_as_peft(module), _read_tensors(name, file))


def read_adapter_tensors(name: str, part: str, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of the adapter of a part; their names begin inside of the part.

    Args:
        name: directory or hub id.
        part: the part's name.
        keywords: `revision`, … of Transformers' `from_pretrained`.

    Raises:
        CheckpointError: if they cannot be read.
    """
    held = _read_tensors(name, _find(name, f"{ADAPTERS_FOLDER}/{part}/{_WEIGHTS}", keywords))
    return {key.removeprefix(_PREFIX): x for key, x in held.items()}


@torch.no_grad()
def _fill(file: str, ours: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file over those of an adapter.

    Raises:
        CheckpointError: if they are not the same by names and shapes.
    """
    named = {name.removeprefix(_PREFIX): x for name, x in held.items()}
    missing = sorted(ours.keys() - named.keys())
    wrong = sorted(name for name, x in named.items() if name not in ours or ours[name].shape != x.shape)
    if missing or wrong:
        raise CheckpointError(
            f"{file} does not hold what adapter_config.json beside it describes: {count_of(len(missing), 'tensor')} "
            f"missing, {len(wrong)} unknown or of another shape; e.g. {(missing + wrong)[0]}. Fetch both again."
        )
    for name, x in named.items():
        ours[name].copy_(x)


def _read_settings(name: str, file: str, keywords: Mapping[str, Any]) -> AdapterSettings:
    """Read the settings of an adapter.

    Raises:
        CheckpointError: for settings that vlm does not have.
    """
    where = f"{file} of {name!r}"
    try:
        data = read_json(_find(name, file, keywords))
    except VLMError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read {where}: {explain_reading(error)}.") from None
    check(data, _SETTINGS, where)
    if foreign := next(_foreign(data), None):
        raise CheckpointError(
            f"{where} sets {foreign} to {show(data[foreign])}, which vlm does not read. PEFT does: "
            "peft.PeftModel.from_pretrained."
        )
    try:
        return AdapterSettings(
            r=data["r"],
            alpha=data["lora_alpha"],
            targets=tuple(data["target_modules"]),
            dropout=data.get("lora_dropout", 0.0),
            dora=data.get("use_dora", False),
            rslora=data.get("use_rslora", False),
        )
    except UsageError as error:
        raise CheckpointError(f"{where} is not valid: {error}") from None


def _foreign(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that are on and that vlm does not have."""
    ours = {"peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_dora", "use_rslora"}
    for key, x in data.items():
        if key not in ours and key not in _WITHOUT_EFFECT and x not in (None, False, "none", [], {}):
            yield key


def _read_tensors(name: str, file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        raise CheckpointError(f"cannot read {file.name} of {name!r}: {explain_reading(error)}.") from None


def _find(name: str, file: str, keywords: Mapping[str, Any]) -> Path:
    """Return the path of a file of a directory or hub id.

    Raises:
        CheckpointError: if there is none.
    """
    from transformers.utils.hub import cached_file

    folder = Path(name)
    if folder.is_dir():
        path = resolve_inside(folder, file, named_by="config.json")
        if not path.is_file():
            raise CheckpointError(f"{name!r} lacks {file}: config.json says that it has this adapter. Fetch it again.")
        return path
    try:
        found = cached_file(name, file, **keywords)
    except Exception as error:
        raise CheckpointError(f"cannot fetch {file} of {name!r}: {explain_reading(error)}.") from None
    assert found is not None  # a file that is missing raises
    return Path(found)
