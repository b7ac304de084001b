"""What a token costs in each way to run a step: eager, captured in a CUDA graph, compiled, and in slots.

python -m benchmarks.speed.steps --size large --device cuda --dtype bfloat16

On a CPU no graph is captured, so that the same code is tried there with tiny models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.decode import BARE, first_calls, weights_of
from benchmarks.speed.measure import Pairs, Run, Skipped, alternate, large_read, now
from benchmarks.speed.models import Contender, Models, Prompt, decode, greedy
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report, Table
from benchmarks.speed.rounding import find_parting, write
from vlm_cli.errors import first_line
from vlm_cli.modeling.acceleration import accelerate
from vlm_cli.modeling.decoding.read_rows import ReadRows
from vlm_cli.modeling.decoding.static import WARM_UP, find_graph
from vlm_cli.modeling.decoding.static_slots import StaticSlots
from vlm_cli.modeling.decoding.steps import EagerStep

COMPILED = "bare, compiled"
LIMITS = {"llava": 1.1, "flamingo": 1.15}  # of the compiled step over the bare model's and over its weights
SLOTS = (16, 64)  # rows


def measure(report: Report, models: Models, settings: Settings) -> None:
    tokens = 12 if models.size.name == "tiny" else 128
    for family in ("llava", "flamingo"):
        ready = _prepare(report, models, family, tokens)
        costs = alternate(ready, settings.few)
        _compare(report, models, family, costs)
        _tell_operations(report, models, family)
    _measure_slots(report, models, settings, tokens)


def _ways(models: Models) -> dict[str, dict[str, Any]]:
    """Settings of `generate`, by the name of the way."""
    ways: dict[str, dict[str, Any]] = {
        "eager": {},
        "graph": {"cache_implementation": "static", "disable_compile": True},
    }
    if models.device != "cpu":
        ways |= {"compile": {"compile": None}, "compile, graphs of torch": {"compile": "reduce-overhead"}}
    return ways


def _prepare(report: Report, models: Models, family: str, tokens: int) -> dict[str, Run]:
    """Make each way ready, and tell what its first calls cost and whether its tokens are those of the eager way."""
    size, prompt, first = models.size.name, Prompt(1), []
    eager = models.ours(family)
    inputs = eager.inputs(prompt)
    few = greedy(min(32, tokens))
    plain = write(eager.model, inputs, **few)
    bare = models.bare(eager.model.num_positions())
    ready: dict[str, Run] = {BARE: decode(bare, prompt, tokens)}
    for name, way in _ways(models).items():
        try:
            contender = models.ours(family)
            if "compile" in way:
                accelerate(contender.model, compile=True)
                contender.model.generation_config.compile_config.mode = way["compile"]
            else:
                contender.model.generation_config.update(**way)
            spent = first_calls(contender, prompt, tokens + 1)
            parting = find_parting(eager.model, inputs, plain, write(contender.model, inputs, **few))
        except Exception as error:
            problem = Skipped(f"{type(error).__name__}: {first_line(error)}")
            report.add(size, prompt, f"{eager.name}, {name}", {BARE: problem})
            continue
        first.append((name, *(f"{x:.2f}" for x in spent), str(parting)))
        ready[name] = decode(contender, prompt, tokens)
    if models.device != "cpu":
        compiled = models.bare(eager.model.num_positions())
        compiled.model.generation_config.cache_implementation = "static"
        ready[COMPILED] = decode(compiled, prompt, tokens)
    title = f"{size}, {family}: seconds of the first call and of the second; tokens next to those of the eager way"
    report.tables.append(Table(title, ("way", "first", "second", "tokens"), first))
    return ready


def _compare(report: Report, models: Models, family: str, costs: Mapping[str, list[float]]) -> None:
    size, name = models.size.name, f"ours, {family}"
    for way in costs:
        if way not in (BARE, COMPILED):
            peers = {peer: Pairs(costs[way], costs[peer]) for peer in (BARE, COMPILED) if peer in costs}
            report.add(size, Prompt(1), f"{name}, {way}", peers, unit="s/token")
    bare, ours = models.bare(1), models.ours(family)
    share = weights_of(bare) / weights_of(bare, ours)
    traffic = weights_of(bare, ours)
    read = min(large_read(traffic, models.device)() for _ in range(5))  # seconds of the same bytes in one piece
    best = min((min(x) for way, x in costs.items() if way not in (BARE, COMPILED)), default=None)
    if family == "flamingo":
        ratio = report.ratio(Prompt(1), f"{name}, eager", BARE)
        report.bars.append(Bar(name="decode, flamingo, eager: cost / bare LM", value=ratio, limit=1.5))
    ratio = report.ratio(Prompt(1), f"{name}, compile", COMPILED)
    value = None if ratio is None else ratio * (share if family == "flamingo" else 1)
    over = ", over the weights of its blocks" if family == "flamingo" else ""
    title = f"decode, {family}, compiled: cost / bare LM compiled by Transformers{over}"
    report.bars.append(Bar(name=title, value=value, limit=LIMITS[family]))
    value = None if best is None else read / best
    title = f"decode, {family}, best way: share of what a read of {traffic / 1e9:.2f} GB allows"
    report.bars.append(Bar(name=title, value=value, limit=0.6, sense="at least"))


# -- operations ------------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


VIEWS = ("view", "_unsafe_view", "transpose", "t", "select", "unbind", "unsqueeze", "expand", "slice", "split", "alias")


def _tell_operations(report: Report, models: Models, family: str) -> None:
    """Count what a step dispatches, views left out: on a GPU each is a launch, for which an eager step waits."""
    ours = models.ours(family)
    inputs, counted = ours.inputs(Prompt(1)), []

    class Counted(EagerStep):
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            with _Operations() as operations:
                logits = super().__call__(ids)
            counted.append(sum(n for name, n in operations.counted.items() if name not in VIEWS))
            return logits

    from vlm_cli.modeling.decoding import loop

    loop.EagerStep = Counted  # type: ignore[misc]
    try:
        with torch.no_grad():
            ours.model.generate(**inputs, **greedy(3))
    finally:
        loop.EagerStep = EagerStep  # type: ignore[misc]
    row = (models.size.name, family, str(len(ours.model.block_layers)), str(counted[-1]))
    head = ("size", "family", "blocks", "operations")
    report.tables.append(Table(f"{family}: operations of an eager step", head, [row]))


# -- slots -----------------------------------------------------------------------------------------------------------


def _measure_slots(report: Report, models: Models, settings: Settings, tokens: int) -> None:
    """Tokens per second of full slots, next to steps of as many rows that begin and end together."""
    size, rows = models.size.name, (2,) if models.size.name == "tiny" else SLOTS
    for family in ("llava", "flamingo"):
        for number in rows:
            prompt, ours = Prompt(1, batch=number), models.ours(family)
            together = decode(ours, prompt, tokens)
            costs = alternate({"slots": _slots(ours, prompt, tokens), "together": together}, settings.few)
            pairs = Pairs(costs["slots"], costs["together"])
            report.add(size, prompt, f"{ours.name}, slots", {"eager, together": pairs}, unit="s/step")


def _slots(ours: Contender, prompt: Prompt, tokens: int) -> Run:
    """Seconds of a step in which all slots are taken."""
    model, inputs = ours.model, ours.inputs(prompt)
    told = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    @torch.inference_mode()
    def run_once() -> float:
        slots, output = StaticSlots(model, graph=find_graph(model, None)), model.generate(**inputs, **told)
        slots.put(range(prompt.batch), ReadRows.of(model, output))
        newest = slots(output.sequences[:, -1]).argmax(-1)
        for _ in range(WARM_UP):  # and the graph is captured
            newest = slots(newest).argmax(-1)
        started = now()
        for _ in range(tokens):
            newest = slots(newest).argmax(-1)
        return (now() - started) / tokens

    return run_once


QUESTION = Question(
    name="steps",
    asks="What does a token cost eager, captured, compiled and in slots, next to the bare LM and its weights' traffic?",
    measure=measure,
    devices=("cuda",),
)

if __name__ == "__main__":
    run(QUESTION)
