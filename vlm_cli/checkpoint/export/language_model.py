"""Export the language model of a VLM alone, as a directory of Transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm_cli.checkpoint.parts.remote_code import write_code
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.generation_settings import inherit_settings
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.processor import VLMProcessor
from vlm_cli.trust import load_tokenizer

__all__ = ["export_language_model", "forget_tokens"]


def export_language_model(
    model: VLM, processor: VLMProcessor, out: Path, *, max_shard_size: str = "5GB"
) -> dict[str, Any]:
    """Write the language model and its tokenizer as a plain Transformers directory, under its published names.

    The tokenizer loses the tokens for which the language model has no row: those that the composition added.

    Raises:
        CheckpointError: if the tokenizer cannot be written without these tokens.
    """
    lm, first = model.lang_model, model.config.first_added_id
    write_code(lm, out)
    settings, _ = inherit_settings(model.generation_config)
    stops = [i for i in stop_token_ids(settings) if i < first]
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    settings.pad_token_id = None if (settings.pad_token_id or 0) >= first else settings.pad_token_id
    lm.generation_config = settings
    lm.save_pretrained(out, max_shard_size=max_shard_size)
    _tokenizer_as_published(processor).save_pretrained(out)
    forget_tokens(out, set(model.config.added_tokens))
    _check_tokenizer(out, first)
    return {"model_type": lm.config.model_type, "tokens": first}


def _tokenizer_as_published(processor: VLMProcessor) -> PreTrainedTokenizerBase:
    """Return the tokenizer, whose chat template has nothing of what a VLM's file adds to it."""
    tokenizer: PreTrainedTokenizerBase = copy.deepcopy(processor.tokenizer)
    template: Any = processor.chat_program
    if isinstance(tokenizer.chat_template, dict):
        others = {name: x for name, x in tokenizer.chat_template.items() if name != "default"}
        template = others if template is None else {**others, "default": template}
    tokenizer.chat_template = template
    return tokenizer


def forget_tokens(folder: Path, names: set[str]) -> None:
    """Remove tokens from a tokenizer's files, and every mention of vlm's processor."""

    def content(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    def without(data: Any) -> Any:
        if isinstance(data, list):
            return [x for x in data if content(x) not in names]
        return data

    def edit(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        file = folder / name
        if file.is_file():
            data = change(read_json(file))
            file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def settings(data: dict[str, Any]) -> dict[str, Any]:
        foreign = ("processor_class", "is_local", "local_files_only")  # written by vlm's processor and by loading
        kept = {key: without(x) for key, x in data.items() if key not in foreign}
        decoder = kept.get("added_tokens_decoder") or {}
        if decoder:
            kept["added_tokens_decoder"] = {i: x for i, x in decoder.items() if content(x) not in names}
        return {key: x for key, x in kept.items() if not (key.endswith("_token") and content(x) in names)}

    def tokens(data: dict[str, Any]) -> dict[str, Any]:
        model = data.get("model") or {}
        if isinstance(table := model.get("vocab"), dict):  # holds added tokens if the vocabulary has holes
            model = {**model, "vocab": {name: i for name, i in table.items() if name not in names}}
        return {**data, "added_tokens": without(data.get("added_tokens") or []), "model": model}

    edit("tokenizer.json", tokens)
    edit("tokenizer_config.json", settings)
    edit("special_tokens_map.json", settings)
    edit("added_tokens.json", lambda data: {name: i for name, i in data.items() if name not in names})


def _check_tokenizer(folder: Path, first: int) -> None:
    """Check that the tokenizer in a directory gives only ids below `first`, the language model's number of rows.

    Raises:
        CheckpointError: if it gives others.
    """
    tokenizer = load_tokenizer(folder)
    beyond = [name for name, i in tokenizer.get_vocab().items() if i >= first]
    if beyond:
        raise CheckpointError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be written without the tokens {', '.join(beyond)}, "
            "which the language model does not have. Take the tokenizer of the language model itself."
        )
