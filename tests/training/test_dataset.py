"""What a record becomes: tokens, labels, batches, and the order of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig

from tests.support.clips import frame, write_animation
from tests.support.training import CROSS_ATTENTION, write
from vlm_cli import load
from vlm_cli.composition import END_OF_CHUNK
from vlm_cli.data.records import read_records
from vlm_cli.errors import DataError
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.learned import IGNORED, row_losses
from vlm_cli.prompt import interleave
from vlm_cli.training.dataset import Collator, RecordDataset, check_batch, load_dataset
from vlm_cli.training.encoder import RecordEncoder
from vlm_cli.training.order import Shares, StreamSampler
from vlm_cli.writing.plain import find_end_token
from vlm_cli.writing.writer import PromptWriter


@pytest.fixture(scope="module")
def model(cross_attention: Path) -> tuple[Any, Any]:
    return load(str(cross_attention))


@pytest.fixture(scope="module")
def stream_model(language_stream: Path) -> tuple[Any, Any]:
    return load(str(language_stream))


def dataset(folder: Path, model: tuple[Any, Any], *lines: Any) -> RecordDataset:
    return load_dataset(write(folder / "some.jsonl", lines), *model)


def ids(data: RecordDataset, index: int = 0) -> list[int]:
    return data[index]["ids"].tolist()


def learned(data: RecordDataset, model: tuple[Any, Any], index: int = 0) -> list[str]:
    """Text of each run of tokens that are learned."""
    runs: list[list[int]] = [[]]
    for token in data[index]["labels"].tolist():
        if token == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [model[1].tokenizer.decode(run) for run in runs if run]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ({"prompt": "<image:red.png>Q: Which? A:", "completion": " red"}, [" red<|endofchunk|>"]),
        (
            {
                "prompt": "<image:red.png>",
                "turns": [{"prompt": "Q: a? A:", "completion": " b"}, {"prompt": " Q: c? A:", "completion": " d e"}],
            },
            [" b<|endofchunk|>", " d e<|endofchunk|>"],
        ),
        ({"text": "See <image:red.png> this<image:blue.png>that."}, [" this", "that.<|endofchunk|>"]),
    ],
)
def test_completions_are_learned_to_their_end(folder: Path, model: Any, line: Any, texts: list[str]) -> None:
    data = dataset(folder, model, line)
    assert learned(data, model) == texts
    assert model[1].media_token_id in ids(data)


def test_worked_example(folder: Path, model: Any) -> None:
    data = dataset(folder, model, {"prompt": "<image:red.png>A:", "completion": " a cat"})
    tokens = model[1].tokenizer.convert_ids_to_tokens(ids(data))
    assert tokens == ["<image>", "A", ":", "Ġa", "Ġcat", END_OF_CHUNK]
    assert (data[0]["labels"] == IGNORED).tolist() == [True, True, True, False, False, False]


def test_without_endofchunk_the_end_of_text_is_learned(folder: Path, stream_model: Any) -> None:
    data = dataset(folder, stream_model, {"prompt": "<image:red.png>A:", "completion": " a cat"})
    assert ids(data)[-1] == stream_model[1].tokenizer.eos_token_id == find_end_token(*stream_model)


def fed_by_generate(prompt: str, processor: Any, *, special: bool = False) -> list[int]:
    """What `vlm generate` feeds for a prompt, without the pictures' pixels."""
    parts = interleave(prompt).parts
    return processor.encode(parts, parse_special_tokens=special)


@pytest.mark.parametrize("prompt", ["<image:red.png>Q: What colour? A:", "One <image:red.png>\ntwo<image:blue.png>:"])
@pytest.mark.parametrize("completion", [" red", "red", "\nA red square.", " </s> and <|endofchunk|>", r" \<image>"])
def test_tokens_are_those_that_generate_feeds(folder: Path, model: Any, prompt: str, completion: str) -> None:
    data = dataset(folder, model, {"prompt": prompt, "completion": completion})
    given, both = fed_by_generate(prompt, model[1]), fed_by_generate(prompt + completion, model[1])
    assert ids(data) == [*both, find_end_token(*model)]
    assert ids(data)[: len(given)] == given
    assert (data[0]["labels"] == IGNORED).sum() == len(given)
    assert not data.split


def test_turns_are_the_tokens_of_the_prompt_that_spells_them(folder: Path, model: Any) -> None:
    turns = [
        {"prompt": "Q: What? A:", "completion": " red"},
        {"prompt": " And <image:blue.png>? A:", "completion": "b"},
    ]
    data = dataset(folder, model, {"prompt": "<image:red.png>", "turns": turns})
    text = "<image:red.png>" + "".join(t["prompt"] + t["completion"] + END_OF_CHUNK for t in turns)
    assert ids(data) == fed_by_generate(text, model[1], special=True)


