"""flamingo-mini, against its published description written out over Transformers' CLIP, OPT and GPT-2.

The description: https://github.com/dhansmair/flamingo-mini. Latents attend to the frames' features and themselves; text
attends to the last image whose `<` stands at or before it; blocks stand before layers 0, n, 2n, ….
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.support.grid import first_of, first_rows
from tests.support.published import SIZE, VOCABULARY, Case, check, load, prompt, rewrite, rewrite_config, shapes_of
from tests.support.swaps import check_swap, other_parts
from tests.support.tiny import nudged, stir
from vlm_cli.checkpoint.create import configure
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.fill import plan_fill
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.composition import Composition, CompositionRequest
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM
from vlm_cli.prompt import parse

DIM, DIM_VISUAL = 32, 64  # one head of CLIP has 64 channels
EOC, MEDIA = VOCABULARY, VOCABULARY + 1
LESS = 77  # the token of `<`
PADDING = 4  # rows of OPT's table that no token has

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LANGUAGE_MODELS: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(
        vocab_size=VOCABULARY + PADDING,
        hidden_size=DIM,
        word_embed_proj_dim=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        do_layer_norm_before=False,
        max_position_embeddings=64,
        init_std=0.2,
        **SPECIAL,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=DIM, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, **SPECIAL
    ),
}


def config(**changes: Any) -> dict[str, Any]:
    """Make `config.json` as Transformers writes it, without fields that have their default."""
    return {
        "dim": DIM,
        "dim_visual": DIM_VISUAL,
        "xattn_every": 2,
        "xattn_dim_head": 8,
        "xattn_heads": 2,
        "xattn_ff_mult": 2,
        "xattn_act": "sqrelu",
        "resampler_depth": 2,
        "resampler_dim_head": 16,
        "resampler_num_latents": 3,
        "resampler_heads": 2,
        "resampler_act": "sqrelu",
        "clip_model_type": "openai/clip-vit-large-patch14",
        **changes,
    }


def added(data: dict[str, Any], layers: int, dim: int, dim_visual: int, **device: Any) -> dict[str, Tensor]:
    """Make random tensors of the resampler and the blocks, under flamingo-mini's names."""
    inner, mult = data["resampler_heads"] * data["resampler_dim_head"], data.get("resampler_ff_mult", 4)
    shapes: dict[str, tuple[int, ...]] = {
        "resampler.latents": (data["resampler_num_latents"], dim_visual),
        "resampler.time_pos_emb": (4, 1, dim_visual),
        "resampler.norm.weight": (dim_visual,),
        "resampler.norm.bias": (dim_visual,),
    }
    for i in range(data["resampler_depth"]):
        attention, ff = f"resampler.layers.{i}.0.", f"resampler.layers.{i}.1."
        for norm in ("norm_media", "norm_latents"):
            shapes |= {f"{attention}{norm}.{kind}": (dim_visual,) for kind in ("weight", "bias")}
        shapes |= {f"{attention}to_{x}.weight": (inner, dim_visual) for x in "qkv"}
        shapes[f"{attention}to_out.weight"] = (dim_visual, inner)
        shapes |= feed_forward_shapes(ff, dim_visual, mult)
    inner = data["xattn_heads"] * data["xattn_dim_head"]
    for i in range(0, layers, data["xattn_every"]):
        block = f"blocks.{i}."
        shapes |= {f"{block}attn.norm.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= {
            f"{block}attn.to_q.weight": (inner, dim),
            f"{block}attn.to_kv.weight": (2 * inner, dim_visual),
            f"{block}attn.to_out.weight": (dim, inner),
            f"{block}alpha_attn": (1,),
            f"{block}alpha_ffw": (1,),
        }
        shapes |= feed_forward_shapes(f"{block}ffw.", dim, data.get("xattn_ff_mult", 4))
    torch.manual_seed(11)
    return {
        name: (1.0 if "norm" in name else 0.0) + 0.3 * torch.randn(shape, **device) for name, shape in shapes.items()
    }


