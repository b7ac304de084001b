"""The connector of Kosmos-2 (https://arxiv.org/abs/2306.14824): learned latents attend once to the mapped patches.

Names and arithmetic are those of Transformers' `Kosmos2ImageToTextProjection`.
B batch, T_img media, F frames, v patches, n latents, d channels; inside attention N media, h heads, k head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import LatentAttentionOptions
from vlm_cli.errors import CompositionError

__all__ = ["LatentAttention"]


class _Attention(nn.Module):
    """Attend from queries to other states; four projections with biases."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """float[N, n, d], float[N, S, d], bool[N, 1, 1, S] -> float[N, n, d]."""
        q, k, v = (
            rearrange(proj(x), "N S (h k) -> N h S k", h=self.num_heads)
            for proj, x in ((self.q_proj, queries), (self.k_proj, states), (self.v_proj, states))
        )
        out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(out, "N h n k -> N n (h k)"))


class LatentAttention(nn.Module):
    """Map each patch, and let learned latents attend to the patches of a medium and to themselves.

    Args:
        options: sizes.
        dim_in: channels of the features.
        num_patches: unused; the number of latents does not depend on it.
        dim_out: channels of the tokens; None keeps `dim_in`.

    Raises:
        CompositionError: if the heads do not divide the channels.
    """

    #: A medium's tokens depend on nothing else in its row.
    encodes_media_independently = True

    def __init__(
        self, options: LatentAttentionOptions, dim_in: int, num_patches: int, dim_out: int | None = None
    ) -> None:
        super().__init__()
        self.dim_out = dim_in if dim_out is None else dim_out
        if self.dim_out % options.num_heads:
            raise CompositionError(
                f"vision_tokenizer.num_heads={options.num_heads} does not fit: the {self.dim_out} channels of the "
                "vision tokens must be a multiple of it."
            )
        self.frames, self.unit_length = options.frames, options.unit_length
        self.dense = nn.Linear(dim_in, self.dim_out)
        self.latent_query = nn.Parameter(torch.empty(options.num_latents, self.dim_out))
        self.x_attn = _Attention(self.dim_out, options.num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the latents from N(0, 1), as Kosmos-2 does."""
        nn.init.normal_(self.latent_query)

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium of so many frames."""
        return self.latent_query.shape[0] * (num_frames if self.frames == "apart" else 1)

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of valid frames, or of media with a valid frame: bool[B, T_img, F] -> bool[B, T_img, n]."""
        if self.frames == "apart":
            return frame_mask.repeat_interleave(self.num_tokens(), dim=-1)
        return frame_mask.any(-1, keepdim=True).expand(-1, -1, self.num_tokens())

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]."""
        B, T, _, v, _ = features.shape
        if self.unit_length:
            features = nnf.normalize(features, dim=-1)
        is_apart = self.frames == "apart"
        axes = "(B T F) v d" if is_apart else "(B T) (F v) d"
        patches = rearrange(self.dense(features), f"B T F v d -> {axes}")
        latents = self.latent_query.to(patches.dtype).expand(patches.shape[0], -1, -1)
        mask = None
        if frame_mask is not None and not is_apart:
            # A padded frame is not seen; the latents always are.
            seen = frame_mask.flatten(0, 1).repeat_interleave(v, dim=-1)
            mask = torch.cat([seen, seen.new_ones(seen.shape[0], latents.shape[1])], dim=-1)[:, None, None]
        tokens = self.x_attn(latents, torch.cat([patches, latents], dim=1), mask)
        return tokens.reshape(B, T, -1, self.dim_out)  # [B, T, n, dim_out]
