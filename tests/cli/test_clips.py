"""Clips through every command: the same frames, counted before they are decoded, in any company."""

from __future__ import annotations

import json
import random
import re

import pytest
from PIL import Image

from tests.support.clips import frame, write_animation, write_video
from vlm_cli.checkpoint import directory
from vlm_cli.training.dataset import load_dataset

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip, an animation, a folder of frames and an image."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "clip.mp4").write_bytes(write_video())
    (folder / "moving.gif").write_bytes(write_animation(9, "GIF"))
    (folder / "frames").mkdir()
    for i in range(5):
        frame(6 * i).save(folder / "frames" / f"{i}.png")
    Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3 * 40 * 30)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def stream(vlm, parts):
    """A model that has a position for each patch of each frame."""
    out = parts.folder / "stream-of-patches"
    flags = ["--set", "vision_tokenizer={type: linear}", "--set", "fusion={type: language-stream}"]
    result = vlm("build", out, *parts.named, "--family", "llava", *flags, "--quiet")
    assert result.exit_code == 0, result.stderr
    return out


ROWS = [
    {"prompt": "<video:clip.mp4?frames=3>The cat"},
    {"prompt": "<image:photo.png>The <video>dog", "videos": ["moving.gif?frames=5"]},
    {"prompt": "<video><image><video:frames>mat", "videos": ["clip.mp4?fps=2&start=1"], "images": ["photo.png"]},
    {"prompt": "The dog"},
    {"prompt": "a photo of", "images": ["photo.png"], "videos": ["clip.mp4?frames=3"]},
]


def ask(vlm, model, folder, row):
    (folder / "prompt.txt").write_text(row["prompt"])
    files = [x for kind in ("image", "video") for name in row.get(f"{kind}s", ()) for x in (f"--{kind}", folder / name)]
    result = vlm("generate", "-m", model, "-f", folder / "prompt.txt", *files, "-n", 6, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("model", "rows", "counts"),
    [("stream", ROWS[1:3], (5, 4)), ("stream", ROWS, (8, 5)), ("open_gates", ROWS, (8, 5)), ("kosmos", ROWS, (8, 5))],
    ids=["two rows", "stream", "open_gates", "kosmos"],
)
def test_a_batch_answers_clips_as_one_by_one(request, vlm, folder, model, rows, counts, tmp_path):
    model = request.getfixturevalue(model)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("-m", model, "-n", 6, "--workers", 0, "--json")
    result = vlm("batch", folder / "rows.jsonl", "-o", tmp_path / "out.jsonl", *flags)
    assert result.exit_code == 0, result.stderr
    written = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [ask(vlm, model, folder, row)["text"] for row in rows]
    found = json.loads(result.stdout)
    assert (found["images"], found["images_encoded"]) == counts


def test_the_answer_is_that_to_the_frames(vlm, folder, open_gates):
    """The frames of an animation without loss are known, so the processor can be given them by hand."""
    model, processor = directory.load(str(open_gates), dtype="auto", device="cpu", trust_remote_code=False)
    texts = {}
    for indices in ((0, 4, 8), (8, 4, 0), (0, 0, 0)):
        inputs = processor(text="<video>The cat", images=[[[frame(i) for i in indices]]])
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts[indices] = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = ask(vlm, open_gates, folder, {"prompt": "<video:moving.gif?frames=3>The cat"})
    assert found["text"] == texts[0, 4, 8] != texts[0, 0, 0]
    assert found["images"][0]["frames"] == [0, 4, 8] and found["images"][0]["seconds"] == [0.0, 0.4, 0.8]


@pytest.mark.sample(1)
@pytest.mark.parametrize("model", ["stream", "open_gates"])
def test_a_chat_shows_clips_in_any_turn(request, vlm, folder, model):
    model = request.getfixturevalue(model)
    turns = [
        f"<image:{folder}/photo.png>The cat",
        "and the dog",
        f"<video:{folder}/clip.mp4?frames=3>The mat",
        f"<image:{folder}/photo.png>sits",
    ]
    result = vlm("chat", model, "-n", 4, "--json", input="".join(f"{turn}\n" for turn in turns))
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    said = ""
    for turn, answer in zip(turns, answers, strict=True):
        said += ("\n" if said else "") + turn
        (folder / "said.txt").write_text(said)
        alone = json.loads(vlm("generate", "-m", model, "-f", folder / "said.txt", "-n", 4, "--json").stdout)
        assert (answer["text"], answer["prompt_positions"]) == (alone["text"], alone["prompt_positions"])
        said += answer["text"]
    assert answers[3]["reused_positions"] > answers[2]["reused_positions"] > 0


@pytest.fixture(scope="module")
def timed(vlm, parts):
    """A model whose composition puts the times of frames before each clip."""
    out = parts.folder / "timed"
    text = "tiling={type: none, clip_text: '{frames} frames at {times} of {seconds} s: {views}'}"
    result = vlm("build", out, *parts.kosmos, "--set", text, "--quiet")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.mark.matrix
def test_times_stand_before_a_clip(vlm, folder, timed, kosmos):
    """It is the text that a user types for a model without it."""
    clip, text = "clip.mp4?frames=3", "3 frames at 0.00, 1.40, 2.90 of 3.00 s: "
    typed = f"The {text}<video:{folder}/{clip}>cat"
    wanted = json.loads(vlm("inspect", kosmos, "--prompt", typed, "--json").stdout)["ids"]
    prompt = f"The <video:{folder}/{clip}>cat"
    assert json.loads(vlm("inspect", timed, "--prompt", prompt, "--json").stdout)["ids"] == wanted
    result = vlm("generate", "-m", timed, f"<video:{folder}/frames>The", "-n", 2)
    assert result.exit_code == 1 and "frames, which have no times, but the model's clip_text names" in result.stderr


