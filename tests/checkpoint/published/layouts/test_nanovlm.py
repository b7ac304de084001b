"""nanoVLM, against Transformers' SigLIP and Llama with the same weights, and a pixel shuffle of this file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import transforms
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.support.grid import first_of
from tests.support.photographs import nanovlm_views
from tests.support.published import (
    SIZE,
    VOCABULARY,
    Case,
    check,
    load,
    prompt,
    register_siglip,
    rewrite,
    rewrite_config,
    shapes_of,
    sized,
    write_tokenizer,
)
from tests.support.swaps import check_swap, other_parts
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.targets import make_targets_of
from vlm_cli.checkpoint.published.towers import siglip
from vlm_cli.composition import CompositionRequest
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.towers import build_tower, patch_features
from vlm_cli.modeling.vlm import VLM
from vlm_cli.prompt import parse

WIDTH, LAYERS, HEADS, PATCH = 32, 2, 2, 8  # of the tower, which gives 4×4 patches
SHUFFLE = 2
TOWER = register_siglip("tiny_siglip_of_nanovlm", width=WIDTH, layers=LAYERS, heads=HEADS, patch=PATCH)
PLACES = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
EXTRA = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **PLACES}


@pytest.fixture(autouse=True)
def tower(monkeypatch):
    monkeypatch.setitem(siglip.SIGLIP_TOWERS, (WIDTH, LAYERS, HEADS, PATCH), TOWER)


def config(**changes: Any) -> dict[str, Any]:
    """Make `config.json` of v0.1, which has no tokens for images."""
    return {
        "vit_hidden_dim": WIDTH,
        "vit_inter_dim": 2 * WIDTH,
        "vit_patch_size": PATCH,
        "vit_img_size": SIZE,
        "vit_n_heads": HEADS,
        "vit_dropout": 0.0,
        "vit_n_blocks": LAYERS,
        "vit_ln_eps": 1e-6,
        "vit_cls_flag": False,
        "vit_model_type": "google/siglip-base-patch16-224",
        "lm_hidden_dim": 24,
        "lm_inter_dim": 40,
        "lm_rms_eps": 1e-5,
        "lm_re_base": 100000,
        "lm_max_position_embeddings": 128,
        "lm_vocab_size": VOCABULARY,
        "lm_n_heads": 6,
        "lm_n_kv_heads": 2,
        "lm_dropout": 0.0,
        "lm_n_blocks": 2,
        "lm_attn_scaling": 1.0,
        "lm_use_tokens": False,
        "lm_tie_weights": True,
        "lm_eos_token_id": 0,
        "mp_pixel_shuffle_factor": SHUFFLE,
        **changes,
    }


def with_tokens(**changes: Any) -> dict[str, Any]:
    """Make `config.json` as the branch `main` writes it."""
    return config(
        **{
            "lm_base_vocab_size": VOCABULARY,
            "lm_vocab_size": VOCABULARY + len(EXTRA),
            "vlm_extra_tokens": EXTRA,
            "mp_image_token_length": 4,
            "max_img_size": 64,
        }
        | changes
    )


def shuffled(x: Tensor, s: int = SHUFFLE) -> Tensor:
    """float[N, v, d] -> float[N, v/s², s²·d], patch by patch."""
    side = int(x.shape[1] ** 0.5)
    squares = [
        torch.cat([x[:, (row + a) * side + column + b] for a in range(s) for b in range(s)], dim=-1)
        for row in range(0, side, s)
        for column in range(0, side, s)
    ]
    return torch.stack(squares, dim=1)


def theirs(data: dict[str, Any]) -> tuple[SiglipVisionModel, LlamaForCausalLM, Tensor]:
    torch.manual_seed(7)
    vision = SiglipVisionConfig(
        hidden_size=data["vit_hidden_dim"],
        intermediate_size=data["vit_inter_dim"],
        num_hidden_layers=data["vit_n_blocks"],
        num_attention_heads=data["vit_n_heads"],
        image_size=data["vit_img_size"],
        patch_size=data["vit_patch_size"],
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=data["lm_vocab_size"],
        hidden_size=data["lm_hidden_dim"],
        intermediate_size=data["lm_inter_dim"],
        num_hidden_layers=data["lm_n_blocks"],
        num_attention_heads=data["lm_n_heads"],
        num_key_value_heads=data["lm_n_kv_heads"],
        rms_norm_eps=data["lm_rms_eps"],
        rope_theta=data["lm_re_base"],
        max_position_embeddings=128,
        tie_word_embeddings=data["lm_tie_weights"],
        initializer_range=0.2,
    )
    projection = 0.2 * torch.randn(data["lm_hidden_dim"], data["mp_pixel_shuffle_factor"] ** 2 * data["vit_hidden_dim"])
    return stir(SiglipVisionModel(vision), seed=5), stir(LlamaForCausalLM(text), seed=5), projection


def named(tower: SiglipVisionModel, lm: LlamaForCausalLM, projection: Tensor) -> dict[str, Tensor]:
    """Give the tensors nanoVLM's names."""
    state = {"MP.proj.weight": projection, "decoder.rotary_embd.inv_freq": torch.ones(2)}
    renames = (
        (r"embeddings\.patch_embedding", "patch_embedding.conv"),
        (r"embeddings\.position_embedding\.weight", "patch_embedding.position_embedding"),
        (r"encoder\.layers", "blocks"),
        (r"layer_norm(\d)", r"ln\1"),
        (r"self_attn", "attn"),
        (r"post_layernorm", "layer_norm"),
    )
    vision = {name.removeprefix("vision_model."): x for name, x in tower.state_dict().items()}
    for name, x in vision.items():
        for pattern, ours in renames:
            name = re.sub(pattern, ours, name)
        if "attn.q_proj" in name:
            parts = [x, *(vision[_other(vision, x, which)] for which in "kv")]
            state[f"vision_encoder.{name.replace('q_proj', 'qkv_proj')}"] = torch.cat(parts)
        elif not re.search(r"attn\.[kv]_proj", name):
            state[f"vision_encoder.{name}"] = x[None] if name.endswith("position_embedding") else x
    renames = (
        (r"^model\.embed_tokens", "token_embedding"),
        (r"^model\.layers", "blocks"),
        (r"^model\.norm", "norm"),
        (r"^lm_head", "head"),
        (r"self_attn\.o_proj", "attn.out_proj"),
        (r"self_attn", "attn"),
        (r"input_layernorm", "norm1"),
        (r"post_attention_layernorm", "norm2"),
    )
    for name, x in lm.state_dict().items():
        for pattern, ours in renames:
            name = re.sub(pattern, ours, name)
        state[f"decoder.{name}"] = x
    return state


