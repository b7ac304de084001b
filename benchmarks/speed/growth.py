"""How costs grow with images, text, layers and rows.

python -m benchmarks.speed.growth
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks.speed.measure import Run, alternate, exponent, seconds
from benchmarks.speed.models import Contender, Models, Prompt, decode, prefill
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Report, Table

TOKENS = 8  # new tokens of a run of decoding
START = Prompt(4, batch=1, text=64)  # what does not grow

#: What grows, and through which values; layers take models of their own.
ALONG: Mapping[str, Sequence[int]] = {"images": (1, 4, 8), "text": (32, 128, 512), "batch": (1, 2, 4)}
TINY: Mapping[str, Sequence[int]] = {"images": (1, 2), "text": (16, 32), "batch": (1, 2)}


def measure(report: Report, models: Models, settings: Settings) -> None:
    is_tiny = models.size.name == "tiny"
    rows: list[tuple[str, ...]] = []
    for family in ("flamingo", "llava"):
        ours = models.ours(family)
        decode(ours, START, TOKENS)()  # warms up
        for along, values in (TINY if is_tiny else ALONG).items():
            prompts = [replace(START, **{along: value}) for value in values]
            for name, make in steps(ours).items():
                if name != "encode" or (along == "images" and family == "flamingo"):
                    rows.append(_row(family, name, along, values, [make(p) for p in prompts], settings))
        layers = (1, 2) if is_tiny else _thirds(models.size.llama["num_hidden_layers"])
        shallow = [_with_layers(models, number).ours(family) for number in layers]
        for name in ("prefill", "decode"):
            runs = [steps(contender)[name](START) for contender in shallow]
            rows.append(_row(family, name, "layers", layers, runs, settings))
    head = ("family", "step", "along", "through", "seconds", "exponent")
    report.tables.append(Table(f"{models.size.name}: from {START}", head, rows))
    report.notes.append("An exponent p says that the cost grows as the p-th power: 0 is constant, 1 linear.")


def steps(ours: Contender) -> dict[str, Callable[[Prompt], Run]]:
    """What is timed of a model."""
    return {
        "encode": lambda prompt: _encode(ours, prompt),
        "prefill": lambda prompt: prefill(ours, prompt),
        "decode": lambda prompt: decode(ours, prompt, TOKENS),
    }


def _encode(ours: Contender, prompt: Prompt) -> Run:
    pixels = ours.inputs(prompt)["vision_x"]
    return seconds(torch.inference_mode()(lambda: ours.model.encode_vision(pixels)))


def _row(
    family: str, step: str, along: str, values: Sequence[int], runs: Sequence[Run], settings: Settings
) -> tuple[str, ...]:
    by_value = {str(value): run for value, run in zip(values, runs, strict=True)}
    costs = [statistics.median(x) for x in alternate(by_value, min(settings.few, 2), warm_up=False).values()]
    through, spent = ", ".join(by_value), ", ".join(f"{x:.3f}" for x in costs)
    return family, step, along, through, spent, f"{exponent(values, costs):.2f}"


def _thirds(number: int) -> tuple[int, ...]:
    return number // 3, number * 2 // 3, number


def _with_layers(models: Models, number: int) -> Models:
    folder = models.scratch / f"layers-{number}"
    folder.mkdir(exist_ok=True)
    return Models(models.size.with_layers(number), folder, models.open_flamingo)


QUESTION = Question(
    name="growth",
    asks="How do encoding, prefill and decoding grow with images, text, layers and rows?",
    measure=measure,
    devices=("cpu",),
    sizes=("tiny", "small", "standard"),
)

if __name__ == "__main__":
    run(QUESTION)