@pytest.mark.matrix
def test_every_command_writes_the_times(vlm, folder, timed, tmp_path):
    prompt = f"The <video:{folder}/clip.mp4?frames=3>cat"
    wanted = json.loads(vlm("inspect", timed, "--prompt", prompt, "--json").stdout)["ids"]
    assert json.loads(vlm("generate", "-m", timed, prompt, "--dry-run", "--json").stdout)["ids"] == wanted
    answer = json.loads(vlm("generate", "-m", timed, prompt, "-n", 4, "--json").stdout)
    assert answer["prompt_tokens"] == len(wanted)
    chat = json.loads(vlm("chat", timed, "-n", 4, "--json", input=f"{prompt}\n").stdout)
    assert (chat["text"], chat["prompt_positions"]) == (answer["text"], answer["prompt_positions"])
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": prompt}))
    vlm("batch", folder / "rows.jsonl", "-o", tmp_path / "out.jsonl", "-m", timed, "-n", 4, "--workers", 0)
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == answer["text"]
    (folder / "records.jsonl").write_text(json.dumps({"prompt": prompt, "completion": " x"}))
    model, processor = directory.load(str(timed), dtype="auto", device="cpu", trust_remote_code=False)
    assert load_dataset(folder / "records.jsonl", model, processor).ids.tolist()[: len(wanted)] == wanted


def test_positions_are_counted_from_the_header(vlm, folder, stream, monkeypatch):
    """16 patches of each frame."""
    import vlm_cli.media.video as video

    monkeypatch.setattr(video.VideoFile, "read", lambda *args: pytest.fail("decoded"))
    monkeypatch.setattr(video.VideoFile, "timeline", lambda *args: pytest.fail("scanned"))
    clip = f"<video:{folder}/clip.mp4?frames=3>"
    result = vlm("inspect", stream, "--prompt", f"{clip}The cat", "--json")
    spans = json.loads(result.stdout)["spans"]
    assert [(x["kind"], x["positions"], x["frames"]) for x in spans] == [("video", 48, 3), ("text", 2, None)]
    shown = vlm("inspect", stream, "--prompt", "<video>The", "--video", f"{folder}/clip.mp4").stdout
    assert re.search(r"clip.mp4> \(8 frames\) +1 +128", shown)


def test_a_dry_run_shows_clips(vlm, folder, stream):
    result = vlm("generate", "-m", stream, f"<video:{folder}/clip.mp4?frames=2>The cat", "--dry-run")
    assert re.search(r"clip.mp4\?frames=2> \(2 frames\) +1 +32", result.stdout)
    assert re.search(r"Clip .*clip.mp4\?frames=2 \(48x32 → .*, 2 frames from 0.00 to 2.90 s\)", result.stderr)


def test_an_evaluation_asks_about_clips(vlm, folder, stream):
    (folder / "questions.jsonl").write_text(json.dumps({"prompt": "<video:clip.mp4?frames=2>The", "completion": "x"}))
    result = vlm(
        "eval", stream, "--data", folder / "questions.jsonl", "-n", 4, "--json", "--html", folder / "page.html"
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)["answers"][0]
    assert (
        answer["answer"]
        == ask(vlm, stream, folder, {"prompt": "<video:clip.mp4?frames=2>The"})["text"][: len(answer["answer"])]
    )
    assert (folder / "page.html").read_text().count("<img") == 2  # both frames


@pytest.mark.matrix
def test_a_model_with_numbered_frames_says_how_many_it_takes(vlm, folder, parts, tmp_path):
    flags = ("--set", "vision_tokenizer.max_num_frames=2", "--quiet")
    assert vlm("build", tmp_path / "numbered", *parts.kosmos, *flags).exit_code == 0
    words = "has a medium of 3 frames, but the vision tokenizer was made for at most 2. Write <video:FILE?frames=2>."
    clip = f"<video:{folder}/clip.mp4?frames=3>The cat"
    for command in (
        ["generate", "-m", tmp_path / "numbered", clip],
        ["inspect", tmp_path / "numbered", "--prompt", clip],
    ):
        result = vlm(*command)
        assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_bad_clips_are_refused_in_words(vlm, folder, open_gates, tmp_path):
    for clip, code, words in (
        ("clip.mp4?frames=2&fps=1", 2, "frames and fps both say how many frames are read"),
        ("clip.mp4?start=9", 1, "lies beyond the end of"),
        ("photo.png?frames=2", 1, "is a still image (PNG), and no clip"),
        ("rows.txt", 1, "no video that vlm reads"),
    ):
        (folder / "rows.txt").write_text("no clip")
        result = vlm("generate", "-m", open_gates, f"<video:{folder}/{clip}>The", "-n", 2)
        assert result.exit_code == code and words in " ".join(result.stderr.split()), result.stderr
    (folder / "bad.jsonl").write_text('{"prompt": "<video:gone.mp4>a"}\n{"prompt": "<video:clip.mp4?fps=0>a"}\n')
    result = vlm("batch", folder / "bad.jsonl", "-o", tmp_path / "out.jsonl", "-m", open_gates, "--workers", 0)
    errors = [json.loads(line)["error"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert result.exit_code == 1 and "cannot find 'gone.mp4'" in errors[0] and "fps expects" in errors[1]