def _other(state: dict[str, Tensor], q: Tensor, which: str) -> str:
    name = next(k for k, x in state.items() if x is q)
    return name.replace("q_proj", f"{which}_proj")


def nanovlm(folder: Path, data: dict[str, Any]) -> Case:
    tower, lm, projection = theirs(data)
    state = named(tower, lm, projection)
    if data["lm_tie_weights"]:  # `safetensors.torch.save_model` keeps one of two names
        del state["decoder.token_embedding.weight"]
    save_file({k: x.contiguous() for k, x in state.items()}, folder / "model.safetensors")
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer, pad=None)
    (folder / "config.json").write_text(json.dumps({**data, "lm_tokenizer": str(tokenizer)}), encoding="utf-8")

    @torch.no_grad()
    def logits(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        """Run the model; `<image>` has the first added id in both versions."""
        media = shuffled(tower(vision_x[0, :, 0]).last_hidden_state) @ projection.T  # [T_img, n, d]
        rows, last, images = [], [], iter(media)
        announced = lm.model.embed_tokens.weight[[VOCABULARY + 1]] if "max_img_size" in data else []
        for token in lang_x[0].tolist():
            is_media = token == VOCABULARY
            rows += [*announced, *next(images)] if is_media else [lm.model.embed_tokens.weight[token]]
            last.append(len(rows) - 1)
        return lm(inputs_embeds=torch.stack(rows)[None]).logits[0, last, :VOCABULARY]

    return Case(source=folder, logits=logits, made_by="Transformers' SigLIP and Llama with a pixel shuffle")


CONFIGS = {
    "v0.1": config(),
    "main": with_tokens(),
    "untied": config(lm_tie_weights=False),
    "other rotary base": config(lm_re_base=10000, lm_rms_eps=1e-3),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_nanovlm(tmp_path, name):
    check(nanovlm(tmp_path, CONFIGS[name]), is_told=name == "v0.1")


@pytest.mark.sample(2)
@pytest.mark.parametrize("kept", ["decoder.head.weight", "decoder.token_embedding.weight", None])
def test_tied_tables_under_either_name(tmp_path, kept):
    case = nanovlm(tmp_path, with_tokens())

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = state.pop("decoder.head.weight")
        names = [kept] if kept else ["decoder.head.weight", "decoder.token_embedding.weight"]
        return {**state, **{name: weight.clone() for name in names}}

    rewrite(tmp_path, change)
    check(case)


class Tiled(nn.Module):
    """nanoVLM with tiles: its `generate.py`, from a picture to tokens, over Transformers' SigLIP and Llama."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        super().__init__()
        self.tower, self.lm, self.projection = theirs(data)
        self.data, self.tokenizer = data, PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.tokenizer.add_special_tokens({"additional_special_tokens": [*data["vlm_extra_tokens"].values()]})

    def __call__(self, *, text: str = "", images: Any = None, input_ids: Any = None, **inputs: Any) -> Any:
        """Stand for the processor if there is a text, and for the model otherwise."""
        return self.read(text, images[0]) if text else self.forward(input_ids, **inputs)

    def read(self, text: str, image: Image.Image) -> dict[str, Tensor]:
        extra, tile = self.data["vlm_extra_tokens"], self.data["vit_img_size"]
        enlarge = self.data.get("resize_to_max_side_len", True)
        views, rows, columns = nanovlm_views(image, tile, self.data["max_img_size"], enlarge=enlarge)
        places = [extra[f"r{r}c{c}"] for r in range(1, rows + 1) for c in range(1, columns + 1)]
        if (whole := extra.get("global_image_token")) is None:
            views = views if len(places) == 1 else views[1:]
        else:
            places = [whole] if len(places) == 1 else [whole, *places]
        vectors = extra["image_token"] * self.data["mp_image_token_length"]
        shown = text.replace("<image>", "".join(place + vectors for place in places))
        return {"input_ids": self.tokenizer(shown, return_tensors="pt").input_ids, "pixel_values": views}

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        rows = self.lm.model.embed_tokens.weight[input_ids]
        media = shuffled(self.tower(pixel_values).last_hidden_state) @ self.projection.T
        rows[input_ids == VOCABULARY] = media.flatten(0, 1)
        return self.lm(inputs_embeds=rows)

    def generate(self, input_ids: Tensor, pixel_values: Tensor, *, max_new_tokens: int, **options: Any) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self.forward(input_ids, pixel_values).logits[:, -1:, :VOCABULARY]
            input_ids = torch.cat([input_ids, logits.argmax(-1)], dim=1)
        return input_ids

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.lm_head


class TiledNanoVLM(TiledCase):
    @property
    def made_by(self) -> str:
        return "its rules for tiles, over Transformers' SigLIP and Llama"


def tiled(folder: Path, **changes: Any) -> TiledCase:
    data = with_tokens(**changes)
    nanovlm(folder, data)
    reference: Any = Tiled(folder, data)
    return TiledNanoVLM(source=folder, model=reference, processor=reference)


def without_whole(**changes: Any) -> dict[str, Any]:
    """Settings of a model that has no token for the whole image."""
    extra = {"image_token": "<|image|>", **PLACES}
    return {"vlm_extra_tokens": extra, "lm_vocab_size": VOCABULARY + len(extra), **changes}


WAYS = [{}, {"resize_to_max_side_len": False}, without_whole(), {"lm_tie_weights": False}]


@pytest.mark.matrix
@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_tiles_of_photographs_of_many_shapes(tmp_path, changes):
    check_tiled(tiled(tmp_path, **changes), is_told=not changes)


def test_tiles_of_a_photograph(tmp_path):
    """The quick case of the test above."""
    check_tiled(tiled(tmp_path), ["4:1"])


def test_a_tile_without_its_token_is_refused(tmp_path):
    case = nanovlm(tmp_path, with_tokens())
    rewrite_config(tmp_path, max_img_size=96)
    with pytest.raises(CheckpointError, match=r"up to 3 in a row\. The tile in row 1 and column 3 .* and is null"):
        load(case)


def test_added_tokens_have_their_rows(tmp_path):
    """`<image>` replaces `<|image|>`; the other tokens keep their ids and their rows."""
    case = nanovlm(tmp_path, with_tokens())
    model = load(case).model
    assert model.config.added_tokens[:3] == ["<image>", "<|global_image|>", "<row_1_col_1>"]
    lang_x, vision_x = prompt(model)
    lang_x[0, 1] = VOCABULARY + 1
    _, lm, _ = theirs(with_tokens())
    assert torch.equal(model.added_tokens.embedding.weight[1:6], lm.model.embed_tokens.weight[VOCABULARY + 1 :])
    with torch.no_grad():
        ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, :, :VOCABULARY]
    torch.testing.assert_close(ours[1:3], case.logits(lang_x, vision_x)[1:3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_siglip_of_transformers(activation):
    """Features and the pooling head's output are equal."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=2 * SIZE,
        patch_size=PATCH,
        hidden_act=activation,
    )
    theirs = stir(SiglipVisionModel(vision), seed=5)
    ours = build_tower(siglip.convert_siglip_config(vision.to_dict(), has_head=True)).eval()
    state, targets_of = ours.state_dict(), make_targets_of(siglip.make_siglip_rules(r"(?:vision_model\.)?", WIDTH))
    left = {name: x.numel() for name, x in state.items()}
    for name, x in theirs.state_dict().items():
        for target in targets_of(name):
            ours_name = target.target.removeprefix("vision_encoder.visual.")
            region = target.region(state[ours_name])
            region.copy_(target.select(x).reshape(region.shape))
            left[ours_name] -= region.numel()
    assert not any(left.values())
    pixels = torch.randn(2, 3, 2 * SIZE, 2 * SIZE)
    with torch.no_grad():
        there = theirs(pixels)
        torch.testing.assert_close(patch_features(ours, pixels), there.last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(pixels), there.pooler_output, atol=1e-4, rtol=0)


def test_saved_and_loaded(tmp_path):
    """`config.json` keeps the tower's activation."""
    model = load(nanovlm(tmp_path, config())).model
    model.save_pretrained(tmp_path / "ours")
    lang_x, vision_x = prompt(model)
    again = VLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        one, two = (m(lang_x=lang_x, vision_x=vision_x).logits for m in (model, again))
    assert torch.equal(one, two)


def test_images_are_prepared_as_there(tmp_path):
    """Images are squashed to a square, and pixels are not normalized."""
    processor = load(nanovlm(tmp_path, config())).processor
    image = Image.fromarray(torch.randint(256, (50, 40, 3), dtype=torch.uint8).numpy())
    there = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    assert torch.equal(processor.image_processor.transform(image), there(image))


def test_the_chat_template_is_the_configuration_s(tmp_path):
    case = nanovlm(tmp_path, {**config(), "lm_chat_template": "{{ messages[0]['content'] }}!"})
    tokenizer = load(case).processor.tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1!"
    rewrite_config(tmp_path, lm_chat_template=["w1"])
    with pytest.raises(CheckpointError, match=r"lm_chat_template=\['w1'\], which is no text"):
        load(case)


def worst(case: Case, model: VLM) -> float:
    lang_x, vision_x = prompt(model)
    text = (lang_x[0] != model.config.media_token_id).nonzero().flatten()
    with torch.no_grad():
        ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, text, :VOCABULARY]
    return float((ours - case.logits(lang_x, vision_x)[text]).abs().max())


