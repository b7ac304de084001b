"""What the server answers: the same as `vlm chat` and `vlm generate`, to the real client of OpenAI and to curl."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from tests.serving.conftest import ask_about
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import interleave
from vlm_cli.serving.limits import Limits
from vlm_cli.tiling import MediumSize

PICTURES = ("two.png", "three.png", "one.png")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def greedy(demo, prompt: str, new_tokens: int = 32) -> str:
    """The answer of `generate` to a prompt of the grammar."""
    model, processor = demo
    found = interleave(prompt, []).parts
    loader = MediaLoader()
    media = [loader.load(part.source).image for part in found if hasattr(part, "source")]
    inputs = processor(text=[found], images=[media] if media else None)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ("two.png", "three.png"))
def test_the_client_of_openai_gets_the_answer_of_generate(client, demo, name):
    wanted = greedy(demo, f"<image:examples/images/{name}>Describe the image.")
    answer = client.chat.completions.create(model="demo", messages=[ask_about(name)])
    assert answer.choices[0].message.content == wanted and wanted.strip()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="demo", messages=[ask_about(name)], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == answer.usage


def test_pictures_decide_the_answer(client):
    said = {
        name: client.chat.completions.create(model="demo", messages=[ask_about(name)]).choices[0].message.content
        for name in ("two.png", "three.png")
    }
    assert len(set(said.values())) == 2


def test_a_second_turn_sees_the_first(client, server):
    first = ask_about("two.png")
    said = client.chat.completions.create(model="demo", messages=[first]).choices[0].message.content
    turns = [first, {"role": "assistant", "content": said}, {"role": "user", "content": "How many things are there?"}]
    answer = client.chat.completions.create(model="demo", messages=turns)
    plan = server.service.preparer.plan
    ids = plan.processor.encode(interleave(f"<image:x>Describe the image.{said}\nHow many things are there?", []).parts)
    assert answer.usage.prompt_tokens == plan.budget.positions(len(ids), [MediumSize()])


def test_completions_continue_a_text(client, demo):
    answer = client.completions.create(model="demo", prompt="The image shows", max_tokens=5)
    assert answer.choices[0].text == greedy(demo, "The image shows", 5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
    both = client.completions.create(model="demo", prompt=["The image shows", "A"], max_tokens=5)
    assert [choice.text for choice in both.choices] == [answer.choices[0].text, greedy(demo, "A", 5)]


def test_probabilities_are_those_of_the_model(client, demo):
    model, processor = demo
    answer = client.completions.create(model="demo", prompt="The image", max_tokens=3, logprobs=2)
    ids = processor.encode(interleave("The image", []).parts)
    for k, found in enumerate(answer.choices[0].logprobs.token_logprobs):
        with torch.no_grad():
            wanted = model(lang_x=torch.tensor([ids])).logits[0, -1].float()
        wanted[processor.media_token_id] = -math.inf  # never generated
        wanted = wanted.log_softmax(-1)
        assert found == pytest.approx(float(wanted.max()), abs=2e-2), k  # the demo runs in bfloat16
        tops = list(answer.choices[0].logprobs.top_logprobs[k].values())
        assert sorted(tops, reverse=True) == pytest.approx(wanted.topk(2).values.tolist(), abs=5e-2)
        ids.append(int(wanted.argmax()))


@pytest.mark.matrix
def test_equal_seeds_give_equal_answers_beside_any_others(client):
    def sample(seed: int) -> str:
        answer = client.chat.completions.create(
            model="demo", messages=[ask_about("two.png")], temperature=2, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    alone = [sample(seed) for seed in range(3)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(sample, [0, 1, 2, 0, 1, 2])) == alone * 2
    assert len(set(alone)) > 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1e-8, 1e-40, 5e-324])
def test_a_temperature_near_0_takes_the_most_likely_token(client, temperature, top_p):
    asked = {"model": "demo", "messages": [ask_about("two.png")], "top_p": top_p}
    near, at = (client.chat.completions.create(**asked, temperature=x) for x in (temperature, 0))
    assert near.choices[0].message.content == at.choices[0].message.content != ""


def test_several_answers_differ_by_their_seeds(client):
    answer = client.chat.completions.create(
        model="demo", messages=[ask_about("two.png")], n=4, temperature=2, seed=5, max_tokens=12
    )
    said = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len(set(said)) > 1


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(client):
    answer = client.chat.completions.create(model="demo", messages=[ask_about("two.png")], stop=[" large", "zzz"])
    assert answer.choices[0].message.content == " a small yellow cross above a"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server, demo):
    data = json.dumps({"messages": [ask_about("three.png", "Q: How many things are there? A:")], "stream": True})
    words = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    lines = subprocess.run(words, input=data, capture_output=True, text=True, check=True).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    said = "".join(json.loads(x)["choices"][0]["delta"].get("content", "") for x in events[:-1])
    assert said == greedy(demo, "<image:examples/images/three.png>Q: How many things are there? A:")


@pytest.mark.matrix
def test_requests_that_wait_are_answered_together(server, client, demo):
    wanted = {name: greedy(demo, f"<image:examples/images/{name}>Describe the image.") for name in PICTURES[:2]}
    before = server.service.engine.load.batches

    def ask(k: int) -> bool:
        name = PICTURES[k % 2]
        answer = client.chat.completions.create(model="demo", messages=[ask_about(name)])
        return answer.choices[0].message.content == wanted[name]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(32)))
    assert server.service.engine.load.batches - before < 24
    assert server.service.engine.load.largest > 1


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "vlm"
    assert server.send("/health")[:2] == (200, {"status": "ok", "running": 0, "waiting": 0})
    status, text, _ = server.send("/metrics")
    assert status == 200 and 'vlm_requests_total{path="/v1/models",status="200"}' in text


def test_each_request_is_one_line_of_the_log(server):
    server.chat(ask_about("two.png"), max_tokens=2)
    server.wait_until(lambda: server.lines[-1].get("completion_tokens") == 2)
    line = server.lines[-1]
    assert (line["status"], line["images"], line["completion_tokens"], line["finish"]) == (200, 1, 2, "length")
    assert 0 <= line["first_token"] <= line["seconds"]


def test_pictures_named_as_text_are_text(server):
    _, body = server.chat({"role": "user", "content": "<image:/etc/passwd> <image>"}, max_tokens=1)
    assert body["usage"]["vlm"]["image_tokens"] == []


def test_the_page_begins_with_the_settings_of_the_server(run):
    with run(limits=Limits(new_tokens=7), temperature=0.35) as other:
        page = other.send("/")[1]
    fields = {
        x["id"]: x for x in (dict(re.findall(r'(\w+)="([^"]*)"', x)) for x in re.findall("<input ([^>]*)>", page))
    }
    assert (fields["most"]["value"], fields["temperature"]["value"]) == ("7", "0.35")
