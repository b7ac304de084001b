"""Compositions: what they are made of, how layers are overlaid, and every mistake at once."""

from __future__ import annotations

import json

import pytest
import yaml

from vlm_cli.composition import (
    FAMILIES,
    Composition,
    PerceiverOptions,
    QFormerOptions,
    merge,
    parse_override,
    read_file,
)
from vlm_cli.errors import CompositionError
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

PARTS = {"vision_encoder": "ViT-B-32", "language_model": "some/lm"}


def problems(*layers, family=None, overrides=()):
    with pytest.raises(CompositionError) as caught:
        Composition.compose(family, *layers, overrides=overrides)
    return caught.value.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_whole_composition(family):
    found = Composition.compose(family)
    assert found.family == family and found.vision_encoder.name and found.language_model.name
    assert Composition.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_data_goes_through_files(family, tmp_path):
    wanted = Composition.compose(family).to_dict()
    (tmp_path / "c.json").write_text(json.dumps(wanted))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(wanted))
    assert read_file(tmp_path / "c.json") == read_file(tmp_path / "c.yaml") == wanted


@pytest.mark.parametrize("tokenizer", VISION_TOKENIZERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_tokenizer_goes_with_every_fusion(tokenizer, fusion):
    found = Composition.compose(None, PARTS, {"vision_tokenizer": tokenizer, "fusion": fusion})
    assert (found.vision_tokenizer.type, found.fusion.type, found.family) == (tokenizer, fusion, None)
    assert Composition.from_dict(found.to_dict()) == found


def test_later_layers_win():
    found = Composition.compose(
        "flamingo",
        {"vision_tokenizer": {"depth": 2, "num_latents": 7}, "weight_decay": 0.5},
        {"vision_tokenizer": {"depth": 3}},
        overrides=["vision_tokenizer.depth=4", "fusion.every=2"],
    )
    assert found.vision_tokenizer.options == PerceiverOptions(depth=4, num_latents=7)
    assert (found.fusion.options.every, found.weight_decay) == (2, 0.5)


def test_naming_the_type_again_keeps_its_settings_and_another_drops_them():
    first = {"vision_tokenizer": {"depth": 2}}
    same = Composition.compose("flamingo", first, {"vision_tokenizer": "perceiver"})
    assert same.vision_tokenizer.options == PerceiverOptions(depth=2)
    other = Composition.compose("flamingo", first, {"vision_tokenizer": "qformer"})
    assert other.vision_tokenizer.options == QFormerOptions()


def test_another_encoder_does_not_keep_the_tag_of_the_first():
    found = Composition.compose("flamingo", {"vision_encoder": "ViT-B-32"})
    assert found.vision_encoder.pretrained is None
    found = Composition.compose("flamingo", {"vision_encoder": {"layer": -2}})
    assert (found.vision_encoder.name, found.vision_encoder.pretrained) == ("ViT-L-14", "openai")


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("ViT-B-32", "ViT-B-32", None),
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32", "laion2b_s34b_b79k"),
        ("hf-hub:timm/ViT-B-16-SigLIP", "hf-hub:timm/ViT-B-16-SigLIP", None),
        ("local-dir:/a/b", "local-dir:/a/b", None),
        ("a/b:c/tower.json", "a/b:c/tower.json", None),
    ],
)
def test_names_of_encoders(text, name, tag):
    for layer in ({"vision_encoder": text}, {"vision_encoder": {"name": text}}):
        found = Composition.compose("flamingo", layer).vision_encoder
        assert (found.name, found.pretrained) == (name, tag)
    found = Composition.compose("flamingo", overrides=[f"vision_encoder={text}"]).vision_encoder
    assert (found.name, found.pretrained) == (name, tag)


def test_a_layer_may_name_the_family_and_the_argument_beats_it():
    assert Composition.compose(None, {"family": "kosmos"}).fusion.type == "language-stream"
    assert Composition.compose("flamingo", {"family": "kosmos"}).fusion.type == "cross-attention"
    assert Composition.compose(None, overrides=["family=blip"]).vision_tokenizer.type == "qformer"


def test_each_setting_of_a_tiling_may_be_given_by_itself():
    found = Composition.compose("llava", overrides=["tiling=grid", "tiling.max_tiles=4", "tiling.thumbnail=first"])
    assert (found.tiling.options.max_tiles, found.tiling.options.thumbnail) == (4, "first")
    other = Composition.compose("llava", found.to_dict(), overrides=["tiling.type=split"]).tiling
    assert (other.options.max_tiles, other.options.thumbnail) == (None, "last")


def test_merging_leaves_its_arguments_alone():
    base = {"fusion": {"type": "cross-attention", "every": 4}}
    merge(base, {"fusion": {"every": 2}})
    assert base == {"fusion": {"type": "cross-attention", "every": 4}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-4", 1e-4),
        ("a=-2.5E+3", -2500.0),
        ("a=.5", 0.5),
        ("a=true", True),
        ("a=null", None),
        ("a=", None),
        ("a=ViT-B-32:openai", "ViT-B-32:openai"),
        ("a='1'", "1"),
        ("a=[x, y]", ["x", "y"]),
        ("a=b=c", "b=c"),
        ("a=1e5x", "1e5x"),
        ("a=e4", "e4"),
    ],
)
def test_values_of_overrides(text, value):
    assert parse_override(text) == {"a": value}


