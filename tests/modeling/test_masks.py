"""The masks of the language stream, against the bare language model with masks that a loop draws.

B rows, L positions of the language model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import reference, tiny
from tests.support.invariants import bare, differs, generate_with_logits, logits, opened, same
from tests.support.tiny import IMAGE, VOCABULARY
from vlm_cli.composition import Composition
from vlm_cli.errors import CompositionError, LanguageModelLimit
from vlm_cli.modeling.fusion.masks import find_media_blocks
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.modeling.vlm import VLM

#: Language models with one kind of layers, with sliding windows, and with masks of their own code.
LANGUAGE_MODELS = ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "mistral", "qwen3", "gemma2", "falcon"]


def stream(mask: str, language_model: str = "llama") -> VLM:
    fusion = {"type": "language-stream", "mask": mask}
    return opened(tokenizer="linear", fusion=fusion, language_model=language_model)


@pytest.fixture(scope="module", params=["image", "prefix"])
def model(request: pytest.FixtureRequest) -> VLM:
    return stream(request.param)


def drawn_mask(ids: list[int], num_patches: int, prefix: int, window: int | None = None) -> Tensor:
    """bool[1, 1, L, L] of a row's tokens: of its `prefix` first tokens, or of each picture."""
    block, number = [], 0
    for i, token in enumerate(ids):
        number += token == IMAGE
        mine = 0 if i < prefix else number if token == IMAGE and not prefix else -1
        block += [mine] * (num_patches if token == IMAGE else 1)
    seen = torch.zeros(len(block), len(block), dtype=torch.bool)
    for q, mine in enumerate(block):
        for k, theirs in enumerate(block):
            is_near = window is None or q - k < window
            seen[q, k] = (k <= q and is_near) or (mine == theirs and mine >= 0)
    return seen[None, None]


@torch.no_grad()
def expected_logits(model: VLM, row: tiny.Row, prefix: int = 0) -> Tensor:
    """float[T_txt, VOCABULARY] of the bare language model, given a mask for each kind of layers."""
    lm, ids = bare(model), row.lang_x[0].tolist()
    table, added = lm.get_input_embeddings(), model.added_tokens.embedding.weight
    tokens, mask = model.encode_vision(row.vision_x)
    media = [x[there] for x, there in zip(tokens[0], mask[0], strict=True)]

    def embed(token: int) -> Tensor:
        return added[token - VOCABULARY] if token >= VOCABULARY else table(torch.tensor([token]))[0]

    embeddings, last = reference.splice(row.lang_x[0], IMAGE, embed, media)
    window = getattr(lm.config, "sliding_window", None)
    kinds = {"full_attention": None, "sliding_attention": window}
    masks: Any = {kind: drawn_mask(ids, len(media[0]), prefix, width) for kind, width in kinds.items()}
    if lm.config._attn_implementation == "eager":
        masks = {kind: torch.where(x, 0.0, torch.finfo(torch.float32).min) for kind, x in masks.items()}
    if not hasattr(lm.config, "layer_types"):
        masks = masks["full_attention" if window is None else "sliding_attention"]
    positions = torch.arange(len(embeddings))[None]
    kept = {key: x for key, x in masks.items() if key in lm.config.layer_types} if isinstance(masks, dict) else masks
    return lm(inputs_embeds=embeddings[None], attention_mask=kept, position_ids=positions).logits[0, last]


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", ["image", "prefix"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_logits_are_those_of_a_drawn_mask(language_model, mask):
    model = stream(mask, language_model)
    row = tiny.row(model, 2, 9)
    expected = expected_logits(model, row, 9 if mask == "prefix" else 0)
    same(logits(model, **row.inputs())[0, :, :VOCABULARY], expected)
    assert differs(logits(stream("causal", language_model), **row.inputs())[0, :, :VOCABULARY], expected)


def test_labels_end_the_prefix():
    model = stream("prefix")
    row, labels = tiny.row(model, 1, 9), torch.full((1, 9), -100)
    labels[0, 6:] = row.lang_x[0, 6:]
    prefix_mask = torch.arange(9)[None] < 6
    expected = expected_logits(model, row, 6)
    same(logits(model, **row.inputs(), labels=labels)[0, :, :VOCABULARY], expected)
    same(logits(model, **row.inputs(), prefix_mask=prefix_mask)[0, :, :VOCABULARY], expected)
    assert differs(logits(model, **row.inputs())[0, :, :VOCABULARY], expected)


@pytest.mark.sample(1)
def test_rows_do_not_depend_on_their_batch(model):
    rows = tiny.rows(model)
    alone = [logits(model, **row.inputs())[0] for row in rows]
    for side in ("left", "right"):
        batch = tiny.collate(rows, side, garbage=1e4)
        together = logits(model, **batch)
        for found, there, row in zip(together, batch["attention_mask"].bool(), alone, strict=True):
            same(found[there], row)