def test_the_exact_gelu_is_another_model(tmp_path):
    """The exact GELU, as in timm's SigLIP."""
    case = nanovlm(tmp_path, config())
    model = load(case).model
    assert worst(case, model) <= 1e-4
    for module in model.vision_encoder.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"
    assert worst(case, model) > 1e-3


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "setting", ["vision_encoder.norm=false", "vision_encoder.layer=-2", "vision_tokenizer.frames=mean"]
)
def test_each_setting_matters(tmp_path, setting):
    case = nanovlm(tmp_path, config())
    model = load(replace(case, options=CompositionRequest(overrides=[setting]))).model
    # A video of one frame is its own mean.
    assert (worst(case, model) > 1e-3) == ("frames" not in setting)


def test_the_order_inside_a_square_matters(tmp_path):
    """Permute the projection's columns, from squares read row by row to squares read column by column."""
    case = nanovlm(tmp_path, config())

    def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
        squares = state["MP.proj.weight"].unflatten(1, (SHUFFLE, SHUFFLE, WIDTH))
        return {**state, "MP.proj.weight": squares.transpose(1, 2).flatten(1).contiguous()}

    rewrite(tmp_path, turned)
    assert worst(case, load(case).model) > 1e-2


def test_images_come_before_the_text(tmp_path):
    """v0.1 has no token for images: text has the logits of all images and the text before it."""
    case = nanovlm(tmp_path, config())
    imported = load(case)
    ids = imported.processor.encode(parse("<image>w1 w2 w3"))
    assert ids == [VOCABULARY, 1, 2, 3]
    lang_x, vision_x = torch.tensor([ids]), torch.randn(1, 1, 1, 3, SIZE, SIZE)
    with torch.no_grad():
        ours = imported.model(lang_x=lang_x, vision_x=vision_x).logits[0, 1:, :VOCABULARY]
    torch.testing.assert_close(ours, case.logits(lang_x, vision_x)[1:], atol=1e-4, rtol=0)
    assert any("<image>Question: … Answer:" in note for note in imported.notes)