def feed_forward_shapes(prefix: str, dim: int, mult: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}0.weight": (dim,),
        f"{prefix}0.bias": (dim,),
        f"{prefix}1.weight": (dim * mult, dim),
        f"{prefix}3.weight": (dim, dim * mult),
    }


class Description:
    """What flamingo-mini computes, one position, one head and one image at a time."""

    def __init__(
        self, data: dict[str, Any], tower: CLIPVisionModel, lm: PreTrainedModel, tensors: dict[str, Tensor]
    ) -> None:
        self.data, self.tower, self.lm, self.tensors = data, tower, lm, tensors
        base = lm.model.decoder if hasattr(lm, "model") else lm.transformer
        self.layers: nn.ModuleList = base.layers if hasattr(base, "layers") else base.h

    def norm(self, name: str, x: Tensor) -> Tensor:
        return nnf.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def feed_forward(self, name: str, x: Tensor, activation: str) -> Tensor:
        hidden = self.norm(f"{name}.0", x) @ self.tensors[f"{name}.1.weight"].T
        hidden = {"gelu": nnf.gelu, "relu": nnf.relu, "sqrelu": lambda y: nnf.relu(y) ** 2}[activation](hidden)
        return hidden @ self.tensors[f"{name}.3.weight"].T

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """float[T, h·k], float[S, h·k] twice -> float[T, h·k]."""
        heads = zip(q.chunk(num_heads, -1), k.chunk(num_heads, -1), v.chunk(num_heads, -1), strict=True)
        return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in heads], dim=-1)

    def resample(self, frames: Tensor) -> Tensor:
        """float[F, v, d] of one medium -> float[n, d]."""
        media = (frames + self.tensors["resampler.time_pos_emb"][: len(frames)]).flatten(0, 1)
        x = self.tensors["resampler.latents"]
        for i in range(self.data["resampler_depth"]):
            name = f"resampler.layers.{i}"
            latents = self.norm(f"{name}.0.norm_latents", x)
            both = torch.cat([self.norm(f"{name}.0.norm_media", media), latents])
            q, k, v = (
                y @ self.tensors[f"{name}.0.to_{which}.weight"].T
                for which, y in (("q", latents), ("k", both), ("v", both))
            )
            out = self.attend(q, k, v, self.data["resampler_heads"])
            x = x + out @ self.tensors[f"{name}.0.to_out.weight"].T
            x = x + self.feed_forward(f"{name}.1", x, self.data["resampler_act"])
        return self.norm("resampler.norm", x)

    def block(self, number: int, y: Tensor, media: list[Tensor], seen: list[int]) -> Tensor:
        """float[T, d] -> float[T, d]; position t has `seen[t]` images at or before it."""
        name = f"blocks.{number}"
        q = self.norm(f"{name}.attn.norm", y) @ self.tensors[f"{name}.attn.to_q.weight"].T
        out = torch.zeros_like(q)
        for t, count in enumerate(seen):
            if count:
                k, v = (media[count - 1] @ self.tensors[f"{name}.attn.to_kv.weight"].T).chunk(2, -1)
                out[t] = self.attend(q[t : t + 1], k, v, self.data["xattn_heads"])[0]
        y = y + self.tensors[f"{name}.alpha_attn"].tanh() * (out @ self.tensors[f"{name}.attn.to_out.weight"].T)
        return y + self.tensors[f"{name}.alpha_ffw"].tanh() * self.feed_forward(
            f"{name}.ffw", y, self.data["xattn_act"]
        )

    @torch.no_grad()
    def logits(self, lang_x: Tensor, vision_x: Tensor) -> Tensor:
        """int[1, T] with `<image>` where the text has `<`, float[1, T_img, F, 3, H, W] -> float[T, V]."""
        media = [self.resample(self.tower(frames).last_hidden_state) for frames in vision_x[0]]
        is_media = lang_x[0] == MEDIA
        seen = is_media.cumsum(0).tolist()

        def before(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = self.block(number, hidden[0], media, seen)[None]
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            return hook

        every = range(0, len(self.layers), self.data["xattn_every"])
        hooks = [self.layers[i].register_forward_pre_hook(before(i), with_kwargs=True) for i in every]
        try:
            return self.lm(input_ids=lang_x.masked_fill(is_media, LESS)).logits[0, :, : VOCABULARY + 1]
        finally:
            for hook in hooks:
                hook.remove()


def named(tower: CLIPVisionModel, lm: PreTrainedModel, tensors: dict[str, Tensor], every: int) -> dict[str, Tensor]:
    """Give all tensors flamingo-mini's names."""
    prefix = "flamingo.vision_encoder.vision_model."
    state = {prefix + name.removeprefix("vision_model."): x for name, x in tower.state_dict().items()}
    for name, x in lm.state_dict().items():
        inner = re.sub(r"^(model|transformer)\.", "lm.", name)
        if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", inner)) and int(match[1]) % every == 0:
            inner = inner[: match.end()] + "lm_block." + inner[match.end() :]
        state[f"flamingo.{inner}"] = x
    layers = "lm.decoder.layers" if hasattr(lm, "model") else "lm.h"
    for name, x in tensors.items():
        name = re.sub(r"^blocks\.(\d+)", rf"{layers}.\1.xattn_block", name)
        state[f"flamingo.{name}"] = x
    return state


def write_language_model(folder: Path, text: PreTrainedConfig) -> str:
    """Write a configuration and a tokenizer, as a hub id gives them."""
    names = {f"w{i}": i for i in range(VOCABULARY - 3)} | {"<": LESS, "image": LESS + 1, ">": LESS + 2}
    words = Tokenizer(models.WordLevel(names, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    text.save_pretrained(folder)
    return str(folder)


def parts(kind: str, data: dict[str, Any]) -> tuple[CLIPVisionModel, PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(7)
    text = LANGUAGE_MODELS[kind]
    vision = CLIPVisionConfig(
        hidden_size=DIM_VISUAL,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=16,
    )
    lm = AutoModelForCausalLM.from_config(type(text)(**{**text.to_dict(), "vocab_size": text.vocab_size + 1}))
    return (
        stir(CLIPVisionModel(vision), seed=5),
        stir(lm, 0.1, seed=5),
        added(data, text.num_hidden_layers, DIM, DIM_VISUAL),
    )


def flamingo(folder: Path, kind: str = "opt", **changes: Any) -> Case:
    data = config(**changes)
    tower, lm, tensors = parts(kind, data)
    state = named(tower, lm, tensors, data["xattn_every"])
    save_file({k: x.clone().contiguous() for k, x in state.items()}, folder / "model.safetensors")
    name = write_language_model(folder / "language_model", LANGUAGE_MODELS[kind])
    (folder / "config.json").write_text(json.dumps({**data, "lm": name}), encoding="utf-8")
    theirs = Description(data, tower, lm, tensors)
    return Case(
        source=folder,
        logits=lambda lang_x, vision_x: theirs.logits(lang_x, vision_x)[:, :VOCABULARY],
        made_by="its description, over Transformers' CLIP and OPT",
    )


def worst(case: Case, model: VLM, lang_x: Tensor, vision_x: Tensor) -> float:
    with torch.no_grad():
        ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, :, :VOCABULARY]
    return float((ours - case.logits(lang_x, vision_x)).abs().max())


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "changes"),
    first_rows(
        [
            ("opt", {}),
            ("gpt2", {"xattn_every": 3, "resampler_act": "relu"}),
            ("opt", {"xattn_every": 1, "xattn_act": "gelu"}),
            ("gpt2", {}),
        ],
        2,
    ),
    ids=str,
)
def test_flamingo_mini(tmp_path, kind, changes):
    check(flamingo(tmp_path, kind, **changes), is_told=kind == "opt" and not changes)


def test_defaults_are_not_in_the_configuration(tmp_path):
    case = flamingo(tmp_path, resampler_num_time_embeds=4, xattn_ff_mult=4, xattn_act="gelu", xattn_every=1)
    data = json.loads((tmp_path / "config.json").read_text())
    left_out = ("resampler_num_time_embeds", "xattn_ff_mult", "xattn_act", "xattn_every")
    (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in data.items() if k not in left_out}))
    check(case)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_marker_is_text(tmp_path, kind):
    """vlm's `<image>image>` equals flamingo-mini's `<image>` at every position, also at that of `<`."""
    case = flamingo(tmp_path, kind)
    imported = load(case)
    model, processor = imported.model, imported.processor
    ids = [3, MEDIA, LESS + 1, LESS + 2, 5, 9, MEDIA, LESS + 1, LESS + 2, 7]
    assert processor.encode(parse("w3 <image>image> w5 w9 <image>image> w7")) == ids
    assert processor.tokenizer("w3 < image > w5")["input_ids"] == [3, LESS, LESS + 1, LESS + 2, 5]
    lang_x = torch.tensor([ids])
    _, vision_x = prompt(model)
    assert worst(case, model, lang_x, vision_x) <= 1e-4
    added = model.added_tokens
    with torch.no_grad():
        added.embedding.weight[MEDIA - EOC] = model.get_input_embeddings().weight.mean(0)
    assert worst(case, model, lang_x, vision_x) > 1e-2
    assert any("<image>image>" in note for note in imported.notes)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_end_of_a_caption_has_its_row(tmp_path, kind):
    """`<EOC>` has the id after the tokenizer's last; in OPT's padded table this is not the appended row."""
    case = flamingo(tmp_path, kind)
    model = load(case).model
    table = next(x for k, x in load_file(tmp_path / "model.safetensors").items() if re.search(r"embed_tokens|wte", k))
    assert model.config.added_tokens[:2] == ["<EOC>", "<image>"] and model.config.first_added_id == EOC
    lang_x, vision_x = prompt(model)
    lang_x[0, 4] = EOC
    assert worst(case, model, lang_x, vision_x) <= 1e-4
    _, lm, tensors = parts(kind, config())
    theirs = Description(config(), parts(kind, config())[0], lm, tensors).logits(lang_x, vision_x)
    with torch.no_grad():
        ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, :, : EOC + 1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # the logit of <EOC> too
    if kind == "opt":
        with torch.no_grad():
            model.added_tokens.embedding.weight[0] = table[-1]
        assert worst(case, model, lang_x, vision_x) > 1e-2


