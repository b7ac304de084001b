"""Video-LLaVA (https://arxiv.org/abs/2311.10122), as Transformers writes it: the half that reads pictures.

Its clips go through a vision encoder of their own (`video_tower`), which a VLM does not have.

Source: transformers/models/video_llava, `VideoLlavaForConditionalGeneration`.
"""

from __future__ import annotations

from transformers import VideoLlavaConfig

from vlm_cli.checkpoint.published.layouts.llava import HuggingFaceLLaVA
from vlm_cli.checkpoint.published.settings import Settings

__all__ = ["HuggingFaceVideoLLaVA"]


class HuggingFaceVideoLLaVA(HuggingFaceLLaVA):
    """LLaVA's parts, with `image_tower` and `video_tower`, and a `config.json` of type `video_llava`."""

    name = "Video-LLaVA (Hugging Face)"
    source = "transformers/models/video_llava/modeling_video_llava.py"
    model_type = "video_llava"
    tower = "image_tower"
    notes = (
        "Video-LLaVA reads clips through another vision encoder than pictures. vlm takes the one for pictures, and "
        "reads clips through it too, so answers about clips are not those of the published model.",
    )
    settings = Settings(
        config=VideoLlavaConfig,
        read=HuggingFaceLLaVA.settings.read,
        without_effect={
            *("image_seq_length", "tie_word_embeddings", "ignore_index", "pad_token_id"),
            *("video_token_index", "video_token_id", "video_seq_length"),
        },
        fixed=HuggingFaceLLaVA.settings.fixed,
    )
