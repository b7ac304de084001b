"""`vlm inspect`: parts, shapes, tokens, gates, and how a prompt lies in the model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from vlm_cli import load


@pytest.fixture
def shown(vlm):
    def inspect(*flags):
        result = vlm("inspect", *flags, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return inspect


@pytest.mark.parametrize("family", ["flamingo", "kosmos"])
def test_shapes_are_those_of_a_real_pass(shown, family, request):
    folder = request.getfixturevalue(family)
    shapes = shown(folder)["shapes"]
    model, processor = load(str(folder))
    batch = processor(text=["<image>a<image>b"], images=[[Image.new("RGB", (9, 9))] * 2])
    sizes = {"B": 1, "T_img": 2, "F": 1, "T_txt": batch["input_ids"].shape[1]}
    with torch.no_grad():
        features = model.vision_encoder(batch["pixel_values"])
        tokens, _ = model.encode_vision(batch["pixel_values"])
        logits = model(**batch).logits
    for name, tensor in {
        "vision_x": batch["pixel_values"],
        "features": features,
        "vision_tokens": tokens,
        "lang_x": batch["input_ids"],
        "logits": logits,
    }.items():
        assert [sizes.get(x, x) for x in shapes[name]] == list(tensor.shape)


def test_what_a_directory_holds(shown, flamingo, parts):
    found = shown(flamingo)
    assert (found["family"], found["class"], found["dtype"]) == ("flamingo", "VLMWithCrossAttention", "float32")
    assert found["language_model"]["name"] == str(parts.language_model)
    assert (found["language_model"]["type"], found["language_model"]["context"]) == ("llama", 2048)
    assert found["fusion"]["before_layers"] == [0, 1, 2, 3]
    assert found["tokens"]["added"] == {"<|endofchunk|>": 466, "<image>": 467, "<pad>": 468}
    assert found["tokens"]["special"]["</s>"] == 1 and found["tokens"]["stop"] == [1, 466]
    assert found["vision_encoder"]["preprocessing"]["size"] == 32
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])
    assert found["bytes"] == 4 * found["parameters"]


def test_the_table(vlm, flamingo):
    table = vlm("inspect", flamingo).stdout
    for words in (
        "vision_tokenizer",
        "perceiver (depth=1",
        "before layers 0, 1, 2, 3",
        "VLMWithCrossAttention, float32",
        "(B, T_img, F, 3, 32, 32)",
        "467  added media",
        "468  added pad",
        "1  stop",
        "resize_mode",
        "blocks.0.attn_gate  +0.0000",
    ):
        assert words in table


def test_gates_are_read_from_the_files(shown, flamingo, open_gates):
    assert set(shown(flamingo)["gates"].values()) == {0.0}
    gates = shown(open_gates)["gates"]
    assert gates == dict.fromkeys(gates, pytest.approx(math.tanh(0.5))) and len(gates) == 8


def test_gates_of_shards(vlm, shown, open_gates, tmp_path):
    model, processor = load(str(open_gates))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    processor.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert shown(tmp_path / "sharded")["gates"] == shown(open_gates)["gates"]


def test_the_language_stream_has_no_gates(shown, vlm, kosmos):
    assert shown(kosmos)["gates"] == {}
    assert "Gates" not in vlm("inspect", kosmos).stdout


def test_a_composition_shows_what_its_directory_shows(shown, parts, flamingo):
    composed, built = shown(*parts.flamingo), shown(flamingo)
    assert composed == built
    assert shown(flamingo / "composition.yaml") == built


def test_a_composition_without_a_tokenizer_is_shown_but_lays_no_prompt_out(vlm, shown, parts, language_model):
    for file in language_model.glob("tokenizer*"):
        file.unlink()
    flags = [*parts.flamingo, "--language-model", language_model]
    assert "special" not in shown(*flags)["tokens"]
    result = vlm("inspect", *flags, "--prompt", "hi")
    assert result.exit_code == 1 and "language_model.tokenizer=" in result.stderr


# -- a prompt ----------------------------------------------------------------------------------------------------------

PROMPT = "One <image> two <image:b.png> three"


def spans(shown, *flags):
    layout = shown(*flags, "--prompt", PROMPT, "-i", "a.png")
    return layout, [(span["kind"], span["content"], span["sees"]) for span in layout["spans"]]


TEXT_SEES = {
    "last": [[], [1], [1], [2], [2]],
    "all": [[], [1], [1], [1, 2], [1, 2]],
}


@pytest.mark.parametrize("attend", ["last", "all"])
def test_what_text_sees_with_cross_attention(shown, parts, attend):
    layout, found = spans(shown, *parts.flamingo, "--set", f"fusion.attend={attend}")
    contents = [("text", "One "), ("medium", "a.png"), ("text", " two "), ("medium", "b.png"), ("text", " three")]
    assert found == [(*content, sees) for content, sees in zip(contents, TEXT_SEES[attend], strict=True)]
    assert layout["positions"] == len(layout["ids"])


@pytest.mark.parametrize("attend", ["last", "all"])
def test_what_text_sees_with_blocks_made_like_llamas(vlm, shown, parts, attend, photo, tmp_path):
    """As with Flamingo's blocks; `vlm generate --dry-run` shows the same."""
    sizes = ("num_heads=2", "head_dim=16", "dim_ff=32", f"attend={attend}")
    flags = ["--fusion", "llama-cross-attention", *(x for size in sizes for x in ("--set", f"fusion.{size}"))]
    chosen = [*parts.named, "--vision-tokenizer", "linear", *flags]
    layout, found = spans(shown, *chosen)
    assert [sees for *_, sees in found] == TEXT_SEES[attend]
    assert layout["positions"] == len(layout["ids"])
    assert vlm("build", tmp_path / "out", *chosen, "--quiet").exit_code == 0
    dry = vlm("generate", "-m", tmp_path / "out", f"<image:{photo}>a" * 2, "--dry-run", "--json")
    assert [span["sees"] for span in json.loads(dry.stdout)["spans"]] == TEXT_SEES[attend][1:]


def test_an_image_takes_n_positions_of_the_language_stream(shown, kosmos):
    layout, found = spans(shown, kosmos)
    assert [sees for *_, sees in found] == TEXT_SEES["all"]
    assert [span["positions"] for span in layout["spans"] if span["kind"] == "medium"] == [6, 6]
    ends = [0] + [span["end"] for span in layout["spans"]]
    assert [span["start"] for span in layout["spans"]] == ends[:-1]
    assert layout["positions"] == ends[-1] == len(layout["ids"]) + 2 * 5
    assert layout["left"] == layout["context"] - layout["positions"]


def test_the_layout_as_a_table(vlm, kosmos):
    result = vlm("inspect", kosmos, "--prompt", PROMPT, "-i", "a.png")
    assert result.exit_code == 0
    assert "<image:a.png>" in result.stdout and "positions of the language model" in result.stdout
    assert "of 2048 left" in result.stdout


def test_layout_and_generation_count_alike(vlm, shown, kosmos, photo):
    layout = shown(kosmos, "--prompt", "a<image>b<image>", "-i", "a.png", "-i", "b.png")
    flags = ("generate", "-m", kosmos, "a<image>b<image>", "-i", photo, "-i", photo, "-n", 1, "--json")
    data = json.loads(vlm(*flags).stdout)
    assert (data["prompt_tokens"], data["prompt_positions"]) == (len(layout["ids"]), layout["positions"])
