"""The Q-Former of BLIP-2 (https://arxiv.org/abs/2301.12597, section 3.1), in Transformers' own class.

B batch, T_img media, F frames, v patches, n queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_cli.composition import QFormerOptions

__all__ = ["QFormer"]


class QFormer(nn.Module):
    """Let learned queries read all patches and frames of a medium, or those of each frame, in a BERT.

    Args:
        options: sizes.
        dim_in: channels of the features.
        num_patches: unused; the number of queries does not depend on it.
        dim_out: channels of the tokens; None omits the last projection.
    """

    #: A medium's tokens depend on nothing else in its row.
    encodes_media_independently = True

    def __init__(self, options: QFormerOptions, dim_in: int, num_patches: int, dim_out: int | None = None) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.frames = options.frames
        self.dim_out = options.dim if dim_out is None else dim_out
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                encoder_hidden_size=dim_in,
                hidden_size=options.dim,
                num_hidden_layers=options.depth,
                num_attention_heads=options.num_heads,
                intermediate_size=options.dim_ff,
                cross_attention_frequency=options.cross_attention_every,
                hidden_dropout_prob=options.dropout,
                attention_probs_dropout_prob=options.dropout,
            )
        )
        self.query_tokens = nn.Parameter(torch.empty(1, options.num_queries, options.dim))
        self.proj = None if dim_out is None else nn.Linear(options.dim, dim_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries from N(0, 0.02), as LAVIS does; equal queries would stay equal in training."""
        nn.init.normal_(self.query_tokens, std=0.02)

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium of so many frames."""
        return self.query_tokens.shape[1] * (num_frames if self.frames == "apart" else 1)

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of valid frames, or of media with a valid frame: bool[B, T_img, F] -> bool[B, T_img, n]."""
        if self.frames == "apart":
            return frame_mask.repeat_interleave(self.num_tokens(), dim=-1)
        return frame_mask.any(-1, keepdim=True).expand(-1, -1, self.num_tokens())

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]."""
        B, T, _, v, _ = features.shape
        is_apart = self.frames == "apart"
        # [B·T, F·v, dim_in]; apart [B·T·F, v, dim_in], where `token_mask` leaves out the tokens of padding
        patches = features.flatten(0, 2) if is_apart else features.flatten(2, 3).flatten(0, 1)
        mask = None
        if frame_mask is not None and not is_apart:
            # A medium of padding sees all of its padding, since a softmax over no key is NaN.
            seen = frame_mask | ~frame_mask.any(-1, keepdim=True)
            mask = seen.flatten(0, 1).repeat_interleave(v, dim=-1).long()
        queries = self.query_tokens.to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = self.qformer(
            query_embeds=queries, encoder_hidden_states=patches, encoder_attention_mask=mask
        ).last_hidden_state
        tokens = tokens.reshape(B, T, -1, tokens.shape[-1])  # [B, T, n, dim]
        return tokens if self.proj is None else self.proj(tokens)