def whole(model: VLM, batch: dict[str, Any], sequences: Tensor) -> Tensor:
    """Logits of prompts and answers in one call, whose prefix is the prompt."""
    num_new = sequences.shape[1] - batch["lang_x"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(sequences[:, :num_new])], dim=1)
    prefix = torch.arange(sequences.shape[1]) < batch["lang_x"].shape[1]
    inputs = batch | {"lang_x": sequences, "attention_mask": mask, "prefix_mask": prefix.expand_as(sequences)}
    return logits(model, **inputs)[:, -num_new - 1 : -1]


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_decoding_gives_the_logits_of_the_whole(model, options):
    batch = tiny.batch(model)
    output = generate_with_logits(model, batch, 3, **options, num_return_sequences=1)
    repeats = options.get("num_beams", 1)
    steps = torch.stack(output.logits, dim=1)[::repeats]  # the first beam's first step is that of the prompt
    expected = whole(model, batch, output.sequences)
    if repeats > 1:
        steps, expected = steps[:, :1], expected[:, :1]
    same(steps[..., :VOCABULARY], expected[..., :VOCABULARY])
    assert differs(steps, whole(model, batch | {"vision_x": batch["vision_x"].flip(-1)}, output.sequences))


@pytest.mark.sample(1)
def test_the_language_models_own_generate(model):
    row = tiny.row(model, 2, 9)
    tokens, _ = model.encode_vision(row.vision_x)
    with model.conditioned(row.lang_x, tokens) as inputs:
        output = model.lang_model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found = model.generate(**row.inputs(), max_new_tokens=3, do_sample=False)
    assert output[0, -3:].tolist() == found[0, -3:].tolist()


def test_a_prompt_cache_keeps_pictures_whole():
    model = stream("image")
    row = tiny.row(model, 2, 9)
    tokens, mask = model.encode_vision(row.vision_x)
    media, cache = {"vision_tokens": tokens, "media_mask": mask}, PromptCache()
    end = int((row.lang_x[0] == IMAGE).nonzero()[-1]) + 1
    prompts = [row.lang_x[:, :end], row.lang_x, row.lang_x[:, :end]]  # one ends with a picture
    for number, lang_x in enumerate(prompts):
        fresh = generate_with_logits(model, {"lang_x": lang_x, **media}, 3)
        kept = generate_with_logits(model, {"lang_x": lang_x, **media}, 3, prompt_cache=cache)
        same(torch.stack(kept.logits), torch.stack(fresh.logits))
        n = model.num_positions()
        # The last position is read again, and its whole picture with it.
        assert cache.reused == (0, end + 2 * (n - 1), end + n - 2)[number]


@pytest.mark.matrix
def test_a_prompt_cache_reuses_no_prefix():
    model = stream("prefix")
    row = tiny.row(model, 1, 9)
    tokens, mask = model.encode_vision(row.vision_x)
    cache, media = PromptCache(), {"vision_tokens": tokens, "media_mask": mask}
    for length in (6, 9):
        batch = {"lang_x": row.lang_x[:, :length], **media}
        fresh = generate_with_logits(model, batch, 2)
        kept = generate_with_logits(model, batch, 2, prompt_cache=cache)
        same(torch.stack(kept.logits), torch.stack(fresh.logits))
        assert cache.reused == 0


def test_chunks_are_refused(model):
    with pytest.raises(LanguageModelLimit, match=r"with fusion.mask=\w+, .* without prefill_chunk_size"):
        generate_with_logits(model, tiny.batch(model, [1]), 2, prefill_chunk_size=4)


@pytest.mark.sample(1)
def test_training_with_checkpointing_gives_the_same_gradients(model):
    row = tiny.row(model, 2, 9)
    labels = row.lang_x.masked_fill(torch.arange(9) < 6, -100)
    found = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        model.train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(**row.inputs(), labels=labels).loss.backward()
        found.append(model.vision_tokenizer.proj.weight.grad.clone())
        model.gradient_checkpointing_disable()
        model.eval()
    same(found[0], found[1])
    assert found[0].abs().sum() > 0


def test_blocks_are_runs_of_one_medium():
    """Two media of 3 and 2 vision tokens side by side, then one in two views with text between."""
    is_media = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 0, 1]]).bool()
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0], [1, 0, 1]]]).bool()
    found = find_media_blocks(is_media, is_media.cumsum(-1), mask)
    assert found.tolist() == [[-1, 1, 1, 1, 2, 2, -1, 3, -1, 4]]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("language_model", "reason"),
    [
        ("mamba", "MambaForCausalLM with attn_implementation='eager' takes no mask for each pair of positions"),
        ("mpt", "layers 0, 1 of MptForCausalLM do not hand on a mask that is prepared for them"),
        ("bloom", "BloomForCausalLM cannot run with a mask that is prepared for it"),
        ("llama", None),
    ],
)
def test_language_models_are_measured(language_model, reason):
    with meta_device():
        model = VLM(tiny.config(fusion={"type": "language-stream", "mask": "prefix"}, language_model=language_model))
    problem = model.fusion_problem()
    assert problem == reason or problem.startswith(f"fusion.mask=prefix does not fit the language model: {reason}")


def test_a_mask_is_one_of_three():
    with pytest.raises(CompositionError, match=r"fusion\.mask must be 'causal' or 'image' or 'prefix', got 'full'"):
        Composition.compose("llava", {"fusion": {"type": "language-stream", "mask": "full"}})
