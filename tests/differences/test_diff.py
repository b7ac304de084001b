"""`vlm diff`: what differs between two models or compositions, and where their answers part."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

import vlm_cli
from tests.differences.test_weights import loaded
from vlm_cli.composition import Composition
from vlm_cli.differences.settings import find_changes


@pytest.fixture
def diff(vlm):
    def run(*words, code=0):
        result = vlm("diff", *words, "--json")
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout)

    return run


def states(found) -> dict[str, dict[str, int]]:
    return {
        part["part"]: {k: n for k, n in part.items() if isinstance(n, int) and n} for part in found["tensors"]["parts"]
    }


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(("a", "b"), [("delta", "trained"), ("full", "lora"), ("trained", "dora"), ("lora", "dora")])
def test_changed_tensors_are_those_of_the_loaded_models(made, diff, a, b):
    found = diff(made.get(a), made.get(b))
    left, right = loaded(made.get(a)), loaded(made.get(b))
    changed = {x["name"]: x for x in found["tensors"]["each"]}
    assert changed.keys() == {name for name in left if not torch.equal(left[name], right[name])}
    for name, x in changed.items():
        norm = float((left[name].double() - right[name].double()).norm())
        assert x["state"] == "changed" and x["change"] == pytest.approx(norm, rel=1e-4, abs=1e-6)
    assert found["differs"]


def test_one_model_in_two_forms_is_the_same(made, diff, vlm):
    found = diff(made.full, made.delta, "--exit-code")
    assert not found["differs"] and found["tensors"]["each"] == []
    assert "The same: composition, model, tokens" in vlm("diff", made.full, made.delta).stdout


@pytest.mark.matrix
def test_a_rounded_model_is_no_other_one(made, diff, tmp_path):
    model, processor = vlm_cli.load(str(made.full), dtype=torch.bfloat16)
    vlm_cli.save(model, processor, tmp_path / "half")
    found = diff(made.full, tmp_path / "half")
    assert {x["state"] for x in found["tensors"]["each"]} == {"rounded"}
    assert [(x["key"], x["a"], x["b"]) for x in found["model"]] == [("dtype", "float32", "bfloat16")]


def test_parts_of_another_shape_and_tensors_of_one_side(made, diff):
    found = diff(made.full, made.llava)
    counts = states(found)
    assert counts["vision_encoder"] == {"rounded": 44} and counts["fusion"] == {"only_a": 44}
    assert counts["vision_tokenizer"].keys() == {"only_a", "only_b"}
    assert {x["key"]: x["b"] for x in found["settings"]}["fusion.type"] == "language-stream"
    parameters = {x["part"]: (x["a"], x["b"]) for x in found["parameters"]}
    assert parameters["fusion"][0] > 0 == parameters["fusion"][1]
    assert parameters["total"][1] == sum(x.numel() for x in vlm_cli.load(str(made.llava))[0].parameters())
    tokens = {x["key"]: (x["a"], x["b"]) for x in found["tokens"]}
    assert tokens["vision tokens per picture"] == (3, 16)


@pytest.mark.matrix
def test_what_is_not_at_hand_is_unknown(made, diff, tmp_path):
    for name in ("delta", "dora"):
        shutil.copytree(made.get(name), tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text().replace(f'"location": "{made.path}/lm"', f'"location": "{tmp_path}/lm"'))
    assert states(diff(made.full, tmp_path / "delta"))["language_model"] == {"unknown": 38}
    assert states(diff(made.delta, tmp_path / "delta"))["language_model"] == {"equal": 38}  # by the recorded hash
    with_adapter = diff(made.delta, tmp_path / "dora")
    assert states(with_adapter)["language_model"] == {"equal": 10, "unknown": 28}
    assert "not at hand" in with_adapter["unknown"][0]


# -- compositions ------------------------------------------------------------------------------------------------------


def test_compositions_need_no_weights(made, diff, tmp_path):
    assert not diff(made.full, made.full / "composition.yaml")["differs"]
    data = (made.full / "composition.yaml").read_text().replace("every: 1", "every: 2")
    (tmp_path / "other.yaml").write_text(data)
    found = diff(made.full / "composition.yaml", tmp_path / "other.yaml")
    assert found["settings"] == [{"key": "fusion.every", "a": 1, "b": 2}]
    assert {x["key"]: x["b"] for x in found["model"]} == {"before_layers": [1, 3]}
    assert found["tensors"] is None and found["differs"]


def test_families_whose_parts_are_not_here_differ_in_their_settings(diff):
    found = diff("flamingo", "kosmos")
    changed = {x["key"]: (x["a"], x["b"]) for x in found["settings"]}
    flamingo, kosmos = (Composition.compose(name).to_dict() for name in ("flamingo", "kosmos"))
    assert changed["fusion.type"] == ("cross-attention", "language-stream")
    assert changed["language_model.name"] == (flamingo["language_model"]["name"], kosmos["language_model"]["name"])
    assert len(found["unknown"]) == 2 and "tokens" not in found


def test_settings_in_lists_of_objects_are_found():
    a = {"encoders": [{"name": "x", "layer": -1}, {"name": "y"}], "size": (1, 2)}
    b = {"encoders": [{"name": "x", "layer": -2}], "size": [1, 2]}
    assert [(x.key, x.a, x.b) for x in find_changes(a, b)] == [
        ("encoders.1.layer", -1, -2),
        ("encoders.2.name", "y", None),
    ]


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The demo, and one that was taught to say another word."""
    model, processor = vlm_cli.load("demo")
    with torch.no_grad():
        torch.manual_seed(1)
        for x in model.lang_model.parameters():
            x.add_(torch.randn_like(x), alpha=0.06)
    out = tmp_path_factory.mktemp("demos") / "other"
    vlm_cli.save(model, processor, out)
    Image.new("RGB", (64, 64), "red").save(out.parent / "red.png")
    return out, out.parent / "red.png"


