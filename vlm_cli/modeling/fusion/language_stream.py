"""`VLMWithLanguageStream`: vision tokens among the text tokens (Kosmos-1, BLIP-2, LLaVA)."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_cli.composition import Composition
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt, expand_media_tokens, pack_valid_tokens, scatter_media
from vlm_cli.modeling.vlm import VLM

__all__ = ["VLMWithLanguageStream"]


class VLMWithLanguageStream(VLM):
    """Vision tokens take the place of `<image>` among the embeddings of text (Kosmos, BLIP-2, LLaVA)."""

    splices_media = True

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        return dim_embedding

    def num_positions(self, num_frames: int = 1) -> int:
        return self.vision_tokenizer.num_tokens(num_frames)

    def num_positions_of(self, vision_tokens: Tensor) -> int:
        return len(vision_tokens)

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        self.fusion = nn.Module()

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """Return each row's vision tokens in order, padding last: float[B, T_img·n, d]."""
        return pack_valid_tokens(vision_tokens, media_mask)

    def expand_prompt(self, lang_x: Tensor, attention_mask: Tensor | None, media_mask: Tensor) -> ExpandedPrompt | None:
        is_media = lang_x == self.config.media_token_id
        return expand_media_tokens(lang_x, attention_mask, is_media, media_mask.sum(-1), self.config.pad_token_id or 0)

    def embed_media(self, embeddings: Tensor, conditioning: Conditioning) -> Tensor:
        """Put the vision tokens at the positions of `<image>`."""
        if conditioning.media is None:
            return embeddings
        is_media = conditioning.ids == self.config.media_token_id
        return scatter_media(embeddings, conditioning.media, is_media, conditioning.media_counts)
