"""`vlm eval` from end to end, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.command import vlm
from tests.support.questions import PROMPTS, Write
from vlm_cli.cli.app import app
from vlm_cli.cli.loading import ModelRequest
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.evaluation.intervals import wilson_interval

SHORT = ["--max-new-tokens", "6"]


def evaluate(*words: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict[str, Any]]:
    """Items whose completion is what `vlm generate` answers to each alone, but for two."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, (kind, prompt) in enumerate(PROMPTS):
            words = ["generate", "--model", "stream", *SHORT, "--json", prompt]
            answer = json.loads(CliRunner().invoke(app, words).stdout)["text"]
            assert answer.strip()
            text = "no" if number in (1, 2) else f"\t{answer.strip()} "
            record = {"id": number, "prompt": prompt, "completion": text, "answer": answer}
            found.append(record if kind is None else record | {"kind": kind})
    return found


@pytest.mark.matrix
def test_answers_are_those_of_generate(records: list[dict[str, Any]], write: Write, folder: Path) -> None:
    data = write(records)
    code, stdout, stderr = evaluate("stream", "--data", data, *SHORT, "--output", "o.jsonl", "--html", "o.html")
    assert code == 0, stderr
    assert "6 items from" in stderr and "items/s" in stderr and "Wrote o.jsonl\nWrote o.html\n" in stderr
    lines = [json.loads(line) for line in Path("o.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [(x["id"], x["kind"], x["prompt"]) for x in lines] == [
        (str(number), kind, prompt) for number, (kind, prompt) in enumerate(PROMPTS)
    ]
    assert [x["answer"] for x in lines] == [x["answer"] for x in records]
    assert [x["expected"] for x in lines] == [x["completion"] for x in records]
    assert [x["scores"]["exact"] for x in lines] == [1, 0, 0, 1, 1, 1]
    rows = [line.split()[:4] for line in stdout.splitlines() if line.strip() and "─" not in line]
    assert rows[1:] == [
        ["colour", "3", "exact", "66.7"],
        ["few-shot", "2", "exact", "50.0"],
        ["(no", "kind)", "1", "exact"],
        ["total", "6", "exact", "66.7"],
    ]
    assert "Wrong answers (2)" in Path("o.html").read_text(encoding="utf-8")
    assert not list(folder.glob(".*.partial"))


def test_json(records: list[dict[str, Any]], write: Write) -> None:
    code, stdout, stderr = evaluate("stream", "-d", write(records), *SHORT, "--limit", 3, "-b", 2, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    exact = {"right": 1, "value": 1 / 3, "interval": [*wilson_interval(1, 3)]}
    assert report["total"] == {"items": 3, "scores": {"exact": exact}}
    kinds = [(x["kind"], x["items"], x["scores"]["exact"]["right"]) for x in report["kinds"]]
    assert kinds == [("colour", 2, 1), ("few-shot", 1, 0)]
    assert [x["answer"] for x in report["answers"]] == [x["answer"] for x in records[:3]]
    assert (report["batch_size"], report["limit"], report["max_new_tokens"]) == (2, 3, 6)


GOOD = {"prompt": "<image:red.png>", "completion": "red"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "no questions are given: vlm eval demo --data FILE.jsonl"),
        (["stream"], 2, "no questions are given: vlm eval stream --data FILE.jsonl"),
        (["stream", "-d", "nope.jsonl"], 1, "cannot find the records 'nope.jsonl'"),
        (["stream", "-d", "."], 1, "'.' is a directory"),
        (["flamingo", "-d", "good.jsonl"], 2, "is a composition without weights"),
        (["nobody", "-d", "good.jsonl"], 2, "unknown model 'nobody'"),
        (["lm", "-d", "good.jsonl"], 1, "not a VLM"),
        (["stream", "-d", "good.jsonl", "--limit", "0"], 2, "--limit"),
        (["stream", "-d", "good.jsonl", "--batch-size", "0"], 2, "--batch-size"),
        (["stream", "-d", "good.jsonl", "--dtype", "int8"], 2, "unknown dtype 'int8'"),
        (["stream", "-d", "good.jsonl", "-o", "red.png"], 2, "'red.png' exists. Choose another name, or add"),
        (["stream", "-d", "good.jsonl", "--html", "red.png"], 2, "'red.png' exists. Choose another name, or add"),
        (["stream", "-d", "good.jsonl", "-o", "no/x"], 1, "does not exist"),
        (["stream", "-d", "good.jsonl", "-o", "lm", "--overwrite"], 2, "'lm' is a directory"),
        (["stream", "-d", "good.jsonl", "-o", "good.jsonl", "--overwrite"], 2, "--output and --data are the same file"),
        (["stream", "-d", "good.jsonl", "-o", "x", "--html", "./x"], 2, "--output and --html are the same file"),
        (["stream", "-d", "good.jsonl", "-n", "2045"], 1, "line 1: with --max-new-tokens 2045, takes 20"),
    ],
)
def test_bad_request(words: list[str], code: int, says: str, write: Write) -> None:
    write([GOOD], "good.jsonl")
    ended, stdout, stderr = evaluate(*words)
    assert (ended, stdout) == (code, "") and says in stderr
    assert "Traceback" not in stderr


