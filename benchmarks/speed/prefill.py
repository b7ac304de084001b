"""How long it takes from images and text to the first new token.

python -m benchmarks.speed.prefill
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.speed.measure import Run, Skipped, Subject, compare, limits, seconds
from benchmarks.speed.models import Contender, Models, Prompt, blocks_alone, greedy, prefill
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report

LIMIT = 30  # seconds of one prefill; longer ones are left out
LONG = 4  # seconds of one prefill; from there on only `Settings.few` pairs run, and no peers
PARTS = "tower + tokenizer + bare LM, each alone"
PARTS_AND_BLOCKS = "the same + blocks alone"
FAMILIES = ("flamingo", "llava", "blip")


def cases(size: str) -> list[Prompt]:
    if size == "tiny":
        return [Prompt(1), Prompt(2, batch=2)]
    return [Prompt(1), Prompt(8), Prompt(1, batch=8), Prompt(32), Prompt(32, batch=8)]


def measure(report: Report, models: Models, settings: Settings) -> None:
    report.notes.append(f"{models.size.name}: {limits(models.device, models.dtype)} in this run")
    for family in FAMILIES:
        prompts = cases(models.size.name)
        _measure_family(report, models, settings, family, prompts[:1] if family == "blip" else prompts)
    if models.size.name == "standard":
        _bars(report)


def _bars(report: Report) -> None:
    for family, parts in (("flamingo", PARTS), ("flamingo", PARTS_AND_BLOCKS), ("llava", PARTS)):
        for prompt in cases("standard")[1:3]:
            _bar(report, prompt, family, parts, 1.05)
    for family, peer in (("llava", "HF LLaVA"), ("llava", "reference"), ("flamingo", "reference")):
        for prompt in cases("standard")[:3]:
            _bar(report, prompt, family, peer, 1.0)


def _bar(report: Report, prompt: Prompt, family: str, peer: str, limit: float) -> None:
    value = report.ratio(prompt, f"ours, {family}", peer, "standard")
    report.bars.append(Bar(name=f"prefill, {family}, {prompt} / {peer}", value=value, limit=limit))


def _measure_family(report: Report, models: Models, settings: Settings, family: str, prompts: Sequence[Prompt]) -> None:
    size, ours = models.size.name, models.ours(family)
    bare = models.bare(ours.model.num_positions())
    estimate = 0.0  # seconds of an image
    for prompt in prompts:
        expected = estimate * prompt.images * prompt.batch
        if expected > LIMIT:
            report.add(size, prompt, ours.name, {"all": Skipped(f"one would take about {expected:.0f} s")})
            continue
        first = prefill(ours, prompt)()
        estimate = first / (prompt.images * prompt.batch)
        peers = [Subject(PARTS, partial(each_alone, models, ours, bare, prompt))]
        if family == "flamingo":
            peers.append(Subject(PARTS_AND_BLOCKS, partial(each_alone, models, ours, bare, prompt, blocks=True)))
        if first <= LONG:
            peers += models.peers(family, partial(prefill, prompt=prompt))
        subject = Subject(ours.name, partial(prefill, ours, prompt))
        rounds = settings.pairs if first <= LONG else settings.few
        found = compare(subject, peers, rounds, together=models.together, warm_up=prompt is prompts[0])
        report.add(size, prompt, ours.name, found)


def each_alone(models: Models, ours: Contender, bare: Contender, prompt: Prompt, *, blocks: bool = False) -> Run:
    """OpenCLIP's tower, the vision tokenizer, and the bare language model at that length, one after the other."""
    model = ours.model
    tower, tokenizer = model.vision_encoder.visual, model.vision_tokenizer
    pixels = models.placed(prompt.pixels(models.image_size).flatten(0, 2))
    shape = (prompt.batch, prompt.images, 1, models.num_patches, models.vision_width)
    features, text = models.placed(torch.randn(shape)), bare.inputs(prompt)
    arithmetic = blocks_alone(model, prompt) if blocks else lambda: None

    @torch.inference_mode()
    def run_all() -> None:
        tower(pixels)
        tokenizer(features, None)
        bare.model.generate(**text, **greedy(1))
        arithmetic()

    return seconds(run_all)


QUESTION = Question(
    name="prefill",
    asks="How long from images and text to the first new token, next to its parts alone and to peers?",
    measure=measure,
)

if __name__ == "__main__":
    run(QUESTION)
