"""Slow loops over media, heads and positions, written from the papers and not from our modules, of which they take
the weights only.

B batch, T positions, M media of a row, F frames, v patches, n vision tokens, d channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


def attention(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Every query looks at every key: float[q, d], float[s, d], float[s, d] -> float[q, d].

    Source: Attention Is All You Need, section 3.2 (https://arxiv.org/abs/1706.03762).
    """
    width = queries.shape[1] // num_heads
    out = torch.empty(queries.shape[0], num_heads * width)
    for i, query in enumerate(queries):
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack([query[part] @ key[part] for key in keys]) / width**0.5
            weights = scores.exp() / scores.exp().sum()
            out[i, part] = sum(w * value[part] for w, value in zip(weights, values, strict=True))
    return out


def feed_forward(ff: nn.Sequential, x: Tensor, activation: str = "gelu") -> Tensor:
    norm, up, _, down = ff
    hidden = norm(x) @ up.weight.T
    active = {"gelu": nnf.gelu(hidden), "relu": hidden.clamp(min=0), "squared_relu": hidden.clamp(min=0) ** 2}
    return active[activation] @ down.weight.T


def perceiver(resampler: nn.Module, features: Tensor, frame_mask: Tensor, activation: str = "gelu") -> Tensor:
    """float[B, M, F, v, d], bool[B, M, F] -> float[B, M, n, d']; media without frames give zeros.

    Source: Flamingo, section 3.1.1 and figure 5 (https://arxiv.org/abs/2204.14198).
    """
    B, M = frame_mask.shape[:2]
    out = torch.zeros(B, M, resampler.num_tokens(), resampler.dim_out)
    for b, m in frame_mask.any(-1).nonzero().tolist():
        patches = []
        for f in frame_mask[b, m].nonzero().flatten().tolist():
            for patch in features[b, m, f]:
                x = patch
                if resampler.frame_embs is not None:
                    x = x + resampler.frame_embs[f]
                if resampler.media_time_embs is not None:
                    x = x + resampler.media_time_embs[m, 0]
                patches.append(x)
        media = torch.stack(patches) if patches else features.new_zeros(0, features.shape[-1])
        latents = resampler.latents
        for attend, ff in resampler.layers:
            x = attend.norm_latents(latents)
            attended = torch.cat([attend.norm_media(media), x])
            key_rows, value_rows = attend.to_kv.weight.chunk(2)
            mixed = attention(
                x @ attend.to_q.weight.T, attended @ key_rows.T, attended @ value_rows.T, attend.num_heads
            )
            latents = latents + mixed @ attend.to_out.weight.T
            latents = latents + feed_forward(ff, latents, activation)
        latents = resampler.norm(latents)
        out[b, m] = latents if resampler.projection is None else resampler.projection(latents)
    return out


def qformer(tokenizer: nn.Module, features: Tensor, frame_mask: Tensor, num_heads: int, every: int) -> Tensor:
    """float[B, M, F, v, d], bool[B, M, F] -> float[B, M, n, d']; media without frames give zeros.

    Source: BLIP-2, section 3.1 (https://arxiv.org/abs/2301.12597), whose layers are BERT's
    (https://arxiv.org/abs/1810.04805), norms last.
    """

    def attend(block: nn.Module, x: Tensor, read: Tensor) -> Tensor:
        inner = block.attention
        mixed = attention(inner.query(x), inner.key(read), inner.value(read), num_heads)
        return block.output.LayerNorm(block.output.dense(mixed) + x)

    B, M = frame_mask.shape[:2]
    out = torch.zeros(B, M, tokenizer.num_tokens(), tokenizer.dim_out)
    for b, m in frame_mask.any(-1).nonzero().tolist():
        patches = features[b, m][frame_mask[b, m]].flatten(0, 1)
        x = tokenizer.qformer.layernorm(tokenizer.query_tokens[0])
        for i, layer in enumerate(tokenizer.qformer.encoder.layer):
            x = attend(layer.attention, x, x)
            if i % every == 0:
                x = attend(layer.crossattention, x, patches)
            y = layer.output_query.dense(nnf.gelu(layer.intermediate_query.dense(x)))
            x = layer.output_query.LayerNorm(y + x)
        out[b, m] = x if tokenizer.proj is None else tokenizer.proj(x)
    return out


def projection(tokenizer: nn.Module, features: Tensor, frame_mask: Tensor) -> list[list[Tensor]]:
    """The tokens of each medium that has frames: float[n, d'] for each row and medium.

    Source: LLaVA, section 4.1 (https://arxiv.org/abs/2304.08485).
    """
    rows = []
    for b in range(features.shape[0]):
        media = []
        for m in range(features.shape[1]):
            frames = [features[b, m, f] for f in range(features.shape[2]) if frame_mask[b, m, f]]
            if not frames:
                continue
            if tokenizer.frames == "mean":
                frames = [sum(frames) / len(frames)]
            media.append(torch.stack([tokenizer.proj(patch) for frame in frames for patch in frame]))
        rows.append(media)
    return rows


def cross_attend(
    block: nn.Module,
    x: Tensor,
    vision_tokens: Tensor,
    media_mask: Tensor,
    media_counts: Tensor,
    attend: str = "last",
    feed_forward_before_media: bool = True,
    activation: str = "gelu",
) -> Tensor:
    """One gated block: float[B, T, d], float[B, M, n, d'], bool[B, M, n], int[B, T] -> float[B, T, d].

    Source: Flamingo, section 3.1.2, figure 4 and section 3.1.3 (https://arxiv.org/abs/2204.14198).
    """
    attn, out = block.attn, x.clone()
    key_rows, value_rows = attn.to_kv.weight.chunk(2)
    for b in range(x.shape[0]):
        if not media_mask[b].any():
            continue
        for t in range(x.shape[1]):
            last = int(media_counts[b, t])
            media = range(last) if attend == "all" else [last - 1] if last else []
            seen = [vision_tokens[b, m, j] for m in media for j in range(media_mask.shape[2]) if media_mask[b, m, j]]
            if seen:
                read = torch.stack(seen)
                query = attn.norm(x[b, t])[None] @ attn.to_q.weight.T
                mixed = attention(query, read @ key_rows.T, read @ value_rows.T, attn.num_heads)
                out[b, t] += block.attn_gate.tanh() * (mixed @ attn.to_out.weight.T)[0]
            if seen or feed_forward_before_media:
                out[b, t] += block.ff_gate.tanh() * feed_forward(block.ff, out[b, t], activation)
    return out


def splice(lang_x: Tensor, image: int, embed: Callable[[int], Tensor], media: list[Tensor]) -> tuple[Tensor, list[int]]:
    """A row of a language stream: embeddings in which the k-th medium stands for the k-th `<image>`.

    Source: Kosmos-1, section 2.1 (https://arxiv.org/abs/2302.14045).

    Args:
        lang_x: int[T].
        image: id of `<image>`.
        embed: id -> float[d].
        media: float[n, d] for each medium.

    Returns:
        float[L, d], and for each token of `lang_x` its last position in it.
    """
    pieces, last = [], []
    media = list(media)
    for token in lang_x.tolist():
        pieces += list(media.pop(0)) if token == image else [embed(token)]
        last.append(len(pieces) - 1)
    return torch.stack(pieces), last


def greedy(logits: Callable[[Tensor], Tensor], ids: Tensor, num_tokens: int, never: int) -> Tensor:
    """int[1, T] -> int[1, T + num_tokens], by a full pass for each token."""
    for _ in range(num_tokens):
        scores = logits(ids)[:, -1].clone()
        scores[:, never] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids
