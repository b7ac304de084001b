"""`vlm generate`: what reaches the model, what is printed where, and when it ends."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import os
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import vlm_cli.checkpoint.directory as directory
from vlm_cli import VLM, load
from vlm_cli.cli import console, prompts
from vlm_cli.cli.standard_streams import find_piped_picture
from vlm_cli.decoding import decode_after
from vlm_cli.generation.stopping import cut_at_stop
from vlm_cli.generation.text_stream import TextStream

PROMPT = "<image>The cat"


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Commands of this module share what they load. Each has a copy of the model, since some change it."""
    read = functools.cache(directory.load)

    def load_copy(*arguments, **keywords):
        model, processor = read(*arguments, **keywords)
        return copy.deepcopy(model), processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "load", load_copy)
        yield


@pytest.fixture
def generate(vlm, open_gates, photo):
    def run(*flags, prompt=PROMPT, images=1, **keywords):
        words = [] if prompt is None else [prompt]
        pictures = [x for _ in range(images) for x in ("-i", photo)]
        return vlm("generate", "-m", open_gates, *words, *pictures, "-n", 8, *flags, **keywords)

    return run


@pytest.fixture
def asked(monkeypatch):
    """Keyword arguments that reach `VLM.generate`."""
    found = {}
    original = VLM.generate

    def spy(self, *args, **kwargs):
        found.update(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VLM, "generate", spy)
    return found


@pytest.fixture
def answers(monkeypatch):
    """Makes the model answer with given rows of token ids."""

    def answer(*rows):
        def fake(self, input_ids, streamer=None, **kwargs):
            if streamer is not None:
                streamer.put(input_ids)
                for token in rows[0]:
                    streamer.put(torch.tensor([token]))
                streamer.end()
            prompt = input_ids.repeat(len(rows), 1)
            return torch.cat([prompt, torch.tensor(rows)], dim=1)

        monkeypatch.setattr(VLM, "generate", fake)

    return answer


# -- what is printed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--temperature", 1, "--seed", 3)])
def test_stream_block_and_json_give_the_same_text(generate, flags):
    streamed, whole = generate(*flags), generate(*flags, "--no-stream")
    data = json.loads(generate(*flags, "--json").stdout)
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout == whole.stdout == data["text"] + "\n"
    assert data["text"]


def test_stdout_has_new_text_and_nothing_else(generate, photo):
    result = generate("--stats")
    assert "The cat" not in result.stdout and "<image>" not in result.stdout
    assert f"Image {photo} (40x30 → " in result.stderr
    assert re.search(
        r"\d+ prompt tokens \(\d+ positions\), 8 new tokens in [\d.]+ s \([\d.]+ tokens/s\), load [\d.]+ s, "
        r"peak memory [\d.]+ [MG]B",
        result.stderr,
    )
    assert "peak memory" not in generate().stderr


def test_greedy_is_what_the_model_says(generate, open_gates, photo):
    model, processor = load(str(open_gates))
    batch = processor(text=PROMPT, images=[Image.open(photo)])
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert generate("--no-stream").stdout == processor.decode(ids, skip_special_tokens=True) + "\n"


def test_a_prompt_file_goes_with_any_source(vlm, open_gates, photo, tmp_path):
    """Paths of the command line start at the current folder; a long source is no file name."""
    (tmp_path / "prompt.txt").write_text("A photo of")
    uri = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    words = ("generate", "-m", open_gates, "-n", 4, "-f", tmp_path / "prompt.txt", "-i")
    texts = {vlm(*words, source).stdout for source in (photo, uri)}
    assert len(texts) == 1 and texts != {""}
    assert "Error: OSError" not in vlm(*words, "x" * 300).stderr


def test_the_image_matters(generate, open_gates, vlm, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "other.png")
    other = vlm("generate", "-m", open_gates, PROMPT, "-i", tmp_path / "other.png", "-n", 8)
    assert other.exit_code == 0 and other.stdout != generate().stdout


