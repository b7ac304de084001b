"""The cases of tests/parity: weights, inputs and outputs of the reference implementation, and our model beside them.

`Case` is our model with the reference's weights. `Parity` gives the same weights as the parts of a published
checkpoint, under the names of the reference's later branch, `reduce-scope-mllm`.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import ROOT
from tests.support.published import tell
from vlm_cli.checkpoint.published.importing import Imported
from vlm_cli.checkpoint.weights import load_weights
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN, PARTS, Composition
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM

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
    num_patches, dim = find_tower_shape(vision)
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


HOME = ROOT / "tests" / "parity"


@dataclass(frozen=True)
class Parity:
    """One folder of tests/parity: the configuration, and the reference's weights under its own names."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, name: str) -> Parity:
        folder = HOME / name
        return cls(folder, json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors"))

    @property
    def language_model(self) -> str:
        """The backbone's directory, which has no weights."""
        return str(self.folder / "language_model")

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): x for k, x in self.weights.items() if k.startswith(prefix)}

    def backbone(self, out: Path, *, is_random: bool = False, **changes: Any) -> str:
        """The directory of the language model with the reference's weights, or with random ones."""
        shutil.copytree(self.language_model, out)
        config = AutoConfig.from_pretrained(out)
        for name, value in changes.items():
            setattr(config, name, value)
        lm = AutoModelForCausalLM.from_config(config)
        bare = {
            name.replace(".decoder_layer.", "."): x
            for name, x in self.part("lang_model.").items()
            if not re.search("additional|gated_cross_attn", name)
        }
        if not changes and not is_random:
            lm.load_state_dict(bare)
        lm.save_pretrained(out)
        return str(out)

    def tower(self, out: Path) -> tuple[str, str]:
        """OpenCLIP's configuration of the vision encoder, and its weights, as files."""
        config, weights = out / "tower.json", out / "tower.safetensors"
        config.write_text(json.dumps(self.config["vision"]))
        save_file({f"visual.{k}": x for k, x in self.part("vision_encoder.").items()}, weights)
        return str(config), str(weights)

    def case(self, model: VLM) -> Case:
        """What the reference was given and gave, with our model in its place."""
        special = self.config["special_tokens"]
        assert model.config.media_token_id == special[MEDIA_TOKEN]
        return Case(model, self.config["image_counts"], special, load_file(self.folder / "case.safetensors"))


def check_greedy(case: Case) -> None:
    for row, expected in enumerate(case.tensors["generated"].tolist()):
        assert case.generate(row, len(expected)) == expected


@torch.no_grad()
def largest_difference(case: Case, num_columns: int | None = None) -> float:
    """Between our logits and the reference's where there is text; `<image>` has another place in a language stream."""
    there = case.tensors["attention_mask"].bool() & (case.tensors["lang_x"] != case.special[MEDIA_TOKEN])
    ours, theirs = case.run().logits[there], case.tensors["logits"][there]
    return float((ours - theirs)[:, :num_columns].abs().max())


def tell_of(imported: Imported, family: str) -> None:
    """See that docs/checkpoints.md has the row of a case that was compared with the reference's own numbers."""
    report = imported.report
    counts = " | ".join(str(len(x)) for x in (report.loaded, report.absent, report.unused))
    tell(f"| {imported.layout.name} | open_flamingo's own numbers, {family} | {counts} | ✓ | ✓ |")
