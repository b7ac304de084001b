"""Checks of decoding: with a cache, greedily, in a padded batch, and after a prompt that is read in chunks.

B rows, T tokens, V columns of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_cli.doctor.check import check
from vlm_cli.doctor.compare import compare, largest_difference, scale_of
from vlm_cli.doctor.finding import Decided, Measured
from vlm_cli.doctor.subject import NUM_DECODED, Decoded, Inputs, Subject

__all__ = ["cached", "chunked_prefill", "greedy", "padded"]

_PADDED_PIXEL = 1e4  # a value that shows in the logits if a model looks at padding


@check(
    "cached", "Decoding with a cache gives the logits of the full pass", "decoding with a cache = full pass", quick=True
)
def cached(subject: Subject) -> Measured:
    """Compare each decoded token's logits with one pass over the prompt and the answer; the twin has other images."""
    inputs = subject.draw(2)
    decoded = subject.generate(**inputs.to_dict())
    steps = decoded.logits[0]
    full = _full_pass(subject, inputs, decoded)
    changed = _full_pass(subject, inputs.with_other_media(), decoded)
    return Measured(largest_difference(steps, full), scale_of(full), twin=largest_difference(steps, changed))


@check(
    "greedy", "Greedy decoding takes the token that the full pass puts first", "greedy token = first of the full pass"
)
def greedy(subject: Subject) -> Measured:
    """Compare the logit of each chosen token with the highest logit; the twin compares the second highest with it."""
    inputs = subject.draw(2, seed=1)
    decoded = subject.generate(**inputs.to_dict())
    full = _full_pass(subject, inputs, decoded)
    full[:, subject.forbidden_ids] = -torch.inf
    best, second = full.topk(2, dim=-1).values.T
    chosen = full.gather(-1, decoded.sequences[0, inputs.lang_x.shape[1] :, None])[:, 0]
    return compare(chosen, best, changed=second)


@check(
    "padded",
    "A row of a left-padded batch, read and decoded, gives the logits of that row alone",
    "a left-padded row = the row alone",
)
def padded(subject: Subject) -> Measured:
    """Compare three rows of 10, 9 and 11 tokens in one batch with each row alone; the twin has other images."""
    rows = [subject.draw(n, 9 + n, seed=n) for n in (1, 0, 2)]
    difference, scale, twin = 0.0, 0.0, math.inf
    for row, (found, sequence) in zip(rows, _read_and_decode(subject, rows), strict=True):
        whole = row.continued(sequence)
        alone, changed = subject.logits(whole)[:-1], subject.logits(whole.with_other_media())[:-1]
        difference = max(difference, largest_difference(found, alone))
        scale = max(scale, scale_of(alone))
        if row.vision_x is not None:
            twin = min(twin, largest_difference(found, changed))
    return Measured(difference, scale, twin)


@check(
    "chunked-prefill",
    "A prompt that is read in chunks gives the logits of the prompt read at once",
    "a prompt in chunks = read at once",
)
def chunked_prefill(subject: Subject) -> Measured | Decided:
    """Compare a prompt read in chunks of 3, 4 and the remaining positions; the twin has other images."""
    if subject.model.sees_ahead != "nothing":
        return Decided("skipped", _IN_ONE_CALL[subject.model.sees_ahead])
    inputs = subject.draw(2, 11)
    whole, found = _read_in_chunks(subject, inputs), _read_in_chunks(subject, inputs, 3, 4)
    return Measured(
        largest_difference(found, whole),
        scale_of(whole),
        twin=largest_difference(_read_in_chunks(subject, inputs.with_other_media(), 3, 4), whole),
    )


_IN_ONE_CALL = {
    "media": "with fusion.mask=image, the language model reads each picture in one call",
    "prompt": "with fusion.mask=prefix, the language model reads each prompt in one call",
}