def test_frames_of_a_video(tmp_path):
    case = flamingo(tmp_path)
    model = load(case).model
    lang_x, _ = prompt(model)
    vision_x = torch.randn(1, 2, 4, 3, SIZE, SIZE)
    assert worst(case, model, lang_x, vision_x) <= 1e-4
    with nudged(model.vision_tokenizer.frame_embs[3]):
        assert worst(case, model, lang_x, vision_x) > 1e-4


@pytest.mark.matrix
@pytest.mark.parametrize(
    "setting",
    first_of(
        [
            "vision_encoder.class_token=false",
            "vision_encoder.norm=true",
            "vision_tokenizer.activation=gelu",
            "fusion.activation=gelu",
            "fusion.attend=all",
            "fusion.feed_forward_before_media=false",
        ],
        2,
    ),
)
def test_each_setting_matters(tmp_path, setting):
    case = flamingo(tmp_path)
    model = load(replace(case, options=CompositionRequest(overrides=[setting]))).model
    lang_x, vision_x = prompt(model)
    lang_x[0, 0] = 5  # text before the first image
    lang_x[0, 1] = MEDIA
    assert worst(case, model, lang_x, vision_x) > 1e-3


@pytest.mark.matrix
def test_keys_come_before_values(tmp_path):
    case = flamingo(tmp_path)

    def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        swap = {"to_k.": "to_v.", "to_v.": "to_k."}
        return {re.sub(r"to_[kv]\.", lambda m: swap[m[0]], name): x for name, x in state.items()}

    rewrite(tmp_path, swapped)
    model = load(case).model
    assert worst(case, model, *prompt(model)) > 1e-3


