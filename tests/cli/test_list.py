"""`vlm list`: every name that can be composed, and what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.grid import first_of
from vlm_cli.checkpoint.parts.openclip import openclip_files
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.composition import FAMILIES, UNSUITABLE_LANGUAGE_MODELS, VisionEncoderOptions
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS
from vlm_cli.report import encoders
from vlm_cli.report.encoders import (
    EncoderFacts,
    EncoderTable,
    cache_file,
    encoder_facts,
    known_facts,
    measure_encoder,
    store_facts,
    stored_facts,
)
from vlm_cli.report.other_encoders import find_other_encoders

KINDS = {
    "families": set(FAMILIES),
    "vision-tokenizers": set(VISION_TOKENIZERS),
    "fusions": set(FUSIONS),
    "language-models": set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNSUITABLE_LANGUAGE_MODELS),
    "vision-encoders": {*open_clip.list_models(), *VISION_ENCODERS},
}
FACTS = EncoderFacts(image_size=(32, 48), patches=6, channels=8, parameters=1_234_567, pretrained=("one", "two"))
# Small towers; two of them are the same.
MEASURED = ("ViT-S-32", "RN50", "RN50-quickgelu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenCLIP of which vlm knows no encoder."""
    empty = EncoderTable(facts={}, configs={}, tags="")
    monkeypatch.setattr(EncoderTable, "read", lambda: empty)


@pytest.fixture
def full_cache(no_table: None) -> None:
    """Facts of every encoder, as if they had been measured."""
    store_facts(dict.fromkeys(open_clip.list_models(), FACTS))


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_holds_all_its_names(vlm, kind, full_cache):
    result = vlm("list", kind)
    assert result.exit_code == 0 and bool(result.stderr) == (kind == "language-models")
    words = set(result.stdout.split())
    assert KINDS[kind] <= words
    result = vlm("list", kind, "--json")
    found = json.loads(result.stdout)
    assert set(found) == KINDS[kind] and not result.stderr
    assert all(isinstance(entry["summary"], str) for entry in found.values())


def test_everything_at_once(vlm, cache):
    result = vlm("list")
    assert {"flamingo", "perceiver", "cross-attention"} <= set(result.stdout.split())
    assert f"vision-encoders: {len(KINDS['vision-encoders'])}" in result.stdout
    found = json.loads(vlm("list", "--json").stdout)
    assert {kind: set(names) for kind, names in found.items()} == KINDS
    assert all(json.loads(vlm("list", kind, "--json").stdout) == found[kind] for kind in KINDS)
    assert not cache.exists()  # nothing was measured


def test_a_word_narrows_the_list(vlm, full_cache):
    rows = vlm("list", "vision-encoders", "SIGLIP").stdout.splitlines()
    names = [row.split()[0] for row in rows if row.strip()][2:]
    assert "ViT-B-16-SigLIP" in names and all("siglip" in name.lower() for name in names)
    result = vlm("list", "vision-encoders", "zzz")
    assert result.exit_code == 0 and not result.stdout and "'zzz'" in result.stderr


def test_an_unknown_kind(vlm):
    result = vlm("list", "fusion")
    assert result.exit_code == 2 and "unknown kind 'fusion'. Did you mean 'fusions'?" in result.stderr


# -- facts of vision encoders ----------------------------------------------------------------------------------------


def test_facts_are_in_the_table_and_in_json(vlm, full_cache):
    (row,) = [x for x in vlm("list", "vision-encoders").stdout.splitlines() if x.split()[:1] == ["ViT-B-32"]]
    assert row.split() == ["ViT-B-32", "32", "×", "48", "6", "8", "1.2", "one,", "two"]
    assert json.loads(vlm("list", "vision-encoders", "ViT-B-32", "--json").stdout)["ViT-B-32"] == {
        "summary": "OpenCLIP",
        "image_size": [32, 48],
        "patches": 6,
        "channels": 8,
        "parameters": 1_234_567,
        "pretrained": ["one", "two"],
    }


