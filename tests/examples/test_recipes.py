"""Each recipe in examples/recipes runs from end to end with tiny parts, and keeps the numbers that it cites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from examples import tiny_language_model
from tests.support import ROOT
from tests.support.training import COLOURS, TRAINING_TOWER, write_pictures_and_records
from vlm_cli.cli.app import app
from vlm_cli.composition.files import read_file
from vlm_cli.training.stages import read_stages

RECIPES = ROOT / "examples" / "recipes"
NAMES = sorted(path.name.removesuffix(".model.yaml") for path in RECIPES.glob("*.model.yaml"))

#: Settings that only make a tokenizer or a fusion large.
SMALL = {
    "qformer": {"num_queries": 2, "depth": 2, "dim": 16, "num_heads": 2, "dim_ff": 16},
    "perceiver": {"depth": 1, "num_latents": 2, "num_heads": 2, "head_dim": 8},
    "cross-attention": {"num_heads": 2, "head_dim": 8},
}


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, pictures and records."""
    path = write_pictures_and_records(tmp_path_factory.mktemp("recipes"))
    tiny_language_model.make(path / "lm")
    (path / "lm" / "chat_template.jinja").write_text(CHAT)
    write_conversations(path)
    return path


@pytest.fixture(scope="module")
def run() -> Callable[..., Any]:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def write_conversations(folder: Path) -> None:
    """Write LLaVA's two files under their own names: captions, and conversations of several turns."""
    for name, num_turns in (("blip_laion_cc_sbu_558k.json", 1), ("llava_v1_5_mix665k.json", 2)):
        rows: list[dict[str, Any]] = []
        for number, colour in enumerate(COLOURS):
            turns = []
            for turn in range(num_turns):
                start = "" if turn else "<image>\n"
                turns.append({"from": "human", "value": f"{start}What colour is it?"})
                turns.append({"from": "gpt", "value": f"It is {colour}."})
            rows.append({"id": str(number), "image": f"{colour}.png", "conversations": turns})
        rows.append({"id": "text", "conversations": turns_of_text(num_turns)})
        (folder / name).write_text(json.dumps(rows))


def turns_of_text(count: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "Yes."}] * count


def shrink(recipe: str, folder: Path) -> Path:
    """Write the recipe's composition with tiny parts: its types, layers and tokens stay."""
    model = read_file(RECIPES / f"{recipe}.model.yaml")
    shuffle = model["vision_tokenizer"].get("pixel_shuffle", 1)
    tower = json.loads(json.dumps(TRAINING_TOWER))
    tower["model_cfg"]["vision_cfg"] |= {"image_size": 8 * 2 * shuffle, "patch_size": 8, "layers": 3}
    (folder / f"{recipe}.json").write_text(json.dumps(tower))
    kept = {key: x for key, x in model["vision_encoder"].items() if key in ("layer", "class_token", "norm")}
    model["vision_encoder"] = {"name": str(folder / f"{recipe}.json"), **kept}
    model["language_model"] = {"name": str(folder / "lm")}
    for part in ("vision_tokenizer", "fusion"):
        model[part] |= SMALL.get(model[part]["type"], {})
    path = folder / f"{recipe}.model.yaml"
    path.write_text(yaml.safe_dump(model))
    return path


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", ["llava-1.5", *sorted({*NAMES} - {"llava-1.5"})])
def test_a_recipe_runs_from_end_to_end(recipe: str, folder: Path, tmp_path: Path, run: Any) -> None:
    built = run("build", tmp_path / "vlm", "--config", shrink(recipe, folder), "--random-weights")
    assert built.exit_code == 0, built.stderr
    plan = yaml.safe_load((RECIPES / f"{recipe}.stages.yaml").read_text())
    for stage in plan["stages"]:
        # LLaVA's recipe reads LLaVA's own format.
        stage["data"] = stage["data"] if recipe == "llava-1.5" else "train.jsonl"
    path = folder / f"{recipe}.stages.yaml"
    path.write_text(yaml.safe_dump(plan))
    sizes = ("--batch-size", 3, "--max-steps", 2, "--log-every", 1, "--warmup-steps", 0)
    sizes += ("--gradient-accumulation", 1) if "global_batch_size" not in str(plan) else ("--global-batch-size", 6)
    out = tmp_path / "out"
    done = run("train", tmp_path / "vlm", "--stages", path, "--output", out, *sizes, "--json")
    assert done.exit_code == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert [stage["name"] for stage in stages] == [stage["name"] for stage in plan["stages"]]
    before, after = load_file(tmp_path / "vlm/model.safetensors"), load_file(out / "model.safetensors")
    changed = {name.split(".")[0].replace("lang_model", "language_model") for name in before}
    changed = {part for part in changed if any(_differs(before, after, part))}
    trained = {part for stage in plan["stages"] for part in stage["trainable"]}
    assert changed == trained, "a part that trains has a gradient"


def _differs(before: Any, after: Any, part: str) -> list[bool]:
    prefix = "lang_model." if part == "language_model" else f"{part}."
    return [not before[name].equal(after[name]) for name in before if name.startswith(prefix)]


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_is_valid_and_names_its_source(recipe: str) -> None:
    stages = read_stages(RECIPES / f"{recipe}.stages.yaml")
    model = read_file(RECIPES / f"{recipe}.model.yaml")
    assert set(model["trainable"]) <= {part for stage in stages for part in stage.settings.trainable or ()}
    for file in (f"{recipe}.model.yaml", f"{recipe}.stages.yaml"):
        assert "# Source: " in (RECIPES / file).read_text() or "Source: " in (RECIPES / file).read_text()


def test_the_numbers_of_llava_s_scripts() -> None:
    """Source: scripts/v1_5/pretrain.sh and finetune.sh of https://github.com/haotian-liu/LLaVA."""
    align, instruct = (stage.settings for stage in read_stages(RECIPES / "llava-1.5.stages.yaml"))
    assert (align.learning_rate, align.step_size(4), align.accumulation(4)) == (1e-3, 256, 4)
    assert (instruct.learning_rate, instruct.step_size(8), instruct.accumulation(8)) == (2e-5, 128, 1)
    for stage in (align, instruct):
        assert (stage.schedule, stage.warmup_steps, stage.weight_decay, stage.epochs) == ("cosine", 0.03, 0.0, 1)
