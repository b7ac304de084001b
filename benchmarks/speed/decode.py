"""How fast new tokens come once the prompt is read.

python -m benchmarks.speed.decode
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.speed.measure import Pairs, Skipped, Subject, alternate, compare, large_read, matrices, read_matrices
from benchmarks.speed.models import Contender, Models, Prompt, decode, greedy
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report, Table
from vlm_cli.errors import VLMError
from vlm_cli.modeling.acceleration import accelerate, compile_for

BARE, WITH_8 = "bare language model", "the same with 8 images"
TOKENS = 8  # new tokens of a run
FEW_TOKENS = 3  # of a peer that takes most of a second for one
LONG = 256  # new tokens of a run of the variants


def cases(size: str) -> list[Prompt]:
    return [Prompt(1), Prompt(2)] if size == "tiny" else [Prompt(1), Prompt(8), Prompt(32)]


def measure(report: Report, models: Models, settings: Settings) -> None:
    size = models.size.name
    for family in ("flamingo", "llava"):
        ceiling = _measure_family(report, models, settings, family)
        if size == "standard":
            _bars(report, family, ceiling)
    _limits(report, models, settings)
    if models.device == "cpu" and size != "large":
        _measure_variants(report, models, settings)


def _measure_family(report: Report, models: Models, settings: Settings, family: str) -> float:
    """Measure the decoding speed of one family beside its peers.

    Returns:
        The share of the bare model's speed that weight traffic allows.
    """
    size, ours = models.size.name, models.ours(family)
    bare = models.bare(ours.model.num_positions())
    prompts = cases(size)
    for prompt in prompts:
        peers = [Subject(BARE, partial(decode, bare, prompt, TOKENS))]
        if prompt.images == 32:
            peers.append(Subject(WITH_8, partial(decode, ours, Prompt(8), TOKENS)))
        if prompt.images <= 8:  # with more, a run of a peer takes half a minute
            is_slow = family == "flamingo" and prompt.images > 1
            peers += models.peers(family, partial(decode, prompt=prompt, num_tokens=FEW_TOKENS if is_slow else TOKENS))
        subject = Subject(ours.name, partial(decode, ours, prompt, TOKENS))
        rounds = settings.pairs if prompt.images <= 8 else settings.few
        is_first = prompt is prompts[0]
        outcomes = compare(subject, peers, rounds, together=models.together, warm_up=is_first)
        report.add(size, prompt, ours.name, outcomes, unit="s/token")
    ceiling = weights_of(bare) / weights_of(bare, ours)
    rows = [r for r in report.rows if (r.size, r.ours, r.peer) == (size, ours.name, BARE)]
    speeds = [
        (row.case, *(f"{1 / cost:.2f}" for cost in (row.ours_median, row.peer_median, row.ratio) if cost))
        for row in rows
    ]
    head = ("case", "our tokens/s", "bare LM's tokens/s", "share")
    title = f"{size}, {family}: tokens per second; weight traffic allows a share of {ceiling:.3f}"
    report.tables.append(Table(title, head, speeds))
    return ceiling


def _bars(report: Report, family: str, ceiling: float) -> None:
    ratio = report.ratio(Prompt(8), f"ours, {family}", BARE)
    share = None if ratio is None else 1 / ratio
    if family == "llava":
        report.bars.append(
            Bar(name="decode, llava, 8 images: speed / bare LM", value=share, limit=0.97, sense="at least")
        )
        return
    value = None if share is None else share / ceiling
    name = f"decode, flamingo, 8 images: speed / bare LM, over the {ceiling:.3f} that weight traffic allows"
    report.bars.append(Bar(name=name, value=value, limit=0.9, sense="at least"))
    more = report.ratio(Prompt(32), "ours, flamingo", WITH_8)
    report.bars.append(Bar(name="decode, flamingo: cost of a token with 32 images / with 8", value=more))


def weights_of(bare: Contender, ours: Contender | None = None) -> int:
    """Bytes of weights that one token reads: the language model's and, with ours, those of its blocks.

    Keys and values of the media are there already, so the blocks' `to_kv` is not read.
    """
    lm = sum(w.nbytes for w in matrices(bare.model))
    if ours is None:
        return lm
    fusion = ours.model.fusion.named_parameters()
    return lm + sum(p.nbytes for name, p in fusion if p.ndim == 2 and ".to_kv." not in name)


def _limits(report: Report, models: Models, settings: Settings) -> None:
    """The bare model's token against reading its weights, and against reading as much memory in one piece."""
    bare = models.bare(1)
    weights = matrices(bare.model)
    traffic = sum(w.nbytes for w in weights)
    peers = [
        Subject("its matrices times one vector", partial(read_matrices, weights)),
        Subject("a plain read of as many bytes", partial(large_read, traffic, models.device)),
    ]
    subject = Subject(BARE, partial(decode, bare, Prompt(0), TOKENS))
    outcomes = compare(subject, peers, settings.pairs)
    report.add(models.size.name, f"no images, {traffic / 1e6:.0f} MB of weights", BARE, outcomes, unit="s/token")