@pytest.mark.matrix
@pytest.mark.parametrize("head", first_of([True, False]), ids=["head", "no head"])
def test_older_files(tmp_path, head):
    """Files of older releases hold GPT-2's masks, and a file may leave out the tied head."""
    case = flamingo(tmp_path, "gpt2")

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        attention = ("0.lm_block.attn", "1.attn", "2.lm_block.attn")
        masks = {f"flamingo.lm.h.{x}.{name}": torch.ones(1) for x in attention for name in ("bias", "masked_bias")}
        return {**{k: x for k, x in state.items() if head or "lm_head" not in k}, **masks}

    rewrite(tmp_path, change)
    check(case)


@pytest.mark.matrix
def test_the_tower_may_come_from_openclip(tmp_path):
    case = flamingo(tmp_path)
    whole = load(case).model
    wanted = {key: whole.config.vision_config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu")}
    (tmp_path / "tower.json").write_text(json.dumps(wanted), encoding="utf-8")
    weights = tmp_path / "tower" / "open_clip_model.safetensors"
    weights.parent.mkdir()
    save_file({f"visual.{k}": x for k, x in whole.vision_encoder.visual.state_dict().items()}, weights)
    rewrite(tmp_path, lambda state: {k: x for k, x in state.items() if "vision_encoder" not in k})
    settings = (f"pretrained={weights}", "class_token=true", "norm=false")  # of another tower, none are kept
    options = CompositionRequest(
        vision_encoder=str(tmp_path / "tower.json"), overrides=[f"vision_encoder.{setting}" for setting in settings]
    )
    check(replace(case, options=options))


def test_the_tower_is_named(tmp_path):
    case = flamingo(tmp_path)
    rewrite(tmp_path, lambda state: {k: x for k, x in state.items() if "vision_encoder" not in k})
    checkpoint = PublishedCheckpoint.open(str(case.source))
    encoder = recognise(checkpoint).description.composition["vision_encoder"]
    assert encoder == {"name": "ViT-L-14", "pretrained": "openai", "class_token": True, "norm": False}


def test_only_what_trained(tmp_path):
    """The checkpoint trains the table, the resampler and the blocks; the rest is the language model's."""
    case = flamingo(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    _, lm, _ = parts("opt", config())
    lm.resize_token_embeddings(VOCABULARY + PADDING)
    lm.save_pretrained(tmp_path / "language_model")
    kept = r"resampler|xattn_block|embed_tokens|lm_head|vision_encoder"
    rewrite(tmp_path, lambda state: {k: x for k, x in state.items() if re.search(kept, k)})
    assert len(load_file(tmp_path / "model.safetensors")) < len(state)
    check(case)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xattn_every": 1}, "cross-attention before layers [0, 2], not xattn_every=1"),
        ({"resampler_depth": 3}, "has 2 resampler layers, not 3"),
        ({"xattn_heads": 3}, "attention of 16 channels, not xattn_heads=3 of xattn_dim_head=8"),
        ({"resampler_dim_head": 64}, "attention of 32 channels, not resampler_heads=2 of resampler_dim_head=64"),
        ({"xattn_act": "silu"}, "activation 'silu'"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit(tmp_path, changes, message):
    case = flamingo(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(case)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("clip", "name", "quick_gelu"),
    [
        ("openai/clip-vit-large-patch14", "ViT-L-14", True),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L-14", False),  # LAION trained with the exact GELU
        ("someone/clip", "clip-vision-transformer", True),
    ],
)
def test_the_tower_is_known_by_the_clip_that_it_was(tmp_path, clip, name, quick_gelu):
    case = flamingo(tmp_path)
    rewrite_config(tmp_path, clip_model_type=clip)
    description = recognise(case.source).description
    assert description.composition["vision_encoder"]["name"] == name
    assert description.vision_config["quick_gelu"] is quick_gelu


def test_other_blocks_and_widths_are_named(tmp_path):
    case = flamingo(tmp_path)
    # OpenFlamingo's blocks stand before layers n-1, 2n-1, ….
    report = load(replace(case, options=CompositionRequest(overrides=["fusion.first=1"]))).report
    assert not report.is_complete and "fusion.blocks.1.attn_gate" in report.missing
    assert "flamingo.lm.decoder.layers.0.xattn_block.alpha_attn" in report.unused
    rewrite_config(tmp_path, xattn_ff_mult=3)
    report = load(case).report
    assert report.mismatched["flamingo.lm.decoder.layers.0.xattn_block.ffw.1.weight"] == ([64, 32], [96, 32])


def test_no_configuration(tmp_path):
    case = flamingo(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape("no config.json")):
        load(case)


#: (configuration, millions that train, millions without the tower), of the wiki's page on model configurations; the
#: whole table trains there.
PUBLISHED = {
    "flamingo-tiny": (
        {
            "lm": "facebook/opt-125m",
            "xattn_heads": 8,
            "xattn_dim_head": 64,
            "resampler_heads": 8,
            "resampler_dim_head": 64,
        },
        OPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072, word_embed_proj_dim=768),
        (63, 180, 267),
    ),
    "flamingo-mini": (
        {
            "lm": "facebook/opt-350m",
            "xattn_heads": 16,
            "xattn_dim_head": 128,
            "resampler_heads": 16,
            "resampler_dim_head": 128,
        },
        OPTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            ffn_dim=4096,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
        ),
        (101, 529, 835),
    ),
}


@pytest.mark.parametrize("name", first_of(PUBLISHED))
@pytest.mark.matrix
def test_published_sizes(name):
    given, text, millions = PUBLISHED[name]
    data = {**config(resampler_depth=6, resampler_num_latents=64, xattn_every=1, xattn_ff_mult=4), **given}
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(type(text)(**{**text.to_dict(), "vocab_size": 50273}))
        tensors = added(data, text.num_hidden_layers, text.hidden_size, 1024)
        state = named(CLIPVisionModel(vision), lm, tensors, 1)
    checkpoint = replace(shapes_of({k: x.clone() for k, x in state.items()}), config=data)
    described = recognise(checkpoint).description
    composition = Composition.compose(None, described.composition)
    assert composition.vision_encoder.name == "ViT-L-14"
    shape = find_tower_shape(described.vision_config, **composition.vision_encoder.feature_arguments)
    assert shape == (257, 1024)
    settings = configure(composition, described.vision_config, shape, text, None, 50265)
    with torch.device("meta"):
        model = VLM(settings)
    report = plan_fill(
        model,
        checkpoint,
        described.targets_for(settings),
        has_weights=lambda _: False,
        is_optional=described.is_optional,
    ).report
    assert report.is_complete and not report.unused
    resampler, blocks = (sum(p.numel() for p in part.parameters()) for part in (model.vision_tokenizer, model.fusion))
    table, whole = model.get_input_embeddings().weight.numel(), model.lang_model.num_parameters()
    new = text.word_embed_proj_dim  # one row
    counts = (resampler, resampler + blocks + table + new, resampler + blocks + whole + new)
    assert tuple(round(count / 1e6) for count in counts) == millions
    tower = model.vision_encoder.visual
    assert sum(p.numel() for p in tower.parameters()) - tower.proj.numel() == 303_179_776


@pytest.mark.matrix
def test_another_language_model(tmp_path):
    (tmp_path / "flamingo").mkdir()
    case, others = flamingo(tmp_path / "flamingo", "opt"), other_parts(tmp_path)
    new = {"fusion", "added_tokens", "language_model"}
    check_swap(case.source, new, case.options, language_model=others["language_model"])