def _full_pass(subject: Subject, inputs: Inputs, decoded: Decoded) -> Tensor:
    """Return float[NUM_DECODED, V], the logits of the decoded tokens in one pass without a cache."""
    return subject.logits(inputs.continued(decoded.sequences))[-NUM_DECODED - 1 : -1]


def _read_and_decode(subject: Subject, rows: Sequence[Inputs]) -> list[tuple[Tensor, Tensor]]:
    """Read and decode rows as one batch.

    Returns:
        For each row without its padding, float[T + NUM_DECODED - 1, V] and int[1, T + NUM_DECODED].
    """
    batch = _left_padded(rows, subject.pad_token_id)
    read = subject.call(**batch).logits
    decoded = subject.generate(**batch)
    lengths = [row.lang_x.shape[1] for row in rows]
    return [
        (
            torch.cat([read[i, -n:], decoded.logits[i, 1:]]),
            decoded.sequences[i : i + 1, -n - NUM_DECODED :],
        )
        for i, n in enumerate(lengths)
    ]


def _left_padded(rows: Sequence[Inputs], pad_token_id: int) -> dict[str, Any]:
    """Return the batch as arguments of `VLM.forward`, padded left; media are padded right.

    Example: rows of 2 and 3 tokens and 1 and 0 media give lang_x [[pad, a, b], [c, d, e]] and vision_mask [[1], [0]].
    """
    lengths = [row.lang_x.shape[1] for row in rows]
    media = [row.vision_x for row in rows if row.vision_x is not None]
    lang_x = rows[0].lang_x.new_full((len(rows), max(lengths)), pad_token_id)
    attention_mask = torch.zeros_like(lang_x)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        lang_x[i, -length:], attention_mask[i, -length:] = row.lang_x[0], 1
    batch = {"lang_x": lang_x, "attention_mask": attention_mask}
    if media:
        most = max(x.shape[1] for x in media)
        vision_x = media[0].new_full((len(rows), most, *media[0].shape[2:]), _PADDED_PIXEL)
        vision_mask = lang_x.new_zeros((len(rows), most, vision_x.shape[2]), dtype=torch.bool)
        vision_grid = lang_x.new_zeros((len(rows), most, 4))
        for i, row in enumerate(rows):
            if row.vision_x is not None:
                there = slice(row.vision_x.shape[1])
                vision_x[i, there] = row.vision_x[0]
                vision_mask[i, there] = row.media.get("vision_mask", torch.tensor(True))
                vision_grid[i, there] = row.media.get("vision_grid", torch.tensor(0))
        batch |= {"vision_x": vision_x, "vision_mask": vision_mask, "vision_grid": vision_grid}
    return batch


@torch.no_grad()
def _read_in_chunks(subject: Subject, inputs: Inputs, *lengths: int) -> Tensor:
    """Return float[positions, V] of a prompt that is read in chunks of these lengths, and then the rest.

    Raises:
        ValueError: if the language model returns no cache.
    """
    model, ids = subject.model, inputs.lang_x
    keywords: dict[str, Any] = {}
    if inputs.vision_x is not None:
        tokens, mask = model.encode_vision(**inputs.media)
        keywords = {"media": model.project_media(tokens, mask), "media_mask": mask}
        grid = inputs.media.get("vision_grid")
        with model.conditioned(inputs.lang_x, tokens, media_mask=mask, vision_grid=grid) as expanded:
            ids = expanded["input_ids"]
    media_counts = (ids == model.config.media_token_id).cumsum(-1)
    found: list[Tensor] = []
    cache, start = None, 0
    for length in (*lengths, ids.shape[1] - sum(lengths)):
        part = slice(start, start + length)
        output = subject.call(
            ids[:, part],
            torch.ones_like(ids[:, : part.stop]),
            media_counts=media_counts[:, part],
            position_ids=torch.arange(start, part.stop, device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            **keywords,
        )
        found.append(output.logits[0])
        if lengths:
            cache, start = model.lm_interface.cache_in(output), part.stop
            if cache is None:
                raise ValueError("it returns no cache")
    return torch.cat(found)
