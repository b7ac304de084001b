"""Which tables of added tokens a checkpoint's vocabulary tables fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint, TensorInfo
from vlm_cli.checkpoint.published.tables import known_and_new_targets, tables_filled
from vlm_cli.modeling.config import VLMConfig

BOTH = ("embedding", "head")


@pytest.mark.parametrize(
    ("is_tied", "names", "embedding", "head"),
    [
        (False, {"wte.weight", "lm_head.weight"}, ("embedding",), ("head",)),
        (False, {"wte.weight"}, ("embedding",), ("head",)),  # its head was frozen, and never saved
        (True, {"wte.weight", "lm_head.weight"}, ("embedding",), ("head",)),
        (True, {"wte.weight"}, BOTH, ("head",)),
        (True, {"lm_head.weight"}, ("embedding",), BOTH),
    ],
)
def test_a_tied_table_that_stands_once_fills_both(is_tied, names, embedding, head):
    info = TensorInfo((4, 2), torch.float32, Path("w.safetensors"))
    checkpoint = PublishedCheckpoint("w.safetensors", Path(), dict.fromkeys(names, info), {})
    config = VLMConfig(text_config=LlamaConfig(tie_word_embeddings=is_tied))
    filled = tables_filled(checkpoint, config, embedding=r"wte\.weight", head=r"lm_head\.weight")
    assert filled == {"embedding": embedding, "head": head}


def test_added_tokens_without_rows_start_at_the_mean():
    table = torch.tensor([[1.0, 3.0], [3.0, 5.0], [7.0, 7.0]])  # two rows of the language model, one of an added token
    added = torch.full((3, 2), torch.nan)
    for target in known_and_new_targets(["head"], slice(2, 3), num_known=1, num_added=3):
        assert target.target == "added_tokens.head.weight"
        target.region(added).copy_(target.select(table))
    assert added.tolist() == [[7.0, 7.0], [2.0, 4.0], [2.0, 4.0]]
