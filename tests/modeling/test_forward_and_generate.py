"""`forward` and `generate`: text alone, with a cache, in a batch, and by each way to call them.

Section numbers are those of the invariants in docs/architecture.md. `tests/support/invariants.py` holds the checks that
other tests repeat on other models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

from tests.support import reference, tiny
from tests.support.grid import first_of, grid
from tests.support.invariants import (
    NO_CHUNKED_GENERATE,
    bare,
    bare_logits,
    cache_of,
    check_against_bare,
    check_cached,
    check_chunked_prefill,
    check_continued_cache,
    check_rows,
    check_text_only,
    differs,
    language_model_name,
    logits,
    opened,
    same,
)
from tests.support.tiny import IMAGE, STOP, VOCABULARY
from vlm_cli.modeling.vlm import VLM

each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


# -- 1: a prompt without media gives the bare language model's logits --------------------------------------------------


@pytest.mark.sample(2)
def test_text_only_is_the_bare_language_model(model_of_each):
    check_text_only(model_of_each)


# -- 2: closed gates, and vision tokens among text, are the bare language model fed the same embeddings ----------------


@pytest.mark.sample(2)
def test_closed_gates_or_spliced_media_are_the_bare_language_model(model_of_each):
    check_against_bare(model_of_each)


def test_a_new_model_starts_with_closed_gates():
    model = tiny.build()
    row = tiny.row(model, 2)
    assert torch.equal(logits(model, **row.inputs())[0, :, :VOCABULARY], bare_logits(model, row))


# -- 3: cached decoding equals the full pass; chunked prefill equals whole ---------------------------------------------


@pytest.mark.sample(2)
def test_cached_decoding_equals_the_full_pass(model_of_each):
    check_cached(model_of_each)


@pytest.mark.sample(2)
def test_forward_continues_a_cache(model):
    check_continued_cache(model)


@pytest.mark.sample(2)
@pytest.mark.parametrize("language_model", ["gpt2", "llama", "bloom", "mamba2", "falcon_h1"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_second_turn_may_bring_its_own_image(language_model, with_mask):
    model = opened(fusion="language-stream", language_model=language_model)
    row, other = tiny.row(model, 3, 10), tiny.row(model, 3, 10, seed=1)
    first, second = slice(4), slice(4, None)

    def second_turn(row: tiny.Row) -> Tensor:
        output = model(vision_x=row.vision_x[:, :2], lang_x=row.lang_x[:, first], use_cache=True)
        # Both images of the first turn have taken three positions.
        mask = torch.ones(1, 4 + 2 * 2 + 6, dtype=torch.long) if with_mask else None
        inputs = {"vision_x": row.vision_x[:, 2:], "lang_x": row.lang_x[:, second], "attention_mask": mask}
        return logits(model, **inputs, past_key_values=cache_of(output))

    expected = logits(model, **row.inputs())[:, second]
    same(second_turn(row), expected)
    assert differs(second_turn(tiny.Row(other.vision_x, row.lang_x)), expected)


@pytest.mark.sample(2)
def test_chunked_prefill_equals_whole(model):
    if reason := NO_CHUNKED_GENERATE.get(language_model_name(model)):
        pytest.skip(reason)
    check_chunked_prefill(model)


WAYS = {"num_beams": 1, "use_cache": False, "cache_implementation": "static", "prompt_lookup_num_tokens": 2}


@pytest.mark.sample(2)
@grid(fusion=tiny.FUSIONS, option=WAYS)
def test_ways_to_decode_agree_with_a_loop(fusion, option):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    found = model.generate(**row.inputs(), max_new_tokens=6, do_sample=False, **{option: WAYS[option]})
    expected = reference.greedy(lambda ids: logits(model, vision_x=row.vision_x, lang_x=ids), row.lang_x, 6, IMAGE)
    assert torch.equal(found, expected)
    other = reference.greedy(lambda ids: logits(model, vision_x=-row.vision_x, lang_x=ids), row.lang_x, 6, IMAGE)
    assert not torch.equal(found, other)


# -- 4: a row does not depend on its batch mates, nor on padding -------------------------------------------------------


@pytest.mark.sample(2)
def test_a_row_does_not_depend_on_its_batch(model):
    check_rows(model)


@pytest.mark.sample(2)
@each_fusion
def test_media_that_no_mask_hides_are_noticed(fusion):
    """The twin of the padding above."""
    model = opened(fusion=fusion)
    one, two = tiny.row(model, 1, 7), tiny.row(model, 2, 7)
    batch = tiny.collate([one, two], garbage=1.0)
    batch["vision_mask"][0, 1] = True
    with pytest.raises(ValueError, match="row 0 of lang_x has 1 media tokens, but vision_x has 2"):
        model(**batch)


# -- 5: decoding a batch agrees with one row at a time -----------------------------------------------------------------


@pytest.mark.sample(2)
@grid(fusion=tiny.FUSIONS, language_model=["gpt2", "llama", "mpt", "mamba2", "falcon_h1"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generating_a_batch_agrees_with_one_row_at_a_time(fusion, language_model, num_beams):
    model = opened(fusion=fusion, language_model=language_model)
    rows = tiny.rows(model)
    options = {"max_new_tokens": 4, "num_beams": num_beams, "num_return_sequences": min(num_beams, 2)}
    batch = tiny.collate(rows)
    together = model.generate(**batch, do_sample=False, **options)[:, -4:]
    alone = torch.cat([model.generate(**row.inputs(), do_sample=False, **options)[:, -4:] for row in rows])
    assert torch.equal(together, alone)
    batch["vision_x"] = 3 - batch["vision_x"]
    assert not torch.equal(model.generate(**batch, do_sample=False, **options)[:, -4:], alone)


@pytest.mark.sample(2)
@each_fusion
def test_sampling_returns_several_sequences(fusion):
    model = opened(fusion=fusion)
    batch = tiny.batch(model)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "temperature": 2.0}
    sequences = model.generate(**batch, **options)
    length = batch["lang_x"].shape[1]
    assert sequences.shape == (9, length + 5)
    assert torch.equal(sequences[:, :length], batch["lang_x"].repeat_interleave(3, dim=0))
    assert not torch.equal(sequences[0], sequences[1])


@pytest.mark.sample(2)
@each_fusion
def test_the_prompt_comes_back_as_it_was_given(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    output = model.generate(**row.inputs(), max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, :-3], row.lang_x)


@pytest.mark.sample(2)
@each_fusion
def test_a_streamer_receives_the_new_tokens(fusion):
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.pieces.append(torch.tensor([-1]))

    model, streamer = opened(fusion=fusion), Collector()
    row = tiny.row(model, 1)
    sequence = model.generate(**row.inputs(), max_new_tokens=5, do_sample=False, streamer=streamer)[0]
    prompt, *tokens, end = streamer.pieces
    assert torch.cat(tokens).tolist() == sequence[-5:].tolist() and end == -1


@pytest.mark.sample(2)
@each_fusion
def test_stop_strings_and_stop_tokens_end_a_row(fusion):
    model = opened(fusion=fusion)
    characters = Tokenizer(models.BPE({chr(33 + i): i for i in range(VOCABULARY + 2)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    row = tiny.row(model, 1)
    tokens = model.generate(**row.inputs(), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    options = {"max_new_tokens": 6, "do_sample": False}
    stop = tokens[1]
    length = row.lang_x.shape[1] + tokens.index(stop) + 1
    assert model.generate(**row.inputs(), **options, eos_token_id=stop).shape[1] == length
    options |= {"stop_strings": [chr(33 + stop)], "tokenizer": tokenizer}
    assert model.generate(**row.inputs(), **options).shape[1] == length
    options["stop_strings"] = [chr(33 + next(i for i in range(VOCABULARY) if i not in tokens))]
    assert model.generate(**row.inputs(), **options).shape[1] == row.lang_x.shape[1] + 6


@pytest.mark.sample(2)
@each_fusion
def test_the_media_token_is_never_generated(fusion):
    model = opened(fusion=fusion, language_model="llama")
    row = tiny.row(model, 1)
    hidden = []
    handle = model.lang_model.lm_head.register_forward_hook(lambda m, args, out: hidden.append(args[0]))
    logits(model, **row.inputs())
    handle.remove()
    model.added_tokens.head.weight.data[1] = 100 * hidden[0][0, -1]
    assert logits(model, **row.inputs())[0, -1].argmax() == IMAGE
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"suppress_tokens": [STOP]}):
        assert IMAGE not in model.generate(**row.inputs(), max_new_tokens=4, **options)[0, -4:]


# -- the call ----------------------------------------------------------------------------------------------------------


def test_the_fusion_chooses_the_class():
    assert [type(tiny.build(fusion=fusion)).__name__ for fusion in tiny.FUSIONS] == [
        "VLMWithCrossAttention",
        "VLMWithLanguageStream",
        "VLMWithLlamaCrossAttention",
    ]


@pytest.mark.sample(2)
@each_fusion
def test_names_of_transformers_and_short_shapes_mean_the_same(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 1)
    expected = logits(model, **row.inputs())
    for pixels in (row.vision_x[:, 0], row.vision_x[:, 0, 0]):
        assert torch.equal(logits(model, input_ids=row.lang_x, pixel_values=pixels), expected)
    found = model.generate(row.lang_x, pixel_values=row.vision_x, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, model.generate(**row.inputs(), max_new_tokens=3, do_sample=False))


@pytest.mark.sample(2)
@each_fusion
def test_loss_is_the_cross_entropy_of_the_next_token(fusion):
    model = opened(fusion=fusion)
    batch = tiny.batch(model)
    labels = batch["lang_x"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    terms = [
        -log_probabilities[b, t, labels[b, t + 1]]
        for b, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1))
        if labels[b, t + 1] >= 0
    ]
    same(output.loss, torch.stack(terms).mean())
    assert differs(model(**batch, labels=labels.roll(1, dims=1)).loss, output.loss)


@pytest.mark.sample(2)
@each_fusion
def test_the_last_logits_can_be_had_alone(fusion):
    model = opened(fusion=fusion)
    batch = tiny.batch(model)
    for keep in (2, torch.tensor([0, 3])):
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        same(logits(model, **batch, logits_to_keep=keep), logits(model, **batch)[:, kept])


def image(*shape: int) -> Tensor:
    return torch.zeros(*shape, 3, tiny.SIZE, tiny.SIZE)


@each_fusion
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lang_x": [[1, IMAGE, 2]]}, "row 0 of lang_x has 1 media tokens, but vision_x has 0"),
        ({"lang_x": [[1, 2]], "vision_x": image(1, 1, 1)}, "has 0 media tokens, but vision_x has 1"),
        ({"lang_x": [[1, IMAGE]] * 2, "vision_x": image(2, 2, 1)}, "has 1 media tokens, but vision_x has 2"),
        (
            {"lang_x": [[1, IMAGE]], "vision_x": image(1, 2, 1), "vision_mask": [[[0], [1]]]},
            "padding comes last in each row",
        ),
        ({"lang_x": [[1, IMAGE]], "vision_x": image(1, 1, 1), "vision_mask": [[1]]}, r"\(B, T_img, F\) = \(1, 1, 1\)"),
        ({"lang_x": [[1, IMAGE]], "vision_x": torch.zeros(3, 32, 32)}, r"must be \(B, T_img, F, 3, 32, 32\)"),
        ({"lang_x": [[1, IMAGE]], "vision_x": torch.zeros(1, 1, 1, 3, 32, 48)}, r"got \(1, 1, 1, 3, 32, 48\)"),
        ({"vision_x": image(1, 1, 1)}, "lang_x is missing"),
        ({"lang_x": [[1, 2]], "vision_x": image(1, 0, 1)}, "vision_x holds no media"),
    ],
    ids=[
        "no media",
        "no token",
        "too many",
        "padding first",
        "mask shape",
        "dimensions",
        "image size",
        "no text",
        "empty",
    ],
)
def test_inputs_that_do_not_fit_are_refused(fusion, inputs, message):
    model = tiny.build(fusion=fusion)
    inputs = {key: torch.tensor(x) if isinstance(x, list) else x for key, x in inputs.items()}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


@pytest.mark.sample(2)
@each_fusion
def test_whole_numbers_serve_as_a_mask(fusion):
    model = opened(fusion=fusion, tokenizer="qformer")
    batch = tiny.batch(model, frames=2)
    expected = logits(model, **batch)
    assert torch.equal(logits(model, **batch | {"vision_mask": batch["vision_mask"].long()}), expected)


# -- the language model's own door -------------------------------------------------------------------------------------


@contextmanager
def door(model: VLM, batch: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    with torch.no_grad():
        tokens, mask = model.encode_vision(batch["vision_x"], batch["vision_mask"])
    with model.conditioned(batch["lang_x"], tokens, batch["attention_mask"], mask) as inputs:
        yield inputs


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options", first_of([{"num_beams": 3}, {}, {"use_cache": False}]), ids=["beams", "greedy", "no cache"]
)
def test_the_language_model_generates_by_itself(model, options):
    batch = tiny.batch(model)
    # Here `<image>` is hidden before the softmax, and in our own `generate` after it: beam scores part if it is likely.
    row = model.added_tokens.head.weight.data[1]
    before = row.clone()
    model.added_tokens.head.weight.data[1] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True} | options
    expected = model.generate(**batch, **options)[:, -4:]
    with door(model, batch) as inputs:
        found = model.lang_model.generate(**inputs, **options)[:, -4:]
    row.copy_(before)
    assert torch.equal(found, expected)


@pytest.mark.sample(2)
@each_fusion
def test_one_block_serves_several_calls(fusion):
    model = opened(fusion=fusion)
    batch, generate = tiny.batch(model), model.lang_model.generate
    options = {"max_new_tokens": 4, "do_sample": False}
    with door(model, batch) as inputs:
        beams = generate(**inputs, **options, num_beams=3)
        greedy = generate(**inputs, **options)
        chunks = generate(**inputs, **options, prefill_chunk_size=4)
    with door(model, batch) as inputs:
        assert torch.equal(generate(**inputs, **options), greedy)
    assert torch.equal(chunks, greedy) and beams.shape == greedy.shape
    with door(model, batch | {"vision_x": 3 - batch["vision_x"]}) as inputs:
        assert not torch.equal(generate(**inputs, **options), greedy)


def test_other_rows_than_those_of_the_prompt_are_refused():
    model = tiny.build()
    message = "conditioned on 3 rows, and was called with 1"
    with door(model, tiny.batch(model)) as inputs, pytest.raises(ValueError, match=message):
        model.lang_model(inputs["input_ids"][:1])


@pytest.mark.sample(2)
@each_fusion
def test_conditioning_ends_with_its_block(fusion):
    model = opened(fusion=fusion)
    batch, ids = tiny.batch(model), torch.randint(1, VOCABULARY, (1, 6))
    with torch.no_grad():
        expected = bare(model)(ids).logits
        with pytest.raises(RuntimeError, match="in the block"), door(model, batch) as inputs:
            assert model.lang_model(**inputs).logits.shape[-1] == VOCABULARY + 2
            raise RuntimeError("in the block")
        assert torch.equal(model.lang_model(ids).logits, expected)
        handle = model.lang_model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        assert torch.equal(model.lang_model(ids).logits, expected)


def test_a_conditioned_language_model_refuses_embeddings():
    model = tiny.build()
    with door(model, tiny.batch(model)), pytest.raises(ValueError, match="takes input_ids"):
        model.lang_model(inputs_embeds=torch.zeros(3, 4, 32))
