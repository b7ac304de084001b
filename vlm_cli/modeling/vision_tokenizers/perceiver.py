"""The Perceiver Resampler of Flamingo (https://arxiv.org/abs/2204.14198, section 3.1).

Parameter names and arithmetic are those of open_flamingo, so that published weights load unchanged.
B batch, T_img media, F frames, v patches, n latents, d channels; inside attention h heads, k head width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import PerceiverOptions
from vlm_cli.modeling.layers import feed_forward

__all__ = ["PerceiverResampler"]


class PerceiverAttention(nn.Module):
    """Attend from latents to the features of a medium and to the latents themselves."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, dim, bias=False)
        # IDEFICS (https://arxiv.org/abs/2306.16527)
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, media: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """float[N, S, d], float[N, n, d], bool[N, 1, 1, S + n] -> float[N, n, d]."""
        latents = self.norm_latents(latents)
        attended = torch.cat([self.norm_media(media), latents], dim=1)  # [N, S + n, d]
        q = rearrange(self.to_q(latents), "N n (h k) -> N h n k", h=self.num_heads)
        k, v = rearrange(self.to_kv(attended), "N S (two h k) -> two N h S k", two=2, h=self.num_heads)
        out = nnf.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=mask)
        return self.to_out(rearrange(out, "N h n k -> N n (h k)"))


class PerceiverResampler(nn.Module):
    """Let a fixed number of learned latents read all patches and frames of a medium, or those of each frame.

    Args:
        options: sizes.
        dim_in: channels of the features, and of the latents.
        num_patches: unused; the number of latents does not depend on it.
        dim_out: channels of the tokens; None omits the last projection.
    """

    def __init__(self, options: PerceiverOptions, dim_in: int, num_patches: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.dim_out = dim_in if dim_out is None else dim_out
        self.frames = options.frames
        self.max_num_frames, self.max_num_media = options.max_num_frames, options.max_num_media
        self.latents = nn.Parameter(torch.empty(options.num_latents, dim_in))
        frames, media = options.max_num_frames, options.max_num_media
        self.frame_embs = None if frames is None else nn.Parameter(torch.empty(frames, dim_in))
        self.media_time_embs = None if media is None else nn.Parameter(torch.empty(media, 1, dim_in))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim_in, options.num_heads, options.head_dim, options.qk_norm),
                    feed_forward(dim_in, options.ff_mult, options.activation),
                ]
            )
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(dim_in)
        self.projection = None if dim_out is None else nn.Linear(dim_in, dim_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the latents and embeddings from N(0, 1), as open_flamingo does."""
        for parameter in (self.latents, self.frame_embs, self.media_time_embs):
            if parameter is not None:
                nn.init.normal_(parameter)

    @property
    def encodes_media_independently(self) -> bool:
        """Whether a medium's tokens depend on nothing else in its row; media-time embeddings depend on its number."""
        return self.media_time_embs is None

    @property
    def reads_patch_masks(self) -> bool:
        """Whether `forward` takes a mask of single patches."""
        return self.frames == "apart"

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium of so many frames."""
        return self.latents.shape[0] * (num_frames if self.frames == "apart" else 1)

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of valid frames, or of media with a valid frame: bool[B, T_img, F] -> bool[B, T_img, n]."""
        if self.frames == "apart":
            return frame_mask.repeat_interleave(self.num_tokens(), dim=-1)
        return frame_mask.any(-1, keepdim=True).expand(-1, -1, self.num_tokens())

    def forward(self, features: Tensor, frame_mask: Tensor | None = None, patch_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out].

        Args:
            features: of the patches.
            frame_mask: bool[B, T_img, F], true for frames that are not padding; None for all.
            patch_mask: bool[B, T_img, F, v], true for patches that are read, if frames are read apart; None for all.

        Raises:
            ValueError: if there are more frames or media than embeddings for them.
        """
        B, T, F, v, _ = features.shape
        for kind, count, most in (("frames", F, self.max_num_frames), ("media", T, self.max_num_media)):
            if most is not None and count > most:
                raise ValueError(f"got {count} {kind}, but the resampler was made for at most {most}.")
        if self.frame_embs is not None:
            features = features + self.frame_embs[:F, None]
        if self.media_time_embs is not None:
            features = features + self.media_time_embs[:T, None]
        is_apart = self.frames == "apart"
        # [B·T, F·v, d]; apart [B·T·F, v, d], where `token_mask` leaves out the tokens of padding
        media = rearrange(features, "B T F v d -> (B T F) v d" if is_apart else "B T F v d -> (B T) (F v) d")
        latents = self.latents.to(media.dtype).expand(media.shape[0], -1, -1)  # `len` would fix N in a program
        mask = None if frame_mask is None or is_apart else self._attention_mask(frame_mask, v)
        if patch_mask is not None and is_apart:
            patches = patch_mask.flatten(0, 2)  # [B·T·F, v]; latents are always read
            mask = torch.cat([patches, patches.new_ones(patches.shape[0], len(self.latents))], dim=-1)[:, None, None]
        for layer in self.layers:
            attention, ff = cast(nn.ModuleList, layer)
            latents = latents + attention(media, latents, mask)
            latents = latents + ff(latents)
        latents = self.norm(latents)
        latents = latents.view(B, T, -1, latents.shape[-1])  # [B, T, n, d]
        return latents if self.projection is None else self.projection(latents)

    def _attention_mask(self, frame_mask: Tensor, num_patches: int) -> Tensor:
        """Mask patches of padding frames, never latents: bool[B, T_img, F] -> bool[B·T_img, 1, 1, F·v + n]."""
        patches = frame_mask.flatten(0, 1).repeat_interleave(num_patches, dim=-1)
        latents = patches.new_ones(patches.shape[0], self.num_tokens())
        return torch.cat([patches, latents], dim=-1)[:, None, None]
