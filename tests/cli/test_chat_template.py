"""One way to write a prompt: with the chat template, every command asks a model what `vlm chat` asks it."""

from __future__ import annotations

import json
import shutil
import time

import pytest

import vlm_cli.checkpoint.directory as directory
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.templates.render import render_template
from vlm_cli.training.dataset import load_dataset
from vlm_cli.writing.choice import TemplateChoice
from vlm_cli.writing.writer import PromptWriter

pytestmark = pytest.mark.usefixtures("loaded_once")

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def templated(open_gates):
    out = shutil.copytree(open_gates, open_gates.parent / "with-chat-template")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def answers(vlm, model, photo, folder, prompt, *flags):
    """What generate, batch and eval answer to a prompt."""
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "x"}) + "\n")
    flags = ("-n", 6, *flags)
    found = [vlm("generate", "-m", model, prompt, "--json", *flags)]
    found.append(vlm("batch", folder / "rows.jsonl", "-m", model, "-o", folder / "out.jsonl", "--overwrite", *flags))
    found.append(vlm("eval", model, "--data", folder / "rows.jsonl", "--json", *flags))
    assert [result.exit_code for result in found] == [0] * 3, [result.stderr for result in found]
    batch = json.loads((folder / "out.jsonl").read_text())["text"]
    graded = json.loads(found[2].stdout)["answers"][0]["answer"]
    return {json.loads(found[0].stdout)["text"], batch, graded}


def test_every_command_asks_what_a_chat_asks(vlm, templated, photo, tmp_path):
    prompt = f"See <image:{photo}>?"
    (said,) = vlm("chat", templated, "--json", "-n", 6, input=prompt + "\n").stdout.splitlines()
    assert answers(vlm, templated, photo, tmp_path, prompt, "--chat-template", "all") == {json.loads(said)["text"]}
    spelled = f"<s>user: {prompt}</s>\n<s>assistant: "
    assert answers(vlm, templated, photo, tmp_path, spelled, "--special-tokens") == {json.loads(said)["text"]}
    twin = vlm("generate", "-m", templated, prompt, "--json", "-n", 6)
    assert json.loads(twin.stdout)["text"] != json.loads(said)["text"]


def test_training_learns_what_a_chat_asks(templated, photo, tmp_path):
    turns = [{"prompt": "One?", "completion": " 1."}, {"prompt": "And two?", "completion": " 2."}]
    lines = [{"prompt": f"<image:{photo}>Which?", "completion": " A cat."}, {"prompt": "", "turns": turns}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, processor = directory.load(str(templated), dtype="auto", device="cpu", trust_remote_code=False)
    found = load_dataset(data, model, processor, writer=PromptWriter(processor, TemplateChoice("all")))
    tokenizer = processor.tokenizer
    said = [
        [("user", "\N{OBJECT REPLACEMENT CHARACTER}Which?"), ("assistant", "A cat.")],
        [("user", "One?"), ("assistant", "1."), ("user", "And two?"), ("assistant", "2.")],
    ]
    for item, messages in zip((found[0], found[1]), said, strict=True):
        whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)
        text = tokenizer.decode(item["ids"].tolist())
        assert text.replace("<image>", "\N{OBJECT REPLACEMENT CHARACTER}") == whole.removesuffix("\n")
    ids = tokenizer(whole.removesuffix("\n"), add_special_tokens=False).input_ids
    assert found[1]["ids"].tolist() == ids  # the tokens of the whole, as the template's own users encode it
    learned = [int(i) for i in found[1]["labels"] if i != IGNORED]
    assert tokenizer.decode(learned) == "1.</s>2.</s>"


def test_a_model_without_a_template_refuses_the_flag(vlm, open_gates, photo):
    result = vlm("generate", "-m", open_gates, "What?", "--chat-template", "all")
    assert result.exit_code == 2 and "has no chat template. Leave out --chat-template." in result.stderr


def test_a_template_that_is_not_used_is_told(vlm, templated, open_gates):
    note = "the tokenizer has a chat template, which `vlm chat` uses"
    assert note in vlm("generate", "-m", templated, "What?", "-n", 1).stderr
    assert note not in vlm("generate", "-m", templated, "What?", "-n", 1, "--chat-template", "all").stderr
    assert note not in vlm("generate", "-m", open_gates, "What?", "-n", 1).stderr


def test_thousands_of_prompts_are_written_by_one_process():
    started = time.monotonic()
    for i in range(60):
        text = render_template(TEMPLATE, [{"role": "user", "content": f"{i}"}], {})
        assert text == f"<s>user: {i}</s>\n<s>assistant: "
    assert time.monotonic() - started < 5
    with pytest.raises(LanguageModelError, match="TemplateSyntaxError"):
        render_template("{% if %}", [], {})
    assert render_template("{{ messages[0].role }}", [{"role": "user"}], {}, opens_answer=False) == "user"


def test_a_system_text_stands_where_the_template_puts_it(vlm, templated, open_gates, tmp_path):
    def shown(model, *flags):
        return vlm("generate", "-m", model, "What?", "--dry-run", *flags)

    asked = "<s>system: Be brief.</s>\\n<s>user: What?</s>\\n<s>assistant: "
    assert asked in shown(templated, "--system", "Be brief.").stdout.replace("\n", "")
    assert asked.partition("\\n")[0] not in shown(templated, "--chat-template", "all").stdout
    file = tmp_path / "other.jinja"
    file.write_text(TEMPLATE.replace("<s>", "<s>[").replace(": {{", "] {{"))
    found = shown(open_gates, "--system", "Be brief.", "--chat-template", file).stdout
    assert "<s>[system] Be brief.</s>" in found
    for flags, problem in (
        (("--system", "x"), "no chat template, which would say where --system stands"),
        (("--system", "x", "--chat-template", "none"), "Leave out --system or --chat-template none"),
        (("--chat-template", "al"), "expects auto, all, none or a file with a template, got 'al', which is no file"),
    ):
        result = shown(open_gates, *flags)
        assert result.exit_code == 2 and problem in result.stderr, result.stderr


def test_a_chat_is_told_the_system_text(vlm, templated):
    told = [vlm("chat", templated, "--json", "-n", 2, *x, input="Hi\n").stdout for x in ((), ("--system", "Be."))]
    plain, with_system = (json.loads(x)["prompt_positions"] for x in told)
    assert with_system > plain
