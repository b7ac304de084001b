"""How long whole commands take to start.

python -m benchmarks.speed.startup
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.speed.measure import Subject, compare, process
from benchmarks.speed.models import Models
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report

ONE_LINE = "import typer; typer.run(lambda: None)"
# Imported in this order, OpenCLIP costs least.
IMPORTS = "import torch; from transformers import LlamaForCausalLM; import open_clip"
DEMO_PROMPT = f"<image:{Path(__file__).parents[2] / 'examples' / 'images' / 'two.png'}>Describe the image."
COUNT, GENERATE = "vlm count-params, 9B", "vlm generate, first token of demo"

#: The configuration of meta-llama/Meta-Llama-3-8B.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def measure(report: Report, models: Models, settings: Settings) -> None:
    size = models.size.name
    lm = models.scratch / "llama-8b"
    LlamaConfig(**LLAMA_8B).save_pretrained(lm)
    one_line = Subject("one-line Typer program, --help", partial(process, "-c", ONE_LINE, "--help"))
    imports = Subject("import torch, LlamaForCausalLM, open_clip", partial(process, "-c", IMPORTS))
    parts = ["--vision-encoder", "ViT-L-14", "--language-model", str(lm), "--set", "fusion.every=4"]
    for name, arguments, peer in (
        ("vlm --help", ["--help"], one_line),
        (COUNT, ["count-params", "--family", "flamingo", *parts], imports),
        (GENERATE, ["generate", DEMO_PROMPT, "--max-new-tokens", "1"], imports),
    ):
        ours = Subject(name, partial(process, "-m", "vlm_cli", *arguments))
        report.add(size, "a whole process", name, compare(ours, [peer], settings.pairs))
    for name, peer, limit in (("vlm --help", one_line, 1.5), (COUNT, imports, 1.15), (GENERATE, imports, None)):
        value = report.ratio("a whole process", name, peer.name)
        report.bars.append(Bar(name=f"{name} / {peer.name}", value=value, limit=limit))


QUESTION = Question(
    name="startup",
    asks="How long do whole commands take to start, next to what they must import?",
    measure=measure,
    devices=("cpu",),
    sizes=("tiny", "standard"),
)

if __name__ == "__main__":
    run(QUESTION)
