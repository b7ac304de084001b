"""`vlm batch` on requests of OpenAI's protocol: what a server answers, a line for each, in the protocol's form."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.support import ROOT
from tests.support.training import write
from vlm_cli.generation.journal import Journal, partial_of
from vlm_cli.media import MediaLoader
from vlm_cli.serving.engine import Engine

pytestmark = pytest.mark.usefixtures("loaded_once")

ASK = "Describe the image."
IMAGES = ROOT / "examples" / "images"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WANTED = " a small yellow cross above a large red heart."


def request(name: Any, *content: Any, url: str = CHAT, **body: Any) -> dict[str, Any]:
    parts = [x if isinstance(x, dict) else {"type": "text", "text": x} for x in content]
    said = {"messages": [{"role": "user", "content": parts}]} if url == CHAT else {"prompt": content[0]}
    return {"custom_id": name, "method": "POST", "url": url, "body": {**said, **body}}


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def as_uri(name: str) -> dict[str, Any]:
    return picture(f"data:image/png;base64,{base64.b64encode((IMAGES / name).read_bytes()).decode()}")


@pytest.fixture
def answer(vlm: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Runs rows through a batch: the result, and the lines that it wrote."""

    def run(rows: list[Any], *flags: Any, code: int = 0) -> tuple[Any, list[dict[str, Any]]]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
        words = ["--image-folder", IMAGES, "--dtype", "float32", "--overwrite"]
        found = vlm("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *words, *flags)
        assert found.exit_code == code, found.stderr
        return found, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def texts(line: dict[str, Any]) -> list[str]:
    assert line["error"] is None and line["response"]["status_code"] == 200
    return [x["message"]["content"] if "message" in x else x["text"] for x in line["response"]["body"]["choices"]]


def test_requests_are_answered_as_they_ask(vlm: Callable[..., Any], answer: Callable[..., Any]) -> None:
    rows = [
        request("path", picture("two.png"), ASK),
        request("data", as_uri("two.png"), ASK),
        request("other", picture("three.png"), ASK),
        request("short", picture("two.png"), ASK, max_tokens=3),
        request("stop", picture("two.png"), ASK, stop=[" cross"], model="gpt-4o"),
        request("text", "Q: What colour is it? A:", url=TEXT, max_tokens=2),
        *(request(f"sample {i}", picture("two.png"), ASK, temperature=2.0, seed=i, n=2) for i in (1, 1, 2)),
    ]
    rows[-2]["custom_id"] = "sample again"
    found, lines = answer(rows)
    assert [line["custom_id"] for line in lines] == [row["custom_id"] for row in rows]
    of = {line["custom_id"]: line for line in lines}
    assert texts(of["path"]) == texts(of["data"]) == [WANTED]
    assert texts(of["other"]) != [WANTED]
    assert texts(of["short"]) == [WANTED[: len(" a small yellow")]] and texts(of["stop"]) == [" a small yellow"]
    finishes = [of[name]["response"]["body"]["choices"][0]["finish_reason"] for name in ("path", "short", "stop")]
    assert finishes == ["stop", "length", "stop"]
    assert of["short"]["response"]["body"]["usage"]["completion_tokens"] == 3
    one, again, two = (texts(of[name]) for name in ("sample 1", "sample again", "sample 2"))
    assert one == again and one[0] != one[1] and one != two
    for line in lines:
        kind = Completion if line["custom_id"] == "text" else ChatCompletion
        kind.model_validate(line["response"]["body"])
        assert line["id"].startswith("batch_req_") and line["response"]["request_id"].startswith("req_")
    assert len({line["id"] for line in lines}) == len(lines)
    assert "Note: line 5 asks for the model 'gpt-4o', and demo answers." in found.stderr
    assert "9 rows, 0 failed" in found.stderr


def test_a_picture_of_several_requests_is_decoded_once(
    answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = MediaLoader.load_medium

    def count(loader: MediaLoader, source: str, *given: Any, **more: Any) -> Any:
        loaded.append(Path(source).name)
        return load(loader, source, *given, **more)

    monkeypatch.setattr(MediaLoader, "load_medium", count)
    asked = ("two.png", "three.png", "two.png", "two.png")
    _, lines = answer([request(str(i), picture(name), ASK, max_tokens=3) for i, name in enumerate(asked)])
    said = [texts(line) for line in lines]
    assert said[0] == said[2] == said[3] != said[1]
    assert sorted(loaded) == ["three.png", "two.png"]


def test_flags_fill_in_what_a_request_leaves_out(answer: Callable[..., Any]) -> None:
    rows = [request("a", picture("two.png"), ASK), request("b", picture("two.png"), ASK, max_tokens=2)]
    found, lines = answer(rows, "-n", 1)
    assert [line["response"]["body"]["usage"]["completion_tokens"] for line in lines] == [1, 2]
    assert "Note: answers to 2 requests of 2 were cut before a stop token; max_tokens" in found.stderr
    sampled = [
        texts(x) for x in answer([{**rows[0], "custom_id": i} for i in "ab"], "--temperature", 2, "--seed", 3)[1]
    ]
    assert sampled[0] != sampled[1]  # each row has a seed of its own
    for flag in (("--top-k", 3), ("--system", "x"), ("--num-beams", 2), ("--special-tokens",), ("--workers", 2)):
        assert f"Leave out {flag[0]}." in answer(rows, *flag, code=2)[0].stderr


BAD: list[tuple[Any, int | str, str]] = [
    ("{broken", "invalid_json_line", "line 2: not JSON"),
    ({"method": "POST", "url": CHAT, "body": {}}, "invalid_custom_id", "must be a text that is not empty, got null"),
    ({"prompt": "x"}, "invalid_custom_id", "got null"),
    (request("good", "x"), "duplicate_custom_id", "line 1 of in.jsonl has the custom_id 'good' already"),
    (request("url", "x") | {"url": "/v1/embeddings"}, "invalid_url", "must be /v1/chat/completions or /v1/completions"),
    (request("method", "x") | {"method": "GET"}, "invalid_method", "must be 'POST', got 'GET'"),
    (request("body", "x") | {"body": []}, "invalid_body", "must be an object"),
    (request("part", {"type": "input_audio"}), 400, "Known: text, image_url, video_url"),
    (request("no picture", {"type": "image_url"}), 400, "has no picture"),
    (request("lost", picture("none.png")), 400, "cannot find 'none.png'"),
    (request("stdin", picture("-")), 400, "which the rows of a file cannot share"),
    (request("web", picture("https://example.com/a.png")), 400, "Add --allow-urls"),
    (request("role", "x") | {"body": {"messages": [{"role": "tool", "content": "x"}]}}, 400, "Known: system"),
    (request("stream", "x", stream=True), 400, "a file holds whole answers"),
    (request("unknown", "x", top_k=3), 400, "is not known here, and the answer would ignore it"),
    (request("hot", "x", temperature=9), 400, "temperature must be"),
    (request("long", "cat " * 3000), 400, "positions"),
    (request("answered", "x") | {"body": {"messages": [{"role": "assistant", "content": "x"}]}}, 400, "role assistant"),
]  # fmt: skip


def test_bad_requests_are_told_in_place(answer: Callable[..., Any]) -> None:
    rows = [request("good", "One", max_tokens=1), *(row for row, _, _ in BAD), request("last", "Two", max_tokens=1)]
    found, lines = answer(rows, code=1)
    assert len(lines) == len(rows) and all(texts(line) for line in (lines[0], lines[-1]))
    for line, (row, kind, words) in zip(lines[1:-1], BAD, strict=True):
        if isinstance(kind, str):
            assert line["response"] is None and line["error"]["code"] == kind and words in line["error"]["message"]
        else:
            assert line["error"] is None and line["response"]["status_code"] == kind
            assert words in line["response"]["body"]["error"]["message"]
        assert line["custom_id"] == (row.get("custom_id") if isinstance(row, dict) else None)
    assert f"{len(BAD)} of {len(rows)} rows could not be answered" in found.stderr


def test_a_role_that_the_template_refuses_is_told_in_its_words(answer: Callable[..., Any], tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
    (tmp_path / "chat.jinja").write_text(template + "{{ m.role }}: {{ m.content }}\n{% endfor %}")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}]
    rows = [request("a", "x") | {"body": {"messages": messages}}, request("b", "One", max_tokens=1)]
    _, lines = answer(rows, "--chat-template", tmp_path / "chat.jinja", code=1)
    assert "No system here" in lines[0]["response"]["body"]["error"]["message"] and texts(lines[1])
    _, lines = answer([{"messages": messages}, {"prompt": "One"}], "--chat-template", tmp_path / "chat.jinja", code=1)
    assert "No system here" in lines[0]["error"] and "text" in lines[1]


def test_an_answer_that_fails_is_the_error_of_its_request(
    answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Engine._generate

    def fail(self: Engine, rows: Any) -> None:
        if rows[0].room == 2:
            raise RuntimeError("no")
        generate(self, rows)

    monkeypatch.setattr(Engine, "_generate", fail)
    rows = [request("a", "One", max_tokens=1), request("b", "One", max_tokens=2), request("c", "One", max_tokens=3)]
    found, lines = answer(rows, "-b", 1, code=1)
    assert [line["response"]["status_code"] for line in lines] == [200, 500, 200]
    assert "an answer failed: RuntimeError: no" in found.stderr


def test_a_run_that_was_cut_resumes(vlm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [request("a", "One"), request("bad", "x", stream=True), request("b", "Two"), request("a", "Three")]
    words = ["batch", write(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl", "-n", 2]

    def interrupt(self: Journal) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupt)
        assert vlm(*words).exit_code == 130
    partial = partial_of(tmp_path / "out.jsonl")
    kept = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(kept[:3]))
    found = vlm(*words)
    assert (
        found.exit_code == 1
        and "Resuming after 2 rows" in found.stderr
        and "4 rows (2 of them earlier), 2 failed" in found.stderr
    )
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert [line.split(b" ", 1)[1] for line in kept[1:3]] == lines[:2]  # the very ids
    last = json.loads(lines[3])
    assert last["error"]["code"] == "duplicate_custom_id"  # of a row that the first run answered
