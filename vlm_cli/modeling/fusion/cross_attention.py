"""Gated cross-attention of Flamingo (https://arxiv.org/abs/2204.14198, section 3.2).

Parameter names and arithmetic are those of open_flamingo, so that published weights load unchanged. Every fusion with
gated blocks shares the gates, the masks and the hooks of this module.
B batch, T_txt text positions, T_img media, n vision tokens per medium, S = T_img·n attended positions, d channels,
L blocks; inside attention h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import Composition, GatedFusionOptions
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.deduplicate import deduplicate
from vlm_cli.modeling.fusion.visibility import MediaVisibility, attend_to_media
from vlm_cli.modeling.hooks import ModelHook
from vlm_cli.modeling.language_model import decoder_layers, update_hidden_states
from vlm_cli.modeling.layers import feed_forward
from vlm_cli.modeling.lm_interface import is_filled
from vlm_cli.modeling.vlm import VLM

__all__ = ["GatedCrossAttention", "GatedCrossAttentionBlock", "VLMWithCrossAttention"]


class MaskedCrossAttention(nn.Module):
    """Attend from text to vision tokens."""

    def __init__(self, dim: int, dim_media: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim_media, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def project(self, media: Tensor) -> Tensor:
        """Compute keys and values of vision tokens: float[B, S, dim_media] -> float[B, 2, h, S, k]."""
        return rearrange(self.to_kv(media), "B S (two h k) -> B two h S k", two=2, h=self.num_heads)

    def forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        """float[B, T_txt, dim], float[B, 2, h, S, k] -> float[B, T_txt, dim]."""
        q = self.to_q(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.to_out(attend_to_media(q, keys_values, visibility))


class GatedCrossAttentionBlock(nn.Module):
    """Compute `x + tanh(a)·attn(x)`, then `x + tanh(f)·ff(x)`. With both gates at zero this is the identity.

    Args:
        attn: has `norm`, which normalises its input of `dim` channels, and `project(media)`, as `MaskedCrossAttention`.
        ff: normalises its input itself.
        gate_size: numbers in a gate: 1, or `dim` for one per channel.
    """

    # Transformers' `gradient_checkpointing_enable` sets these.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    attn: Any  # calls and attributes that `nn.Module` does not declare

    def __init__(self, attn: nn.Module, ff: nn.Module, gate_size: int = 1) -> None:
        super().__init__()
        self.attn = attn
        self.attn_gate = nn.Parameter(torch.empty(gate_size))
        self.ff = ff
        self.ff_gate = nn.Parameter(torch.empty(gate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close the gates."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.ff_gate)

    def project(self, media: Tensor) -> Tensor:
        """Compute keys and values of vision tokens, as `MaskedCrossAttention.project` does."""
        return self.attn.project(media)

    @property
    def dim(self) -> int:
        """Channels of the hidden states."""
        return self.attn.norm.normalized_shape[0]

    def forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        """float[B, T_txt, dim], float[B, 2, h, S, k] -> float[B, T_txt, dim]."""
        if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func(self._forward, x, keys_values, visibility)
        return self._forward(x, keys_values, visibility)

    def _forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        # A decoded token waits for each operation: these are as few as there can be.
        x = torch.addcmul(x, self.attn_gate.tanh(), _without(self.attn(x, keys_values, visibility), visibility.unread))
        return torch.addcmul(x, self.ff_gate.tanh(), _without(self.ff(x), visibility.unfed))


def _without(x: Tensor, hidden: Tensor | None) -> Tensor:
    """Set positions to zero: float[B, T_txt, d], bool[B, T_txt, 1] -> float[B, T_txt, d]."""
    return x if hidden is None else x.masked_fill(hidden, 0)


class GatedCrossAttention(nn.Module):
    """All blocks of a language model; each is named by the number of the decoder layer that follows it.

    Args:
        options: settings of the fusion.
        dim: channels of the decoder layers.
        dim_media: channels of the vision tokens.
        layers: numbers, from 0, of the decoder layers that get a block.
    """

    def __init__(self, options: GatedFusionOptions, dim: int, dim_media: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.options: Any = options
        self.blocks: Any = nn.ModuleDict({str(i): self.build_block(options, dim, dim_media) for i in layers})

    @staticmethod
    def build_block(options: Any, dim: int, dim_media: int) -> GatedCrossAttentionBlock:
        """Build one block; each kind of fusion has its own."""
        return GatedCrossAttentionBlock(
            MaskedCrossAttention(dim, dim_media, options.num_heads, options.head_dim),
            feed_forward(dim, options.ff_mult, options.activation),
        )

    def project(self, vision_tokens: Tensor) -> Tensor:
        """Compute keys and values for all blocks: float[B, T_img, n, dim_media] -> float[B, L, 2, h, S, k].

        Without gradients, equal media are projected once.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or vision_tokens.is_meta:
            media = vision_tokens.flatten(1, 2)
            return torch.stack([block.project(media) for block in self.blocks.values()], dim=1)
        B, T, n, _ = vision_tokens.shape
        media, inverse = deduplicate(vision_tokens.flatten(0, 1))  # [media, n, dim_media], [B·T_img]
        keys_values: Any = None
        for slot, block in enumerate(self.blocks.values()):  # fill one tensor: stacking would need twice the memory
            found = block.project(media)  # [media, 2, h, n, k]
            if keys_values is None:
                keys_values = found.new_empty(B, len(self.blocks), 2, found.shape[2], T * n, found.shape[4])
            keys_values[:, slot] = rearrange(found[inverse], "(B T) two h n k -> B two h (T n) k", B=B)
        return keys_values

    @property
    def attends_before_media(self) -> bool:
        """Whether text before its row's first medium reads all media of the row."""
        return getattr(self.options, "attend_before_media", False)

    def visibility(
        self,
        media_counts: Tensor,
        media_mask: Tensor,
        segments: Tensor | None = None,
        readers_bound: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MediaVisibility:
        """Compute what each position sees; arguments as for `MediaVisibility.build`."""
        return MediaVisibility.build(
            media_counts,
            media_mask,
            attend=self.options.attend,
            feed_forward_before_media=self.options.feed_forward_before_media,
            attend_before_media=self.attends_before_media,
            segments=segments,
            readers_bound=readers_bound,
            dtype=dtype,
        )


class VLMWithCrossAttention(VLM):
    """Gated cross-attention blocks before decoder layers read the vision tokens (Flamingo).

    Before each chosen decoder layer, a hook passes the layer's input through a block.
    """

    _fusion_class: type[GatedCrossAttention] = GatedCrossAttention
    _no_split_modules = ["GatedCrossAttentionBlock", "VisionEncoder"]

    fusion: GatedCrossAttention
    media_may_be_padded = True

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        return None

    def media_seen(self, num_media: int) -> list[int]:
        if self.fusion.options.attend == "last":
            return [num_media] if num_media else []
        return super().media_seen(num_media)

    @property
    def block_layers(self) -> list[int]:
        return [int(i) for i in self.fusion.blocks]

    def fusion_problem(self) -> str | None:
        if self.block_layers:
            return None
        options, depth = self.fusion.options, self.config.get_text_config(decoder=True).num_hidden_layers
        name, value, most = (
            ("every", options.every, depth) if options.first is None else ("first", options.first, depth - 1)
        )
        return (
            f"fusion.{name}={value} leaves no cross-attention block: the language model has {depth} layers. Choose at "
            f"most {most}."
        )

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        options = parts.fusion.options
        layers = decoder_layers(self.lang_model, parts.language_model.decoder_layers)
        first = options.every - 1 if options.first is None else options.first
        numbers = range(first, len(layers), options.every)
        self.fusion = self._fusion_class(options, dim_layer, self.vision_tokenizer.dim_out, numbers)
        self.reads_before_media = self.fusion.attends_before_media
        for slot, i in enumerate(numbers):
            self.hooks.attach(self.lang_model, layers[i], _BeforeLayer(self, str(i), slot), is_before=True)

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """Return the keys and values of all blocks: float[B, L, 2, h, T_img·n, k]."""
        return self.fusion.project(vision_tokens)

    def condition_call(self, prompt: Conditioning, ids: Tensor, end: int | None) -> Conditioning:
        """Compute once per call which media each position sees: `fusion_state` is a `MediaVisibility`."""
        conditioning = super().condition_call(prompt, ids, end)
        if conditioning.media is None:
            return conditioning
        if conditioning.media_mask is None:  # see `decoded_media`
            conditioning.fusion_state = MediaVisibility()
            return conditioning
        # While tokens are decoded, `media` holds fewer media than were counted (see below).
        counts = conditioning.media_counts.clamp(max=conditioning.media_mask.shape[1])
        conditioning.fusion_state = self.fusion.visibility(
            counts,
            conditioning.media_mask,
            conditioning.segments,
            conditioning.most_readers,
            conditioning.media.dtype,
        )
        return conditioning

    def reads_all_media(self, media_counts: Tensor, media_mask: Tensor) -> bool:
        visibility = self.fusion.visibility(media_counts, media_mask)
        hidden = (~visibility.attention, visibility.unread, visibility.unfed)  # type: ignore[operator]
        if self.fusion.options.attend == "last" and media_mask.shape[1] > 1:  # the other media will be dropped
            rows, last = torch.arange(len(media_mask)), (media_counts[:, 0] - 1).clamp(min=0)
            hidden = (~media_mask[rows, last], *hidden[1:])
        return not any(bool(x.any()) for x in hidden if x is not None)

    def decoded_media(
        self, media: Tensor | None, media_mask: Tensor | None, reads_all: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Leave out the mask if it hides nothing, so that no block reads it."""
        return media, None if reads_all else media_mask

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kept = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if not is_filled(kept.get(self.lm_interface.cache_name)):
            return kept
        media, mask = self.media_for_decoding(kept.get("media"), kept.get("media_mask"))
        return kept | {"media": media, "media_mask": mask}

    def media_for_decoding(
        self, media: Tensor | None, media_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keep the last medium of each row if a decoded token sees no other."""
        mask = media_mask
        if media is None or mask is None or self.fusion.options.attend != "last" or mask.shape[1] == 1:
            return media, mask
        last = (mask.any(-1).sum(-1) - 1).clamp(min=0)  # [B]
        rows = torch.arange(len(last), device=last.device)
        by_medium = media.unflatten(-2, mask.shape[1:])  # [B, L, 2, h, T_img, n, k]
        return by_medium[rows, ..., last, :, :].contiguous(), mask[rows, last][:, None]


class _BeforeLayer(ModelHook):
    """A hook that runs one gated cross-attention block before its decoder layer."""

    def __init__(self, model: VLMWithCrossAttention, key: str, slot: int) -> None:
        super().__init__(model)
        self.key, self.slot = key, slot

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        conditioning = self.model.conditioning
        if conditioning is None or conditioning.media is None:
            return None
        block, visibility = self.model.fusion.blocks[self.key], conditioning.fusion_state
        keys_values = conditioning.media[:, self.slot]  # [B, 2, h, S, k]

        def update(hidden: Tensor) -> Tensor:
            return block(hidden, keys_values.to(hidden), visibility)

        return update_hidden_states(update, args, kwargs, conditioning.ids.shape, block.dim)
