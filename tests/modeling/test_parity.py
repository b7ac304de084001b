"""The reference's own weights, inputs and outputs (`tests/parity`, described in docs/architecture.md).

More folders of such cases are tested too if the environment variable VLM_PARITY names where they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tests.support import ROOT
from tests.support.tiny import nudged
from vlm_cli.checkpoint.weights import load_weights
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN, PARTS, Composition
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
from vlm_cli.modeling.towers import tower_shape
from vlm_cli.modeling.vlm import VLM

HOMES = [ROOT / "tests" / "parity", *(Path(x) for x in [os.environ.get("VLM_PARITY")] if x)]
FOLDERS = sorted(path.parent for home in HOMES for path in home.glob("*/config.json"))

#: The reference's names of settings that we call otherwise.
RENAMED = {
    "heads": "num_heads",
    "dim_head": "head_dim",
    "num_query_tokens": "num_queries",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "dim_ff",
    "cross_attention_frequency": "cross_attention_every",
}

#: Sums in another order, in float32.
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
LOSS_TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def composition(config: dict[str, Any]) -> Composition:
    tokenizer = {RENAMED.get(key, key): x for key, x in config["vision_tokenizer"].items()}
    special = config["special_tokens"]
    layer: dict[str, Any] = {
        "vision_encoder": "the reference's",
        "vision_tokenizer": tokenizer,
        "language_model": config["language_model"],
        "added_tokens": sorted(special, key=special.get),
    }
    if "cross_attn_every_n_layers" in config:
        layer["fusion"] = {"every": config["cross_attn_every_n_layers"]}
    return Composition.compose(config["family"], layer)


def build(folder: Path, config: dict[str, Any]) -> VLM:
    parts = composition(config)
    vision = {key: x for key, x in config["vision"].items() if key in ("embed_dim", "vision_cfg", "quick_gelu")}
    num_patches, dim = tower_shape(vision)
    settings = VLMConfig(
        text_config=AutoConfig.from_pretrained(folder / "language_model"),
        vision_config=vision | {"num_patches": num_patches, "dim": dim},
        composition=parts,
        added_tokens=list(parts.added_tokens),
        first_added_id=min(config["special_tokens"].values()),
        media_token_id=config["special_tokens"][MEDIA_TOKEN],
        pad_token_id=config["pad_token_id"],
    )
    return VLM(settings).eval()


def load(model: VLM, path: Path) -> None:
    report = load_weights(model, path, random_parts=PARTS)
    assert report.is_complete and not report.unused and not report.absent, report


@dataclass
class Case:
    """A model with the reference's weights, and what the reference was given and gave."""

    model: VLM
    counts: list[int]  # media of each row
    special: dict[str, int]
    tensors: dict[str, Tensor]

    @property
    def vision_mask(self) -> Tensor:
        """bool[B, T_img, F]"""
        B, T_img, F = self.tensors["vision_x"].shape[:3]
        return (torch.arange(T_img) < torch.tensor(self.counts)[:, None])[..., None].expand(B, T_img, F)

    def run(self) -> Any:
        inputs = {key: self.tensors[key] for key in ("vision_x", "lang_x", "attention_mask", "labels")}
        return self.model(**inputs, vision_mask=self.vision_mask)

    def generate(self, row: int, num_tokens: int, **options: Any) -> list[int]:
        """New tokens of a row by itself, unpadded; the stop token is suppressed."""
        lang_x = self.tensors["lang_x"][row][self.tensors["attention_mask"][row].bool()][None]
        stop = self.special.get(END_OF_CHUNK)
        sequence = self.model.generate(
            vision_x=self.tensors["vision_x"][row, None, : self.counts[row]],
            lang_x=lang_x,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=None if stop is None else [stop],
            **options,
        )[0]
        return sequence[lang_x.shape[1] :].tolist()


@cache
def read(folder: Path) -> Case:
    config = json.loads((folder / "config.json").read_text())
    model = build(folder, config)
    load(model, folder / "weights.safetensors")
    return Case(model, config["image_counts"], config["special_tokens"], load_file(folder / "case.safetensors"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read(request.param)


def check_vision(case: Case) -> None:
    there = case.vision_mask
    with torch.no_grad():
        features = case.model.vision_encoder(case.tensors["vision_x"])
        tokens, _ = case.model.encode_vision(case.tensors["vision_x"], there)
    torch.testing.assert_close(features, case.tensors["vision_features"], **TOLERANCE)
    there = there.any(-1)
    torch.testing.assert_close(tokens[there], case.tensors["vision_tokens"][there], **TOLERANCE)


@torch.no_grad()
def check_text(case: Case) -> None:
    output, there = case.run(), case.tensors["attention_mask"].bool()
    if isinstance(case.model, VLMWithLanguageStream):
        # The reference returns the first position of a medium there, and we the last.
        there = there & (case.tensors["lang_x"] != case.special[MEDIA_TOKEN])
    torch.testing.assert_close(output.logits[there], case.tensors["logits"][there], **TOLERANCE)
    torch.testing.assert_close(output.loss, case.tensors["loss"].squeeze(), **LOSS_TOLERANCE)


def test_there_are_cases():
    assert {folder.name for folder in FOLDERS} >= {"flamingo-llama", "kosmos-llama", "blip-opt", "llava-llama"}


def test_vision_tokens_are_the_references(case):
    check_vision(case)


def test_logits_and_loss_are_the_references(case):
    check_text(case)


def test_greedy_tokens_are_the_references(case):
    for row, expected in enumerate(case.tensors["generated"].tolist()):
        assert case.generate(row, len(expected)) == expected


def test_beams_are_the_references(case):
    for row, expected in enumerate(case.tensors["beam3"].tolist()):
        assert case.generate(row, len(expected), num_beams=3) == expected


def test_a_changed_weight_of_any_part_is_noticed(case):
    parts = [part for part, module in case.model.part_modules().items() if list(module.parameters())]
    assert set(PARTS) - set(parts) <= {"fusion"}  # the language stream has no weights
    for part in parts:
        weight, at = most_important(case, part)
        checks = (check_text, check_vision) if part.startswith("vision") else (check_text,)
        for check in checks:
            with nudged(weight, at=at), pytest.raises(AssertionError, match="not close"):
                check(case)
        check_text(case)


def most_important(case: Case, part: str) -> tuple[Tensor, int]:
    """The weight of a part on which the loss hangs most: its tensor, and where it is in it."""
    case.model.set_trainable([part])
    case.run().loss.backward()
    weights = [p for p in case.model.parameters() if p.grad is not None]
    weight = max(weights, key=lambda p: p.grad.abs().max())
    at = int(weight.grad.abs().argmax())
    case.model.zero_grad()
    case.model.set_trainable(case.model.config.composition.trainable)
    return weight, at