def test_long_lists_of_tags_stay_on_their_line(vlm, no_table):
    tags = tuple(f"a_pretrained_tag_{i}" for i in range(60))
    store_facts(dict.fromkeys(open_clip.list_models(), EncoderFacts(**{**vars(FACTS), "pretrained": tags})))
    (row,) = [x for x in vlm("list", "vision-encoders").stdout.splitlines() if x.split()[:1] == ["RN101"]]
    assert row.rstrip().endswith(", ".join(tags))


def test_only_what_is_asked_for_is_measured_and_only_once(vlm, monkeypatch, no_table):
    built = []
    monkeypatch.setattr(
        encoders, "measure_encoder", lambda config, measure=encoders.measure_encoder: built.append(1) or measure(config)
    )
    first = vlm("list", "vision-encoders", "RN50-quick", "--json")
    assert (
        "Measuring 1 vision encoder, once" in first.stderr
        and list(stored_facts()) == ["RN50-quickgelu"]
        and len(built) == 1
    )
    assert json.loads(first.stdout)["RN50-quickgelu"] == {
        "summary": "OpenCLIP",
        "image_size": [224, 224],
        "patches": 49,
        "channels": 2048,
        "parameters": 38_316_896,
        "pretrained": open_clip.list_pretrained_tags_by_model("RN50-quickgelu"),
    }
    again = vlm("list", "vision-encoders", "RN50-quick", "--json")
    assert again.stdout == first.stdout and not again.stderr and len(built) == 1


def config(name: str) -> dict:
    return open_clip.get_model_config(name)


def test_the_table_knows_every_encoder_and_its_tags(cache):
    facts = known_facts(openclip_files())
    assert not cache.exists() and set(facts) == set(open_clip.list_models())
    for name, known in facts.items():
        assert list(known.pretrained) == open_clip.list_pretrained_tags_by_model(name)


@pytest.mark.parametrize(
    "name",
    first_of(
        [
            "RN50-quickgelu",
            "ViT-B-32",
            "ViT-B-16-SigLIP",
            "ViT-SO400M-14-SigLIP2-378",
            "EVA02-B-16",
            "convnext_base_w",
            "coca_ViT-B-32",
            "MobileCLIP-S1",
        ]
    ),
)
def test_the_table_holds_what_is_measured(name):
    """`docs/generate_encoders.py` measures all of them in this way."""
    measured = measure_encoder(find_tower(VisionEncoderOptions(name=name)).config)
    assert replace(EncoderTable.read().facts[name], pretrained=()) == measured


def test_an_encoder_that_changed_is_not_taken_from_the_table(tmp_path):
    files = dict(openclip_files())
    sizes = EncoderTable.read().sizes_for(files)
    changed = json.loads(files["RN50"].read_text())
    changed["vision_cfg"]["width"] += 8
    files["RN50"] = tmp_path / "RN50.json"
    files["RN50"].write_text(json.dumps(changed))
    assert EncoderTable.read().sizes_for(files) == {name: x for name, x in sizes.items() if name != "RN50"}


def test_another_list_of_tags_measures_nothing(monkeypatch):
    table = replace(EncoderTable.read(), tags="those of another version", facts={"RN50": FACTS})
    monkeypatch.setattr(EncoderTable, "read", lambda: table)
    monkeypatch.setattr(encoders, "measure_encoder", lambda config: pytest.fail("measured"))
    facts = encoder_facts(["RN50"], openclip_files(), config)
    assert facts == {"RN50": replace(FACTS, pretrained=("openai", "yfcc15m", "cc12m"))}