@pytest.mark.parametrize("text", ["", "a", "=1", "a.=1", ".a=1", "a.b.c=1", "a={"])
def test_overrides_that_cannot_be_read(text):
    with pytest.raises(CompositionError, match="--set"):
        parse_override(text)


def test_paths_in_a_file_start_at_its_folder_where_something_is_there(tmp_path):
    for name in ("lm", "tower", "words"):
        (tmp_path / name).mkdir()
    (tmp_path / "tower.json").touch()
    (tmp_path / "weights.pt").touch()
    data = {
        "vision_encoder": {"name": "tower.json", "pretrained": "weights.pt"},
        "language_model": {"name": "lm", "tokenizer": "words", "revision": "lm"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    found = read_file(tmp_path / "c.yaml")
    assert found["vision_encoder"] == {"name": str(tmp_path / "tower.json"), "pretrained": str(tmp_path / "weights.pt")}
    assert found["language_model"]["name"] == str(tmp_path / "lm")
    assert found["language_model"]["tokenizer"] == str(tmp_path / "words")
    assert found["language_model"]["revision"] == "lm"
    (tmp_path / "c.yaml").write_text("vision_encoder: local-dir:tower\nlanguage_model: some/lm\n")
    found = read_file(tmp_path / "c.yaml")
    assert found == {"vision_encoder": f"local-dir:{tmp_path / 'tower'}", "language_model": "some/lm"}


def test_every_problem_is_told_at_once():
    found = problems(
        {
            "vision_encoder": {"name": "x", "layer": 0},
            "vision_tokenizer": {"type": "perceiver", "depth": 0, "num_heads": "many", "latents": 3},
            "fusion": "cross",
            "trainable": ["fusion", "fusion", "vision"],
            "weight_decay": "much",
            "colour": "red",
        },
        overrides=["nonsense"],
    )
    for words in (
        "--set expects NAME=VALUE",
        "unknown key 'colour'",
        "vision_encoder.layer counts from the end",
        "vision_tokenizer.num_heads must be a whole number, got 'many'",
        "unknown key vision_tokenizer.latents. Did you mean 'num_latents'?",
        "unknown fusion 'cross'. Did you mean 'cross-attention'?",
        "no language model is named. Add --language-model",
        "unknown part 'vision' in trainable. Did you mean 'fusion'?",
        "trainable names something twice",
        "weight_decay must be a number from 0 to 1000, got 'much'",
    ):
        assert any(words in problem for problem in found), words
    assert str(CompositionError(found)).startswith(f"the composition has {len(found)} problems:\n  - ")


def test_an_unknown_family_hides_no_other_problem_and_makes_none():
    found = problems({"family": "flamigo", "vision_tokenizer": "percever", "fusion": {"every": 2}})
    assert found[0].startswith("unknown family 'flamigo'. Did you mean 'flamingo'?")
    assert len(found) == 2 and "percever" in found[1]


def test_what_could_be_read_is_known_nevertheless():
    with pytest.raises(CompositionError) as caught:
        Composition.compose("flamingo", PARTS, {"fusion": "none"})
    assert caught.value.readable["vision_encoder"].name == "ViT-B-32"
    assert caught.value.readable["language_model"].name == "some/lm"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"vision_tokenizer": {"depth": True}}, "vision_tokenizer.depth must be a whole number, got true"),
        ({"vision_tokenizer": {"depth": 1.5}}, "vision_tokenizer.depth must be a whole number, got 1.5"),
        ({"vision_tokenizer": {"dim_out": "x"}}, "must be a whole number or null"),
        ({"vision_tokenizer": {"type": "qformer", "dim": 10, "num_heads": 3}}, "dim must be a multiple of num_heads"),
        ({"vision_tokenizer": {"type": "qformer", "dropout": 1}}, "dropout must be in [0, 1)"),
        ({"vision_tokenizer": {"type": "linear", "frames": "last"}}, "must be 'concatenate' or 'mean'"),
        ({"fusion": {"attend": "none"}}, "fusion.attend must be 'last' or 'all'"),
        ({"fusion": {"feed_forward_before_media": 1}}, "must be true or false, got 1"),
        ({"fusion": 7}, "fusion must be a name (cross-attention, llama-cross-attention, language-stream), got 7."),
        ({"vision_encoder": {"image_size": 0}}, "vision_encoder.image_size must be at least 1"),
        ({"vision_encoder": 3}, "vision_encoder must be a name or a mapping, got 3"),
        ({"trainable": 3}, "trainable must be a list of names, got 3"),
        ({"added_tokens": ["<|endofchunk|>"]}, "added_tokens must hold '<image>'"),
    ],
)
def test_one_problem_is_one_sentence(layer, words):
    (problem,) = problems(layer, family="flamingo")
    assert words in problem and problem.endswith(".")


def test_settings_of_a_tiling_without_a_type_are_refused_with_an_example() -> None:
    with pytest.raises(CompositionError, match=r"Add a type, for example --set tiling\.type=grid \(none, grid, "):
        Composition.compose("llava", overrides=["tiling.max_tiles=4"])
