"""The reference's models of tests/parity as published checkpoints need them: a backbone, a tower, and what is trained.

The names are those of its later branch, `reduce-scope-mllm`.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.modeling.test_parity import Case
from tests.support import ROOT
from tests.support.published import tell
from vlm_cli.checkpoint.published.importing import Imported
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.modeling.vlm import VLM

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