BAD = [
    ('{"prompt": "<image:red.png>"', "not JSON"),
    ({"prompt": "<image:red.png>"}, 'has no "completion"'),
    ({"prompt": "What?", "completion": "x", "image": "red.png"}, '"image" is not read. Give pictures as a list'),
    ({"text": "Words."}, "asks nothing: its prompt is empty"),
    ({"prompt": "<image:nope.png>", "completion": "x"}, "cannot find 'nope.png'"),
    ({"text": "<image:red.png>a<image:red.png>b"}, 'is a "text" with images in what would be the answer'),
    ({"prompt": "<image:red.png>", "turns": [{"prompt": x, "completion": "b"} for x in "a "]}, "its prompt is empty"),
    ({"prompt": "<image:red.png>\ud800", "completion": "x"}, "holds half a character"),
    ({**GOOD, "id": "\ud800"}, "holds half a character"),
]


def test_bad_lines_are_listed(write: Write) -> None:
    data = write([GOOD, *(record for record, _ in BAD)], "bad.jsonl")
    code, stdout, stderr = evaluate("stream", "-d", data, "--limit", 1)
    assert (code, stdout) == (1, "")
    assert f"{len(BAD)} of the {len(BAD) + 1} records" in stderr
    told = [line for line in stderr.splitlines() if line.startswith("  line ")]
    for number, ((_, says), line) in enumerate(zip(BAD, told, strict=True), start=2):
        assert line.startswith(f"  line {number}: ") and says in line


def test_questions_without_a_picture_are_asked(write: Write) -> None:
    rows = [GOOD, {"prompt": "Two and two?", "completion": " Four."}]
    mixed, alone = (evaluate("stream", "-d", write(lines, "mixed.jsonl"), "--json")[1] for lines in (rows, rows[1:]))
    assert json.loads(mixed)["answers"][1]["answer"] == json.loads(alone)["answers"][0]["answer"] != ""


def test_a_picture_that_a_prompt_only_names_is_told(write: Write) -> None:
    named = {"prompt": "Describe red.png.", "completion": "x"}
    _, _, stderr = evaluate("stream", "-d", write([GOOD, named, named], "named.jsonl"))
    assert "names the picture file 'red.png', which is read as text. To show it, write <image:red.png>." in stderr
    assert "line 2 of" in stderr and "1 more line does the same." in stderr


def test_damaged_picture(write: Write, folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:-30])
    failed_row = {**GOOD, "prompt": "<image:cut.png>"}
    data = write([GOOD, failed_row])
    code, stdout, stderr = evaluate("stream", "-d", data, *SHORT, "-o", "cut.jsonl")
    assert code == 1 and "line 2 of" in stderr and "'cut.png' is damaged or cut short" in stderr
    assert "Error: 1 of 2 items have no answer, and are not counted:" in stderr
    alone = evaluate("stream", "-d", write([GOOD]), *SHORT)[1]
    assert stdout == alone != ""  # it takes no other answer with it
    answered, failed = map(json.loads, Path("cut.jsonl").read_text().splitlines())
    assert "answer" in answered and failed["error"] == "'cut.png' is damaged or cut short. Fetch or save it again."
    code, stdout, _ = evaluate("stream", "-d", write([failed_row, failed_row]), *SHORT)
    assert (code, stdout) == (1, "")


