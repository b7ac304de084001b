"""Export a model that is composed like LLaVA-1.5 to Transformers' `LlavaForConditionalGeneration`.

LLaVA-1.5 (https://arxiv.org/abs/2310.03744) maps patches of a CLIP tower through an MLP to tokens among the text.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.export.llava_agreement import compare_logits, compare_pictures
from vlm_cli.composition import MEDIA_TOKEN, UNTILED, MLPOptions
from vlm_cli.errors import UsageError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.generation_settings import inherit_settings
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.templates.conversation import ChatFormat
from vlm_cli.templates.pictures import PLAIN, take_pictures
from vlm_cli.trust import load_pretrained

__all__ = ["check_llava", "export_llava"]

#: Types of language models whose embedding is a plain table and whose head is a plain linear map: LLaVA's class assumes
#: both.
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")

#: Keys of OpenCLIP's `vision_cfg` that change the features and that Transformers' CLIP does not have.
_FOREIGN = (
    "act_kwargs",
    "attentional_pool",
    "block_type",
    "ls_init_value",
    "no_ln_pre",
    "norm_kwargs",
    "qk_norm",
    "scale_attn",
    "scale_attn_inner",
    "scale_fc",
    "scale_heads",
    "scaled_cosine_attn",
    "timm_model_name",
)

#: Settings of the MLP that may have any value. `frames` is for videos, which LLaVA's class does not read.
_MLP_SETTINGS = ("bias", "dim_out", "frames")

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^conv1\.", "embeddings.patch_embedding."),
        (r"^class_embedding$", "embeddings.class_embedding"),
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^ln_pre\.", "pre_layrnorm."),
        (r"^ln_post\.", "post_layernorm."),
        (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
        (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
        (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
        (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    )
)
_IN_PROJECTION = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def check_llava(config: VLMConfig) -> None:
    """Check that a model can be written as Transformers' LLaVA.

    Raises:
        UsageError: naming every setting that does not fit.
    """
    problems = [*_part_problems(config), *_vision_problems(config)]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UsageError(f"Transformers' LLaVA class cannot hold this model:{lines}")


def _part_problems(config: VLMConfig) -> list[str]:
    parts, problems = config.composition, []
    if parts.tiling != UNTILED:
        kind = "none with picture_text" if parts.tiling.type == "none" else parts.tiling.type
        problems.append(f"tiling is {kind}; it would have to be none, without texts.")
    if parts.fusion.type != "language-stream":
        problems.append(f"fusion is {parts.fusion.type}; it would have to be language-stream.")
    elif (mask := parts.fusion.options.mask) != "causal":
        problems.append(f"fusion.mask is {mask}; it would have to be causal.")
    if parts.vision_tokenizer.type != "mlp":
        problems.append(f"vision_tokenizer is {parts.vision_tokenizer.type}; it would have to be mlp.")
    else:
        for field in dataclasses.fields(MLPOptions):
            value = getattr(parts.vision_tokenizer.options, field.name)
            if field.name not in _MLP_SETTINGS and value != field.default:
                problems.append(f"vision_tokenizer.{field.name} is {value!r}; it would have to be {field.default!r}.")
    kind = config.text_config.model_type
    if kind not in LANGUAGE_MODELS:
        problems.append(f"the language model is of type {kind}; it would have to be {', '.join(LANGUAGE_MODELS)}.")
    if getattr(parts.language_model, "head_bias", False):
        problems.append("language_model.head_bias is set; the head would have to be without one.")
    return problems


def _vision_problems(config: VLMConfig) -> list[str]:
    vision, options, problems = config.vision_config, config.composition.vision_encoder, []
    cfg = vision["vision_cfg"]
    if "type" in vision:
        return [f"vision encoder {options.name!r} is of another package; it would have to be a ViT of OpenCLIP."]
    foreign = [name for name in _FOREIGN if cfg.get(name)]
    if foreign or not isinstance(cfg.get("layers", 12), int):
        what = ", ".join(f"{name}={cfg[name]!r}" for name in foreign) or "a ResNet"
        problems.append(f"vision encoder {options.name!r} has {what}; it would have to be a plain ViT of OpenCLIP.")
    for name in ("image_size", "patch_size"):
        if isinstance(cfg.get(name), (list, tuple)) and len(set(cfg[name])) > 1:
            problems.append(f"the {name} of the vision encoder is {cfg[name]}; it would have to be a square.")
    if _is_normed(config):
        problems.append(
            f"layer {options.layer} of the vision encoder passes through its last norm; it would have to be a layer "
            "without it, as vision_encoder.layer=-2 (LLaVA's own)."
        )
    preprocess = vision.get("preprocess", {})
    if preprocess.get("resize_mode", "shortest") not in ("shortest", "squash"):
        problems.append(
            f"images are resized by {preprocess['resize_mode']!r}; it would have to be 'shortest' or 'squash'."
        )
    return problems


def _is_normed(config: VLMConfig) -> bool:
    options = config.composition.vision_encoder
    norm = getattr(options, "norm", None)
    return -1 in options.layers if norm is None else norm


def export_llava(model: VLM, processor: VLMProcessor, out: Path, *, max_shard_size: str = "5GB") -> dict[str, Any]:
    """Write the model and its processor as Transformers' LLaVA, load both back, and compare what they give.

    Raises:
        UsageError: if the composition does not fit.
        CheckpointError: if the logits differ, or what the two processors make of a picture and a message.
    """
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    check_llava(model.config)
    config = _config(model)
    with meta_device():
        theirs = LlavaForConditionalGeneration(config)
    theirs.load_state_dict(_state(model), assign=True)
    theirs.generation_config, _ = inherit_settings(model.generation_config)
    # A VLM never writes the image token; forbid it here, too.
    suppressed = theirs.generation_config.suppress_tokens or []
    theirs.generation_config.suppress_tokens = [*suppressed, model.config.media_token_id]
    theirs.save_pretrained(out, max_shard_size=max_shard_size)
    _processor(model, processor, config).save_pretrained(out)
    loaded = load_pretrained(LlavaForConditionalGeneration, out, dtype=model.dtype).eval()
    facts = {"positions_per_image": config.image_seq_length, "largest_difference": compare_logits(model, loaded)}
    return facts | compare_pictures(model, processor, loaded, load_pretrained(LlavaProcessor, out))


def _config(model: VLM) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    ours, visual = model.config, cast(Any, model.vision_encoder.visual)
    options = ours.composition.vision_encoder
    width, blocks = visual.conv1.out_channels, visual.transformer.resblocks
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        projection_dim=ours.vision_config["embed_dim"],
        hidden_act="quick_gelu" if ours.vision_config.get("quick_gelu") else "gelu",
        layer_norm_eps=visual.ln_pre.eps,
    )
    text = copy.deepcopy(ours.text_config)
    # The added tokens become rows of both tables. The VLM never ties these rows, so the tables cannot stay tied.
    text.vocab_size, text.tie_word_embeddings = ours.first_added_id + len(ours.added_tokens), False
    text.pad_token_id, text.dtype = ours.pad_token_id, model.dtype
    return LlavaConfig(  # type: ignore[call-arg]  # it takes what every configuration takes
        vision_config=vision,
        text_config=text,
        image_token_index=ours.media_token_id,
        image_seq_length=model.num_positions(),
        projector_hidden_act="gelu",
        multimodal_projector_bias=model.vision_tokenizer.proj[0].bias is not None,
        vision_feature_layer=[*options.layers] if isinstance(options.layer, tuple) else options.layer,
        vision_feature_select_strategy="full" if getattr(options, "class_token", False) else "default",
        tie_word_embeddings=False,
        pad_token_id=ours.pad_token_id,
        dtype=model.dtype,
    )


def _state(model: VLM) -> dict[str, Tensor]:
    """Return the tensors under the names of LLaVA's class in memory."""
    projector, first = model.vision_tokenizer.proj, model.config.first_added_id
    state = {f"model.vision_tower.{name}": x for name, x in _vision_state(model.vision_encoder.visual).items()}
    for number, layer in ((1, projector[0]), (2, projector[2])):
        state |= {f"model.multi_modal_projector.linear_{number}.{k}": x for k, x in layer.state_dict().items()}
    body = model.lang_model.get_decoder().state_dict()
    state |= {f"model.language_model.{name}": x for name, x in body.items()}
    added = model.added_tokens
    tables: tuple[tuple[str, Any, Tensor], ...] = (
        ("model.language_model.embed_tokens.weight", model.get_input_embeddings(), added.embedding.weight),
        ("lm_head.weight", model.get_output_embeddings(), added.head.weight),
    )
    for name, table, rows in tables:
        state[name] = torch.cat([table.weight[:first], rows])
    return {name: x.detach().contiguous() for name, x in state.items()}


