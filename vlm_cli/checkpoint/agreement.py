"""Check that the files of a model agree: a token has one id in its tokenizer, its configuration and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError

if TYPE_CHECKING:
    from vlm_cli.modeling.config import VLMConfig

__all__ = ["check_agreement"]


def check_agreement(
    config: VLMConfig, found: Mapping[str, int], wanted: Mapping[str, int], rows: Mapping[str, int]
) -> None:
    """Check what was read back of a model that was written.

    Args:
        config: of the model.
        found: token -> id of the tokenizer that was read back.
        wanted: token -> id of the tokenizer in memory.
        rows: name of a table in the weight files -> its number of rows; tables of added tokens begin with
            `added_tokens.`, and the others belong to the language model.

    Raises:
        CheckpointError: naming the first disagreement.
    """
    for problem in _find_problems(config, found, wanted, rows):
        raise CheckpointError(
            f"the files that were written do not agree: {problem}. Give another tokenizer: "
            "--set language_model.tokenizer=DIRECTORY_OR_HUB_ID"
        )


def _find_problems(
    config: VLMConfig, found: Mapping[str, int], wanted: Mapping[str, int], rows: Mapping[str, int]
) -> Iterator[str]:
    """Find disagreements, each as a clause."""
    first, added = config.first_added_id, config.added_tokens
    ids = {**config.added_ids, MEDIA_TOKEN: config.media_token_id}
    for source, expected in (("the tokenizer in memory", wanted), ("config.json", ids)):
        for token, i in expected.items():
            if found.get(token) != i:
                yield f"{token!r} is token {i} in {source}, and {found.get(token)} in the tokenizer's files"
    end = first + len(added)
    if (last := max(found.values())) >= end:
        yield f"the tokenizer's files have ids up to {last}, and config.json has ids up to {end - 1}"
    for name, count in rows.items():
        is_added = name.startswith("added_tokens.")
        if count != len(added) if is_added else count < first:
            yield f"{name} has {count} rows, and config.json needs {len(added) if is_added else first}"