# -- variants --------------------------------------------------------------------------------------------------------


def variants(models: Models, family: str) -> dict[str, Callable[[], Contender]]:
    """Ways to run the same model, by name; the first is what the others are compared with.

    Compilation is told apart by `_measure_variants`.
    """

    def way(dtype: torch.dtype = torch.float32, **accelerations: Any) -> Contender:
        contender = models.ours(family, dtype=dtype)
        try:
            accelerate(contender.model, **accelerations)
        except VLMError as error:
            raise Skipped(str(error)) from None
        return contender

    return {
        "float32": way,
        "bfloat16": lambda: way(torch.bfloat16),
        "int8": lambda: way(quantize="int8"),
        "compile": lambda: way(compile=True),
        "bfloat16 + int8": lambda: way(torch.bfloat16, quantize="int8"),
        "bfloat16 + int8 + compile": lambda: way(torch.bfloat16, quantize="int8", compile=True),
    }


def _measure_variants(report: Report, models: Models, settings: Settings) -> None:
    """Each variant against float32, at the length of a long answer."""
    size, family = models.size.name, "llava"
    prompt, tokens = Prompt(1), 16 if models.size.name == "tiny" else LONG
    ready, first = {}, []
    for name, make in variants(models, family).items():
        try:
            contender = make()
        except Skipped as reason:
            report.add(size, f"{prompt}, {tokens} new", f"ours, {family}, {name}", {"float32": reason})
            continue
        ready[name] = decode(contender, prompt, tokens)
        first.append((name, *(f"{x:.2f}" for x in first_calls(contender, prompt, tokens + 1))))
    costs = alternate(ready, settings.few, warm_up=False)
    others = list(ready)[1:]
    for name in others:
        pairs = Pairs(costs[name], costs["float32"])
        report.add(size, f"{prompt}, {tokens} new", f"ours, {family}, {name}", {"float32": pairs}, unit="s/token")
    report.tables.append(
        Table(f"{size}, {family}: seconds of the first call and of the second", ("variant", "first", "second"), first)
    )
    if size == "standard":
        ratios = [report.ratio(f"{prompt}, {tokens} new", f"ours, {family}, {name}", "float32") for name in others]
        _variant_bars(report, others, ratios)


def _variant_bars(report: Report, names: Sequence[str], ratios: Sequence[float | None]) -> None:
    known = [x for x in ratios if x is not None]
    best = 1 / min(known) if known else None
    report.bars.append(Bar(name="decode, best of the variants: speed / float32", value=best, limit=2, sense="at least"))
    for name, ratio in zip(names, ratios, strict=True):
        value = None if ratio is None else 1 / ratio
        title = f"decode, {name}, {LONG} new tokens: speed / float32"
        report.bars.append(Bar(name=title, value=value, limit=1, sense="at least"))


@torch.inference_mode()
def first_calls(contender: Contender, prompt: Prompt, tokens: int) -> tuple[float, float]:
    """Seconds of two calls that end after a few tokens; the first may compile, for an answer of so many."""
    arguments = {**contender.inputs(prompt), **greedy(tokens)}
    return compile_for(contender.model, **arguments), compile_for(contender.model, **arguments)


QUESTION = Question(
    name="decode",
    asks="How fast do new tokens come, next to the bare language model, its weights' traffic, peers and variants?",
    measure=measure,
)

if __name__ == "__main__":
    run(QUESTION)