def _vision_state(visual: nn.Module) -> dict[str, Tensor]:
    """Return OpenCLIP's tensors under the names of Transformers' CLIP, without `proj` (for pooled features only)."""
    state: dict[str, Tensor] = {}
    for name, x in visual.state_dict().items():
        if name == "proj":
            continue
        if found := _IN_PROJECTION.match(name):
            for letter, part in zip("qkv", x.chunk(3), strict=True):
                state[f"encoder.layers.{found[1]}.self_attn.{letter}_proj.{found[2]}"] = part
            continue
        pattern, replacement = next((p, r) for p, r in _RENAMES if p.match(name))
        state[pattern.sub(replacement, name)] = x
    return state


def _processor(model: VLM, processor: VLMProcessor, config: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor
    from transformers.image_utils import PILImageResampling

    given = processor.image_processor.preprocess_config
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    squashes = given.get("resize_mode") == "squash"
    images = CLIPImageProcessor(
        size=square if squashes else {"shortest_edge": given.get("shortest_edge", side)},
        crop_size=square,
        do_center_crop=not squashes,
        resample=PILImageResampling(processor.image_processor.preprocessing.filter),
        **({"image_mean": list(given["mean"]), "image_std": list(given["std"])} if "mean" in given else {}),
    )
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = None  # it takes no pictures, and the processor has one that does
    heading = ChatFormat(processor).heading  # that vlm writes for a template that does not open answers
    opening = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(heading)} }}}}{{% endif %}}" if heading else ""
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=take_pictures(processor.chat_program or PLAIN, processor.tokenizer.special_tokens_map) + opening,
        image_token=MEDIA_TOKEN,
        num_additional_image_tokens=1,  # the class token
    )