def test_a_token_over_the_border_is_cut(folder: Path, model: Any) -> None:
    prompt, completion = "<image:red.png>A: ", "red"  # " red" would be one token
    data = dataset(folder, model, {"prompt": prompt, "completion": completion})
    given = fed_by_generate(prompt, model[1])
    assert ids(data)[: len(given)] == given
    assert ids(data)[:-1] != fed_by_generate(prompt + completion, model[1])
    assert model[1].tokenizer.decode(ids(data)) == f"<image>A: red{END_OF_CHUNK}"
    assert data.split == ["line 1 of some.jsonl"]


def test_a_begin_token_comes_once(folder: Path, model: Any) -> None:
    class WithBegin:
        media_token_id, chat_program = model[1].media_token_id, None

        def encode(self, parts: Any, **keywords: Any) -> list[int]:
            return [1, *model[1].encode(parts)]

    turns = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    (record,) = read_records(write(folder / "b.jsonl", [{"prompt": "<image:red.png>", "turns": turns}])).good
    ((tokens, *_),) = RecordEncoder(PromptWriter(WithBegin()), 9).encode(record)  # type: ignore[arg-type]
    assert tokens[0] == 1 and tokens.count(1) == 1 and tokens.count(9) == 2


@pytest.mark.parametrize("fusion", ["cross_attention", "language_stream"])
def test_what_does_not_fit_is_a_bad_line(folder: Path, fusion: str, request: pytest.FixtureRequest) -> None:
    vlm = load(str(request.getfixturevalue(fusion)))
    vlm[0].config.text_config.max_position_embeddings = 12
    good = {"prompt": "<image:red.png>A:", "completion": " cat"}  # 5 tokens, and 3 more positions in the stream
    with pytest.raises(DataError) as error:
        dataset(folder, vlm, good, {"prompt": "<image:red.png>A:", "completion": " cat" * 20}, {"text": ""})
    message = str(error.value)
    assert "2 of the 3 records" in message
    assert f"line 2: takes {24 + (3 if fusion == 'language_stream' else 0)} positions" in message
    assert "the language model has 12" in message and 'line 3: "text" is empty' in message


@pytest.mark.parametrize("fusion", ["cross_attention", "language_stream"])
def test_records_of_text_alone_are_learned(folder: Path, fusion: str, request: pytest.FixtureRequest) -> None:
    vlm, processor = load(str(request.getfixturevalue(fusion)))
    lines = [
        {"prompt": "<image:red.png>Q: Which? A:", "completion": " red"},
        {"prompt": "Two and two?", "completion": " Four."},
        {"text": "Words."},
    ]
    data = dataset(folder, (vlm, processor), *lines)
    assert learned(data, (vlm, processor), 1)[0].startswith(" Four.") and data.num_images.tolist() == [1, 0, 0]
    assert learned(data, (vlm, processor), 2)[0].startswith("ords.")  # nothing stands before the first token
    collate = Collator(processor.tokenizer.pad_token_id)
    together, alone = collate([data[0], data[1], data[2]]), [collate([data[i]]) for i in range(3)]
    assert together["vision_mask"].flatten(1).tolist() == [[True], [False], [False]]
    assert "pixel_values" not in alone[1]
    found = []
    for batch in (together, *alone):
        labels, *_ = (batch.pop(key) for key in ("labels", "records", "num_tokens", "notes"))
        with torch.no_grad():
            found.append(row_losses(vlm(**batch).logits, labels, batch["logits_at"])[0])
    torch.testing.assert_close(found[0], torch.cat(found[1:]))
    assert not torch.allclose(found[0], found[0].roll(1))  # the twin


def test_a_length_by_another_name_is_checked(folder: Path, cross_attention: Path) -> None:
    """MPT calls its context `max_seq_len`."""
    vlm = load(str(cross_attention))
    vlm[0].config.text_config = AutoConfig.for_model("mpt", max_seq_len=12)
    with pytest.raises(DataError, match=r"takes 24 positions .* the language model has 12"):
        dataset(folder, vlm, {"prompt": "<image:red.png>A:", "completion": " cat" * 20})


def test_too_many_images_are_a_bad_line(folder: Path, build: Any) -> None:
    tokenizer = CROSS_ATTENTION["vision_tokenizer"] | {"max_num_media": 1}
    vlm = load(str(build(CROSS_ATTENTION | {"vision_tokenizer": tokenizer})))
    with pytest.raises(DataError, match="has 2 images, but the vision tokenizer was made for at most 1"):
        dataset(folder, vlm, {"text": "<image:red.png><image:blue.png>x"})


LINES = [
    {"prompt": "<image:red.png>Q: What is it? A:", "completion": " A red square."},
    {"prompt": "<image:blue.png>and<image:red.png>", "completion": " two"},
]