def test_an_encoder_that_cannot_be_measured_does_not_hide_the_others(vlm, monkeypatch, no_table):
    def measure(config):
        if config["vision_cfg"].get("layers") == [3, 15, 36, 10]:  # RN50x64
            raise RuntimeError("this timm cannot")
        return FACTS

    monkeypatch.setattr(encoders, "measure_encoder", measure)
    result = vlm("list", "vision-encoders", "RN50x", "--json")
    found = json.loads(result.stdout)
    assert found["RN50x64"] == {"summary": "OpenCLIP", "problem": "RuntimeError: this timm cannot"}
    assert found["RN50x4"]["patches"] == 6 and "Cannot measure the vision encoder 'RN50x64'." in result.stderr
    assert "RN50x64" not in stored_facts()


def test_towers_that_are_the_same_are_built_once(monkeypatch, no_table):
    built = []
    monkeypatch.setattr(encoders, "measure_encoder", lambda config: built.append(config) or FACTS)
    facts = encoder_facts(MEASURED, openclip_files(), config)
    assert len(built) == 2 and list(facts) == list(MEASURED)
    assert facts["RN50"].pretrained == ("openai", "yfcc15m", "cc12m")
    assert facts["ViT-S-32"].pretrained == ()


def test_what_was_measured_before_an_interruption_is_kept(vlm, monkeypatch, no_table):
    def measure(config):
        if config["vision_cfg"].get("layers") == [3, 15, 36, 10]:  # RN50x64
            raise KeyboardInterrupt
        return FACTS

    monkeypatch.setattr(encoders, "measure_encoder", measure)
    result = vlm("list", "vision-encoders", "RN")
    assert result.exit_code == 130 and not result.stdout and result.stderr.endswith("Interrupted.\n")
    done = set(stored_facts())
    assert done and "RN50x64" not in done and done < {x for x in open_clip.list_models() if "rn" in x.lower()}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"RN50": {}}', '{"RN50": {"image_size": 3}}', '{"RN50": {"image_size": [1e999, 1]}}', "\udcff"],
)
def test_a_broken_cache_is_replaced(vlm, content, monkeypatch, no_table):
    monkeypatch.setattr(encoders, "measure_encoder", lambda config: FACTS)
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(content.encode(errors="surrogateescape"))
    result = vlm("list", "vision-encoders", "RN50x4-quick")
    assert result.exit_code == 0 and "RN50x4-quickgelu" in result.stdout
    assert list(stored_facts()) == ["RN50x4-quickgelu"] and not list(cache_file().parent.glob(".*"))


def test_a_cache_that_cannot_be_written_is_no_error(vlm, cache, monkeypatch, no_table):
    monkeypatch.setattr(encoders, "measure_encoder", lambda config: FACTS)
    cache.write_text("not a folder")
    result = vlm("list", "vision-encoders", "RN50x4-quick")
    assert result.exit_code == 0 and "RN50x4-quickgelu" in result.stdout and cache.read_text() == "not a folder"


def test_other_versions_have_a_cache_of_their_own(full_cache, monkeypatch):
    ours = cache_file()
    monkeypatch.setattr(encoders, "version", lambda name: "99" if name == "timm" else "1")
    assert stored_facts() == {} and cache_file() != ours and cache_file().parent == ours.parent


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_the_cache_is_at_home_by_default(given, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file().parent == tmp_path / ".cache" / "vlm"


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """Two encoders of another package, one of which cannot be built."""
    (tmp_path / "package.py").write_text(
        """
from dataclasses import dataclass
from torch import nn
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.registry import RegisteredPart

@dataclass(frozen=True, kw_only=True)
class Options(VisionEncoderOptions):
    pass

class Outside(nn.Module):
    image_size = 32
    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)
    @classmethod
    def configure(cls, options):
        return {"vision_cfg": {"image_size": 32}}
    def patch_features(self, pixels, layer=-1):
        return self.conv(pixels).flatten(2).transpose(1, 2)

class Broken(Outside):
    def __init__(self, config):
        raise OSError("no such thing")

part = RegisteredPart("outside", "package:Outside", "package:Options", "one convolution")
broken = RegisteredPart("outside-broken", "package:Broken", "package:Options", "nothing works")
"""
    )
    info = tmp_path / "package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: package\nVersion: 1\n")
    points = "outside = package:part\noutside-broken = package:broken\n"
    (info / "entry_points.txt").write_text(f"[{VISION_ENCODERS.group}]\n{points}")
    yield tmp_path


