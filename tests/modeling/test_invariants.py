"""What holds for every composition (docs/architecture.md, invariants), each beside a change that breaks it.

`check_*` are run on a covering set of compositions here, and on the whole cross product with `-m matrix`.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

from tests.support import reference, tiny
from tests.support.tiny import IMAGE, STOP, VOCABULARY, nudged
from vlm_cli.composition import FAMILIES, PARTS
from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttentionBlock
from vlm_cli.modeling.fusion.expansion import expand_media_tokens, pack_valid_tokens, scatter_media
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
from vlm_cli.modeling.fusion.visibility import MediaVisibility, attend_to_media
from vlm_cli.modeling.language_model import update_hidden_states
from vlm_cli.modeling.towers import build_tower, patch_features, tower_shape
from vlm_cli.modeling.vlm import VLM

#: Logits are of order 1 and travel through sums in another order.
TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}
#: Of a cache. Transformers' zamba2 decodes with other arithmetic than it reads with; the bare model differs as much.
#: With torch 2.9, one logit of jamba is 3.5e-5 away.
CACHE_TOLERANCE = {name: TOLERANCE for name in tiny.LANGUAGE_MODELS} | {
    "jamba": {"atol": 1e-4, "rtol": 1e-4},
    "zamba2": {"atol": 1e-2, "rtol": 1e-2},
}

#: Language models that cannot read a prompt in pieces of several tokens, whoever calls them.
NO_CHUNKS = {
    "mamba": "its cached forward takes one token at a time",
    "jamba": "its cached forward takes one token at a time",
}
#: … and by `generate(prefill_chunk_size=…)`.
NO_CHUNKED_GENERATE = NO_CHUNKS | {"mamba2": "Transformers asks its cache for a length that it does not have"}

each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


@pytest.fixture(scope="module", params=tiny.covering(), ids="+".join)
def model(request: pytest.FixtureRequest) -> VLM:
    """Each language model, encoder and tokenizer with several fusions; gates open. Tests leave it as it was."""
    return tiny.open_gates(tiny.build(*request.param))


def opened(**parts: Any) -> VLM:
    return tiny.open_gates(tiny.build(**parts))


def language_model_name(model: VLM) -> str:
    return model.config.composition.language_model.name


def bare(model: VLM) -> PreTrainedModel:
    return tiny.language_model(language_model_name(model))


@torch.no_grad()
def logits(model: VLM, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def same(ours: Tensor, theirs: Tensor, tolerance: dict[str, float] = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, **tolerance)


def differs(ours: Tensor, theirs: Tensor, tolerance: dict[str, float] = TOLERANCE) -> bool:
    return not torch.allclose(ours, theirs, **tolerance)


def swapped(vision_x: Tensor) -> Tensor:
    """The media of a row in another order."""
    return vision_x.roll(1, dims=1)


# -- 1: a prompt without media gives the bare language model's logits --------------------------------------------------


def check_text_only(model: VLM) -> None:
    ids = torch.randint(1, VOCABULARY, (2, 9))
    for inputs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with torch.no_grad():
            expected = bare(model)(ids, **inputs).logits
        assert torch.equal(logits(model, lang_x=ids, **inputs)[..., :VOCABULARY], expected)
    with nudged(model.lang_model.get_output_embeddings().weight):
        assert not torch.equal(logits(model, lang_x=ids)[..., :VOCABULARY], expected)


def test_text_only_is_the_bare_language_model(model):
    check_text_only(model)


# -- 2: closed gates, and vision tokens among text, are the bare language model fed the same embeddings ----------------


@contextmanager
def closed(model: VLM) -> Iterator[None]:
    gates = [p for name, p in model.fusion.named_parameters() if name.endswith("gate")]
    before = [gate.detach().clone() for gate in gates]
    for gate in gates:
        gate.data.zero_()
    try:
        yield
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.data.copy_(value)


@torch.no_grad()
def bare_logits(model: VLM, row: tiny.Row) -> Tensor:
    """float[T_txt, VOCABULARY] of the bare language model, from embeddings that a loop put together."""
    table, added = bare(model).get_input_embeddings(), model.added_tokens.embedding.weight
    media, image = [], -1
    if isinstance(model, VLMWithLanguageStream):
        tokens, mask = model.encode_vision(row.vision_x)
        media, image = [x[there] for x, there in zip(tokens[0], mask[0], strict=True)], IMAGE

    def embed(token: int) -> Tensor:
        return added[token - VOCABULARY] if token >= VOCABULARY else table(torch.tensor([token]))[0]

    embeddings, last = reference.splice(row.lang_x[0], image, embed, media)
    return bare(model)(inputs_embeds=embeddings[None]).logits[0, last]


def check_against_bare(model: VLM) -> None:
    row = tiny.row(model, 2, 9)
    with closed(model):
        expected = bare_logits(model, row)
        same(logits(model, **row.inputs())[0, :, :VOCABULARY], expected)
    row.vision_x = swapped(row.vision_x)
    assert differs(logits(model, **row.inputs())[0, :, :VOCABULARY], expected)


def test_closed_gates_or_spliced_media_are_the_bare_language_model(model):
    check_against_bare(model)


def test_a_new_model_starts_with_closed_gates():
    model = tiny.build()
    row = tiny.row(model, 2)
    assert torch.equal(logits(model, **row.inputs())[0, :, :VOCABULARY], bare_logits(model, row))


# -- 3: cached decoding equals the full pass; chunked prefill equals whole ---------------------------------------------


def check_cached(model: VLM, num_tokens: int = 4) -> None:
    tolerance = CACHE_TOLERANCE[language_model_name(model)]
    batch = tiny.batch(model)
    with calls(model) as lengths:
        output = generate_with_logits(model, batch, num_tokens)
    assert lengths[1:] == [1] * (num_tokens - 1)
    steps = torch.stack(output.logits, dim=1)  # [B, num_tokens, V]
    ones = torch.ones(len(steps), num_tokens, dtype=torch.long)
    batch |= {"lang_x": output.sequences, "attention_mask": torch.cat([batch["attention_mask"], ones], dim=1)}
    full = logits(model, **batch)[:, -num_tokens - 1 : -1]
    same(steps, full, tolerance)
    assert differs(steps, logits(model, **batch | {"vision_x": swapped(batch["vision_x"])})[:, -num_tokens - 1 : -1])
    full[..., IMAGE] = -torch.inf
    chosen = output.sequences[:, -num_tokens:, None]
    assert (full.gather(-1, chosen)[..., 0] >= full.amax(-1) - tolerance["atol"]).all()


def generate_with_logits(model: VLM, batch: dict[str, Any], num_tokens: int, **options: Any) -> Any:
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, max_new_tokens=num_tokens, **options)


@contextmanager
def calls(model: VLM) -> Iterator[list[int]]:
    """The number of positions in each call of the language model."""
    lengths: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    handle = model.lang_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@torch.no_grad()
def in_pieces(model: VLM, row: tiny.Row, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits of a prompt read in pieces of so many positions, and of the prompt read at once."""
    tokens, mask = model.encode_vision(row.vision_x)
    with model.conditioned(row.lang_x, tokens) as inputs:
        ids = inputs["input_ids"]
    media = {"media": model.project_media(tokens, mask), "media_mask": mask}
    positions = (ids == IMAGE).cumsum(-1)
    found, cache, start = [], None, 0
    for length in pieces:
        part = slice(start, start + length)
        output = model(
            lang_x=ids[:, part], media_counts=positions[:, part], past_key_values=cache, use_cache=True, **media
        )
        found.append(output.logits)
        cache, start = cache_of(output), start + length
    return torch.cat(found, dim=1), logits(model, lang_x=ids, media_counts=positions, **media)[:, :start]


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache, whose name depends on the language model and on the version of Transformers."""
    return next(output[key] for key in ("cache", "past_key_values", "cache_params") if key in output)


def test_cached_decoding_equals_the_full_pass(model):
    check_cached(model)


def test_forward_continues_a_cache(model):
    row = tiny.row(model, 2, 9)
    name = language_model_name(model)
    tolerance = CACHE_TOLERANCE[name]
    for pieces in ([3, 1, 1, 1, 1], *([] if name in NO_CHUNKS else [[3, 4, 2]])):
        found, whole = in_pieces(model, row, pieces)
        same(found, whole, tolerance)
    row.vision_x = swapped(row.vision_x)
    assert differs(in_pieces(model, row, [3, 1, 1, 1, 1])[0], whole[:, :7])


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


def test_chunked_prefill_equals_whole(model):
    if reason := NO_CHUNKED_GENERATE.get(language_model_name(model)):
        pytest.skip(reason)
    batch = tiny.batch(model)
    whole = generate_with_logits(model, batch, 3)
    with calls(model) as lengths:
        chunks = generate_with_logits(model, batch, 3, prefill_chunk_size=4)
    assert lengths[:2] == [4, 4]
    tolerance = CACHE_TOLERANCE[language_model_name(model)]
    same(torch.stack(chunks.logits), torch.stack(whole.logits), tolerance)


@each_fusion
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_decode_agree_with_a_loop(fusion, options):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    found = model.generate(**row.inputs(), max_new_tokens=6, do_sample=False, **options)
    expected = reference.greedy(lambda ids: logits(model, vision_x=row.vision_x, lang_x=ids), row.lang_x, 6, IMAGE)
    assert torch.equal(found, expected)
    other = reference.greedy(lambda ids: logits(model, vision_x=-row.vision_x, lang_x=ids), row.lang_x, 6, IMAGE)
    assert not torch.equal(found, other)


# -- 4: a row does not depend on its batch mates, nor on padding -------------------------------------------------------


def check_rows(model: VLM) -> None:
    rows = tiny.rows(model)
    alone = [logits(model, **row.inputs())[0] for row in rows]
    for side in ("left", "right"):
        batch = tiny.collate(rows, side, garbage=1e4)
        together = logits(model, **batch)
        there = batch["attention_mask"].bool()
        for i, expected in enumerate(alone):
            same(together[i][there[i]], expected)
    batch["vision_x"][2] = swapped(batch["vision_x"])[2]
    other = logits(model, **batch)
    assert torch.equal(other[:2], together[:2]) and differs(other[2], together[2])


def test_a_row_does_not_depend_on_its_batch(model):
    check_rows(model)


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


@each_fusion
@pytest.mark.parametrize("language_model", ["gpt2", "llama", "mpt", "mamba2", "falcon_h1"])
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


@each_fusion
def test_the_prompt_comes_back_as_it_was_given(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    output = model.generate(**row.inputs(), max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, :-3], row.lang_x)


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


# -- 6: save, load, copy -----------------------------------------------------------------------------------------------


def check_state(model: VLM) -> None:
    """A model that is built anew from the configuration and the tensors gives the same logits."""
    state = model.state_dict()
    theirs = {f"lang_model.{name}" for name in bare(model).state_dict()}
    assert {name for name in state if name.startswith("lang_model.")} == theirs
    again = VLM(model.config).eval()
    batch = tiny.batch(model)
    expected = logits(model, **batch)
    assert not torch.equal(logits(again, **batch), expected)
    again.load_state_dict(state)
    assert type(again) is type(model) and torch.equal(logits(again, **batch), expected)


def test_saved_and_loaded_models_are_equal(model, tmp_path):
    model.save_pretrained(tmp_path / "vlm", max_shard_size="100KB")
    bare(model).save_pretrained(tmp_path / "lm")
    names = json.loads((tmp_path / "vlm" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / "lm" / "model.safetensors", "pt") as file:
        published = {f"lang_model.{name}" for name in file.keys()}
    assert {name for name in names if name.startswith("lang_model.")} == published
    assert len(set(names.values())) > 1

    loaded, report = VLM.from_pretrained(tmp_path / "vlm", output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model) and trained(loaded) == trained(model)
    # Tensors begin at any byte of a file, and the last bit of a convolution depends on that; a copy is aligned.
    loaded, batch = copy.deepcopy(loaded).eval(), tiny.batch(model)
    expected = logits(model, **batch)
    assert torch.equal(logits(loaded, **batch), expected)
    with nudged(next(loaded.vision_tokenizer.parameters())):
        assert not torch.equal(logits(loaded, **batch), expected)


def trained(model: VLM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_in_memory_is_rebuilt_from_its_tensors():
    check_state(opened())


@each_fusion
def test_hooks_follow_a_copy(fusion):
    model = opened(fusion=fusion)
    batch = tiny.batch(model)
    expected = logits(model, **batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, **batch), expected)
    tiny.stir(twin.added_tokens, 1.0)
    tiny.stir(twin.fusion, 1.0)
    assert differs(logits(twin, **batch), expected)
    assert torch.equal(logits(model, **batch), expected)


# -- 7: exactly the declared parameters train --------------------------------------------------------------------------


@contextmanager
def training(model: VLM, parts: Sequence[str]) -> Iterator[None]:
    model.set_trainable(parts)
    try:
        yield
    finally:
        model.zero_grad()
        model.set_trainable(model.config.composition.trainable)


def gradients(model: VLM) -> dict[str, Tensor]:
    batch = tiny.batch(model)
    labels = batch["lang_x"].masked_fill((batch["attention_mask"] == 0) | (batch["lang_x"] == IMAGE), -100)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def part_of(name: str) -> str:
    return name.partition(".")[0].replace("lang_model", "language_model")


def check_gradients(model: VLM, *choices: Sequence[str]) -> None:
    with training(model, PARTS):
        everything = gradients(model)
        model.zero_grad()
        patch_features(model.vision_encoder.visual, tiny.batch(model)["vision_x"].flatten(0, 2)).sum().backward()
        # Pooling and projection of the tower are not used.
        idle = {name for name, p in model.vision_encoder.named_parameters(prefix="vision_encoder") if p.grad is None}
    assert set(everything) == {name for name, _ in model.named_parameters()} - idle
    for parts in choices:
        with training(model, parts):
            found = gradients(model)
        assert set(found) == {name for name in everything if part_of(name) in parts}
        assert {name for name, grad in found.items() if not grad.any()} == set()


def test_exactly_the_declared_parameters_train(model):
    families = {tuple(family["trainable"]) for family in FAMILIES.values()}
    has_fusion = bool(list(model.fusion.parameters()))
    single = [(part,) for part in PARTS if part != "fusion" or has_fusion]
    check_gradients(model, *families, *single)


def test_closed_gates_train_first():
    """The twin of the test above: behind a closed gate, a gradient is zero."""
    model = tiny.build()
    found = gradients(model)
    assert all(grad.any() for name, grad in found.items() if name.endswith("gate"))
    assert not any(grad.any() for name, grad in found.items() if name.startswith("vision_tokenizer"))


@pytest.mark.parametrize("also", [(), ("language_model",)], ids=["frozen language model", "trained language model"])
def test_gradient_checkpointing_gives_the_same_gradients(model, also):
    with training(model, [*model.config.composition.trainable, *also]):
        model.train()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        with block_calls(model) as runs:
            found = gradients(model)
        model.gradient_checkpointing_disable()
        model.eval()
    assert len(runs) == 2 * sum(isinstance(x, GatedCrossAttentionBlock) for x in model.fusion.modules())
    assert set(found) == set(expected)
    for name, grad in found.items():
        same(grad, expected[name])


def test_gradient_checkpointing_may_repeat_the_hooks_of_a_layer(monkeypatch):
    """Remote code, and Transformers before 5.23, checkpoint a layer together with its hooks."""
    model = opened(fusion="cross-attention", language_model="llama")
    with training(model, model.config.composition.trainable):
        model.train()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        layers = model.lang_model.model.layers
        for layer in layers:
            layer.gradient_checkpointing = False  # the layer's own way

        def call(layer, *args, **kwargs):
            return layer._gradient_checkpointing_func(partial(nn.Module.__call__, layer, **kwargs), *args)

        monkeypatch.setattr(type(layers[0]), "__call__", call)
        with block_calls(model) as runs:
            found = gradients(model)
        assert len(runs) == 2 * len(model.fusion.blocks)
        # A copy checkpoints with its own conditioning.
        assert set(gradients(copy.deepcopy(model))) == set(expected)
    assert set(found) == set(expected)
    for name, grad in found.items():
        same(grad, expected[name])


@contextmanager
def block_calls(model: VLM) -> Iterator[list[int]]:
    """One entry for each time that a cross-attention block ran."""
    runs: list[int] = []
    blocks = [x for x in model.fusion.modules() if isinstance(x, GatedCrossAttentionBlock)]
    handles = [block.ff.register_forward_hook(lambda *_: runs.append(1)) for block in blocks]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def test_statistics_move_only_in_an_encoder_that_trains():
    model = opened(vision="resnet")
    vision_x = tiny.batch(model)["vision_x"]
    trained_encoder = copy.deepcopy(model.vision_encoder).requires_grad_(True).train()
    for encoder, moves in ((model.train().vision_encoder, False), (trained_encoder, True)):
        before = [x.clone() for x in encoder.buffers()]
        encoder(vision_x)
        assert any(differs(x, y) for x, y in zip(encoder.buffers(), before, strict=True)) is moves


def test_unknown_parts_do_not_train():
    with pytest.raises(ValueError, match=r"unknown parts \['head'\]\. Known: vision_encoder, "):
        tiny.build().set_trainable(["head"])


def test_weight_decay_falls_on_the_named_parts():
    model = tiny.build(weight_decay=0.1, weight_decay_on=["fusion"])
    decayed, others = model.parameter_groups()
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.fusion.parameters()}
    assert {id(p) for p in others["params"]} == {
        id(p) for part in (model.vision_tokenizer, model.added_tokens) for p in part.parameters()
    }


# -- 8: tied weights are one tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language_model", ["llama", "llama-tied"])
def test_tied_weights_are_counted_and_saved_once(language_model, tmp_path):
    model = tiny.build(language_model=language_model)
    lm, is_tied = model.lang_model, language_model == "llama-tied"
    assert sum(p.numel() for p in lm.parameters()) == sum(p.numel() for p in bare(model).parameters())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lang_model.lm_head.weight" in names) is not is_tied
    loaded = VLM.from_pretrained(tmp_path).lang_model
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is is_tied
    assert (
        len(dict(loaded.named_parameters()))
        == len(dict(lm.named_parameters()))
        == len([name for name in names if name.startswith("lang_model.")])
    )


# -- 9: the k-th image lands at the k-th placeholder -------------------------------------------------------------------


def test_each_image_is_first_seen_at_its_placeholder(model):
    row = tiny.row(model, 3, 9)
    expected = logits(model, **row.inputs())[0]
    for k, start in enumerate((row.lang_x[0] == IMAGE).nonzero().flatten().tolist()):
        vision_x = row.vision_x.clone()
        vision_x[:, k] = vision_x[:, k].flip(-1) + 0.5
        found = logits(model, vision_x=vision_x, lang_x=row.lang_x)[0]
        assert not differs(found[:start], expected[:start]) and differs(found[start], expected[start])


@each_fusion
def test_swapping_two_images_swaps_two_rows(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    both = tiny.Row(torch.cat([row.vision_x, swapped(row.vision_x)]), row.lang_x.expand(2, -1))
    one, other = logits(model, **both.inputs())
    again, first = logits(model, vision_x=swapped(both.vision_x), lang_x=both.lang_x)
    same(torch.stack([one, other]), torch.stack([first, again]))
    assert differs(one, other)


@each_fusion
def test_generated_tokens_follow_the_order_of_images(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    ordered = generate_with_logits(model, row.inputs(), 2).logits[1]
    changed = generate_with_logits(model, {"vision_x": swapped(row.vision_x), "lang_x": row.lang_x}, 2).logits[1]
    assert differs(ordered, changed)


# -- 10: frames --------------------------------------------------------------------------------------------------------

TOKENIZERS_WITH_FRAMES: dict[str, tiny.Settings] = {
    **tiny.TOKENIZERS,
    "perceiver-frames": {"type": "perceiver", "max_num_frames": 4, "max_num_media": 3},
    "linear-mean": {"type": "linear", "frames": "mean"},
    "mlp-mean": {"type": "mlp", "frames": "mean"},
}


def video_model(tokenizer: str, fusion: str = "cross-attention") -> VLM:
    return opened(fusion=fusion, tokenizer=TOKENIZERS_WITH_FRAMES[tokenizer])


@each_fusion
@pytest.mark.parametrize("tokenizer", TOKENIZERS_WITH_FRAMES)
def test_padding_frames_never_leak(tokenizer, fusion):
    model = video_model(tokenizer, fusion)
    rows = [tiny.row(model, n, 7 + n, frames=frames, seed=n) for n, frames in ((1, 2), (2, 3), (0, 1), (2, 1))]
    batch = tiny.collate(rows, garbage=1e4)
    together = logits(model, **batch)
    for i, row in enumerate(rows):
        there = batch["attention_mask"][i].bool()
        same(together[i][there], logits(model, **row.inputs())[0])
    batch["vision_mask"][0, 0, 2] = True
    assert differs(logits(model, **batch)[0], together[0])


@pytest.mark.parametrize("tokenizer", TOKENIZERS_WITH_FRAMES)
def test_tokens_of_ragged_videos_match_a_loop(tokenizer):
    model = video_model(tokenizer)
    module = model.vision_tokenizer
    mask = torch.tensor([[[True, True, False], [True, True, True]], [[True, False, False], [False, False, False]]])
    features = torch.randn(*mask.shape, model.config.vision_config["num_patches"], model.config.vision_config["dim"])
    with torch.no_grad():
        found, there = module(features, mask), module.token_mask(mask)
        if tokenizer.startswith("perceiver"):
            expected = reference.perceiver(module, features, mask)
        elif tokenizer == "qformer":
            expected = reference.qformer(module, features, mask, num_heads=2, every=2)
        else:
            media = reference.projection(module, features, mask)
            same(found[there], torch.cat([tokens for row in media for tokens in row]))
            assert [[len(tokens) for tokens in row] for row in media] == [
                [x for x in r if x] for r in there.sum(-1).tolist()
            ]
            return
    assert torch.equal(there, mask.any(-1, keepdim=True).expand_as(there))
    same(found[there], expected[there])
    with nudged(next(module.parameters())):
        assert differs(module(features, mask)[there], expected[there])


@pytest.mark.parametrize(("tokenizer", "sees_order"), [("perceiver", False), ("perceiver-frames", True)])
def test_frame_embeddings_tell_frames_apart(tokenizer, sees_order):
    model = video_model(tokenizer)
    video = tiny.row(model, 1, frames=3).vision_x
    with torch.no_grad():
        forward, backward = model.encode_vision(video)[0], model.encode_vision(video.flip(2))[0]
    assert differs(forward, backward) is sees_order


@pytest.mark.parametrize(("media", "frames", "kind"), [(1, 5, "5 frames"), (4, 1, "4 media")])
def test_more_frames_or_media_than_embeddings_are_refused(media, frames, kind):
    model = video_model("perceiver-frames")
    with pytest.raises(ValueError, match=f"got {kind}, but the resampler was made for at most"):
        model.encode_vision(torch.zeros(1, media, frames, 3, tiny.SIZE, tiny.SIZE))


def test_the_mean_of_frames_has_the_tokens_of_one():
    concatenated, mean = video_model("linear"), video_model("linear-mean")
    video = tiny.row(mean, 1, frames=3).vision_x
    with torch.no_grad():
        found, frames = mean.encode_vision(video)[0], concatenated.encode_vision(video)[0]
    same(found, frames.unflatten(2, (3, -1)).mean(2))
    assert (
        (found.shape[2], frames.shape[2])
        == (4, 12)
        == (
            mean.vision_tokenizer.num_tokens(3),
            concatenated.vision_tokenizer.num_tokens(3),
        )
    )


@each_fusion
def test_a_video_is_one_medium_in_generation(fusion):
    model = video_model("linear", fusion)
    rows = [tiny.row(model, 1, 6, frames=3), tiny.row(model, 2, 8, frames=1)]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [model.generate(**row.inputs(), **options)[0, -4:].tolist() for row in rows]
    assert model.generate(**tiny.collate(rows), **options)[:, -4:].tolist() == alone


# -- the parts against slow loops --------------------------------------------------------------------------------------


def attending(**settings: Any) -> VLM:
    return opened(fusion={"type": "cross-attention"} | settings)


@pytest.mark.parametrize("attend", ["last", "all"])
@pytest.mark.parametrize(("feed_forward_before_media", "activation"), [(True, "squared_relu"), (False, "gelu")])
def test_cross_attention_matches_a_loop(attend, feed_forward_before_media, activation):
    settings = {
        "attend": attend,
        "feed_forward_before_media": feed_forward_before_media,
        "activation": activation,
    }
    fusion = attending(**settings).fusion
    block = fusion.blocks["1"]
    x, tokens = torch.randn(3, 6, 32), torch.randn(3, 3, 2, 32)
    positions = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = (torch.arange(3) < positions[:, -1:])[..., None].repeat(1, 1, 2)
    mask[0, 1, 1] = False

    def ours(mask: Tensor) -> Tensor:
        keys_values = fusion.project(tokens)[:, 1]
        return block(x, keys_values, fusion.visibility(positions, mask))

    with torch.no_grad():
        expected = reference.cross_attend(block, x, tokens, mask, positions, **settings)
        same(ours(mask), expected)
        mask[0, 1, 1] = True
        assert differs(ours(mask), expected)
        mask[0, 1, 1] = False
        with nudged(block.attn.to_kv.weight):
            assert differs(ours(mask), expected)


@pytest.mark.parametrize(
    ("settings", "numbers"), [({}, ["0", "1"]), ({"every": 2}, ["1"]), ({"every": 2, "first": 0}, ["0"])]
)
def test_blocks_stand_before_their_layers(settings, numbers):
    model = attending(**settings)
    assert list(model.fusion.blocks) == numbers
    row, seen = tiny.row(model, 2), {}
    for i, layer in enumerate(model.lang_model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.update({f"into {i}": args[0]}))
        layer.register_forward_hook(lambda m, args, out, i=i: seen.update({f"out of {i}": out}))
    model.lang_model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.update({"embedded": out}))
    with torch.no_grad():
        model(**row.inputs())
        tokens, mask = model.encode_vision(row.vision_x)
        positions = (row.lang_x == IMAGE).cumsum(-1)
        for i, before in enumerate(("embedded", "out of 0")):
            expected = seen[before]
            if str(i) in numbers:
                expected = reference.cross_attend(model.fusion.blocks[str(i)], expected, tokens, mask, positions)
            same(seen[f"into {i}"], expected)


def test_media_visibility_example():
    positions, mask = torch.tensor([[0, 1, 1, 2, 2]]), torch.ones(1, 2, 2, dtype=torch.bool)
    last, everything = (
        MediaVisibility.build(positions, mask, attend=attend, feed_forward_before_media=False)
        for attend in ("last", "all")
    )
    # Equal keys and values that name their position: what is looked at has a share in the result.
    keys_values = torch.stack([torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]], dim=1)
    shares = attend_to_media(torch.zeros(1, 1, 5, 4), keys_values, last).masked_fill(~last.reads, 0)
    pictures = ["".join(".1"[int(x > 0)] for x in row) for row in shares[0]]
    assert pictures == ["....", "11..", "11..", "..11", "..11"]
    assert last.reads.flatten().tolist() == last.feeds.flatten().tolist() == [False, True, True, True, True]
    assert everything.attention[0, 0, 3:].all() and not everything.attention[0, 0, 1:3, 2:].any()


def test_expand_example():
    a, b, c, I, p = 5, 6, 7, IMAGE, tiny.PAD  # noqa: E741
    rows = torch.tensor([[a, I, b], [a, b, c]])
    expansion = expand_media_tokens(rows, None, rows == I, torch.tensor([[3], [0]]), p)
    assert expansion.ids.tolist() == [[a, I, I, I, b], [p, p, a, b, c]]
    assert expansion.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert expansion.last.tolist() == [[0, 3, 4], [2, 3, 4]]
    assert expansion.fold(torch.arange(10).view(2, 5, 1))[..., 0].tolist() == [[0, 3, 4], [7, 8, 9]]


def test_compact_and_place_example():
    tokens, mask = torch.arange(1.0, 5).view(1, 2, 2, 1), torch.tensor([[[True, False], [True, True]]])
    media = pack_valid_tokens(tokens, mask)
    assert media.flatten().tolist() == [1, 3, 4, 2]
    is_media = torch.tensor([[True, False, True, True]])
    placed = scatter_media(torch.full((1, 4, 1), 9.0), media, is_media, is_media.cumsum(-1))
    assert placed.flatten().tolist() == [1, 9, 3, 4]


def test_layers_with_several_residual_streams():
    """AltUp (gemma3n) changes its active stream; hyper-connections add to all what the mean gains."""
    B, T, S, d = 2, 3, 4, 5

    def update(x: Tensor) -> Tensor:
        assert x.shape == (B, T, d)
        return 2 * x + 1

    def run(hidden: Tensor) -> Tensor:
        (found, flag), _ = update_hidden_states(update, (hidden, "flag"), {}, torch.Size((B, T)), d)
        _, named = update_hidden_states(update, (), {"hidden_states": hidden}, torch.Size((B, T)), d)
        assert flag == "flag" and torch.equal(named["hidden_states"], found)
        return found

    plain, streams = torch.randn(B, T, d), torch.randn(B, T, S, d)
    same(run(plain), 2 * plain + 1)
    expected = streams + streams.mean(2, keepdim=True) + 1
    same(run(streams), expected)
    same(run(streams.flatten(2)), expected.flatten(2))
    altup = streams.permute(2, 0, 1, 3)
    same(run(altup), torch.cat([2 * altup[:1] + 1, altup[1:]]))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("vision", tiny.VISION)
def test_features_have_the_shape_that_was_foretold(vision, layer):
    tower = tiny.tower(vision)
    config = tiny.config(vision=vision, vision_encoder={"layer": layer}).vision_config
    size = config["vision_cfg"]["image_size"]
    with torch.no_grad():
        features = patch_features(tower, torch.randn(2, 3, size, size), layer)
    assert features.shape == (2, config["num_patches"], config["dim"])
    assert differs(features[0], features[1])


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # of how it resizes Swin's tables
@pytest.mark.parametrize("vision", ["vit", "siglip", "eva02", "swin", "convnext"])
def test_towers_are_built_at_the_size_that_is_asked_for(vision):
    config = copy.deepcopy(tiny.VISION[vision])
    config["vision_cfg"]["image_size"] = 64
    tower = build_tower(config)
    with torch.no_grad():
        features = patch_features(tower.eval(), torch.randn(1, 3, 64, 64))
    assert features.shape[1:] == tower_shape(config)


# -- added tokens ------------------------------------------------------------------------------------------------------


@each_fusion
def test_added_tokens_have_their_own_logits(fusion):
    model = opened(fusion=fusion, language_model="llama")
    ids = tiny.row(model, 0).lang_x[:, :-2]
    with torch.no_grad():
        hidden = bare(model)(ids, output_hidden_states=True).hidden_states[-1]
        same(logits(model, lang_x=ids)[..., VOCABULARY:], model.added_tokens.head(hidden))


@each_fusion
def test_added_tokens_take_the_place_of_padded_rows(fusion):
    config = tiny.config(fusion=fusion)
    config.first_added_id, config.media_token_id = VOCABULARY - 4, VOCABULARY - 3
    model = tiny.open_gates(VLM(config).eval())
    ids = torch.randint(1, VOCABULARY - 4, (1, 6))
    expected = model.lang_model(ids).logits[..., : VOCABULARY - 4]
    found = logits(model, lang_x=ids)
    assert found.shape[-1] == VOCABULARY - 2 and torch.equal(found[..., :-2], expected)
    ids[0, 2] = VOCABULARY - 3
    assert model.generate(lang_x=ids, vision_x=torch.randn(1, 3, 32, 32), max_new_tokens=5).max() < VOCABULARY - 2


@pytest.mark.parametrize("language_model", ["llama", "gemma3_text", "opt-projected"])
def test_added_tokens_start_at_the_mean(language_model):
    model = tiny.build(language_model=language_model)
    added, table, head = (
        model.added_tokens,
        *(get() for get in (model.lang_model.get_input_embeddings, model.lang_model.get_output_embeddings)),
    )
    nn.init.zeros_(added.embedding.weight), nn.init.zeros_(added.head.weight)
    added.start_at_mean(table, head, chunk=7)
    with torch.no_grad():
        same(added.embedding.weight[0], table(torch.arange(VOCABULARY)).mean(0))
        same(added.head.weight[0], head.weight.mean(0))


# -- the call ----------------------------------------------------------------------------------------------------------


def test_the_fusion_chooses_the_class():
    assert [type(tiny.build(fusion=fusion)).__name__ for fusion in tiny.FUSIONS] == [
        "VLMWithCrossAttention",
        "VLMWithLanguageStream",
        "VLMWithLlamaCrossAttention",
    ]


@each_fusion
def test_names_of_transformers_and_short_shapes_mean_the_same(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 1)
    expected = logits(model, **row.inputs())
    for pixels in (row.vision_x[:, 0], row.vision_x[:, 0, 0]):
        assert torch.equal(logits(model, input_ids=row.lang_x, pixel_values=pixels), expected)
    found = model.generate(row.lang_x, pixel_values=row.vision_x, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, model.generate(**row.inputs(), max_new_tokens=3, do_sample=False))


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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
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


@pytest.mark.parametrize("fusion", tiny.FUSIONS)
def test_a_fusion_says_what_it_has(fusion):
    model = tiny.build(fusion=fusion)
    has_blocks = fusion != "language-stream"
    assert model.block_layers == ([0, 1] if has_blocks else [])
    gates = {f"blocks.{i}.{name}" for i in model.block_layers for name in ("attn_gate", "ff_gate")}
    assert model.gates().keys() == gates and not any(gate.any() for gate in model.gates().values())
    assert [model.media_seen(k) for k in (0, 1, 3)] == [[], [1], [3] if has_blocks else [1, 2, 3]]
    assert model.splices_media is not has_blocks and model.fusion_problem() is None


@pytest.mark.parametrize("fusion", ["cross-attention", "llama-cross-attention"])
def test_a_fusion_that_attends_to_all_media_says_so(fusion):
    model = tiny.build(fusion={"type": fusion, "attend": "all", "every": 2, "first": None})
    assert model.media_seen(3) == [1, 2, 3] and model.block_layers == [1]


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


# -- numbers of half the width -----------------------------------------------------------------------------------------


@each_fusion
@pytest.mark.parametrize("language_model", ["llama", "opt", "falcon_h1"])
@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
def test_bfloat16_runs(fusion, language_model, tokenizer):
    model = opened(fusion=fusion, language_model=language_model, tokenizer=tokenizer)
    model = copy.deepcopy(model).to(torch.bfloat16)  # the tower is shared
    batch = tiny.batch(model, frames=2)
    found = logits(model, **batch)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["lang_x"].shape[1] + 2


# -- everything with everything ----------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("language_model", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("fusion", tiny.FUSIONS)
@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
@pytest.mark.parametrize("vision", tiny.VISION)
def test_every_composition(vision, tokenizer, fusion, language_model):
    model = tiny.open_gates(tiny.build(vision, tokenizer, fusion, language_model))
    check_text_only(model)
    check_against_bare(model)
    check_cached(model)
    check_rows(model)
    check_state(model)
    check_gradients(model, model.config.composition.trainable, ["vision_encoder"])