#: Numbers that differ from nanoVLM-222M's, and the millions of parameters of the whole.
PUBLISHED = {
    "nanoVLM-222M": ({}, "ViT-B-16-SigLIP", 49, 222),
    "nanoVLM-450M": (
        {
            "vit_img_size": 256,
            "lm_hidden_dim": 960,
            "lm_inter_dim": 2560,
            "lm_n_heads": 15,
            "lm_n_kv_heads": 5,
            "lm_n_blocks": 32,
            "lm_base_vocab_size": 49152,
            "lm_vocab_size": 49153,
            "vlm_extra_tokens": {"image_token": "<|image|>"},
            "mp_image_token_length": 64,
        },
        "ViT-B-16-SigLIP-256",
        64,
        450,
    ),
}


@pytest.mark.parametrize("name", first_of(PUBLISHED))
@pytest.mark.matrix
def test_published_sizes(name):
    changes, tower_name, num_tokens, millions = PUBLISHED[name]
    data = config(
        vit_hidden_dim=768,
        vit_inter_dim=3072,
        vit_patch_size=16,
        vit_img_size=224,
        vit_n_heads=12,
        vit_n_blocks=12,
        lm_hidden_dim=576,
        lm_inter_dim=1536,
        lm_max_position_embeddings=8192,
        lm_vocab_size=49152,
        lm_n_heads=9,
        lm_n_kv_heads=3,
        lm_n_blocks=30,
    )
    data |= changes
    with torch.device("meta"):
        tower, lm, projection = theirs(data)
        state = named(tower, lm, projection)
    published = tower.num_parameters() + lm.num_parameters() + projection.numel()
    model, report = sized(replace(shapes_of(state), config=data))
    assert report.is_complete and not report.unused
    assert (model.config.composition.vision_encoder.name, model.vision_tokenizer.num_tokens()) == (
        tower_name,
        num_tokens,
    )
    assert published // 10**6 == millions
    has_row = data["lm_vocab_size"] > 49152  # of `<image>`, which has two of ours: its embedding and its logit
    assert sum(p.numel() for p in model.parameters()) - published == data["lm_hidden_dim"] * (2 - has_row)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mp_pixel_shuffle_factor": 4}, "projects 128 channels; mp_pixel_shuffle_factor=4"),
        (
            {"mp_image_token_length": 64},
            "makes 4 vectors of an image of 32 pixels, but its mp_image_token_length is 64",
        ),
        ({"vit_n_heads": 4}, "32 channels, 2 layers, 4 heads and patches of 8 pixels"),
        ({"vit_ln_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"vit_cls_flag": True}, "vit_cls_flag"),
        ({"lm_attn_scaling": 2.0}, "lm_attn_scaling=2.0"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit(tmp_path, changes, message):
    case = nanovlm(tmp_path, config())
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(case)


@pytest.mark.parametrize(
    ("changes", "name", "shapes"),
    [
        ({"lm_inter_dim": 41}, "decoder.blocks.0.mlp.up_proj.weight", ([40, 24], [41, 24])),
        ({"lm_n_kv_heads": 3}, "decoder.blocks.0.attn.k_proj.weight", ([8, 24], [12, 24])),
    ],
    ids=str,
)
def test_another_width_is_named(tmp_path, changes, name, shapes):
    case = nanovlm(tmp_path, config())
    rewrite_config(tmp_path, **changes)
    imported = load(case)
    assert imported.model is None
    assert imported.report.mismatched[name] == shapes


def test_a_missing_block_is_named(tmp_path):
    case = nanovlm(tmp_path, config())
    rewrite(tmp_path, lambda state: {k: x for k, x in state.items() if not k.startswith("decoder.blocks.1.attn.v")})
    assert load(case).report.missing == ["lang_model.model.layers.1.self_attn.v_proj.weight"]


def test_no_configuration(tmp_path):
    case = nanovlm(tmp_path, config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape("no config.json of nanoVLM")):
        load(case)


@pytest.mark.matrix
def test_another_language_model(tmp_path):
    (tmp_path / "nanovlm").mkdir()
    case, others = nanovlm(tmp_path / "nanovlm", config()), other_parts(tmp_path)
    new = {"vision_tokenizer", "added_tokens", "language_model"}
    check_swap(case.source, new, case.options, language_model=others["language_model"])
