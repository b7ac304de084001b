"""Transformers' `IdeficsForVisionText2Text`: a CLIP, a resampler, and gated cross-attention between Llama's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings
from vlm_cli.checkpoint.export.hf.language import compare_settings
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.published.layouts.idefics import ADDED_TOKENS, LLAMA_SETTINGS, HuggingFaceIDEFICS

__all__ = ["IdeficsClass"]

_CLIP = "clip_vision_model"
_SAME = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "hidden_act")


class IdeficsClass(HFClass):
    """IDEFICS's class. Its processor takes pictures and texts, no chat template; added tokens have own tables."""

    layout = HuggingFaceIDEFICS()
    model = "IdeficsForVisionText2Text"
    processor = "IdeficsProcessor"
    tower = r"model\.vision_model\."
    language_models = ("llama",)
    stand_in = replace(
        STAND_IN,
        config={"model_type": _CLIP, "hidden_size": 32, "num_attention_heads": 2, "image_size": 224, "patch_size": 16},
        num_before=1,
        has_class_token=True,
    )

    def draft(self, source: Source) -> Draft:
        from transformers import IdeficsImageProcessor

        text = source.text_config
        kept = {key: text[key] for key in LLAMA_SETTINGS if key in text}
        heads = {"num_key_value_heads": text["num_attention_heads"]} if "num_attention_heads" in text else {}
        source.problems.extend(compare_settings(text, {"model_type": "llama", **kept, **heads}))
        begin = _find_bos(source)
        return Draft(
            config={
                "model_type": "idefics",
                **kept,
                "additional_vocab_size": _count_added(source),
                "cross_layer_interval": source.option("fusion", "every", 1),
                "qk_layer_norms": source.option("fusion", "qk_norm", False),
                "alpha_type": "vector" if source.option("fusion", "gate") == "vector" else "float",
                "use_resampler": True,
                "vision_config": _make_vision_config(source),
                "perceiver_config": {
                    "use_resampler": True,
                    "resampler_n_latents": source.option("vision_tokenizer", "num_latents", 64),
                    "resampler_depth": source.option("vision_tokenizer", "depth", 6),
                    "resampler_n_heads": source.option("vision_tokenizer", "num_heads", 16),
                    "resampler_head_dim": source.option("vision_tokenizer", "head_dim", 96),
                    "qk_layer_norms_perceiver": source.option("vision_tokenizer", "qk_norm", False),
                },
            },
            images=IdeficsImageProcessor(image_size=source.tower.image_size, **image_settings(source.config)),
            plain_prompt=f"{begin}{ADDED_TOKENS[0]}{ADDED_TOKENS[1]}{ADDED_TOKENS[0]}{{text}}",
        )


def _count_added(source: Source) -> int:
    """Return the number of added tokens; it is a problem if they are others than the class's, or have other ids."""
    ours, rows = list(source.config.added_tokens), source.config.get_text_config(decoder=True).vocab_size
    wanted = list(ADDED_TOKENS[: max(2, len(ours))])
    if ours != wanted:
        source.problems.append(f"added_tokens are {', '.join(ours) or 'none'}; the class has {', '.join(wanted)}.")
    elif source.config.first_added_id != rows:
        source.problems.append(
            f"the first added token has id {source.config.first_added_id}; in the class it has {rows}, the number of "
            "rows of the language model's tables."
        )
    return len(wanted)


def _find_bos(source: Source) -> str:
    """Return the token with which the class's processor begins each prompt; it is a problem if there is none."""
    bos = None if source.tokenizer is None else source.tokenizer.bos_token
    if source.tokenizer is not None and bos is None:
        source.problems.append("the class's processor begins each prompt with a BOS token, and the tokenizer has none.")
    return bos or ""


def _make_vision_config(source: Source) -> dict[str, Any]:
    """Return the configuration of a CLIP under the class's own names.

    Raises:
        NotHeld: if the vision encoder is no CLIP.
    """
    given = source.tower.config
    if (kind := given["model_type"]) != _CLIP:
        raise NotHeld(f"vision_encoder is a {kind}; the class has a CLIP.")
    more = {"layer_norm_eps": given["layer_norm_eps"]} if "layer_norm_eps" in given else {}
    return {"embed_dim": given["hidden_size"], **{key: given[key] for key in _SAME if key in given}, **more}
