"""GOT-OCR 2.0 (https://arxiv.org/abs/2409.01704), as Transformers writes it.

Source: transformers/models/got_ocr2, `GotOcr2ForConditionalGeneration`: modeling_got_ocr2.py and
processing_got_ocr2.py.
"""

from __future__ import annotations

from transformers import GotOcr2Config

from vlm_cli.checkpoint.published.announcing import read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_grid import GRID_SETTINGS
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["HuggingFaceGotOCR2"]

_SETTINGS = Settings(
    config=GotOcr2Config,
    read={"vision_config", "text_config"},
    without_effect={"image_token_index", "image_token_id", "image_seq_length", "tie_word_embeddings"},
)
#: How images are prepared where no file says it.
_LIKE = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
_PROJECTOR = rf"{MODEL}multi_modal_projector\."
_RULES: list[Rule] = [
    (rf"{_PROJECTOR}conv_upsampler1\.(\w+)", r"vision_tokenizer.convolutions.0.\1"),
    (rf"{_PROJECTOR}conv_upsampler2\.(\w+)", r"vision_tokenizer.convolutions.1.\1"),
    (rf"{_PROJECTOR}multimodal_projector\.(\w+)", r"vision_tokenizer.proj.\1"),
]
_SYSTEM = "You should follow the instructions carefully and explain your answers in detail."
#: What the processor writes around a prompt.
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + _SYSTEM + "<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NOTES = (
    "GOT-OCR 2.0 was trained with few prompts: $'<image>\\n OCR: ', or $'<image>\\n OCR with format: ' for formatted "
    "text. The chat template writes what stands around them; outside `vlm chat`, give --chat-template all.",
    "Its processor cuts no picture unless it is asked. --set tiling.max_tiles=12 cuts, and the prompt is then "
    "$'<image>\\n OCR upon the patch reference: '.",
)


class HuggingFaceGotOCR2:
    """A SAM, `multi_modal_projector` of convolutions, and any language model; `config.json` of type `got_ocr2`."""

    name = "GOT-OCR 2.0 (Hugging Face)"
    source = "transformers/models/got_ocr2/modeling_got_ocr2.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first convolution and the configuration's type."""
        return checkpoint.config.get("model_type") == "got_ocr2" and any(
            name.endswith("multi_modal_projector.conv_upsampler1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts.

        `<image>` is added to the tokenizer, after its last token. Nothing reads the row of `<image>` in the tables.
        """
        read_processor(checkpoint.folder, {})
        parts = read_parts(checkpoint, _SETTINGS, cuts=GRID_SETTINGS, like=_LIKE)
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}"},
                "vision_tokenizer": {"type": "linear", "convolutions": 2},
                "fusion": "language-stream",
                "tiling": {"type": "grid", "max_tiles": 1, "picture_text": "<img>{views}</img>"},
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [*_RULES, *parts.rules, *make_language_model_rules(checkpoint, ours, has_added_rows=False)]
            ),
            text_config=parts.text_config,
            vision_config=parts.vision_config,
            chat_template=_TEMPLATE,
            end_of_answer="<|im_end|>",
            optional_pattern=r"added_tokens\..*",
            notes=_NOTES,
        )