def test_a_batch_is_what_the_processor_makes(folder: Path, model: Any) -> None:
    data = dataset(folder, model, *LINES)
    batch = Collator(model[0].config.pad_token_id)([data[0], data[1]])
    rows = [interleave(line["prompt"] + line["completion"] + END_OF_CHUNK).parts for line in LINES]
    images = [[Image.open(folder / medium.source) for medium in sources] for sources in data.media]
    theirs = model[1](text=rows, images=images, parse_special_tokens=True)
    for name, tensor in theirs.items():
        torch.testing.assert_close(batch[name], tensor, atol=0, rtol=0)
    assert batch["records"] == [0, 1]
    assert torch.equal(batch["labels"][batch["attention_mask"] == 0].unique(), torch.tensor([IGNORED]))


def test_clips_stand_beside_images(folder: Path, model: Any) -> None:
    (folder / "clip.gif").write_bytes(write_animation(9, "GIF"))
    clip = {"prompt": "<video>Then<image>", "completion": " x", "videos": ["clip.gif?frames=3"], "images": ["red.png"]}
    data = dataset(folder, model, clip, LINES[0])
    batch = Collator(model[0].config.pad_token_id)([data[0], data[1]])
    media = [[[frame(0), frame(4), frame(8)], [Image.open(folder / "red.png")]], [[Image.open(folder / "red.png")]]]
    theirs = model[1].image_processor.preprocess(media)
    for name in ("pixel_values", "vision_mask"):
        torch.testing.assert_close(batch[name], theirs[name], atol=0, rtol=0)
    assert data.num_images.tolist() == [4, 1]
    (folder / "clip.gif").write_bytes(b"GIF89a")
    assert "line 1 of 'some.jsonl': 'clip.gif' is damaged" in data[0]["error"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder: Path, model: Any, workers: int) -> None:
    whole = (folder / "red.png").read_bytes()
    (folder / "damaged.png").write_bytes(whole[:-30])  # its head is fine
    data = dataset(folder, model, {"text": "<image:damaged.png>x"})
    loader = DataLoader(data, batch_size=1, collate_fn=Collator(0), num_workers=workers)
    with pytest.raises(DataError, match=r"line 1 of 'some.jsonl': 'damaged.png' is damaged"):
        check_batch(next(iter(loader)), NoteTally())


def stream(num_records: int, num_drawn: int, **settings: Any) -> list[int]:
    return list(StreamSampler(num_records, num_drawn, **{"seed": 0, "batch_size": 4, **settings}))


def test_each_pass_has_every_record_once() -> None:
    drawn = stream(10, 28)
    assert [sorted(drawn[i : i + 10]) for i in (0, 10)] == [list(range(10))] * 2
    assert drawn[:10] != drawn[10:20]
    assert len(drawn) == 28 and len(set(drawn[20:])) == 8


def test_the_order_is_the_seed_s() -> None:
    assert stream(50, 100) == stream(50, 100) != stream(50, 100, seed=1)
    assert stream(50, 60) == stream(50, 100)[:60]


def test_like_sizes_share_a_batch() -> None:
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(1, 4, 1000), rng.integers(5, 100, 1000)], axis=1)
    drawn = stream(1000, 1000, sizes=sizes)
    assert sorted(drawn) == list(range(1000))

    def spread(order: list[int]) -> float:
        return float(np.mean([np.ptp(sizes[order[i : i + 4], 0]) for i in range(0, 1000, 4)]))

    assert spread(drawn) < 0.1 < 1 < spread(stream(1000, 1000))
    batches = [tuple(sizes[drawn[i]]) for i in range(0, 200, 4)]
    assert batches != sorted(batches)  # short ones do not all come first


def test_sources_are_drawn_by_their_weights() -> None:
    counts, weights = (10, 300, 50), (0.5, 0.2, 0.3)
    drawn = np.array(stream(360, 5_000, shares=Shares(counts, weights)))
    sources = np.searchsorted([10, 310], drawn, side="right")
    shares = np.bincount(sources, minlength=3) / len(drawn)
    assert np.abs(shares - weights).max() < 1e-3
    for source, first in enumerate((0, 10, 310)):  # each source goes through all its records before it begins again
        own = drawn[sources == source][: counts[source]]
        assert sorted(own) == list(range(first, first + counts[source]))
    blocks = [sources[i : i + 40].tolist() for i in range(0, 400, 40)]
    assert len({tuple(block) for block in blocks}) == len(blocks)


def test_a_mixture_s_order_is_the_seed_s_and_goes_on() -> None:
    shares = Shares((10, 30), (0.9, 0.1))
    long = stream(40, 3_000, shares=shares)
    assert long[:1_500] == stream(40, 1_500, shares=shares) != stream(40, 1_500, shares=shares, seed=1)
    assert set(stream(40, 1_000, shares=Shares((10, 30), (1.0, 0.0)))) == set(range(10))
