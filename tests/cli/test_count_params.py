"""`vlm count-params`: each number once, the same in every form, and those of published models."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from vlm_cli import load


@pytest.fixture
def count(vlm):
    def run(*flags):
        result = vlm("count-params", *flags, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def by_name(report):
    return {part["name"]: part["parameters"] for part in report["parts"]}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flamingo", "kosmos"])
def test_counts_are_those_of_the_tensors(count, family, request):
    folder = request.getfixturevalue(family)
    model, _ = load(str(folder))
    report = count(folder)
    # Tied weights are saved once.
    assert report["total"]["parameters"] == sum(x.numel() for x in load_file(folder / "model.safetensors").values())
    trainable = {p.data_ptr(): p.numel() for p in model.parameters() if p.requires_grad}
    assert report["total"]["trainable"] == sum(trainable.values())
    for part in report["parts"]:
        assert part["parameters"] == part["trainable"] + part["frozen"]
    assert report["total"]["parameters"] == sum(part["parameters"] for part in report["parts"])
    assert sum(part["share"] for part in report["parts"]) == pytest.approx(1)
    assert report["total"]["bytes"] == 4 * report["total"]["parameters"]


def test_tied_weights_count_once(count, parts, language_model):
    tied = by_name(count(*parts.flamingo))["language_model"]
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = by_name(count(*parts.flamingo, "--language-model", language_model))["language_model"]
    assert untied - tied == config["vocab_size"] * config["hidden_size"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_rows_below_a_part_add_up_to_it(count, flamingo, depth):
    rows = count(flamingo, "--depth", depth)["parts"]
    parts = [row for row in rows if row["depth"] == 1]
    assert [row["name"] for row in parts] == [row["name"] for row in count(flamingo)["parts"]]
    for row in rows:
        below = [x for x in rows if x["name"].startswith(row["name"] + ".") and x["depth"] == row["depth"] + 1]
        assert not below or sum(x["parameters"] for x in below) == row["parameters"]
    assert max(row["depth"] for row in rows) == depth


def test_dtype_counts_bytes(count, flamingo, parts):
    number = count(flamingo)["total"]["parameters"]
    assert count(flamingo, "--dtype", "bfloat16")["total"]["bytes"] == 2 * number
    assert count(*parts.flamingo, "--dtype", "float16")["dtype"] == "float16"


def test_trainable_flag_moves_what_is_frozen(count, parts):
    report = count(*parts.flamingo, "--trainable", "language_model")
    trains = {part["name"] for part in report["parts"] if part["trainable"]}
    assert trains == {"language_model"}


# -- forms -------------------------------------------------------------------------------------------------------------


def test_a_directory_a_file_and_flags_agree(count, parts, flamingo):
    built = count(flamingo)
    assert count(flamingo / "composition.yaml") == built
    assert count(*parts.flamingo) == built
    assert count("flamingo", *parts.flamingo[2:]) == built
    assert count(*parts.flamingo, "--set", "vision_tokenizer.depth=2") != built


def test_table_csv_markdown_and_json_agree(vlm, count, flamingo):
    report = count(flamingo, "--depth", 2)
    rows = [*report["parts"], report["total"]]
    numbers = [(row["parameters"], row["trainable"], row["frozen"]) for row in rows]

    text = vlm("count-params", flamingo, "--depth", 2, "--csv").stdout
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["part"] for row in table] == [row["name"] for row in rows]
    assert [tuple(int(row[key]) for key in ("parameters", "trainable", "frozen")) for row in table] == numbers
    assert [int(row["bytes"]) for row in table] == [row["bytes"] for row in rows]
    assert [float(row["share"]) for row in table] == pytest.approx([row["share"] for row in rows], abs=1e-6)

    text = vlm("count-params", flamingo, "--depth", 2, "--markdown").stdout
    head, line, *body = text.splitlines()
    assert {row.count("|") for row in (head, line, *body)} == {7}
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in body]
    assert [tuple(int(cell.replace(",", "")) for cell in row[1:4]) for row in cells] == numbers

    text = vlm("count-params", flamingo, "--depth", 2).stdout
    lines = re.findall(r"^ +\S+ +([\d,]+) +([\d,]+) +([\d,]+) +[\d.]+%", text, re.MULTILINE)
    assert [tuple(int(x.replace(",", "")) for x in line) for line in lines] == numbers


def test_forms_exclude_each_other(vlm, flamingo):
    result = vlm("count-params", flamingo, "--json", "--csv")
    assert result.exit_code == 2 and "exclude each other" in result.stderr


def test_without_a_model_the_bundled_one_is_counted(vlm):
    assert vlm("count-params", "--json").stdout == vlm("count-params", "demo", "--json").stdout


def test_flags_have_no_effect_on_a_directory(vlm, flamingo):
    result = vlm("count-params", flamingo, "--set", "fusion.every=2")
    assert result.exit_code == 2 and "is built already, so --set has no effect" in result.stderr
    assert "composition.yaml" in result.stderr


# -- published models --------------------------------------------------------------------------------------------------
# The numbers are counted from the shapes of released models by hand: peers.md, section 6.


def language_model_of(path, model_type, **sizes):
    """A directory with a configuration and nothing else, which is all that counting needs."""
    AutoConfig.for_model(model_type, **sizes).save_pretrained(path)
    return path


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA_SIZES = {"vocab_size": 32000, "tie_word_embeddings": False}


@pytest.fixture
def llama(tmp_path):
    return language_model_of(tmp_path / "llama-7b", "llama", **LLAMA_7B, **LLAMA_SIZES)


@pytest.fixture
def flags(llama):
    return ("--vision-encoder", "ViT-L-14:openai", "--language-model", llama)


def test_llama_7b_and_flamingo_9b(count, flags):
    report = count("--family", "flamingo", *flags, "--set", "fusion.every=4")
    found = by_name(report)
    assert found["language_model"] == 6_738_415_616
    # CLIP ViT-L/14 with the projection, which stands in OpenCLIP's files and which we keep.
    assert found["vision_encoder"] == 303_966_208
    assert found["vision_tokenizer"] == 63_019_008
    assert found["fusion"] == 8 * 139_476_994
    assert found["added_tokens"] == 2 * 2 * 4096  # <|endofchunk|> and <image>, embedded and predicted
    trained = 63_019_008 + 8 * 139_476_994 + 4 * 4096
    assert report["total"]["trainable"] == trained


@pytest.mark.matrix
def test_llama_13b(count, tmp_path):
    llama = language_model_of(tmp_path / "llama-13b", "llama", **LLAMA_13B, **LLAMA_SIZES)
    flags = ("--family", "llava", "--vision-encoder", "ViT-L-14-336:openai", "--language-model", llama)
    found = by_name(count(*flags, "--vision-tokenizer", "mlp"))
    assert found["language_model"] == 13_015_864_320
    assert found["vision_encoder"] == 304_293_888
    assert found["vision_tokenizer"] == 31_467_520


@pytest.mark.matrix
def test_llava_7b_projection(count, flags):
    assert by_name(count("--family", "llava", *flags, "--vision-tokenizer", "mlp"))["vision_tokenizer"] == 20_979_712


@pytest.mark.matrix
def test_perceiver_with_a_projection(count, flags):
    assert by_name(count("--family", "kosmos", *flags))["vision_tokenizer"] == 67_217_408


@pytest.mark.parametrize(
    ("dim", "heads", "block"),
    [
        (2048, 16, 36_708_354),
        pytest.param(2560, 32, 56_109_058, marks=pytest.mark.matrix),
        pytest.param(4096, 32, 139_476_994, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.matrix
def test_gated_cross_attention_block(count, tmp_path, dim, heads, block):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": heads, "intermediate_size": 64}
    lm = language_model_of(tmp_path / "lm", "gpt_neox", hidden_size=dim, **sizes)
    flags = ("--family", "flamingo", "--vision-encoder", "ViT-L-14:openai", "--language-model", lm)
    assert by_name(count(*flags, "--set", "fusion.every=2"))["fusion"] == 2 * block


@pytest.mark.parametrize(
    ("encoder", "qformer"),
    [("ViT-L-14", 101_623_296), pytest.param("EVA01-g-14", 105_162_240, marks=pytest.mark.matrix)],
)
def test_q_former(count, tmp_path, encoder, qformer):
    """Theirs are the 32 queries and the layers; ours has the projection to the language model beside them."""
    lm = language_model_of(tmp_path / "lm", "opt", hidden_size=2560, word_embed_proj_dim=2560, num_attention_heads=32)
    flags = ("--family", "blip", "--vision-encoder", encoder, "--language-model", lm)
    projection = 768 * 2560 + 2560
    assert projection == 1_968_640
    assert by_name(count(*flags))["vision_tokenizer"] == qformer + projection


@pytest.mark.matrix
def test_xgen_mm_perceiver_and_siglip(count, tmp_path):
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32}
    lm = language_model_of(tmp_path / "phi", "phi3", **sizes, pad_token_id=None)
    flags = ("--family", "kosmos", "--vision-encoder", "ViT-SO400M-14-SigLIP-384", "--language-model", lm)
    perceiver = [f"vision_tokenizer.{x}" for x in ("num_heads=16", "head_dim=96", "num_latents=128")]
    found = by_name(count(*flags, *(x for size in perceiver for x in ("--set", size))))
    assert found["vision_tokenizer"] == 109_901_568
    assert found["vision_encoder"] == 428_225_600


@pytest.mark.matrix
def test_projection_of_the_tower_is_what_clip_counts_without(count, flags):
    rows = by_name(count("--family", "flamingo", *flags, "--depth", 3))
    assert rows["vision_encoder"] - rows["vision_encoder.visual.proj"] == 303_179_776


@pytest.mark.matrix
def test_nine_billion_parameters_take_less_than_a_gigabyte(llama, environment):
    """Its peak memory is mostly that of the libraries, whose import is measured by itself."""
    # VmHWM is of the command alone; ru_maxrss would also be that of the process that started it.
    script = "import sys; from vlm_cli.cli.app import app\ntry: app()\nexcept SystemExit: pass\n"
    script += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    flags = ["--family", "flamingo", "--vision-encoder", "ViT-L-14", "--language-model", str(llama), "--json"]
    command = [sys.executable, "-c", script, "count-params", *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["total"]["parameters"] > 9e9
    assert int(result.stderr.split()[-1]) * 1024 < 1e9


def test_counting_allocates_no_weight(count, llama, monkeypatch):
    """Every parameter of a model of 11 billion is made on the meta device."""
    made = []
    original = torch.nn.Parameter.__new__

    def spy(cls, data=None, *args, **kwargs):
        if data is not None:
            made.append(data)
        return original(cls, data, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", spy)
    count("--family", "flamingo", "--vision-encoder", "ViT-L-14:openai", "--language-model", llama)
    assert len(made) > 500 and {x.device.type for x in made} == {"meta"}


def test_a_composition_comes_from_stdin(vlm, parts):
    """`-` means stdin, as in every other place that reads a file."""
    words = ("count-params", *parts.flamingo, "--json")
    piped = vlm(*words, "--config", "-", input=b"\xef\xbb\xbffusion:\r\n  every: 2\r\n")
    assert piped.exit_code == 0, piped.stderr
    assert piped.stdout == vlm(*words, "--set", "fusion.every=2").stdout != vlm(*words).stdout


def test_memory_of_the_weights(vlm, parts):
    """The bytes of each part as they are, and with each quantization; what a picture needs keeps its weights."""
    found = vlm("count-params", *parts.flamingo, "--memory", "--json", "--dtype", "bfloat16")
    sizes = json.loads(found.stdout)["bytes"]
    plain = json.loads(vlm("count-params", *parts.flamingo, "--json", "--dtype", "bfloat16").stdout)["parts"]
    assert sizes["bfloat16"] == {row["name"]: row["bytes"] for row in plain}
    assert sizes["int4"]["vision_encoder"] == sizes["bfloat16"]["vision_encoder"]
    assert sizes["int4"]["fusion"] < sizes["int8"]["fusion"] < sizes["bfloat16"]["fusion"]
    table = vlm("count-params", *parts.flamingo, "--memory")
    assert [row.split()[0] for row in table.stdout.splitlines() if row.strip()][-1] == "total"
    refused = vlm("count-params", *parts.flamingo, "--memory", "--csv")
    assert refused.exit_code == 2 and "--memory prints a table" in refused.stderr