def test_overwrite(write: Write) -> None:
    Path("old.jsonl").write_text("old")
    data = write([GOOD])
    assert evaluate("stream", "-d", data, "-n", 1, "-o", "old.jsonl")[0] == 2
    assert Path("old.jsonl").read_text() == "old"
    code, _, stderr = evaluate("stream", "-d", data, "-n", 1, "-o", "old.jsonl", "--overwrite")
    assert code == 0 and "the answer was cut at 1 token," in stderr
    assert json.loads(Path("old.jsonl").read_text())["expected"] == "red"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_none_of_two_files(write: Write, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    original, calls = os.fsync, []

    def fill(handle: int) -> None:
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", fill)
    names = [f"both{fails_at}.jsonl", f"both{fails_at}.html"]
    words = ["stream", "-d", write([GOOD]), "-n", "1", "--output", names[0], "--html", names[1]]
    code, stdout, stderr = evaluate(*words)
    assert code == 1 and "total" in stdout and "Wrote" not in stderr
    assert f"cannot write '{names[0]}' and '{names[1]}': No space left on device. Nothing was changed." in stderr
    assert not list(Path().glob(f"*both{fails_at}*"))
    assert evaluate(*words)[0] == 0 and {str(path) for path in Path().glob(f"*both{fails_at}*")} == set(names)


def test_outputs_are_locked_before_the_model_is_loaded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        assert Path(".locked.jsonl.lock").exists() and Path(".locked.html.lock").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelRequest, "load", load)
    code, _, _ = evaluate("stream", "-d", write([GOOD]), "--output", "locked.jsonl", "--html", "locked.html")
    assert code == 130 and not list(Path().glob("*locked*"))


def test_full_disk_leaves_what_was_there(write: Write, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fails(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    Path("kept.html").write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    words = ["stream", "-d", write([GOOD]), "-n", "1", "--html", "kept.html", "--overwrite"]
    code, stdout, stderr = evaluate(*words)
    assert code == 1 and "cannot write 'kept.html': No space left on device. Nothing was changed." in stderr
    assert "total" in stdout, "the scores are told although the page is lost"
    assert Path("kept.html").read_text() == "old" and not list(folder.glob(".*.partial"))


def test_interrupt(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressLine, "show", lambda self, done: signal.raise_signal(signal.SIGINT))
    code, stdout, stderr = evaluate("stream", "-d", write([GOOD]), "-n", "1", "-o", "interrupted.jsonl")
    assert (code, stdout) == (130, "") and "Interrupted." in stderr
    assert not Path("interrupted.jsonl").exists()


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 105.0, 112.0, 115.0, 120.0])
    monkeypatch.setattr("vlm_cli.cli.progress.time.monotonic", lambda: next(times))
    with ProgressLine(80) as progress:
        for done in (20, 48, 60):
            progress.show(done)
    told = capsys.readouterr().err.splitlines()
    assert told == ["  48 of 80, 4.0 items/s, 8.0 s left", "  80 items in 20 s, 4.0 items/s"]


def test_help_states_the_rule() -> None:
    code, printed = vlm(["eval", "--help"])
    words = " ".join(printed.split())
    assert code == 0 and "equals the completion exactly, apart from whitespace at both ends" in words


def test_answers_go_to_stdout(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write([GOOD, {**GOOD, "kind": "other"}])
    code, _, _ = evaluate("stream", "-d", data, "-o", "printed.jsonl", "--html", "printed.html")
    assert code == 0
    for flag, name in (("-o", "printed.jsonl"), ("--html", "printed.html")):
        code, stdout, stderr = evaluate("stream", "-d", data, flag, "-")
        expected = (folder / name).read_text()
        if flag == "-o":
            assert stdout == expected
        assert code == 0 and len(stdout.splitlines()) == len(expected.splitlines()) and "total: " in stderr
        assert not (folder / "-").exists()
    assert evaluate("stream", "-d", data, "-o", "-", "--json")[0] == 2
