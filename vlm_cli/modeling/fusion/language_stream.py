"""`VLMWithLanguageStream`: vision tokens among the text tokens (Kosmos-1, BLIP-2, LLaVA)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_cli.composition import Composition
from vlm_cli.errors import LanguageModelLimit
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt, expand_media_tokens, pack_valid_tokens, scatter_media
from vlm_cli.modeling.fusion.masks import cuts_a_medium, find_mask_problem, find_media_blocks, prepare_masks
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.modeling.lm_interface import is_filled
from vlm_cli.modeling.packed import count_within
from vlm_cli.modeling.vlm import VLM

__all__ = ["VLMWithLanguageStream"]

_SEES_AHEAD: dict[str, Literal["nothing", "media", "prompt"]] = {
    "causal": "nothing",
    "image": "media",
    "prefix": "prompt",
}


class VLMWithLanguageStream(VLM):
    """Vision tokens take the place of `<image>` among the embeddings of text (Kosmos, BLIP-2, LLaVA)."""

    splices_media = True
    media_may_be_padded = True

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        return dim_embedding

    def num_positions(self, num_frames: int = 1) -> int:
        return self.vision_tokenizer.num_tokens(num_frames)

    def num_positions_of(self, vision_tokens: Tensor) -> int:
        return len(vision_tokens)

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        self.fusion = nn.Module()
        self.sees_ahead = _SEES_AHEAD[getattr(parts.fusion.options, "mask", "causal")]

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """Return each row's vision tokens in order, padding last: float[B, T_img·n, d]."""
        return pack_valid_tokens(vision_tokens, media_mask)

    def media_for_decoding(self, media: Tensor | None, media_mask: Tensor | None) -> tuple[None, None]:
        """Return nothing: the language model's cache holds the media."""
        return None, None

    def expand_prompt(self, lang_x: Tensor, attention_mask: Tensor | None, media_mask: Tensor) -> ExpandedPrompt | None:
        is_media = lang_x == self.config.media_token_id
        return expand_media_tokens(lang_x, attention_mask, is_media, media_mask.sum(-1), self.config.pad_token_id or 0)

    def find_prefix(self, lang_x: Tensor, labels: Tensor | None, segments: Tensor | None = None) -> Tensor | None:
        """Mark the tokens before the first label, or all without labels, if the mask is `prefix`."""
        if self.sees_ahead != "prompt":
            return None
        if labels is None:
            return torch.ones_like(lang_x, dtype=torch.bool)
        learned = labels != IGNORED
        return (learned.cumsum(-1) if segments is None else count_within(learned, segments)) == 0

    def condition_call(self, prompt: Conditioning, ids: Tensor, end: int | None) -> Conditioning:
        """Find the blocks of positions that see each other. A single position sees none after it."""
        call = super().condition_call(prompt, ids, end)
        blocks = None
        if self.sees_ahead == "prompt" and call.prefix_mask is not None:
            blocks = torch.where(call.prefix_mask, 0 if call.segments is None else call.segments, -1)
        elif self.sees_ahead == "media" and call.media_mask is not None:
            blocks = self._find_media_blocks(call)
        return replace(call, fusion_state=blocks if ids.shape[1] > 1 else None)

    def _find_media_blocks(self, call: Conditioning) -> Tensor:
        assert call.media_mask is not None
        media = (call.ids == self.config.media_token_id, call.media_counts, call.media_mask)
        if not torch.compiler.is_compiling() and cuts_a_medium(*media):
            raise LanguageModelLimit(
                "with fusion.mask=image, the positions of a picture see each other, so that the language model must "
                "read each picture in one call. Give the whole prompt at once, without prefill_chunk_size."
            )
        return find_media_blocks(*media)

    def mask_call(self, conditioning: Conditioning, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Prepare the language model's masks, if positions of the call see positions after their own."""
        blocks, cache = conditioning.fusion_state, kwargs.get(self.lm_interface.cache_name)
        if blocks is None or not (torch.compiler.is_compiling() or bool((blocks >= 0).any())):
            return super().mask_call(conditioning, kwargs)
        if self.sees_ahead == "prompt" and is_filled(cache):
            raise LanguageModelLimit(
                "with fusion.mask=prefix, the positions of a prompt see each other, so that the language model must "
                "read the prompt in one call. Give the whole prompt at once, without prefill_chunk_size, or call "
                "forward with a prefix_mask that is false after a cache."
            )
        masks = prepare_masks(self.lang_model, blocks, kwargs, cache, conditioning.segments)
        kwargs = {**kwargs, "attention_mask": masks}
        if kwargs.get("position_ids") is None and self.lm_interface.takes_positions and not is_filled(cache):
            # OPT would count them from the mask, as if it were one of padding.
            kwargs["position_ids"] = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
        return kwargs

    def fusion_problem(self) -> str | None:
        if self.sees_ahead == "nothing":
            return None
        layers = decoder_layers(self.lang_model, self.config.composition.language_model.decoder_layers)
        problem = find_mask_problem(self.lang_model, layers)
        mask = self.config.composition.fusion.options.mask
        return problem and (
            f"fusion.mask={mask} does not fit the language model: {problem.rstrip('.')}. Leave fusion.mask out "
            "(causal), or choose another language model."
        )

    def decoded_media(
        self, media: Tensor | None, media_mask: Tensor | None, reads_all: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return nothing: the language model's cache holds the media, and no `<image>` follows."""
        return None, None

    def embed_media(self, embeddings: Tensor, conditioning: Conditioning) -> Tensor:
        """Put the vision tokens at the positions of `<image>`."""
        if conditioning.media is None:
            return embeddings
        is_media = conditioning.ids == self.config.media_token_id
        return scatter_media(embeddings, conditioning.media, is_media, conditioning.media_counts)
