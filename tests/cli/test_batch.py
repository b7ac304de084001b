"""`vlm batch`: the answers of one by one, in order, whatever happens on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import vlm_cli.checkpoint.directory as directory
from tests.support import ROOT, command
from tests.support.grid import first_of, grid
from vlm_cli import VLM
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.errors import is_out_of_memory
from vlm_cli.generation import answers, choosing, slot_choice
from vlm_cli.generation.batch_size import BatchSize, RowCost
from vlm_cli.generation.encoded_image import ImageSlot
from vlm_cli.generation.images import ImageCache, Pixels, Preprocessor
from vlm_cli.generation.journal import Journal, partial_of
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.decoding.slot_cache import SlotCache
from vlm_cli.modeling.decoding.static_slots import StaticSlots
from vlm_cli.models import DEMO
from vlm_cli.prompt import Medium
from vlm_cli.tiling import MediumSize

pytestmark = pytest.mark.usefixtures("loaded_once")

ANSWER = ("text", "new_tokens", "finish_reason")
PROMPTS = [
    {"prompt": "<image:0.png>The cat", "id": 1},
    {"prompt": "The cat sits on the mat and the dog", "note": {"kept": [1, None, "é"]}},
    {"prompt": "<image>The cat <image>and the dog sits on the <image:0.png>mat", "images": ["1.png", "2.png"]},
    {"prompt": "The dog"},
    {"prompt": "<image>The <image:2.png>", "images": ["copy of 0.png"]},
    {"prompt": "a photo of the cat", "images": ["1.png"]},
    {"prompt": "<image:2.png><image:2.png>The dog and the cat and the mat"},
]


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them twice."""
    for i in range(3):
        Image.frombytes("RGB", (40, 30), random.Random(i).randbytes(3 * 40 * 30)).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "copy of 0.png")
    return tmp_path


