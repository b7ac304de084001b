"""The invariants of docs/architecture.md as functions, which tests run on their models.

Each function compares two ways to get one result, then changes something and sees that the results differ.

`vlm doctor` checks some of the same invariants with code of its own. Neither imports the other, on purpose: a mistake
in one of them is then not repeated by the other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support import reference, tiny
from tests.support.tiny import IMAGE, VOCABULARY, nudged
from vlm_cli.composition import FAMILIES, PARTS
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
from vlm_cli.modeling.towers import patch_features
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


def opened(**parts: Any) -> VLM:
    """A new model whose media matter."""
    return tiny.open_gates(tiny.build(**parts))


@cache
@torch.inference_mode(False)
def opened_of(vision: str, tokenizer: str, fusion: str, language_model: str) -> VLM:
    """The same model for all tests of a process, which leave it as it was."""
    return tiny.open_gates(tiny.build(vision, tokenizer, fusion, language_model))


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


def check_text_only(model: VLM) -> None:
    ids = torch.randint(1, VOCABULARY, (2, 9))
    for inputs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with torch.no_grad():
            expected = bare(model)(ids, **inputs).logits
        assert torch.equal(logits(model, lang_x=ids, **inputs)[..., :VOCABULARY], expected)
    with nudged(model.lang_model.get_output_embeddings().weight):
        assert not torch.equal(logits(model, lang_x=ids)[..., :VOCABULARY], expected)


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


def trained(model: VLM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


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


def check_continued_cache(model: VLM) -> None:
    """`forward` goes on from its own cache, in steps of one token and of several."""
    row = tiny.row(model, 2, 9)
    name = language_model_name(model)
    tolerance = CACHE_TOLERANCE[name]
    for pieces in ([3, 1, 1, 1, 1], *([] if name in NO_CHUNKS else [[3, 4, 2]])):
        found, whole = in_pieces(model, row, pieces)
        same(found, whole, tolerance)
    row.vision_x = swapped(row.vision_x)
    assert differs(in_pieces(model, row, [3, 1, 1, 1, 1])[0], whole[:, :7])


def check_chunked_prefill(model: VLM) -> None:
    """`generate` reads a prompt in chunks as it reads it whole; for language models outside `NO_CHUNKED_GENERATE`."""
    batch = tiny.batch(model)
    whole = generate_with_logits(model, batch, 3)
    with calls(model) as lengths:
        chunks = generate_with_logits(model, batch, 3, prefill_chunk_size=4)
    assert lengths[:2] == [4, 4]
    tolerance = CACHE_TOLERANCE[language_model_name(model)]
    same(torch.stack(chunks.logits), torch.stack(whole.logits), tolerance)


def check_saved(model: VLM, folder: Path) -> None:
    """A saved model holds the language model under its own names, and is loaded as it was."""
    model.save_pretrained(folder / "vlm", max_shard_size="100KB")
    bare(model).save_pretrained(folder / "lm")
    names = json.loads((folder / "vlm" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / "lm" / "model.safetensors", "pt") as file:
        published = {f"lang_model.{name}" for name in file.keys()}
    assert {name for name in names if name.startswith("lang_model.")} == published
    assert len(set(names.values())) > 1

    loaded, report = VLM.from_pretrained(folder / "vlm", output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model) and trained(loaded) == trained(model)
    # Tensors begin at any byte of a file, and the last bit of a convolution depends on that; a copy is aligned.
    loaded, batch = copy.deepcopy(loaded).eval(), tiny.batch(model)
    expected = logits(model, **batch)
    assert torch.equal(logits(loaded, **batch), expected)
    with nudged(next(loaded.vision_tokenizer.parameters())):
        assert not torch.equal(logits(loaded, **batch), expected)


def check_trainable(model: VLM) -> None:
    """Exactly the declared parts train: those of each family, and each part alone."""
    families = {tuple(family["trainable"]) for family in FAMILIES.values()}
    has_fusion = bool(list(model.fusion.parameters()))
    single = [(part,) for part in PARTS if part != "fusion" or has_fusion]
    check_gradients(model, *families, *single)


def check_placeholders(model: VLM) -> None:
    """Each image changes the logits from its own placeholder on, and none before."""
    row = tiny.row(model, 3, 9)
    expected = logits(model, **row.inputs())[0]
    for k, start in enumerate((row.lang_x[0] == IMAGE).nonzero().flatten().tolist()):
        vision_x = row.vision_x.clone()
        vision_x[:, k] = vision_x[:, k].flip(-1) + 0.5
        found = logits(model, vision_x=vision_x, lang_x=row.lang_x)[0]
        assert not differs(found[:start], expected[:start]) and differs(found[start], expected[start])