def test_where_two_answers_part(vlm, diff, demos):
    other, picture = demos
    prompt = f"<image:{picture}>What is it?"
    found = diff("demo", other, "--prompt", prompt, "--max-new-tokens", 8)["answers"]
    assert not found["same"] and found["a"].startswith(found["before"]) and found["b"].startswith(found["before"])
    number = found["token"]["a"] - 1
    for name, key in (("demo", "a"), (str(other), "b")):  # a slow loop: a step for each token
        model, processor = vlm_cli.load(name)
        batch = processor(text=["<image>What is it?"], images=[[Image.open(picture)]])
        ids, written = batch.pop("input_ids"), []
        batch.pop("attention_mask")
        with torch.no_grad():
            for _ in range(number + 1):
                logits = model(input_ids=torch.cat([ids, torch.tensor([written], dtype=torch.long)], 1), **batch).logits
                step = logits[0, -1].float()
                step[model.config.media_token_id] = -torch.inf
                written.append(int(step.argmax()))
        likely = step.softmax(-1)
        for way in found["ways"]:
            token = processor.tokenizer.encode(way["text"], add_special_tokens=False)
            if len(token) == 1 and processor.tokenizer.decode(token) == way["text"]:
                assert way[key] == pytest.approx(float(likely[token[0]]), abs=2e-2)  # bfloat16
        own = found["ways"]["ab".index(key)]
        assert own[key] == pytest.approx(float(likely.max()), abs=2e-2)
    text = vlm("diff", "demo", other, "--prompt", prompt, "--max-new-tokens", 8).stdout
    assert f"They part at token {number + 1}" in text and "Probability in A" in text


@pytest.mark.matrix
def test_the_same_answer(diff, demos):
    found = diff("demo", "demo", "--prompt", f"<image:{demos[1]}>What is it?", "--max-new-tokens", 8, "--exit-code")
    assert found["answers"]["same"] and found["answers"]["a"] == found["answers"]["b"] and not found["differs"]


@pytest.mark.matrix
def test_tokenizers_that_differ(made, diff, demos):
    found = diff("demo", made.full, "--prompt", f"<image:{demos[1]}>What is it?", "--max-new-tokens", 4)
    words = found["vocabulary"]
    assert words["only_a"]["count"] - words["only_b"]["count"] == words["a"] - words["b"] != 0
    assert not found["answers"]["same"] and found["answers"]["ways"][0]["a"] > 0


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("demo", "nope"), 2, "unknown model 'nope'"),
        (("flamingo", "kosmos", "--prompt", "a"), 2, "'flamingo' is a composition without weights"),
        (("demo", "demo", "--image", "a.png"), 2, "--image needs --prompt"),
        (("flamingo", "kosmos", "--exit-code"), 1, ""),
        (("demo", "demo", "--revision-a", "main"), 2, "--revision is for hub ids"),
    ],
)
def test_exit_codes(vlm, words, code, message):
    result = vlm("diff", *words)
    assert result.exit_code == code and message in result.stderr
