"""What a VLM inherits of `generation_config.json`: a file that Transformers writes, under which greedy stays greedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import vlm_cli
from tests.support import disk
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.generation_settings import inherit_checked, inherit_settings

#: Settings of other answers than greedy ones, or of none.
FOREIGN = {"stop_strings": ["zzz"], "min_new_tokens": 5, "no_repeat_ngram_size": 1, "prompt_lookup_num_tokens": 3}
VICUNA = {"temperature": 0.9, "top_p": 0.6}  # without do_sample, as Vicuna-1.5 has them


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({}, []),
        (VICUNA, ["temperature", "top_p"]),
        ({"do_sample": True, **VICUNA}, []),
        ({"do_sample": True, "temperature": 0.0}, ["do_sample", "temperature"]),
        ({"penalty_alpha": 0.6, "top_k": 4}, ["penalty_alpha", "top_k"]),
        (FOREIGN, list(FOREIGN)),
        ({"length_penalty": 2.0}, ["length_penalty"]),
        ({"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.05}, []),
        ({"chat_format": "raw"}, ["chat_format"]),
        ({"num_return_sequences": 1, "guidance_scale": 1.0, "min_length": 0, "top_k": 50, "temperature": 1.0}, []),
    ],
)
def test_settings_that_are_kept(given: dict[str, Any], left_out: list[str], tmp_path: Path) -> None:
    config = GenerationConfig.from_dict(given)
    kept, found = inherit_settings(config)
    assert sorted(found) == sorted(left_out)
    kept.save_pretrained(tmp_path)  # Transformers refuses what it finds wrong
    wanted = {key: x for key, x in given.items() if key not in left_out}
    data = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: x for key, x in data.items() if key in given} == wanted
    assert config.to_dict() == GenerationConfig.from_dict(given).to_dict()  # the argument stays as it was


def test_notes_name_each_setting() -> None:
    _, (unused, other) = inherit_checked(GenerationConfig.from_dict({**VICUNA, "min_new_tokens": 5}), "lm")
    assert "temperature=0.9, top_p=0.6, which have no effect there" in unused
    assert "'lm' sets min_new_tokens=5." in other
    with pytest.raises(LanguageModelError, match=r"generation_config.json of 'lm' is not valid: .*max_new_tokens"):
        config = GenerationConfig()
        config.max_new_tokens = 0
        inherit_checked(config, "lm")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> vlm_cli.Composition:
    folder = tmp_path_factory.mktemp("parts")
    tower, lm = disk.tower(folder / "tower"), disk.language_model(folder / "lm")
    add_settings(lm, {**VICUNA, **FOREIGN})
    return disk.composition(f"local-dir:{tower}", str(lm), "perceiver", "cross-attention")


def add_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.matrix
def test_a_dry_run_tells_what_the_build_does(parts: vlm_cli.Composition, tmp_path: Path, vlm: Any) -> None:
    dry, built = vlm_cli.build(parts), vlm_cli.build(parts, tmp_path / "out")
    assert dry.notes == built.notes[: len(dry.notes)] and len(dry.notes) == 2
    written = GenerationConfig.from_pretrained(tmp_path / "out").to_diff_dict()
    assert not {*VICUNA, *FOREIGN} & written.keys()
    ask = ("generate", "--model", tmp_path / "out", "The cat", "--json", "-n", 8)
    plain = vlm(*ask)
    # A directory that was written before.
    add_settings(tmp_path / "out", FOREIGN)
    again = vlm(*ask)
    assert again.exit_code == 0 and json.loads(again.stdout)["text"] == json.loads(plain.stdout)["text"]
    assert "Note: generation_config.json sets" in again.stderr and "Note: generation" not in plain.stderr
    # The same settings bend the answers of the library, so that this test sees them.
    model, _ = vlm_cli.load(str(tmp_path / "out"))
    model.generation_config.stop_strings = None
    model.generation_config.prompt_lookup_num_tokens = None
    ids = torch.tensor([[5, 6, 7]])
    bent = model.generate(ids, max_new_tokens=12, min_new_tokens=None)
    assert not bent.equal(model.generate(ids, max_new_tokens=12, no_repeat_ngram_size=None, min_new_tokens=None))


def test_what_the_build_refuses_is_refused_by_a_dry_run(parts: vlm_cli.Composition, tmp_path: Path) -> None:
    lm = disk.language_model(tmp_path / "lm")
    other = disk.composition(parts.vision_encoder.name, str(lm), "perceiver", "cross-attention")
    for change, message in (
        (lambda: add_settings(lm, {"cache_implementation": "none of them"}), "cache_implementation"),
        (lambda: (lm / "model.safetensors").unlink(), "no file named model.safetensors"),
    ):
        change()
        for out in (None, tmp_path / "out"):
            with pytest.raises(LanguageModelError, match=message):
                vlm_cli.build(other, out)
        add_settings(lm, {"cache_implementation": None})
