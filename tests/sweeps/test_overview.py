"""`vlm sweep` without data: what each composition is and costs, and what does not fit."""

from __future__ import annotations

import csv
import json

import pytest

import vlm_cli
from tests.support.sweeps import CROSS_ATTENTION, PERCEIVER
from vlm_cli.composition import Composition, read_file
from vlm_cli.errors import UsageError
from vlm_cli.sweeps.dimensions import Dimension, make_grid, parse_dimension


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2", (1, 2)),
        ("a=x", ("x",)),
        ("a=[x,y],[x]", (["x", "y"], ["x"])),
        ("a={type: t, b: [1, 2]},u", ({"type": "t", "b": [1, 2]}, "u")),
        ("a='1,2',3", ("1,2", 3)),
        ("a=1e-3,null", (0.001, None)),
    ],
)
def test_values_are_yaml_between_commas(text, values):
    assert parse_dimension(text) == Dimension("a", values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "expects NAME=VALUE,VALUE"),
        ("=1", "expects NAME=VALUE,VALUE"),
        ("a=", "holds an empty value"),
        ("a=1,,2", "holds an empty value"),
        ("a.b.c=1", "NAME or PART.SETTING"),
        ("a={b", "is not YAML"),
        ("a=1,1", "twice, which would be the same run"),
        ("a={b: 1, c: 2},{c: 2, b: 1}", "twice, which would be the same run"),
        (f"a={','.join(map(str, range(101)))}", "101 values; 1 to 100"),
    ],
)
def test_a_dimension_that_is_none(text, words):
    with pytest.raises(UsageError, match=words):
        parse_dimension(text)


def test_the_grid():
    grid = make_grid([Dimension("a", (1, 2)), Dimension("b", ("x", "y"))])
    assert grid == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(UsageError, match="names a twice"):
        make_grid([Dimension("a", (1,)), Dimension("a", (2,))])
    with pytest.raises(UsageError, match="10,000 compositions; 1,000 are possible"):
        make_grid([Dimension("a", tuple(range(100))), Dimension("b", tuple(range(100)))])


def test_costs_are_those_of_the_models(here, vlm):
    sets = "--set", f"vision_tokenizer=linear,{PERCEIVER}", "--set", f"fusion=language-stream,{CROSS_ATTENTION}"
    result = vlm("sweep", "base.yaml", *sets, "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["compositions"]
    assert [row["number"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        composition = Composition.compose(None, read_file(here / "base.yaml"), row["values"])
        model = vlm_cli.create(vlm_cli.plan(composition), random_weights=True)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert row["tokens_per_image"] == model.vision_tokenizer.num_tokens()
        assert row["positions_per_image"] == (1 if "type" in row["values"]["fusion"] else row["tokens_per_image"])


def test_impossible_ones_stand_in_the_table_with_their_reason(here, vlm):
    words = ["sweep", "base.yaml", "--set", "vision_tokenizer=linear,perceiver"]
    words += ["--set", "vision_tokenizer.num_latents=4,8", "--set", "language_model=lm,nowhere"]
    rows = json.loads(vlm(*words, "--json").stdout)["compositions"]
    possible = [row["values"] for row in rows if "problem" not in row]
    assert possible == [
        {"vision_tokenizer": "perceiver", "vision_tokenizer.num_latents": n, "language_model": "lm"} for n in (4, 8)
    ]
    assert "cannot find language model 'nowhere'" in next(x["problem"] for x in rows[4:] if "problem" in x)


def test_the_table_and_its_forms(here, vlm):
    words = ["sweep", "base.yaml", "--set", "vision_tokenizer=linear,perceiver"]
    words += ["--set", "vision_tokenizer.num_latents=4"]
    [linear, perceiver] = csv.DictReader(vlm(*words, "--csv").stdout.splitlines())
    assert linear["problem"].startswith("unknown key vision_tokenizer.num_latents")
    assert perceiver["tokens_per_image"] == "4"
    table = vlm(*words).stdout
    assert "1 is impossible: unknown key vision_tokenizer.num_latents" in " ".join(table.split())
    assert "vision_tokenizer.num_latents is 4 everywhere." in table


def test_a_composition_in_other_words_is_recognised(here, vlm):
    words = ["sweep", "base.yaml", "--set", "vision_tokenizer=linear,{type: linear},mlp", "--json"]
    rows = json.loads(vlm(*words).stdout)["compositions"]
    assert [row.get("same_as") for row in rows] == [None, 1, None]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "vision_tokenizer=linear,percever"], "Did you mean 'perceiver'?"),
        (["--set", "vision_tokeniser=linear,mlp"], "Did you mean 'vision_tokenizer'?"),
        (["--set", "vision_tokenizer.pool=1,x"], "vision_tokenizer.pool must be a whole number"),
        (["--set", "train.learning_rat=1e-3"], "Did you mean 'learning_rate'?"),
        (["--set", "train.learning_rate=fast"], "train.learning_rate must be a number"),
        (["--set", "train.seed=1,2"], "give --seeds"),
        (["--set", "fusion=language-stream", "--set", "fusion=cross-attention"], "names fusion twice"),
        (["--json", "--csv"], "exclude each other"),
    ],
)
def test_a_sweep_that_is_wrong(here, vlm, words, told):
    result = vlm("sweep", "base.yaml", *words)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize("base", ["nothing", "demo"])
def test_a_base_that_is_none(here, vlm, base):
    result = vlm("sweep", base)
    assert result.exit_code == 2
    assert "unknown model 'nothing'" in result.stderr or "Start from its composition" in result.stderr