def write(folder, rows, name="in.jsonl"):
    """Rows, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return folder / name


@pytest.fixture
def answer(vlm, open_gates, folder):
    """Runs rows through a batch: the result, and what it wrote."""

    def run(rows, *flags, model=open_gates, out="out.jsonl", tokens=6, workers=0, code=0):
        words = [write(folder, rows), "-o", folder / out, "-m", model, "-n", tokens, "--workers", workers]
        result = vlm("batch", *words, *flags)
        assert result.exit_code == code, result.stderr
        assert partial_of(folder / out).exists() == (code not in (0, 1))
        return result, [json.loads(line) for line in (folder / out).read_text().splitlines()]

    return run


def one_by_one(vlm, model, folder, rows, *flags, tokens=6):
    found = []
    for row in rows:
        (folder / "prompt.txt").write_text(row["prompt"])
        images = [x for name in row.get("images", ()) for x in ("-i", folder / name)]
        result = vlm("generate", "-m", model, "-f", folder / "prompt.txt", *images, "-n", tokens, "--json", *flags)
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout))
    return found


@pytest.fixture
def asked(monkeypatch):
    """What reaches `VLM.generate`, and how many images the vision encoder reads."""
    calls, images = [], []
    generate, encode = VLM.generate, VLM.encode_vision

    def spy(self, *args, **kwargs):
        calls.append({name: x for name, x in kwargs.items() if name != "media_keys"})  # which keep images
        return generate(self, *args, **kwargs)

    def count(self, vision_x, *more):
        images.append(vision_x.shape[:2].numel())
        return encode(self, vision_x, *more)

    monkeypatch.setattr(VLM, "generate", spy)
    monkeypatch.setattr(VLM, "encode_vision", count)
    return calls, images


# -- the same answers --------------------------------------------------------------------------------------------------


@grid(
    flags=[(), ("--stop", "e"), ("--repetition-penalty", 1.5), ("--num-beams", 2, "--num-return-sequences", 2)],
    model=["open_gates", "kosmos"],
    quick={"flags": [(), ("--num-beams", 2, "--num-return-sequences", 2)]},
)
def test_a_batch_answers_as_one_by_one(request, vlm, answer, folder, model, flags):
    model = request.getfixturevalue(model)
    _, written = answer(PROMPTS, *flags, model=model)
    alone = one_by_one(vlm, model, folder, PROMPTS, *flags)
    assert [{key: row[key] for key in ANSWER} for row in written] == [{key: x[key] for key in ANSWER} for x in alone]
    if "--num-beams" in flags:
        assert [row["sequences"] for row in written] == [x["sequences"] for x in alone]
    else:
        assert not any("sequences" in row for row in written)
    assert [{key: x for key, x in row.items() if key not in (*ANSWER, "sequences")} for row in written] == PROMPTS


def test_the_images_of_a_batch_matter(answer):
    """The twin of the above."""
    texts = [
        [row["text"] for row in answer([{"prompt": f"<image:{i}.png>The cat"}], "--overwrite")[1]] for i in range(3)
    ]
    assert len({str(x) for x in texts}) > 1


@pytest.mark.matrix
def test_the_demo_answers_as_one_by_one(vlm, answer, folder):
    images = ROOT / "examples" / "images"
    rows = [
        {"prompt": f"<image:{images / name}.png>{question}"}
        for name in ("one", "two", "three")
        for question in ("Describe the image.", "Q: How many shapes are there? A:", "Q: What is it?")
    ]
    rows.append({"prompt": f"<image:{images / 'one.png'}>One. <image:{images / 'two.png'}>Describe the image."})
    flags = ("--dtype", "float32", "--temperature", 0)
    _, written = answer(rows, *flags, model=DEMO, tokens=20)
    alone = one_by_one(vlm, DEMO, folder, rows, *flags, tokens=20)
    assert [row["text"] for row in written] == [x["text"] for x in alone]
    assert {x["finish_reason"] for x in written} >= {"stop_token"}
    assert written[3]["text"] == " a small yellow cross above a large red heart."


@pytest.mark.matrix
def test_a_row_whose_answer_the_context_ends(vlm, answer, open_gates, folder):
    rows = [{"prompt": " cat" * n} for n in (3, 2040, 5, 2039, 2040)]
    _, written = answer(rows, "--batch-size", 5, tokens=20)
    alone = one_by_one(vlm, open_gates, folder, rows, tokens=20)
    assert [row["text"] for row in written] == [x["text"] for x in alone]
    assert len({row["new_tokens"] for row in written}) > 1


def test_samples_are_repeatable_with_a_seed(answer):
    def sample(seed, *flags):
        flags = ("--temperature", 3, "--num-return-sequences", 2, "--batch-size", 3, "--seed", seed, "--overwrite")
        return answer(PROMPTS, *flags)[1]

    first = sample(1)
    assert all(len(row["sequences"]) == 2 for row in first)
    assert first == sample(1) and first != sample(2)


@grid(flags=[("--stop", "e"), (), ("--temperature", 3, "--seed", 1)], quick={"flags": [("--stop", "e")]})
def test_a_static_cache_gives_the_same(answer, monkeypatch, flags):
    wanted = answer(PROMPTS, *flags, out="growing.jsonl")[1]
    monkeypatch.setattr(slot_choice, "_is_static", lambda model: True)  # as on a GPU
    put, slots = StaticSlots.put, []

    def spy(self, new, rows):
        slots.extend(new)
        put(self, new, rows)

    monkeypatch.setattr(StaticSlots, "put", spy)
    assert answer(PROMPTS, *flags)[1] == wanted
    assert len(slots) == len(PROMPTS)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--num-beams", 2), "Note: beams, or several answers to a row, go on until the last of them ends"),
        (("--repetition-penalty", 1.5), "Note: a repetition penalty looks at all tokens of a row"),
        (("--repetition-penalty", 1.5, "--batch-size", 1), None),
        ((), None),
    ],
)
def test_what_keeps_the_rows_of_a_batch_together_is_told(answer, flags, reason):
    said = " ".join(answer(PROMPTS[:1], *flags)[0].stderr.split())
    rest = "so each batch of rows takes as long as its longest answer."
    assert f"{reason}, {rest}" in said if reason else rest not in said


# -- together ----------------------------------------------------------------------------------------------------------


def test_rows_of_like_length_are_answered_together_and_written_in_order(answer, asked):
    rows = [{"prompt": "cat " * (40 if i % 2 else 2 + i // 8), "id": i} for i in range(32)]
    _, written = answer(rows, "--batch-size", 4)
    assert [row["id"] for row in written] == list(range(32))
    padding = [int((kwargs["attention_mask"] == 0).sum()) for kwargs in asked[0]]
    assert [len(kwargs["input_ids"]) for kwargs in asked[0]] == [4] * 8
    assert max(padding) < 20  # in their order, it would be 2 · 35 in each


def test_an_answer_does_not_wait_for_the_end_of_the_input(answer, monkeypatch):
    written, read = [], []
    add, fill = Journal.add, Preprocessor.__getitem__
    monkeypatch.setattr(Journal, "add", lambda self, line, data: (written.append(len(read)), add(self, line, data)))
    monkeypatch.setattr(Preprocessor, "__getitem__", lambda self, x: (read.append(x), fill(self, x))[1])
    answer([{"prompt": "cat " * (1 + i % 7)} for i in range(100)], "--batch-size", 2, tokens=1)
    ahead = [seen - number for number, seen in enumerate(written)]
    assert max(ahead) <= answers.LOOKAHEAD_BATCHES * 2 and len(read) == 100


@pytest.mark.matrix
@pytest.mark.parametrize("model", first_of(["kosmos", "open_gates"]))
def test_without_left_padding_only_equal_lengths_go_together(request, vlm, answer, asked, folder, monkeypatch, model):
    model = request.getfixturevalue(model)
    rows = [{"prompt": i % 2 * "<image:0.png>" + "cat " * n} for n in range(1, 9) for i in range(6)]
    wanted = answer(rows, model=model, out="padded.jsonl")[1]
    monkeypatch.setattr("vlm_cli.generation.choosing.NO_LEFT_PADDING", {"llama": "why"})
    monkeypatch.setattr("vlm_cli.modeling.vlm.NO_LEFT_PADDING", {"llama": "why"})
    asked[0].clear()
    assert answer(rows, model=model)[1] == wanted
    assert all(kwargs["attention_mask"].all() for kwargs in asked[0])
    assert max(len(kwargs["input_ids"]) for kwargs in asked[0]) > 1
    # The twin: padded rows are refused.
    monkeypatch.setattr("vlm_cli.generation.choosing.NO_LEFT_PADDING", {})
    words = ["-o", folder / "twin.jsonl", "--workers", 0, "-b", 5]
    assert "padded at the left" in vlm("batch", write(folder, rows), "-m", model, *words).stderr


def test_equal_images_are_encoded_once_in_the_whole_file(answer, asked):
    rows = [{"prompt": f"<image:{i % 3}.png>The <image:copy of 0.png>cat", "id": i} for i in range(30)]
    result, _ = answer(rows, "--batch-size", 4, "--json")
    data = json.loads(result.stdout)
    assert sum(asked[1]) == data["images_encoded"] == 3 and data["images"] == 60
    assert all("vision_tokens" in kwargs for kwargs in asked[0])


@pytest.mark.matrix
def test_images_that_were_let_go_are_encoded_again(answer, asked, monkeypatch):
    """The twin of the above, with the same answers."""
    rows = [{"prompt": f"<image:{i % 3}.png>The cat", "id": i} for i in range(12)]
    _, wanted = answer(rows, out="kept.jsonl")
    asked[1].clear()
    monkeypatch.setattr(answers, "CACHE_BYTES", 1)
    assert answer(rows, "--batch-size", 1)[1] == wanted
    assert sum(asked[1]) > 3


@pytest.mark.parametrize("model", first_of(["open_gates", "kosmos"]))
def test_shots_that_rows_share_are_read_once(request, vlm, answer, folder, model):
    model, ends = request.getfixturevalue(model), ("cat", "dog and the cat", "mat", "cat and the dog")
    shots = "<image:0.png>The cat sat on the mat. <image:1.png>The dog sat on the mat. "
    rows = [{"prompt": f"{shots}<image:{i % 3}.png>The {end}"} for i, end in enumerate(ends)]
    result, written = answer(rows, "--json", model=model)
    assert [row["text"] for row in written] == [x["text"] for x in one_by_one(vlm, model, folder, rows)]
    reused = json.loads(result.stdout)["positions_reused"]
    assert reused % len(rows) == 0 and reused / len(rows) > 15
    alone = [{"prompt": f"<image:{i % 3}.png>{end}"} for i, end in enumerate(ends)]  # the twin
    assert json.loads(answer(alone, "--json", model=model, out="alone.jsonl")[0].stdout)["positions_reused"] == 0


def test_a_tokenizer_that_numbers_media_gets_pixels(vlm, answer, asked, parts, folder):
    numbered = folder / "numbered"
    flags = ("--set", "vision_tokenizer.max_num_media=2")
    assert vlm("build", numbered, *parts.kosmos, *flags, "--quiet").exit_code == 0
    rows = [{"prompt": f"<image:{i % 3}.png>The <image:0.png>cat"} for i in range(5)]
    result, written = answer([*rows, {"prompt": "<image:0.png>" * 3}], model=numbered, code=1)
    assert [row["text"] for row in written[:5]] == [x["text"] for x in one_by_one(vlm, numbered, folder, rows)]
    assert all("pixel_values" in kwargs for kwargs in asked[0])
    assert written[5]["error"] == "line 6: the prompt has 3 images, but the vision tokenizer was made for at most 2."


def test_worker_processes_give_the_same_and_hold_no_model(answer, open_gates):
    wanted = answer(PROMPTS, out="alone.jsonl")[1]
    assert answer(PROMPTS, workers=2)[1] == wanted
    model, processor = directory.load(str(open_gates), dtype="auto", device="cpu", trust_remote_code=False)
    held = pickle.dumps(Preprocessor(processor.image_processor, MediaLoader()))
    assert len(held) < 10_000 < len(pickle.dumps(model.vision_encoder.state_dict()))


def test_a_gallery_is_bounded_and_knows_equal_pixels():
    cache = ImageCache(2)
    first, second, third = Medium("a"), Medium("b"), Medium("a", "video")
    a, b = cache.find(first)[0], cache.find(second)[0]
    pixels = torch.rand(1, 3, 4, 4).numpy()
    for slot in (a, b):
        cache.fill(slot, Pixels(pixels.copy(), MediumSize()))
    assert a.image is b.image
    cache.fill(other := ImageSlot(), Pixels(pixels.copy(), MediumSize(1, 1, 1, 30, 40)))
    assert other.image is not a.image  # equal tiles of a picture with other bars
    assert cache.find(first) == (a, False)
    cache.find(third)
    assert cache.find(second)[1] and not cache.find(third)[1]  # the second was used longest ago
    cache.find(first, 2)
    assert cache.find(second)[1]  # a clip of two frames takes the place of two images


def test_a_language_model_that_mixes_its_rows_gets_one_at_a_time(answer, asked, monkeypatch):
    monkeypatch.setattr(choosing, "ONE_AT_A_TIME", {"llama": "why"})
    answer(PROMPTS, "--batch-size", 4)
    assert [len(kwargs["input_ids"]) for kwargs in asked[0]] == [1] * len(PROMPTS)


# -- how many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "found"), [(4, 4), (16, 16), (64, 64), (1000, 256)])
def test_a_batch_grows_while_that_is_faster(best, found):
    size = BatchSize()
    for _ in range(40):
        size.record(1, 0.001)  # too few rows to tell
        size.record(size.rows, 1.0 + max(0, size.rows - best))
    assert size.rows == found


@pytest.mark.parametrize(("best", "found"), [(4, 4), (16, 16), (64, 64), (1000, 256)])
@pytest.mark.parametrize("is_noisy", [False, True])
def test_slots_grow_while_that_is_faster(best, found, is_noisy):
    draw, size, sizes = random.Random(best), BatchSize(), []
    for _ in range(600):
        size.record_step(1, 0.001)  # slots that are not full tell nothing
        accident = 8.0 if is_noisy and draw.random() < 0.3 else 1.0
        size.record_step(size.rows, (1.0 + 0.05 * draw.random() + max(0, size.rows - best)) * accident)
        sizes.append(size.rows)
    assert size.rows == found
    assert is_noisy or sizes.index(found) <= 14
    # Sizes that are too large are tried for a few steps alone.
    assert sum(rows > found for rows in sizes) <= 12


@pytest.mark.parametrize(
    "error",
    first_of([torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]),
)
def test_where_memory_does_not_suffice_rows_are_halved_and_asked_again(answer, monkeypatch, error):
    wanted = answer(PROMPTS, out="enough.jsonl")[1]
    generate, sizes = VLM.generate, []

    def scarce(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise error
        return generate(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(VLM, "generate", scarce)
    result, written = answer(PROMPTS)
    assert written == wanted
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1, 1]
    assert "memory does not suffice for 4 rows at once; continuing with 2." in result.stderr


def test_where_memory_ends_within_the_slots_no_row_is_lost(answer, monkeypatch):
    wanted = answer(PROMPTS, out="enough.jsonl")[1]
    write, calls = SlotCache.write, []

    def scarce(self, slots, rows):
        found = write(self, slots, rows)
        calls.append(len(slots))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(SlotCache, "write", scarce)
    result, written = answer(PROMPTS)
    assert written == wanted and len(calls) > 2
    assert "memory does not suffice for" in result.stderr


def test_a_row_that_is_too_large_alone_is_an_error_and_others_go_on(answer, monkeypatch):
    generate = VLM.generate

    def scarce(self, input_ids, **kwargs):
        if input_ids.shape[1] > 20:
            raise torch.OutOfMemoryError
        return generate(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(VLM, "generate", scarce)
    _, written = answer([{"prompt": "cat"}, {"prompt": "cat " * 30}, {"prompt": "dog"}], code=1)
    assert ["error" in row for row in written] == [False, True, False]
    assert written[1]["error"].startswith("line 2: memory does not suffice for this row alone (")


def test_another_error_is_not_taken_for_lack_of_memory(vlm, open_gates, folder, monkeypatch):
    def broken(self, **kwargs):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(VLM, "generate", broken)
    words = [write(folder, PROMPTS), "-m", open_gates, "-o", folder / "out.jsonl", "--workers", 0]
    result = vlm("batch", *words)
    assert result.exit_code == 1 and "a shape is wrong" in result.stderr
    assert sorted(path.name for path in folder.glob("out*")) == []  # nothing was answered
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


def test_memory_bounds_a_batch(answer, asked, monkeypatch, open_gates):
    rows = [{"prompt": "The cat", "id": i} for i in range(8)]
    model, _ = directory.load(str(open_gates), dtype="auto", device="cpu", trust_remote_code=False)
    cost = RowCost(model)(12, 0)
    monkeypatch.setattr(choosing, "available_memory", lambda device: int(4.1 * cost))
    answer(rows, "--batch-size", 8)
    assert {len(kwargs["input_ids"]) for kwargs in asked[0]} <= {1, 2}
    assert RowCost(model)(12, 1000) > cost and RowCost(model, 3)(12, 0) > cost


# -- bad rows ----------------------------------------------------------------------------------------------------------


def test_bad_rows_are_told_in_place_and_others_go_on(answer, folder):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    good = {"prompt": "<image:0.png>The cat"}
    bad = [
        ('{"prompt": ', "not JSON"),
        ("[1]", "expected an object"),
        ('{"promt": "a", "id": 4}', "has no \"prompt\". Did you mean 'promt'?"),
        ({"prompt": 7}, '"prompt" must be text, got a number.'),
        ({"prompt": "<image>a", "id": "x"}, '1 bare <image> placeholder but no files were given with "images"'),
        ({"prompt": "<image>a", "images": ["0.png", "1.png"]}, "the 2nd file, '1.png', has no placeholder"),
        ({"prompt": "a", "images": "0.png"}, '"images" must be a list of files, got text.'),
        ({"prompt": "<image:none.png>a"}, "cannot find 'none.png'"),
        ({"prompt": "<image:0.png> and <image:cut.png>a"}, "'cut.png' is damaged or cut short"),
        ({"prompt": "<image:->a"}, "means standard input, which the rows of a file cannot share"),
        ({"prompt": "<image:https://example.com/a.png>a"}, "Add --allow-urls"),
        ({"prompt": "cat " * 3000}, "but the language model has 2048"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a", "text": "mine"}, '"text" is a key of the answer'),
        ({"prompt": "\ud800"}, "not UTF-8 text"),
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "not JSON"),
    ]
    rows = [good, *(line for pair in bad for line in (pair[0], good))]
    result, written = answer(rows, code=1)
    assert len(written) == len(rows)
    for number, (row, (line, message)) in enumerate(zip(written[1::2], bad, strict=True), start=1):
        assert row["error"].startswith(f"line {2 * number}: ") and message in row["error"]
        assert not set(ANSWER[1:]) & set(row)
        if isinstance(line, dict):
            assert {key: row[key] for key in line} == line
    assert len({row["text"] for row in written[::2]}) == 1
    assert f'{len(bad)} of {len(rows)} rows could not be answered; their lines have an "error".' in result.stderr
    assert (written[5]["id"], "error" in written[0]) == (4, False)


def test_blank_lines_are_passed_over_and_errors_of_before_forgotten(answer):
    _, written = answer(["", '{"prompt": "The cat", "error": "line 9: broken"}', "  "])
    assert len(written) == 1 and "error" not in written[0] and written[0]["text"]


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(vlm, open_gates, folder, monkeypatch):
    """A run that was interrupted when all was answered: its command, the bytes it left, and what it should write."""
    rows = [*PROMPTS[:3], '{"prompt": ', {"prompt": "é\u2028 \ud800"}, *PROMPTS[3:]]
    words = ["batch", write(folder, rows), "-m", open_gates, "-n", 3, "--workers", 0]
    assert vlm(*words, "-o", folder / "whole.jsonl").exit_code == 1

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupt)
        result = vlm(*words, "-o", folder / "out.jsonl")
    assert result.exit_code == 130 and "partial keeps 9 answers; run the same command to resume" in result.stderr
    return [*words, "-o", folder / "out.jsonl"], partial_of(folder / "out.jsonl"), (folder / "whole.jsonl").read_bytes()


@pytest.mark.matrix
def test_a_run_goes_on_wherever_it_was_cut(vlm, unfinished, folder):
    words, partial, wanted = unfinished
    whole = partial.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    places = {0, 1, 20, ends[0] - 1, ends[0] + 5, len(whole) - 1, len(whole), *ends, *(x - 1 for x in ends[::3])}
    for place in sorted(places | set(random.Random(0).sample(range(len(whole)), 10))):
        partial.write_bytes(whole[:place])
        result = vlm(*words)
        assert result.exit_code == 1, result.stderr
        assert (folder / "out.jsonl").read_bytes() == wanted, place
        assert not partial.exists()
        answered = sum(end <= place for end in ends[1:])
        assert (f"Resuming after {answered}" in result.stderr) == (answered > 0)
        (folder / "out.jsonl").unlink()


def test_the_header_is_that_of_earlier_versions(unfinished, open_gates):
    """So that a run of an earlier version resumes."""
    header = json.loads(unfinished[1].read_bytes().splitlines()[0])
    assert [header["vlm_batch"], header["replaces"]] == [1, False]
    digest = header["settings"].pop("the model's files")
    assert len(digest) == 16
    assert header["settings"] == {
        "--model": str(open_gates),
        "--dtype": "auto",
        "--quantize": None,
        "--special-tokens": False,
        "--max-new-tokens": 3,
        "--temperature": None,
        "--top-p": None,
        "--top-k": None,
        "--num-beams": 1,
        "--num-return-sequences": 1,
        "--repetition-penalty": 1.0,
        "--stop": None,
        "--seed": None,
    }


def test_what_is_answered_is_not_asked_again(vlm, unfinished, asked):
    words, partial, _ = unfinished
    kept = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(kept[:-2]))
    vlm(*words)
    assert sum(len(kwargs["input_ids"]) for kwargs in asked[0]) == 2


def test_another_run_is_not_gone_on_with(vlm, unfinished, folder, kosmos):
    words, partial, wanted = unfinished
    before = partial.read_bytes()

    def refused(*flags):
        result = vlm(*words, *flags)
        assert result.exit_code == 2 and partial.read_bytes() == before
        assert "--overwrite" in result.stderr
        return result.stderr

    assert "--temperature: was None, is 0.5" in refused("--temperature", 0.5)
    assert "--max-new-tokens: was 3, is 9" in refused("-n", 9)
    assert "--stop: was None, is ['a']" in refused("--stop", "a")
    assert f"is {str(kosmos)!r}" in refused("-m", kosmos)
    source = folder / "in.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:2], lines[2].replace("cat", "dog"), *lines[3:]]))
    assert "has another line 3 now" in refused()
    source.write_text("".join(lines[:4]))
    assert "now ends before row 5" in refused()
    # What was not answered may change.
    source.write_text("".join(lines) + '{"prompt": "The cat"}\n')
    assert vlm(*words).exit_code == 1
    out = (folder / "out.jsonl").read_bytes()
    assert out.startswith(wanted) and out.count(b"\n") == wanted.count(b"\n") + 1


def test_a_model_that_was_built_again_is_another(vlm, unfinished, open_gates):
    words, partial, _ = unfinished
    stamp = (open_gates / "model.safetensors").stat()
    os.utime(open_gates / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    try:
        result = vlm(*words)
    finally:
        os.utime(open_gates / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert result.exit_code == 2 and "the model's files: was" in result.stderr


def test_overwrite_starts_anew_and_replaces_only_at_the_end(vlm, unfinished, folder, monkeypatch):
    words, partial, wanted = unfinished
    out = folder / "out.jsonl"
    out.write_text("old")
    assert "exists. Choose another name, or add --overwrite" in vlm(*words).stderr
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vlm(*words, "--overwrite").exit_code == 130
    assert out.read_text() == "old" and not partial.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vlm(*words, "--overwrite").exit_code == 130
    # The same command resumes, for it was allowed to replace the file then.
    result = vlm(*words)
    assert result.exit_code == 1 and "Resuming after 9 rows" in result.stderr
    assert out.read_bytes() == wanted


@pytest.mark.sample(2)
@pytest.mark.parametrize("text", ["notes of mine\n", '{"vlm_batch": 1, "settings": 3}\n', '{"vlm_batch": 1, {\n'])
def test_a_file_of_another_is_no_unfinished_run(vlm, unfinished, text):
    words, partial, _ = unfinished
    partial.write_text(text)
    for flags in ((), ("--overwrite",)):
        result = vlm(*words, *flags)
        assert result.exit_code == 2 and "is not the journal of an unfinished run" in result.stderr
    assert partial.read_text() == text


def test_a_journal_that_somebody_edited_is_not_resumed(vlm, unfinished):
    words, partial, _ = unfinished
    header, row, *rest = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([header, row.replace(b'": ', b'" ', 1), *rest]))
    result = vlm(*words)
    assert result.exit_code == 2 and "is damaged at row 1. Add --overwrite" in result.stderr


def test_two_runs_do_not_write_one_file(vlm, unfinished, folder):
    words, partial, _ = unfinished
    script = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, partial], **pipes) as other:
        other.stdout.readline()
        result = vlm(*words)
        other.stdin.close()
    assert result.exit_code == 2 and "is being written by another vlm" in result.stderr


def test_a_full_disk_keeps_the_answers(vlm, unfinished, folder, monkeypatch):
    words, partial, wanted = unfinished

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = vlm(*words)
    assert result.exit_code == 1 and "No space left on device" in result.stderr and partial.exists()
    assert vlm(*words).exit_code == 1 and (folder / "out.jsonl").read_bytes() == wanted


@pytest.fixture
def long_run(open_gates, folder):
    """Words of a command that answers 100 rows with a worker process, two at once."""
    rows = [{"prompt": f"<image:{i % 3}.png>The cat " + "cat " * (i % 5), "id": i} for i in range(100)]
    words = ["batch", str(write(folder, rows)), "-m", str(open_gates), "-n", "12", "-b", "2"]
    return [*words, "--workers", "1", "-o"]


@pytest.mark.matrix
def test_a_killed_process_loses_and_repeats_no_row(vlm, long_run, folder):
    out, partial = folder / "out.jsonl", partial_of(folder / "out.jsonl")
    process = command.start(*long_run, out)
    deadline = time.monotonic() + 100
    while not partial.exists() or partial.read_bytes().count(b"\n") < 5:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and partial.exists() and not out.exists()
    result = vlm(*long_run, out, "-b", 32)
    assert result.exit_code == 0 and "Resuming after" in result.stderr
    assert vlm(*long_run, folder / "whole.jsonl", "-b", 32).exit_code == 0
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()


@pytest.mark.matrix
def test_ctrl_c_keeps_the_answers_and_ends_the_workers(vlm, long_run, folder, monkeypatch):
    show = ProgressLine.show

    def interrupt(self, done):
        show(self, done)
        if done == 6:
            assert multiprocessing.active_children()
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "show", interrupt)
        result = vlm(*long_run, folder / "out.jsonl")
    assert result.exit_code == 130 and "keeps 6 answers; run the same command to resume" in result.stderr
    assert not multiprocessing.active_children()
    assert "Resuming after 6 rows" in vlm(*long_run, folder / "out.jsonl", "-b", 32).stderr


# -- what is said, and refused -----------------------------------------------------------------------------------------


def test_generate_with_batch_is_batch(vlm, answer, open_gates, folder, monkeypatch):
    wanted = answer(PROMPTS, out="whole.jsonl")[1]
    words = ["-m", open_gates, "-n", 6, "--workers", 0, "-b", 3, "-o", folder / "out.jsonl"]
    result = vlm("generate", "--batch", folder / "in.jsonl", *words)
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()] == wanted
    # A run under one name resumes under the other.
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vlm("generate", "--batch", folder / "in.jsonl", *words, "--overwrite").exit_code == 130
    assert "Resuming after 7 rows" in vlm("batch", folder / "in.jsonl", *words).stderr


def test_summary_and_statistics(answer):
    result, _ = answer(PROMPTS, "--stats")
    assert result.stdout == ""
    assert "7 rows, 0 failed, " in result.stderr and "3 images encoded of 9 used" in result.stderr
    assert "peak memory" in result.stderr and "Wrote " in result.stderr
    data = json.loads(answer(PROMPTS, "--json", out="other.jsonl")[0].stdout)
    assert (data["rows"], data["failed"], data["earlier"], data["new_tokens"]) == (7, 0, 0, 42)


def test_prompts_from_stdin(vlm, answer, open_gates, folder, monkeypatch):
    wanted = answer(PROMPTS, out="file.jsonl")[1]
    monkeypatch.chdir(folder)  # where its paths start
    words = ["batch", "-", "-m", open_gates, "-o", "out.jsonl", "-n", 6, "--workers", 0]
    result = vlm(*words, input=(folder / "in.jsonl").read_bytes())
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()] == wanted
    assert "holds no prompts" in vlm(*words, "--overwrite", input=b"\n").stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "out.jsonl"], "--output is an option of `vlm batch FILE`, which answers a file of prompts"),
        (["hello", "--workers", 1], "--workers is an option of `vlm batch FILE`"),
        (["hello", "-b", 3], "--batch-size is an option of `vlm batch FILE`"),
        (["--batch", "in.jsonl"], "no output file is named: vlm batch in.jsonl --output OUT.jsonl"),
        (["--batch", "in.jsonl", "-o", "./in.jsonl"], "are the same file"),
        (
            ["--batch", "in.jsonl", "-o", "out.jsonl", "hello"],
            "PROMPT is no option of `vlm batch`. Leave out PROMPT or --batch",
        ),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "-p", ""], "--prompt is no option of `vlm batch`"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "-f", "in.jsonl"], "--prompt-file is no option of `vlm batch`"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "-i", "0.png"], "--image is no option of `vlm batch`"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "--dry-run"], "--dry-run is no option of `vlm batch`"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "--no-stream"], "--no-stream is no option of `vlm batch`"),
        (
            ["--batch", "in.jsonl", "-o", "out.jsonl", "-b", "0"],
            "expects auto or a number of rows from 1 to 65,536, got '0'",
        ),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "-b", "many"], "got 'many'"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "--temperature", 0, "--top-k", 3], "--temperature 0 is greedy"),
    ],
)
def test_flags_that_do_not_go_together(vlm, folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    write(folder, PROMPTS)
    result = vlm("generate", *flags)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize(
    ("source", "output", "code", "message"),
    [
        ("none.jsonl", "out.jsonl", 1, "cannot find the records 'none.jsonl'"),
        ("below", "out.jsonl", 1, "is a directory without files of records"),
        ("empty.jsonl", "out.jsonl", 1, "'empty.jsonl' holds no prompts"),
        ("in.jsonl", "no/out.jsonl", 1, "the folder"),
        ("in.jsonl", ".", 2, "is a directory or a device"),
    ],
)
def test_files_that_cannot_be_used(vlm, folder, monkeypatch, source, output, code, message):
    monkeypatch.chdir(folder)
    write(folder, PROMPTS)
    write(folder, [""], "empty.jsonl")
    (folder / "below").mkdir()
    result = vlm("batch", source, "-o", output)
    assert result.exit_code == code and message in result.stderr
    assert not list(folder.glob("out*"))


# -- what other people may read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_do_not_tell_what_files_hold(workers, answer, folder):
    (folder / "passwd").write_text("root:x:0:0:root:/root:/bin/bash")
    (folder / "salaries.png").touch()
    rows = [{"prompt": f"<image:{name}>a"} for name in ("passwd", "salarie.png", ".")]
    result, written = answer(rows, "--workers", workers, code=1)
    errors = [row["error"] for row in written]
    assert errors[0] == (
        "line 1: 'passwd' is not an image that Pillow can read (text). Give a PNG, JPEG, WebP or the like."
    )
    assert errors[1] == "line 2: cannot find 'salarie.png'."
    assert errors[2] == "line 3: '.' is a directory. Give one of its files."
    # The user sees more.
    assert "line 1: 'passwd' is not an image that Pillow can read: it begins with b'root:x:0:0:r'" in result.stderr
    assert "line 2: cannot find 'salarie.png': there is no" in result.stderr and "'salaries.png'" in result.stderr


# -- pipes and numbers -------------------------------------------------------------------------------------------------


def test_answers_go_to_stdout(vlm, open_gates, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "The cat", "id": 1}, {"prompt": "", "id": 2}, {"prompt": "The dog", "id": "naïve"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("-m", open_gates, "-n", 4)
    assert vlm("batch", "rows.jsonl", "-o", "out.jsonl", *words).exit_code == 1
    printed = vlm("batch", "rows.jsonl", "-o", "-", *words)
    assert printed.exit_code == 1 and printed.stdout == (tmp_path / "out.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
    for flag, says in (("--json", "both write to stdout"), ("--overwrite", "has nothing to replace")):
        refused = vlm("batch", "rows.jsonl", "-o", "-", *words, flag)
        assert refused.exit_code == 2 and says in refused.stderr and not refused.stdout


def test_a_pipe_is_read_once(vlm, open_gates, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(photo.parent)
    row = json.dumps({"prompt": f"<image:{photo.name}>The cat"}).encode()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n")
    # Another process writes: of a thread, the command's workers would inherit the open pipe, which then has no end.
    writer = subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', tmp_path / "rows", tmp_path / "pipe"])
    piped = vlm("batch", tmp_path / "pipe", "-o", "-", "-m", open_gates, "-n", 4)
    assert writer.wait(30) == 0
    assert piped.exit_code == 0, piped.stderr
    assert (
        json.loads(piped.stdout)["text"]
        == json.loads(vlm("batch", "-", "-o", "-", "-m", open_gates, "-n", 4, input=row).stdout)["text"]
    )


def test_numbers_that_json_cannot_write_are_refused(vlm, open_gates, tmp_path):
    rows = '{"prompt": "a", "n": 1e400, "id": 1}\n{"prompt": "a", "n": [NaN], "id": 2}\n{"prompt": "a"}\n'
    result = vlm("batch", "-", "-o", tmp_path / "out.jsonl", "-m", open_gates, "-n", 1, input=rows)
    assert result.exit_code == 1

    def refuse(word):
        raise AssertionError(word)

    first, second, third = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    )
    assert first["id"] == 1 and first["error"] == second["error"].replace("line 2", "line 1")
    assert '"n" holds a number that JSON cannot write' in first["error"] and "error" not in third