def test_json_says_what_was_asked_and_given(generate, open_gates, photo):
    data = json.loads(generate("--json", "--seed", 5, prompt="<image>The <image>cat", images=2).stdout)
    assert data["model"] == str(open_gates)
    assert data["prompt"] == f"<image:{photo}>The <image:{photo}>cat"
    assert data["images"] == 2 * [{"source": str(photo), "width": 40, "height": 30}]
    assert (data["new_tokens"], data["finish_reason"], data["seed"]) == (8, "length", 5)
    assert data["prompt_positions"] == data["prompt_tokens"]
    assert data["sequences"] == [{key: data[key] for key in ("text", "new_tokens", "finish_reason")}]


def test_positions_of_the_language_stream_count_vision_tokens(vlm, kosmos, photo):
    data = json.loads(vlm("generate", "-m", kosmos, PROMPT, "-i", photo, "-n", 1, "--json").stdout)
    assert data["prompt_positions"] == data["prompt_tokens"] - 1 + 6


def test_dry_run_shows_the_layout_and_generates_nothing(generate, asked, vlm, open_gates):
    data = json.loads(generate("--dry-run", "--json").stdout)
    assert [span["kind"] for span in data["spans"]] == ["medium", "text"] and not asked
    table = generate("--dry-run")
    assert "Sees media" in table.stdout and "tokens at" in table.stdout
    batch = load(str(open_gates))[1](text=PROMPT, images=[Image.new("RGB", (8, 8))])
    assert data["ids"] == batch["input_ids"][0].tolist()


# -- sampling ----------------------------------------------------------------------------------------------------------

GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "max_new_tokens": 8,
}
SAMPLE = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ((), {}),
        (("--temperature", 0), {}),
        (("--temperature", 0.5), SAMPLE | {"temperature": 0.5}),
        (("--top-p", 0.9), SAMPLE | {"top_p": 0.9}),
        (("--top-k", 3), SAMPLE | {"top_k": 3}),
        (("--temperature", 2, "--top-k", 3, "--top-p", 0.5), SAMPLE | {"temperature": 2.0, "top_k": 3, "top_p": 0.5}),
        (("--num-beams", 3), {"num_beams": 3}),
        (("--num-beams", 3, "--num-return-sequences", 2), {"num_beams": 3, "num_return_sequences": 2}),
        (("--temperature", 1, "--num-return-sequences", 2), SAMPLE | {"num_return_sequences": 2}),
        (("--repetition-penalty", 1.3), {"repetition_penalty": 1.3}),
        (("-n", 3), {"max_new_tokens": 3}),
        (("--max-tokens", 3), {"max_new_tokens": 3}),
        (("--max-new-tokens", 3), {"max_new_tokens": 3}),
    ],
)
def test_each_flag_reaches_the_model(generate, asked, flags, changed):
    result = generate(*flags)
    assert result.exit_code == 0, result.stderr
    assert {key: asked[key] for key in GREEDY} == GREEDY | changed


def test_flags_beat_the_generation_config_of_the_model(vlm, open_gates, tmp_path, photo):
    own = shutil.copytree(open_gates, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 50, "repetition_penalty": 3.0}
    (own / "generation_config.json").write_text(json.dumps(config | sampling))
    flags = (PROMPT, "-i", photo, "-n", 8)
    assert vlm("generate", "-m", own, *flags).stdout == vlm("generate", "-m", open_gates, *flags).stdout


@pytest.mark.matrix
def test_a_seed_makes_samples_repeatable(generate):
    flags = ("--temperature", 3, "-n", 16)
    first = generate(*flags, "--seed", 1).stdout
    assert generate(*flags, "--seed", 1).stdout == first
    assert generate(*flags, "--seed", 2).stdout != first


def test_beams_and_several_answers(generate, open_gates, photo):
    model, processor = load(str(open_gates))
    batch = processor(text=PROMPT, images=[Image.open(photo)])
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=3, num_return_sequences=2)
    wanted = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    result = generate("--num-beams", 3, "--num-return-sequences", 2)
    assert result.stdout == "\n".join(wanted) + "\n"
    data = json.loads(generate("--num-beams", 3, "--num-return-sequences", 2, "--json").stdout)
    assert [sequence["text"] for sequence in data["sequences"]] == wanted and data["text"] == wanted[0]


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts.language_model)


