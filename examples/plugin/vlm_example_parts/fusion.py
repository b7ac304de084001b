"""A fusion. B batch, T positions of a call, T_img media, n vision tokens of a medium, d channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_cli.composition import Composition
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.vlm import VLM


class VLMWithRunningMean(VLM):
    """Add to each embedding the projected mean of its row's media so far. `<image>` keeps its one position.

    The gate starts at 0, so that a new model gives the bare language model's logits.
    """

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        return None  # any number of channels: `fusion` projects them

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        dim_embedding = self.get_input_embeddings().weight.shape[1]
        self.fusion = GatedProjection(self.vision_tokenizer.dim_out, dim_embedding, parts.fusion.options.bias)

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """Return float[B, T_img, d], whose k-th row comes from the mean of the first k media."""
        tokens = vision_tokens.where(media_mask[..., None], 0)  # padding may hold any number
        media = tokens.sum(2) / media_mask.sum(2, keepdim=True).clamp(min=1)  # [B, T_img, d]
        counts = torch.arange(1, media.shape[1] + 1, device=media.device)
        return self.fusion(media.cumsum(1) / counts[:, None])

    def embed_media(self, embeddings: Tensor, conditioning: Conditioning) -> Tensor:
        """Add to each embedding, float[B, T, d], the mean of the media up to it; `media_counts` says how many."""
        media = conditioning.media  # [B, T_img, d], what `project_media` returned
        if media is None:
            return embeddings
        num_seen = conditioning.media_counts[..., None]  # [B, T, 1]
        last = (num_seen - 1).clamp(0, media.shape[1] - 1).expand(-1, -1, embeddings.shape[-1])
        update = media.to(embeddings.dtype).gather(1, last)
        return torch.where(num_seen > 0, embeddings + update, embeddings)


class GatedProjection(nn.Module):
    """Compute tanh(gate)·proj(x)."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)
        self.media_gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close the gate."""
        nn.init.zeros_(self.media_gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.media_gate.tanh() * self.proj(x)
