"""What a model has read of a prompt, kept for prompts that begin alike: a chat's turns, rows with the same shots.

B rows, L positions of the language model, T_img media, n vision tokens per medium, d channels.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.conditioning import count_media
from vlm_cli.modeling.language_model import NO_LEFT_PADDING

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM

__all__ = ["PromptCache"]

MIN_SHARED_POSITIONS = 8  # positions that rows must share to be read once for all of them


class PromptCache:
    """Hand the same one to `VLM.generate(…, prompt_cache=…)` each time, always with whole prompts.

    A prompt's beginning is taken from here as far as its tokens and its vision tokens are those read last. One row
    leaves what it read, and its answer, for the next call; of several rows, what they share is read once and stays.

    Attributes:
        reused: positions of each row that the last call did not compute.
    """

    def __init__(self) -> None:
        self.reused = 0
        self._ids = torch.empty(0, dtype=torch.long)  # [L] that the cache holds, without padding
        self._media: list[Tensor] = []  # [n, d] of each medium among them
        self._cache: Any = None

    def begin(
        self, model: VLM, ids: Tensor, mask: Tensor | None, vision_tokens: Tensor | None, media_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """
        Args:
            model: the VLM.
            ids: int[B, L], padded at the left.
            mask: bool[B, L]; None for all.
            vision_tokens: float[B, T_img, n, d], or None without media.
            media_mask: bool[B, T_img, n] of them.

        Returns:
            ids and mask in which padding follows what all rows share, and the cache that was read up to there; None if
            there is nothing of use.
        """
        self._ids = self._ids.to(ids.device)
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[there] for row, there in zip(ids, keep, strict=True)]
        media = _media_of_rows(len(rows), vision_tokens, media_mask)
        start = min(_shared(model, (self._ids, self._media), (rows[b], media[b])) for b in range(len(rows)))
        start = min(start, *(len(row) - 1 for row in rows))
        if not self._crop(start):
            self._forget()
            start = 0
        if len(rows) > 1:
            lengths = {len(row) for row in rows}
            if len(lengths) > 1 and not _may_pad_within(model):
                self.reused = 0
                return ids, keep.long(), None
            common = min(_shared(model, (rows[0], media[0]), (rows[b], media[b])) for b in range(1, len(rows)))
            common = min(common, min(lengths) - 1)
            if common - start >= MIN_SHARED_POSITIONS:
                self._read(model, rows[0][:common], media[0], vision_tokens, media_mask)
                start = len(self._ids)
        self.reused = start
        if not start:
            return ids, keep.long(), None
        rest, is_valid = pad_left([row[start:] for row in rows], model.config.pad_token_id or 0)
        padded = torch.cat([rows[0][:start].expand(len(rows), -1), rest], dim=1)
        there = torch.cat([torch.ones_like(padded[:, :start]), is_valid], dim=1)
        if len(rows) == 1:
            return padded, there, self._cache
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        return padded, there, cache

    def end(
        self, model: VLM, sequences: Tensor, cache: Any, vision_tokens: Tensor | None, media_mask: Tensor | None
    ) -> None:
        """Keep what one row read and wrote.

        Args:
            model: the VLM.
            sequences: int[B, L + new], prompts without padding where B is 1, and answers.
            cache: of the language model.
            vision_tokens, media_mask: as for `begin`.
        """
        if len(sequences) > 1:
            return
        if not _is_plain(cache):
            self._forget()
            return
        self._ids, self._cache = sequences[0, : cache.get_seq_length()], cache
        self._media = _media_of_rows(1, vision_tokens, media_mask)[0]

    def _forget(self) -> None:
        self._ids, self._media, self._cache = self._ids[:0], [], None

    def _crop(self, length: int) -> bool:
        """Shorten the cache to so many positions, if it can be."""
        if self._cache is None or not length:
            return False
        surplus = self._cache.get_seq_length() - length
        if surplus and not all(
            type(layer) is DynamicLayer or layer.get_seq_length() < layer.sliding_window for layer in self._cache.layers
        ):
            return False
        if surplus:
            self._cache.crop(-surplus)
        self._ids = self._ids[:length]
        return True

    def _read(
        self, model: VLM, ids: Tensor, media: list[Tensor], vision_tokens: Tensor | None, media_mask: Tensor | None
    ) -> None:
        """Read the rest of a beginning that several rows share, as the first of them has it."""
        start = len(self._ids)
        inputs: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        if vision_tokens is not None and media_mask is not None:
            inputs |= {"media": model.project_media(vision_tokens[:1], media_mask[:1]), "media_mask": media_mask[:1]}
        positions = count_media(ids, model.config.media_token_id)
        cache = self._cache if start else None
        self._forget()  # whatever happens now, it holds no less than it says
        output = model(
            lang_x=ids[None, start:],
            attention_mask=torch.ones_like(ids)[None],
            media_counts=positions[None, start:],
            past_key_values=cache,
            **inputs,
        )
        cache = model.cache_of(output)
        if _is_plain(cache):
            self._ids, self._media, self._cache = ids, media, cache


def _media_of_rows(num_rows: int, vision_tokens: Tensor | None, media_mask: Tensor | None) -> list[list[Tensor]]:
    """The vision tokens of each medium of each row, float[n, d], without padding."""
    if vision_tokens is None or media_mask is None:
        return [[] for _ in range(num_rows)]
    return [
        [x[m] for x, m in zip(row, mask, strict=True) if m.any()]
        for row, mask in zip(vision_tokens, media_mask, strict=True)
    ]


def _shared(model: VLM, a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> int:
    """Positions at which two prompts begin alike; a medium is alike with all its tokens."""
    (ids, media), (other_ids, other_media) = a, b
    length = min(len(ids), len(other_ids))
    same = (ids[:length] == other_ids[:length]).cumprod(0)
    alike = 0  # positions of the media that are alike
    for x, y in zip(media, other_media, strict=False):
        if not torch.equal(x, y):
            break
        alike += model.num_positions_of(x)
    known = count_media(ids[:length], model.config.media_token_id) <= alike
    return int((same * known).cumprod(0).sum())


def _is_plain(cache: Any) -> bool:
    """Whether all of a cache is keys and values by position, from which the last can be taken away."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _may_pad_within(model: VLM) -> bool:
    """Whether padding may stand between a beginning and what follows: positions are then told, not counted."""
    return (
        model.lang_model.config.model_type not in NO_LEFT_PADDING and "position_ids" in model._language_model_arguments
    )