def finish(generate, *flags):
    data = json.loads(generate("--json", *flags).stdout)
    return data["text"], data["new_tokens"], data["finish_reason"]


def test_a_stop_token_ends_the_answer(generate, answers, tokenizer):
    ids = tokenizer(" a dog").input_ids
    answers([*ids, 466, 7, 7])  # <|endofchunk|>
    assert finish(generate) == (" a dog", len(ids) + 1, "stop_token")
    answers([*ids, 1, 468, 468])  # </s>, padding
    assert finish(generate) == (" a dog", len(ids) + 1, "stop_token")


def test_a_stop_token_that_is_no_special_token_is_not_text(vlm, open_gates, answers, tokenizer, tmp_path):
    own = shutil.copytree(open_gates, tmp_path / "own")
    [comma] = tokenizer(",").input_ids[-1:]
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, comma]}))
    ids = tokenizer(" a dog").input_ids
    answers([*ids, comma, 7])
    for flags in ((), ("--no-stream",)):
        assert vlm("generate", "-m", own, "The cat", "-n", 8, *flags).stdout == " a dog\n"
    # The twin: with another stop token, it is text.
    assert "," in vlm("generate", "-m", open_gates, "The cat", "-n", 8).stdout


def test_length_ends_the_answer(generate, answers, tokenizer):
    ids = tokenizer(" a dog and cat").input_ids[:4]
    answers(ids)
    assert finish(generate, "-n", 4)[1:] == (4, "length")


def test_a_stop_string_cuts_the_answer(generate, answers, tokenizer):
    ids = tokenizer(" a dog. Question: What").input_ids
    answers(ids)
    for stream in ((), ("--no-stream",)):
        assert generate("--stop", "Question", *stream).stdout == " a dog. \n"
        assert generate("--stop", "What", "--stop", "dog", *stream).stdout == " a \n"
    length = len(tokenizer(" a dog.").input_ids)  # what follows is not counted
    assert finish(generate, "--stop", ".", "-n", len(ids)) == (" a dog", length, "stop_string")


def test_answers_that_stop_sooner_than_others_are_not_counted_with_their_padding(generate, answers, tokenizer):
    short, long = tokenizer(" dog.").input_ids, tokenizer(" The cat sits on the mat").input_ids
    answers(short + [468] * (len(long) - len(short)), long)
    flags = ("--json", "--temperature", 1, "--num-return-sequences", 2, "--stop", ".", "-n", len(long))
    found = json.loads(generate(*flags).stdout)["sequences"]
    assert [(x["text"], x["new_tokens"], x["finish_reason"]) for x in found] == [
        (" dog", len(short), "stop_string"),
        (" The cat sits on the mat", len(long), "length"),
    ]


def test_the_model_itself_stops_at_a_stop_string(generate):
    text = json.loads(generate("--json", "-n", 12).stdout)["text"]
    stop = text[3:5]
    data = json.loads(generate("--json", "-n", 12, "--stop", stop).stdout)
    assert data["text"] == text[: text.find(stop)]
    assert data["finish_reason"] == "stop_string" and data["new_tokens"] < 12
    assert generate("-n", 12, "--stop", stop).stdout == data["text"] + "\n"


def test_the_context_bounds_the_answer(vlm, open_gates, asked):
    result = vlm("generate", "-m", open_gates, " cat" * 2043, "-n", 4000, "--json")
    positions = json.loads(vlm("generate", "-m", open_gates, " cat" * 2043, "--dry-run", "--json").stdout)["positions"]
    assert asked["max_new_tokens"] == 2048 - positions
    assert f"leaves room for {2048 - positions} new tokens" in result.stderr


