"""What a layout of published weights answers: whether a checkpoint is written so, and what the checkpoint is.

A layout is one small module. It recognises a checkpoint by names and shapes, never by the name of a repository; it says
which composition the checkpoint is; and it has a table from the checkpoint's names to those of a VLM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.targets import TargetsOf
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["CheckpointDescription", "Layout", "missing_config"]


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """A checkpoint in vlm's terms.

    Attributes:
        composition: plain data for `Composition.compose`; the user's flags are laid over it.
        targets_for: gives, for a VLM of this configuration, the targets of each tensor.
        text_config: configuration of a language model whose weights the checkpoint holds, as plain data with a
            `model_type`; None if the language model comes from `composition["language_model"]`.
        holds_language_model: whether the checkpoint holds all weights of `composition["language_model"]`, so that
            only the configuration and the tokenizer are read from there.
        vision_config: OpenCLIP's configuration (`embed_dim`, `vision_cfg`, `quick_gelu`, `preprocess`) of a vision
            encoder whose weights the checkpoint holds; None if they come from `composition["vision_encoder"]`.
        crops_down: whether images were cropped as Transformers crops them, if the vision encoder comes from OpenCLIP.
        tokenizer: directory or hub id of the tokenizer; None for the checkpoint's or the language model's own.
        starts_with_bos: whether prompts start with the tokenizer's BOS token; None leaves it to the tokenizer.
        renamed_tokens: token of the tokenizer -> its new text. vlm's `<image>` stands for a whole picture, so that a
            tokenizer must not have this text for anything else.
        chat_template: in the place of the tokenizer's own; None keeps that one.
        end_of_answer: token that ends an answer, in the place of the tokenizer's end of a text; None keeps that one. A
            tokenizer without the token stays as it is.
        first_added_id: id of the first token with a row in `added_tokens`; None for the id after the tokenizer's last.
        initialize_like: added token -> a text. The token's embedding starts as that of the text's first token, if the
            checkpoint never had the added token itself.
        optional_pattern: pattern of names in a VLM that this layout never fills and the VLM does not need.
        notes: sentences that the user should read.
    """

    composition: Mapping[str, Any]
    targets_for: Callable[[VLMConfig], TargetsOf]
    text_config: Mapping[str, Any] | None = None
    holds_language_model: bool = False
    vision_config: Mapping[str, Any] | None = None
    crops_down: bool = False
    tokenizer: str | None = None
    starts_with_bos: bool | None = None
    renamed_tokens: Mapping[str, str] | None = None
    chat_template: str | None = None
    end_of_answer: str | None = None
    first_added_id: int | None = None
    initialize_like: Mapping[str, str] | None = None
    optional_pattern: str = r"(?!)"  # matches no name
    notes: tuple[str, ...] = ()

    def is_optional(self, name: str) -> bool:
        """Say whether a VLM can do without the tensor of this name."""
        return re.fullmatch(self.optional_pattern, name) is not None


class Layout(Protocol):
    """One way in which published weights are written.

    Attributes:
        name: what reports call it.
        source: the address or file of the code that writes it.
    """

    name: str
    source: str

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Say whether names and shapes are those of this layout."""

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Describe a checkpoint of this layout in vlm's terms.

        Raises:
            CheckpointError: if vlm has no equal of something in it.
        """


def missing_config(checkpoint: PublishedCheckpoint, owner: str) -> CheckpointError:
    """Make the error for a checkpoint without its `config.json`.

    Args:
        checkpoint: named in the error.
        owner: the program that writes such a file.
    """
    return CheckpointError(
        f"{checkpoint.name!r} has no config.json of {owner}, and its tensors do not tell how many heads there are. "
        "Give the directory that holds both."
    )
