"""`VLMConfig`: what `config.json` of a VLM holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from vlm_cli.composition import Composition
from vlm_cli.shim import CONFIG_CLASSES, write_shim
from vlm_cli.trust import make_config

__all__ = ["VLMConfig", "stored_dtype"]


def stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype of the weights that a configuration belongs to; None if it names none."""
    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


class VLMConfig(PreTrainedConfig):
    """A composition, with the configurations of its two pretrained parts.

    Attributes:
        text_config: configuration of the language model.
        vision_config: configuration of the vision encoder: `embed_dim`, `vision_cfg` and `quick_gelu` as in OpenCLIP,
            `preprocess`, and the shape of its features, `num_patches` and `dim`.
        composition: the `Composition`; `config.json` holds its `to_dict()`.
        added_tokens: tokens that the language model does not have, in the order of their ids.
        first_added_id: id of the first added token.
        media_token_id: id of `<image>`.
        tiling_texts: ids of each text that the composition's tiling puts around or between views; None without any.
        adapters: parts that have an adapter; None without any.
        random_weights: whether training began with random weights in all parts; None if it did not.
        writes_shim: whether directories get `vlm_shim.py`, see `vlm_cli/shim.py`; config.json does not hold it.
    """

    model_type = "vlm"
    sub_configs = {"text_config": AutoConfig}

    # Transformers makes configurations without arguments, so each field has a default; a model needs all of them.
    text_config: Any = None
    vision_config: Any = None
    composition: Any = None
    added_tokens: Any = None
    first_added_id: Any = None
    media_token_id: Any = None
    tiling_texts: Any = None
    adapters: Any = None
    random_weights: Any = None
    pad_token_id: int | None = None
    eos_token_id: list[int] | None = None
    # The language model ties its own weights; VLM ties no others.
    tie_word_embeddings: bool = False

    writes_shim = True

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = make_config(**{"model_type": "llama"} | (self.text_config or {}))
        text = self.text_config.get_text_config(decoder=True)
        pad = getattr(text, "pad_token_id", None)  # some configurations name none
        if isinstance(pad, int) and pad >= text.vocab_size:
            # Transformers' Trainer writes the tokenizer's pad token here, which may be one of the added tokens.
            text.pad_token_id = None
        if isinstance(self.composition, Mapping):
            self.composition = Composition.from_dict(self.composition)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        # The language model's configuration may itself hold a text configuration (gemma3, mllama, …).
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        if isinstance(self.composition, Composition):
            data["composition"] = self.composition.to_dict()
        for name in ("tiling_texts", "adapters", "random_weights"):
            if data.get(name) is None:
                data.pop(name, None)  # a model without them has the file that it always had
        for name in ("writes_shim", "auto_map"):
            data.pop(name, None)
        return {**data, "auto_map": dict(CONFIG_CLASSES)} if self.writes_shim else data

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and the file through which Transformers finds our classes, into a directory."""
        if self.writes_shim:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            write_shim(folder)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: Transformers would copy the module of this class into directories, in the place of the shim."""

    @property
    def is_delta(self) -> bool:
        """Whether the directory of this configuration is a delta: other places hold a part of the tensors."""
        return bool(getattr(self, "backbones", None) or self.adapters)

    @property
    def image_token_id(self) -> int:
        """`media_token_id` under Transformers' name."""
        return self.media_token_id

    @property
    def added_ids(self) -> dict[str, int]:
        """Added token -> id. The ids follow each other from `first_added_id`."""
        return {token: self.first_added_id + i for i, token in enumerate(self.added_tokens)}