def test_a_length_by_another_name_bounds_the_answer(vlm, parts, example, tmp_path):
    """MPT calls its context `max_seq_len`."""
    tokenizer = example.make_tokenizer()
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 12, "vocab_size": len(tokenizer)}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes, bos_token_id=0, eos_token_id=1))
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    out = tmp_path / "out"
    assert vlm("build", out, *parts.flamingo, "--language-model", tmp_path / "lm").exit_code == 0
    result = vlm("generate", "-m", out, "The cat sits", "-n", 30, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 12 - json.loads(result.stdout)["prompt_tokens"]


def test_more_images_than_the_tokenizer_takes_are_refused(vlm, parts, photo, tmp_path):
    flags = ("--set", "vision_tokenizer.max_num_media=2", "--quiet")
    assert vlm("build", tmp_path / "out", *parts.kosmos, *flags).exit_code == 0
    pictures = [x for _ in range(3) for x in ("-i", photo)]
    result = vlm("generate", "-m", tmp_path / "out", "<image>" * 3, *pictures)
    assert result.exit_code == 2 and not result.stdout
    assert "the prompt has 3 images, but the vision tokenizer was made for at most 2." in result.stderr


def stream(tokenizer, ids, stops=()):
    """Pieces as they are written, one token at a time."""
    pieces = []
    streamer = TextStream(partial(decode_after, tokenizer), pieces.append, stops)
    streamer.put(torch.tensor([[5, 5, 5]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


HALF = "\N{REPLACEMENT CHARACTER}"  # how an unfinished character is decoded


@pytest.mark.parametrize("text", ["héllo wörld", "日本語の猫", "a 👩‍🚀 b🎉", f"{HALF} x {HALF}"])
def test_no_half_characters_are_streamed(tokenizer, text):
    ids = tokenizer(text).input_ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    if HALF not in text:
        assert len(ids) > len(pieces) > 1
        assert not any(HALF in piece for piece in pieces)
        assert any(HALF in tokenizer.decode(ids[:n]) for n in range(len(ids)))  # the twin: they are there


@pytest.mark.parametrize("stop", ["END", "ND", "E", "the END of", "zzz", "dog"])
def test_no_part_of_a_stop_string_is_streamed(tokenizer, stop):
    text = "The cat EN END of the END of dogs"
    pieces = stream(tokenizer, tokenizer(text).input_ids, [stop])
    assert "".join(pieces) == cut_at_stop(text, [stop])


def test_what_may_become_a_stop_string_waits(tokenizer):
    ids = [i for word in ("cat", "E", "N", "X") for i in tokenizer(word).input_ids]
    pieces = stream(tokenizer, ids, ["END"])
    assert pieces[-1].startswith("EN") and "".join(pieces) == "catENX"


# -- where the prompt comes from ---------------------------------------------------------------------------------------


def test_a_prompt_is_an_argument_an_option_a_file_or_stdin(generate, tmp_path):
    wanted = generate().stdout
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert generate("-p", PROMPT, prompt=None).stdout == wanted
    assert generate("--prompt-file", file, prompt=None).stdout == wanted
    assert generate("-f", file, prompt=None).stdout == wanted
    assert generate(prompt=None, input=PROMPT + "\n").stdout == wanted
    assert generate(prompt="-", input=PROMPT).stdout == wanted
    assert generate(prompt=PROMPT + "s").stdout != wanted


def test_an_image_is_a_path_stdin_or_a_data_uri(vlm, generate, open_gates, photo):
    wanted = generate().stdout
    data = photo.read_bytes()
    flags = ("generate", "-m", open_gates, "-n", 8)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for prompt, images, stdin in (
        (f"<image:{photo}>The cat", [], None),
        (PROMPT, ["-i", "-"], data),
        ("<image:->The cat", [], data),
        (PROMPT, ["-i", uri], None),
        (f"<image:{uri}>The cat", [], None),
    ):
        result = vlm(*flags, prompt, *images, input=stdin)
        assert result.stdout == wanted, result.stderr


def test_paths_in_a_prompt_file_start_at_its_folder(vlm, generate, open_gates, photo, tmp_path, monkeypatch):
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "a photo.png").write_bytes(photo.read_bytes())
    (folder / "prompt.txt").write_text("<image:a photo.png>The cat")
    flags = ("generate", "-m", open_gates, "-n", 8)
    assert vlm(*flags, "-f", folder / "prompt.txt").stdout == generate().stdout
    # …and paths on the command line start here.
    monkeypatch.chdir(photo.parent)
    (folder / "prompt.txt").write_text(PROMPT)
    assert vlm(*flags, "-f", folder / "prompt.txt", "-i", photo.name).stdout == generate().stdout


def test_images_come_first_where_no_placeholder_says_otherwise(generate):
    result = generate(prompt="The cat")
    assert result.stdout == generate().stdout
    assert "the images come first" in result.stderr


def test_a_literal_placeholder_is_text(vlm, open_gates):
    result = vlm("generate", "-m", open_gates, r"\<image> is a tag", "--dry-run", "--json")
    data = json.loads(result.stdout)
    assert [span["content"] for span in data["spans"]] == ["<image> is a tag"]
    assert load(str(open_gates))[0].config.media_token_id not in data["ids"]


def test_special_tokens_are_text_unless_asked_for(vlm, open_gates):
    def ids(*flags):
        result = vlm("generate", "-m", open_gates, "a<|endofchunk|>", "--dry-run", "--json", *flags)
        return json.loads(result.stdout)["ids"]

    assert 466 not in ids() and ids("--special-tokens")[-1] == 466


def test_a_prompt_of_text_gives_what_the_bare_language_model_gives(vlm, parts, flamingo):
    lm = AutoModelForCausalLM.from_pretrained(parts.language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(parts.language_model)
    inputs = tokenizer("The cat sits", return_tensors="pt", return_token_type_ids=False)
    ids = lm.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    result = vlm("generate", "-m", flamingo, "The cat sits", "-n", 8)
    assert result.stdout == tokenizer.decode(ids) + "\n"


def test_dtype_and_device(generate, monkeypatch):
    result = generate("--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0 and "on cpu, bfloat16" in result.stderr
    assert "on cpu, float32" in generate("--device", "cpu").stderr


# -- where a prompt comes from -----------------------------------------------------------------------------------------


@pytest.mark.sample(2)
def test_a_prompt_is_the_same_wherever_it_comes_from(vlm, open_gates, tmp_path):
    raw = b"\xef\xbb\xbfThe cat\r\n"
    (tmp_path / "prompt.txt").write_bytes(raw)
    words = ("generate", "-m", open_gates, "-n", 1, "--json")
    found = [
        vlm(*words, "-f", tmp_path / "prompt.txt"),
        vlm(*words, "-f", "-", input=raw),
        vlm(*words, "-", input=raw),
        vlm(*words, raw.decode().rstrip("\n")),
        vlm(*words, "-p", "The cat"),
    ]
    assert [result.exit_code for result in found] == [0] * len(found)
    assert len({(x["text"], x["prompt_tokens"]) for x in (json.loads(result.stdout) for result in found)}) == 1


def test_a_picture_on_stdin_that_is_not_shown_is_refused(vlm, open_gates, photo, monkeypatch):
    monkeypatch.setattr(prompts, "find_piped_picture", lambda: "PNG")
    refused = vlm("generate", "-m", open_gates, "The cat", "-n", 1)
    assert refused.exit_code == 2 and not refused.stdout
    assert "stdin holds a picture (PNG), and the prompt does not show it. Add --image -" in refused.stderr
    shown = vlm("generate", "-m", open_gates, "The cat", "-i", "-", "-n", 1, input=photo.read_bytes())
    assert shown.exit_code == 0, shown.stderr
    given = vlm("generate", "-m", open_gates, "-", input=photo.read_bytes())
    assert given.exit_code == 2 and "the prompt on stdin is a picture (PNG), not text" in given.stderr


def test_a_picture_that_waits_on_stdin_stays_there(photo, monkeypatch):
    data = photo.read_bytes()
    with photo.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert (find_piped_picture(), file.tell()) == ("PNG", 0)
    there, here = os.pipe()
    with os.fdopen(there, "rb") as read, os.fdopen(here, "wb") as write:
        monkeypatch.setattr(sys, "stdin", read)
        assert find_piped_picture() is None  # nothing waits, and nothing is waited for
        write.write(data[:1000])
        write.flush()
        assert find_piped_picture() == ("PNG" if sys.platform == "linux" else None)
        assert os.read(there, 1000) == data[:1000]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16"])
def test_json_is_utf_8_whatever_the_locale(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    console.print_json({"name": "naïve 😀", "loss": float("inf")})
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode("utf-8")) == {"name": "naïve 😀", "loss": None}