@pytest.mark.matrix
def test_encoders_of_other_packages_are_measured_too(plugin, environment, cache):
    command = [sys.executable, "-m", "vlm_cli", "list", "vision-encoders", "outside"]
    environment = {**environment, "XDG_CACHE_HOME": str(cache)}
    environment["PYTHONPATH"] += f"{os.pathsep}{plugin}"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=120)

    found = json.loads(run("--json").stdout)
    sizes = {"image_size": [32, 32], "patches": 4, "channels": 8, "parameters": 6152, "pretrained": []}
    assert found == {
        "outside": {"summary": "one convolution", **sizes},
        "outside-broken": {"summary": "nothing works", "problem": "OSError: no such thing"},
    }
    result = run()
    assert "one convolution" in result.stdout and "nothing works" in result.stdout
    assert "Cannot measure the vision encoder 'outside-broken'. OSError: no such thing" in result.stderr
    assert not cache.exists()  # its version does not tell when it changes


# -- language models -------------------------------------------------------------------------------------------------


def test_types_and_classes_of_language_models(vlm):
    result = vlm("list", "language-models", "llama4")
    assert [x.split() for x in result.stdout.splitlines() if x.strip()][2:] == [
        ["llama4", "Llama4ForCausalLM"],
        ["llama4_text", "Llama4ForCausalLM"],
    ]
    assert not result.stderr


def test_unsuitable_language_models(vlm):
    number = len(UNSUITABLE_LANGUAGE_MODELS.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())
    assert vlm("list", "language-models").stderr.startswith(f"{number} further types of AutoModelForCausalLM cannot be")
    for flags in ([], ["--json"]):
        result = vlm("list", "language-models", "xlnet", *flags)
        assert "xlnet" not in result.stdout and "No language-models" not in result.stderr
        assert result.stderr == "Not suitable: xlnet (not causal: later tokens change earlier logits).\n"
    result = vlm("list", "language-models", "bert")
    assert "modernbert-decoder" in result.stdout and "Not suitable: bert, bert-generation, camembert," in result.stderr


# -- encoders of other libraries ---------------------------------------------------------------------------------------


def test_a_word_finds_encoders_of_transformers_and_timm(vlm: Callable[..., Any]) -> None:
    found = json.loads(vlm("list", "vision-encoders", "dinov2", "--json").stdout)
    assert found["timm:vit_small_patch14_dinov2"] == {"summary": "timm", "pretrained": ["lvd142m"]}
    assert found["hf:dinov2"]["summary"] == "Transformers Dinov2Model: hf:ORG/NAME"
    table = vlm("list", "vision-encoders", "dinov2").stdout
    assert "timm:vit_small_patch14_dinov2" in table and "pixels" not in table
    mixed = vlm("list", "vision-encoders", "so400m").stdout
    assert "ViT-SO400M-14-SigLIP" in mixed and "timm:vit_so400m_patch14_siglip_224" in mixed and "pixels" in mixed
    assert not any(name.startswith(("hf:", "timm:")) for name in json.loads(vlm("list", "--json").stdout))


def test_the_table_of_other_encoders_is_that_of_the_installed_libraries() -> None:
    import timm
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = find_other_encoders(":")
    models = {name.removeprefix("timm:"): x.pretrained for name, x in found.items() if name.startswith("timm:")}
    types = {name.removeprefix("hf:") for name in found if name.startswith("hf:")}
    assert types <= set(CONFIG_MAPPING) and len(types) > 60
    if version("timm") == "1.0.31":  # the version that it was written with
        ours = {name for name in timm.list_models() if not name.startswith("tiny_")}  # tests register small ones
        assert ours <= set(models) and f"test_vit.{models['test_vit'][0]}" in timm.list_pretrained("test_vit.*")
