"""`vlm cost`: tables, JSON, CSV and plots of what a composition costs."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest


@pytest.fixture
def cost(vlm):
    def run(*flags: object) -> Any:
        result = vlm("cost", *map(str, flags), "--json", "--quiet")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_the_demo_costs_more_with_more_pictures(cost):
    [model] = cost("--pictures", "1,2", "--text", "8", "--train")["models"]
    first, two = model["costs"]
    assert [(x["pictures"], x["text"]) for x in model["costs"]] == [(1, 8), (2, 8)]
    assert two["flops"]["prefill"] > first["flops"]["prefill"]
    assert two["flops"]["encoder"] == 2 * first["flops"]["encoder"]
    assert first["step"]["memory"]["peak"] > first["peak_bytes"]


@pytest.mark.matrix
def test_two_fusions_stand_side_by_side_and_cross_where_json_says(cost):
    found = cost("--text", "8", "--against", "language-stream", "--crossing", "--card", "h100")
    assert [model["name"] for model in found["models"]] == ["demo", "language-stream"]
    sides = {model["name"]: model["costs"][0] for model in found["models"]}
    crossing = next(x for x in found["crossings"] if x["measure"] == "cache and media")
    first = crossing["changes"][0]["cheaper"]
    assert first in sides and found["card"]["name"] == "h100"
    kept = {name: x["cache_bytes"] + x["media_bytes"] for name, x in sides.items()}
    later = [x for x in crossing["changes"] if x["from_tokens"] <= 8][-1]["cheaper"]
    assert kept[later] == min(kept.values())


@pytest.mark.matrix
def test_csv_holds_what_json_holds(vlm, cost):
    result = vlm("cost", "--text", "8", "--csv", "-q")
    [row] = csv.DictReader(io.StringIO(result.stdout))
    [model] = cost("--text", "8")["models"]
    assert int(row["flops_total"]) == model["costs"][0]["flops"]["total"]
    assert int(row["cache_bytes"]) == model["costs"][0]["cache_bytes"]
    assert int(row["activation_bytes"]) == int(row["peak_bytes"]) - int(row["weight_bytes"])


@pytest.mark.matrix
def test_a_plot_is_the_same_each_time(vlm, tmp_path):
    pictures = []
    for name in ("a.svg", "b.svg", "c.png"):
        result = vlm("cost", "--text", "4,8", "-q", "--plot", str(tmp_path / name))
        assert result.exit_code == 0, result.stderr
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and b"<svg" in pictures[0]
    assert pictures[2].startswith(b"\x89PNG")


@pytest.mark.matrix
def test_every_row_of_a_table_has_all_columns_and_no_step_is_without_a_name(vlm):
    result = vlm("cost", "--text", "8", "--frames", "1,2")
    heads, _, *rows = result.stdout.split("\n\n")[1].splitlines()
    assert heads.split() == ["pictures", "frames", "text", "positions", "encoder", "tokenizer", "prefill", "token"]
    assert [row.split()[:4] for row in rows] == [["1", "1", "8", "9"], ["1", "2", "8", "9"]]
    assert all(line.split()[0] == "counting" for line in result.stderr.splitlines())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card", "h200x"], "unknown card 'h200x'. Did you mean 'h100'?"),
        (["--pictures", "1;2"], "--pictures expects whole numbers from 0 to 1,048,576 with commas between"),
        (["--text", "0"], "--text expects whole numbers from 1"),
        (["--size", "640"], "--size expects width and height in pixels"),
        (["--size", "64x64", "--frames", "2"], "--size, --tiles and --frames exclude each other"),
        (["--tiles", "4"], "the composition cuts no picture into 4 tiles. It can be 1."),
        (["--crossing"], "--crossing compares two models. Add --against OTHER."),
        (["--plot", "a.svg"], "--plot draws costs over several sizes."),
        (["--plot", "a.pdf", "--text", "1,2"], "'a.pdf' is neither SVG nor PNG."),
        (["--json", "--csv"], "--json and --csv exclude each other"),
        (["--against", "demo"], "--against demo is MODEL itself"),
        (["--stochastic-rounding"], "--stochastic-rounding rounds to bfloat16 in AdamW"),
        (["--trainable", "ears"], "unknown part 'ears' in --trainable"),
    ],
)
def test_what_cannot_be_is_refused(vlm, flags, message):
    result = vlm("cost", *flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_long_prompt_is_counted_with_a_note(vlm):
    result = vlm("cost", "--text", "100000")
    assert result.exit_code == 0
    assert "do not fit its language model" in result.stderr
