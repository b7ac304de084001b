"""Write a model as a directory, which `vlm_cli.checkpoint.directory` loads; its opening lists the files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_cli.checkpoint.directory import read_config, read_generation_config, read_processor
from vlm_cli.errors import UsageError
from vlm_cli.manifest import recording
from vlm_cli.report.card import UNTRAINED, model_card
from vlm_cli.report.parameters import ParameterReport

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = ["save", "save_adapted", "save_delta"]

COMPOSITION_FILE = "composition.yaml"


def save(
    model: VLM,
    processor: VLMProcessor,
    out: str | Path,
    *,
    name: str | None = None,
    story: str = UNTRAINED,
    parameters: ParameterReport | None = None,
    max_shard_size: str = "5GB",
    shim: bool = True,
) -> None:
    """Write a model as a directory that `vlm_cli.load` and every command read.

    Args:
        model: the model.
        processor: its processor.
        out: the directory; made if it does not exist. Files of the same names are replaced.
        name: name of the model in the model card; None takes the directory's name.
        story: sentences of the model card on how the model was trained.
        parameters: for the model card, if the caller counted the parameters already.
        max_shard_size: largest size of one weight file, such as "5GB".
        shim: whether to write the file through which Transformers opens the directory with `trust_remote_code`.

    Raises:
        OSError, safetensors.SafetensorError: if the disk is full. `replacing_directory` turns both into an error for
            users.
    """
    _refuse_adapters(model)
    folder = _make_folder(out)
    model.config.writes_shim = shim
    with recording(folder):
        _write_code(model, folder)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_companions(model, processor, folder, model_card(model, name or folder.name, story, parameters))


def save_delta(
    model: VLM,
    processor: VLMProcessor,
    out: str | Path,
    *,
    name: str | None = None,
    story: str = UNTRAINED,
    parameters: ParameterReport | None = None,
    max_shard_size: str = "5GB",
    unchanged: Sequence[str] = (),
    trust_remote_code: bool = False,
    shim: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write a model as a delta directory, which leaves out the tensors that the pretrained parts hold.

    Args:
        model, processor, out, name, story, parameters, max_shard_size: as of `save`.
        unchanged: parts that hold exactly their pretrained weights, as the caller knows: they are not loaded again.
        trust_remote_code: whether the language model's own code may run, when its weights are loaded to compare.
        shim: as of `save`.
        progress: called with the name of each step before it begins.

    Returns:
        The pinned pretrained parts, and the numbers of tensors and bytes that were written and left out.

    Raises:
        VLMError: if a pretrained part cannot be found, or no tensor can be left out.
    """
    from vlm_cli.checkpoint.delta import write_delta

    _refuse_adapters(model)
    folder = _make_folder(out)
    model.config.writes_shim = shim
    with recording(folder):
        _write_code(model, folder)
        facts = write_delta(
            model,
            folder,
            unchanged=unchanged,
            trust_remote_code=trust_remote_code,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        _write_companions(model, processor, folder, model_card(model, name or folder.name, story, parameters))
    return facts


def save_adapted(
    model: VLM,
    processor: VLMProcessor,
    out: str | Path,
    base: str,
    *,
    changed: Collection[str] = (),
    backbones: Mapping[str, str] | None = None,
    name: str | None = None,
    story: str = UNTRAINED,
    shim: bool = True,
) -> dict[str, Any]:
    """Write a model with adapters as a delta directory over the model that it was trained from.

    Args:
        model, processor, out, name, story, shim: as of `save`.
        base: directory or hub id of the model that it was trained from.
        changed: parts that do not hold the tensors of `base`, although they are frozen now.
        backbones: if `base` is a delta directory, part -> where its pretrained weights are now, if they moved.

    Returns:
        As of `save_delta`, and `adapter_bytes`.

    Raises:
        VLMError: if `base` cannot be read.
    """
    from vlm_cli.checkpoint.trained import write_trained

    folder = _make_folder(out)
    model.config.writes_shim = shim
    with recording(folder):
        _write_code(model, folder)
        facts = write_trained(model, folder, base, changed=changed, backbones=backbones)
        _write_companions(model, processor, folder, model_card(model, name or folder.name, story))
    return facts


def _make_folder(out: str | Path) -> Path:
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    return folder


def _refuse_adapters(model: VLM) -> None:
    """Check that a model has no adapters, for which its file has no place.

    Raises:
        UsageError: if it has.
    """
    if model.config.adapters:
        raise UsageError(
            f"the model has an adapter of its {', '.join(model.config.adapters)}. Merge it before you write the "
            "model: model.merge_adapters(), or vlm export MODEL OUT --format merged."
        )


def _write_code(model: VLM, folder: Path) -> None:
    from vlm_cli.checkpoint.parts.remote_code import write_code

    write_code(model.lang_model, folder)


def _write_companions(model: VLM, processor: VLMProcessor, folder: Path, card: str) -> None:
    """Write all files but the weights and their configurations, and read back what was written."""
    processor.save_pretrained(folder)
    composition = yaml.safe_dump(model.config.composition.to_dict(), sort_keys=False)
    (folder / COMPOSITION_FILE).write_text(composition, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    _read_back(model, processor, folder)


def _read_back(model: VLM, processor: VLMProcessor, folder: Path) -> None:
    """Read a directory that was written as a command will read it, weights aside.

    Raises:
        CheckpointError: if it cannot be read, or its tokenizer, configuration and tables do not agree.
    """
    from vlm_cli.checkpoint.agreement import check_agreement
    from vlm_cli.checkpoint.parts.remote_code import has_own_code

    place, trusted = str(folder), has_own_code(model.lang_model, processor.tokenizer)
    config = read_config(place, trust_remote_code=trusted)
    tokenizer = read_processor(place, trust_remote_code=trusted).tokenizer
    read_generation_config(place)
    check_agreement(config, tokenizer.get_vocab(), processor.tokenizer.get_vocab(), _count_rows(model, folder))


def _count_rows(model: VLM, folder: Path) -> dict[str, int]:
    """Return the rows of the vocabulary tables in the weight files of a directory; no tensor is read."""
    from safetensors import safe_open

    added = model.added_tokens
    tables = (model.lang_model.get_input_embeddings().weight, added.embedding.weight, added.head.weight)
    names = {name for name, x in model.named_parameters(remove_duplicate=False) if any(x is table for table in tables)}
    found: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_shape()[0] for name in names.intersection(opened.keys())}
    return found
