"""A prompt whose beginning was read before: the same answer, and fewer positions computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.support import seed_torch, tiny
from tests.support.grid import grid
from tests.support.tiny import IMAGE
from vlm_cli.modeling.conditioning import count_media
from vlm_cli.modeling.prompt_cache import PromptCache, PromptRow, Reuse
from vlm_cli.modeling.vlm import VLM

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
#: Language models whose state is more than keys and values by position.
NOT_KEPT = {"mamba", "mamba2", "jamba", "zamba2", "falcon_h1", "recurrent_gemma", "rwkv", "xlstm", "openai-gpt"}


class Counter:
    """Positions that the language model read: B times the length of each call."""

    def __init__(self, model: VLM) -> None:
        self.positions = 0
        model.lang_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: Any, kwargs: Any) -> None:
        self.positions += kwargs["input_ids"].numel()

    def of(self, call: Any) -> tuple[Any, int]:
        before = self.positions
        return call(), self.positions - before


def prompt(model: VLM, media: list[int], *, texts: list[int], pool: Tensor) -> dict[str, Tensor]:
    """`texts` tokens after each of the media, which are numbers in `pool`, float[M, n, d]."""
    ids = [1]
    for k, length in zip([*media, None], texts, strict=True):
        ids += [2 + (7 * len(ids) + i) % 11 for i in range(length)] + ([IMAGE] if k is not None else [])
    inputs = {"lang_x": torch.tensor([ids])}
    if media:
        inputs |= {"vision_tokens": pool[media][None], "media_mask": torch.ones(1, len(media), pool.shape[1]).bool()}
    return inputs


@pytest.fixture(params=tiny.FUSIONS)
def model(request: pytest.FixtureRequest) -> VLM:
    return tiny.open_gates(tiny.build(fusion=request.param))


@pytest.fixture
def pool(model: VLM) -> Tensor:
    """Vision tokens of four images, float[4, n, d]."""
    seed_torch(4)
    size = model.config.vision_config["vision_cfg"]["image_size"]
    with torch.no_grad():
        return model.encode_vision(torch.randn(1, 4, 1, 3, size, size))[0][0]


def with_answer(inputs: dict[str, Tensor], answer: Tensor, more: list[int]) -> dict[str, Tensor]:
    return inputs | {"lang_x": torch.cat([answer, torch.tensor([more])], dim=1)}


@pytest.mark.sample(2)
def test_turns_of_a_chat_are_read_once(model, pool):
    counter, cache = Counter(model), PromptCache()
    inputs = prompt(model, [0], texts=[3, 4], pool=pool)
    for turn in range(3):
        plain, all_positions = counter.of(lambda inputs=inputs: model.generate(**inputs, **NEW))
        found, positions = counter.of(lambda inputs=inputs: model.generate(**inputs, **NEW, prompt_cache=cache))
        assert torch.equal(found, plain)
        assert positions == all_positions - cache.reused and (cache.reused > 0) == (turn > 0)
        inputs = with_answer(inputs, found, [IMAGE, 5, 6] if turn == 0 else [7, 8])
        if turn == 0:
            inputs |= {"vision_tokens": pool[[0, 1]][None], "media_mask": torch.ones(1, 2, pool.shape[1]).bool()}
    # All but the last token, whose turn never came, and the two of the turn.
    new, per_medium = NEW["max_new_tokens"], model.num_positions()
    assert cache.reused == found.shape[1] + 2 * (per_medium - 1) - new - 3


@pytest.mark.sample(2)
def test_what_changed_is_read_again(model, pool):
    cache = PromptCache()
    before = prompt(model, [0, 1], texts=[3, 4, 2], pool=pool)
    model.generate(**before, **NEW, prompt_cache=cache)
    other_image = prompt(model, [0, 2], texts=[3, 4, 2], pool=pool)
    other_text = before | {"lang_x": before["lang_x"].clone()}
    other_text["lang_x"][0, 2] += 1
    per_medium = model.num_positions()
    for inputs, reused in ((other_image, 1 + 3 + per_medium + 4), (other_text, 2), (before, 2)):
        found = model.generate(**inputs, **NEW, prompt_cache=cache)
        assert cache.reused == reused
        assert torch.equal(found, model.generate(**inputs, **NEW))


@pytest.mark.sample(2)
def test_a_cache_that_believed_the_text_alone_would_be_wrong(model, pool, monkeypatch):
    """The twin of the test above: with the images not compared, another answer comes out."""
    monkeypatch.setattr("vlm_cli.modeling.prompt_cache.torch.equal", lambda a, b: True)
    cache, wrong = PromptCache(), 0
    for k in range(3):
        inputs = prompt(model, [k, 3], texts=[1, 1, 6], pool=5 * pool)
        scores = [
            model.generate(**inputs, **NEW, **options, output_scores=True, return_dict_in_generate=True).scores[0]
            for options in ({}, {"prompt_cache": cache})
        ]
        wrong += bool((scores[0] - scores[1])[..., :IMAGE].abs().max() > 1e-3)
    assert wrong == 2


@torch.no_grad()
def test_text_that_reads_later_media_is_read_again():
    """With `attend_before_media`, a new image changes all positions of the row."""
    model = tiny.open_gates(tiny.build(fusion={"type": "llama-cross-attention", "attend_before_media": True}))
    seed_torch(4)
    pool, _ = model.encode_vision(torch.randn(1, 2, 1, 3, tiny.SIZE, tiny.SIZE))
    turns = [prompt(model, [0], texts=[4, 3], pool=pool[0]), prompt(model, [0, 1], texts=[4, 3, 2], pool=pool[0])]
    for reads, reused in ((True, 0), (False, 9)):
        model.reads_before_media, cache = reads, PromptCache()
        model.generate(**turns[0], prompt_cache=cache, **NEW)
        found = model.generate(**turns[1], prompt_cache=cache, **NEW)
        assert cache.reused == reused
        assert not reads or torch.equal(found, model.generate(**turns[1], **NEW))


@pytest.mark.sample(2)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 5, 3)])
def test_shots_that_rows_share_are_read_once(model, pool, lengths):
    counter, cache = Counter(model), PromptCache()
    rows = [prompt(model, [0, 1, 2 + b % 2], texts=[3, 6, 1, n], pool=pool) for b, n in enumerate(lengths)]
    longest = max(row["lang_x"].shape[1] for row in rows)
    pad = [longest - row["lang_x"].shape[1] for row in rows]
    batch = {
        "lang_x": torch.cat([torch.nn.functional.pad(r["lang_x"], (n, 0)) for r, n in zip(rows, pad, strict=True)]),
        "vision_tokens": torch.cat([row["vision_tokens"] for row in rows]),
        "media_mask": torch.cat([row["media_mask"] for row in rows]),
    }
    batch["attention_mask"] = (torch.arange(longest) >= torch.tensor(pad)[:, None]).long()
    plain, all_positions = counter.of(lambda: model.generate(**batch, **NEW))
    found, first = counter.of(lambda: model.generate(**batch, **NEW, prompt_cache=cache))
    shared = 1 + 3 + 6 + 2 * model.num_positions() + 1
    assert torch.equal(found, plain) and cache.reused == shared
    assert first == all_positions - 2 * shared  # once instead of three times
    found, second = counter.of(lambda: model.generate(**batch, **NEW, prompt_cache=cache))
    assert torch.equal(found, plain) and second == first - shared
    for b, row in enumerate(rows):
        assert torch.equal(found[b, pad[b] :], model.generate(**row, **NEW)[0])
    other = batch | {"lang_x": batch["lang_x"].clone()}
    other["lang_x"][batch["lang_x"] == 1] = 9  # another first token: nothing of before is of use
    found = model.generate(**other, **NEW, prompt_cache=cache)
    assert torch.equal(found, model.generate(**other, **NEW)) and cache.reused == shared


#: Language models with a cache of each kind.
CACHES = ("llama", "gpt2", "gemma3_text", "bloom", "mamba", "mamba2", "jamba", "falcon_h1", "zamba2")


@pytest.mark.sample(2)
@grid(language_model=tiny.LANGUAGE_MODELS, fusion=tiny.FUSIONS, quick={"language_model": CACHES})
def test_every_language_model_answers_the_same(language_model, fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    inputs = tiny.row(model, 2, 12)
    tokens, mask = model.encode_vision(inputs.vision_x)
    cache, lang_x = PromptCache(), inputs.lang_x
    for _ in range(2):
        given = {"lang_x": lang_x, "vision_tokens": tokens, "media_mask": mask}
        plain = model.generate(**given, **NEW)
        assert torch.equal(model.generate(**given, **NEW, prompt_cache=cache), plain)
        lang_x = torch.cat([plain, torch.tensor([[3, 4]])], dim=1)
    assert bool(cache.reused) == (language_model not in NOT_KEPT)


@pytest.mark.sample(2)
def test_interrupted_answers_leave_a_cache_that_is_right(model, pool):
    class Stop(Exception):
        pass

    class Streamer:
        left = 3

        def put(self, value: Any) -> None:
            self.left -= 1
            if not self.left:
                raise Stop

        def end(self) -> None: ...

    cache = PromptCache()
    inputs = prompt(model, [0], texts=[3, 4], pool=pool)
    answer = model.generate(**inputs, **NEW, prompt_cache=cache)
    longer = with_answer(inputs, answer, [4, 5, 6])
    with pytest.raises(Stop):
        model.generate(**longer, **NEW, prompt_cache=cache, streamer=Streamer())
    other = with_answer(inputs, answer, [6, 5, 4, 3])
    assert torch.equal(model.generate(**other, **NEW, prompt_cache=cache), model.generate(**other, **NEW))
    assert cache.reused


@pytest.mark.sample(2)
def test_refusals(model, pool):
    inputs = prompt(model, [0], texts=[1, 1], pool=pool)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        model.generate(**inputs, num_beams=2, prompt_cache=PromptCache())
    row = tiny.row(model, 1)
    with pytest.raises(ValueError, match="give vision_tokens"):
        model.generate(**row.inputs(), prompt_cache=PromptCache())
    text = {"lang_x": inputs["lang_x"][:, :1]}
    details = model.generate(**text, **NEW, prompt_cache=PromptCache(), return_dict_in_generate=True)
    assert torch.equal(details.sequences, model.generate(**text, **NEW))


def row_of(text: str, *media: float, num_positions: int = 3) -> PromptRow:
    """A row in which `I` is a position of a medium; each medium is told apart by one number."""
    ids = torch.tensor([IMAGE if letter == "I" else ord(letter) for letter in text])
    return PromptRow(
        ids,
        count_media(ids, IMAGE),
        [torch.full((num_positions, 4), x) for x in media],
        [num_positions] * len(media),
    )


def held(row: PromptRow) -> PromptCache:
    """A cache that has read a row."""
    keys = torch.zeros(1, 1, len(row), 4)
    kept, cache = DynamicCache(), PromptCache()
    kept.update(keys, keys, 0)
    cache.keep(row, kept)
    return cache


@pytest.mark.parametrize(
    ("before", "rows", "reuse"),
    [
        # One row: all but its last position, as far as it starts like the row that is kept.
        (row_of("abcdef"), [row_of("abcdef")], Reuse(5, 5)),
        (row_of("abcdef"), [row_of("abcdefgh")], Reuse(6, 6)),
        (row_of("abcdef"), [row_of("abcxef")], Reuse(3, 3)),
        (row_of("abcdef"), [row_of("xbcdef")], Reuse(0, 0)),
        (None, [row_of("abcdef")], Reuse(0, 0)),
        # A medium counts as a whole, and only if its vision tokens are equal.
        (row_of("aIIIbcIIId", 1, 2), [row_of("aIIIbcIIIde", 1, 2)], Reuse(10, 10)),
        (row_of("aIIIbcIIId", 1, 2), [row_of("aIIIbcIIIde", 1, 3)], Reuse(6, 6)),
        (row_of("aIIIbcIIId", 1, 2), [row_of("aIIIbcIIIde", 3, 2)], Reuse(1, 1)),
        (row_of("aIbc", 1, num_positions=1), [row_of("aIbcd", 1, num_positions=1)], Reuse(4, 4)),
        # Several rows: what all of them share is read once, if it is long enough.
        (None, [row_of("abcdefghij1"), row_of("abcdefghij23")], Reuse(0, 10)),
        (None, [row_of("abcdefg1"), row_of("abcdefg2")], Reuse(0, 0)),
        (row_of("abc"), [row_of("abcdefghijk1"), row_of("abcdefghijk2")], Reuse(3, 11)),
        (row_of("abcx"), [row_of("abcdefgh1"), row_of("abcdefgh2")], Reuse(3, 3)),
        (None, [row_of("aIIIbcdefgh1", 1), row_of("aIIIbcdefgh2", 2)], Reuse(0, 0)),
        (None, [row_of("aIIIbcdefgh1", 1), row_of("aIIIbcdefgh2", 1)], Reuse(0, 11)),
        # No row gives up its last position.
        (None, [row_of("abcdefghij"), row_of("abcdefghijk")], Reuse(0, 9)),
    ],
)
def test_what_is_reused(before, rows, reuse):
    cache = PromptCache() if before is None else held(before)
    length = cache.length
    assert cache.match(rows) == reuse
    assert cache.length == length  # comparing changes nothing
    cache.crop(reuse.cached)
    assert cache.length == reuse.cached


def test_a_full_sliding_window_is_not_cropped():
    row, cache = row_of("abcdef"), PromptCache()
    kept = DynamicCache(config=tiny.language_model_config("mistral"))  # a window of 5 positions
    for layer in range(2):
        kept.update(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), layer)
    cache.keep(row, kept)
    assert cache.match([row_of("abcdefg")]) == Reuse(6, 6)
    assert cache.match([row_of("abcdx")]) == Reuse(0, 0)
