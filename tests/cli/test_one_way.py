"""The same question is written in one way: in a chat, a file of prompts, an evaluation, a server, a pipeline, a run."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from tests.support.training import write
from vlm_cli import VLM
from vlm_cli.checkpoint import directory
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.serving.limits import Limits
from vlm_cli.serving.requests import read_chat
from vlm_cli.serving.row import Piece
from vlm_cli.serving.service import make_service
from vlm_cli.training.dataset import load_dataset
from vlm_cli.writing.writer import PromptWriter

pytestmark = pytest.mark.usefixtures("loaded_once")

NEW_TOKENS = 6
#: Templates that behave as published ones do: with a system text of their own, of brackets, with parts,
#: with a space before answers, without an end.
TEMPLATES = {
    "plain": "",
    "chatml": (
        "{% if messages[0].role != 'system' %}<s>system\nYou help.</s>\n{% endif %}{% for m in messages %}"
        "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% elif m.role == 'system' %}<<{{ m.content }}>>{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}<s>{{ m.role }}:\n{% for part in m.content %}{{ part.text }}{% endfor %}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
    ),
    "space": (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    ),
    "heading": "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}\n{% endfor %}",
}


def say(role: str, *parts: str | dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": [x if isinstance(x, dict) else {"type": "text", "text": x} for x in parts]}


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request: pytest.FixtureRequest, open_gates: Path) -> Path:
    out = open_gates.parent / f"one-way-{request.param}"
    shutil.copytree(open_gates, out, copy_function=os.link)
    if TEMPLATES[request.param]:
        (out / "chat_template.jinja").unlink(missing_ok=True)  # a link, whose file is the other model's
        (out / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return out


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each prompt that reaches the model."""
    found: list[list[int]] = []
    original = VLM.generate

    def spy(self: VLM, *args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["input_ids" if "input_ids" in kwargs else "lang_x"][0].tolist())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VLM, "generate", spy)
    return found


class Asker:
    """Asks a model the last of some messages in every way. Each method returns the answer."""

    def __init__(self, vlm: Callable[..., Any], typed: Callable[..., Any], model: Path, folder: Path) -> None:
        self.vlm, self.typed, self.model, self.folder = vlm, typed, model, folder

    def chat(self, messages: list[dict[str, Any]]) -> str:
        *before, asked = messages
        told = before.pop(0)["content"][0]["text"] if before and before[0]["role"] == "system" else None
        load = [f"/load {write(self.folder / 'chat.json', [{'messages': before}])}"] if before else []
        line = "".join(x["text"] if x["type"] == "text" else f"<image:{x['path']}>" for x in asked["content"])
        flags = ["--json", *([] if told is None else ["--system", told])]
        found = self.typed(*load, line, EOFError(), model=self.model, flags=flags)
        assert found.exit_code == 0, found.stderr
        return str(json.loads(found.stdout.splitlines()[-1])["text"])

    def batch(self, messages: list[dict[str, Any]], *flags: str) -> str:
        rows = write(self.folder / "rows.jsonl", [{"messages": messages}])
        out = self.folder / "out.jsonl"
        found = self.vlm("batch", rows, "-m", self.model, "-o", out, "--overwrite", "-n", NEW_TOKENS, *flags)
        assert found.exit_code == 0, found.stderr
        return str(json.loads(out.read_text())["text"])

    def eval(self, messages: list[dict[str, Any]]) -> str:
        rows = write(self.folder / "records.jsonl", [{"messages": [*messages, say("assistant", "x")]}])
        found = self.vlm("eval", self.model, "--data", rows, "--json", "-n", NEW_TOKENS, "--batch-size", 1)
        assert found.exit_code == 0, found.stderr
        return str(json.loads(found.stdout)["answers"][-1]["answer"])

    def serve(self, messages: list[dict[str, Any]]) -> str:
        sent = json.loads(json.dumps(messages))
        for part in (part for message in sent for part in message["content"] if part["type"] == "image"):
            data = base64.b64encode(Path(part.pop("path")).read_bytes()).decode()
            part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        service = make_service(*self._load(), "tiny")
        pieces: list[Piece] = []
        asked = read_chat({"messages": sent, "max_tokens": NEW_TOKENS}, Limits(), temperature=0.0)
        service.engine.start()
        service.engine.submit(service.preparer.prepare(asked, lambda _, piece: pieces.append(piece)).rows)
        service.engine.close()
        assert service.engine.join(30)
        return "".join(piece.text for piece in pieces)

    def pipeline(self, messages: list[dict[str, Any]]) -> str:
        model, processor = self._load()
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
        return str(pipe(text=messages, **asked)[0]["generated_text"])

    def learned_behind(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens behind which a run learns the answer."""
        model, processor = self._load()
        rows = write(self.folder / "records.jsonl", [{"messages": [*messages, say("assistant", "x")]}])
        items = load_dataset(rows, model, processor, writer=PromptWriter(processor))
        item = items[len(items) - 1]
        learned = [i for i, label in enumerate(item["labels"].tolist()) if label != IGNORED]
        start = max(i for i in learned if i - 1 not in learned)
        return list(item["ids"][:start].tolist())

    def _load(self) -> tuple[Any, Any]:
        return directory.load(str(self.model), dtype="auto", device="cpu", trust_remote_code=False)


@pytest.fixture
def asker(vlm: Callable[..., Any], typed: Callable[..., Any], model: Path, tmp_path: Path) -> Iterator[Asker]:
    with torch.no_grad():
        yield Asker(vlm, typed, model, tmp_path)


@pytest.fixture(params=("one turn", "two turns", "system"))
def messages(request: pytest.FixtureRequest, photo: Path, model: Path) -> list[dict[str, Any]]:
    shown = {"type": "image", "path": str(photo)}
    asked = say("user", "The ", shown, " sits </s> on?")
    has_template = model.name != "one-way-plain"
    if request.param == "system" and not has_template:
        pytest.skip("a chat without a template takes no system text")
    answer = "the mat" if has_template else " the mat"  # as the model would write it
    turns = {
        "one turn": [asked],
        "two turns": [asked, say("assistant", answer), say("user", "A cat?")],
        "system": [say("system", "The dog."), asked],
    }
    return turns[request.param]


@pytest.mark.sample(1)
def test_every_way_feeds_the_same_tokens(asker: Asker, fed: list[list[int]], messages: list[dict[str, Any]]) -> None:
    answer = asker.chat(messages)
    (wanted,) = fed
    for ask in (asker.batch, asker.eval, asker.serve, asker.pipeline):
        fed.clear()
        assert ask(messages) == answer, ask.__name__
        assert max(fed, key=len) == wanted, ask.__name__  # an evaluation asks for each answer
    assert asker.learned_behind(messages) == wanted
    fed.clear()
    asker.batch([*messages[:-1], say("user", "The dog?")])
    assert fed[-1] != wanted


@pytest.mark.sample(2)
def test_without_the_template_other_tokens_are_fed(asker: Asker, fed: list[list[int]], photo: Path) -> None:
    asked = [say("user", {"type": "image", "path": str(photo)}, "The cat sits on?")]
    asker.chat(asked)
    asker.batch(asked, "--chat-template", "none")
    has_template = asker.model.name != "one-way-plain"
    assert (fed[0] != fed[1]) == has_template
