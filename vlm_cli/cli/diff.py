"""`vlm diff`: what differs between two models or compositions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console, terminal
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_subjects
from vlm_cli.cli.options import OUTPUT, RUN, DeviceOptions, JsonOption, QuietOption, flatten_options
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.prompts import PROMPT, ReadingOptions, load_images
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.prompt import interleave

if TYPE_CHECKING:
    from vlm_cli.differences.answers import AnswerDifference, Answered
    from vlm_cli.differences.compare import Difference
    from vlm_cli.differences.side import Side
    from vlm_cli.differences.tensors import TensorState
    from vlm_cli.prompt import Interleaved

__all__ = ["diff"]

_MOST_TENSORS = 10  # of the changed ones that the text lists
_SUBJECT = "Directory or hub id of a built model, a family, a composition file, or demo."


def _subject(metavar: str) -> Any:
    return typer.Argument(metavar=metavar, help=_SUBJECT, show_default=False, autocompletion=complete_subjects)


@flatten_options
def diff(
    a: Annotated[str, _subject("A")],
    b: Annotated[str, _subject("B")],
    prompt: Annotated[
        str | None,
        option(
            PROMPT,
            "Let both models answer this prompt with their likeliest tokens, and show the first token that differs.",
            "--prompt",
            "-p",
            metavar="TEXT",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        option(PROMPT, "Image for the next bare <image> of --prompt. Repeatable.", "--image", "-i", metavar="FILE"),
    ] = None,
    video: Annotated[
        list[str] | None,
        option(PROMPT, "Clip for the next bare <video> of --prompt. Repeatable.", "--video", metavar="FILE"),
    ] = None,
    max_new_tokens: Annotated[
        int, option(PROMPT, "Most tokens of each answer to --prompt.", metavar="N", min=1, max=4096)
    ] = 64,
    reading: ReadingOptions = ReadingOptions(),
    devices: DeviceOptions = DeviceOptions(),
    revision_a: Annotated[
        str | None, option(RUN, "Branch, tag or commit of A, if it is a hub id.", metavar="REVISION")
    ] = None,
    revision_b: Annotated[
        str | None, option(RUN, "Branch, tag or commit of B, if it is a hub id.", metavar="REVISION")
    ] = None,
    trust_remote_code: Annotated[
        bool, option(RUN, "Run Python code that comes with the language models.", "--trust-remote-code")
    ] = False,
    exit_code: Annotated[
        bool, option(OUTPUT, "Exit with 1 if they differ. Without this option, only a failure does.", "--exit-code")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what differs between two models or compositions: settings, parameters, tokens, preprocessing and tensors.

    Tensors are read one by one, and a composition needs no weights.

    Example: vlm diff my-flamingo my-trained --prompt "<image:cat.jpg>A photo of"
    """
    if prompt is None and (image or video):
        raise PromptError(f"{'--image' if image else '--video'} needs --prompt, whose placeholders it fills.")
    words = None if prompt is None else interleave(prompt, image or (), video or ())
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    from vlm_cli.differences.compare import compare
    from vlm_cli.differences.side import Side

    left, right = (
        Side.open(name, revision=revision, trust_remote_code=trust_remote_code)
        for name, revision in ((a, revision_a), (b, revision_b))
    )
    sides = [left, right]
    if words is not None and (bare := next((x.name for x in sides if x.place is None), None)):
        raise UsageError(f"{bare!r} is a composition without weights, and --prompt needs answers. Build it: vlm build")
    with ProgressLine(None, noun="tensors", has_summary=False) as line:
        found = compare(left, right, progress=lambda done, total: line.show(done))
    answers = None
    if words is not None:
        revisions = (revision_a, revision_b)
        answers = _answer(sides, revisions, words, reading, devices, max_new_tokens, trust_remote_code)
    if as_json:
        console.print_json(found.to_dict() | ({} if answers is None else {"answers": answers.to_dict()}))
    else:
        _print(found)
        if answers is not None:
            _print_answers(answers)
    if exit_code and (found.differs or (answers is not None and answers.before is not None)):
        raise typer.Exit(1)


def _answer(
    sides: list[Side],
    revisions: tuple[str | None, str | None],
    words: Interleaved,
    reading: ReadingOptions,
    devices: DeviceOptions,
    max_new_tokens: int,
    trust_remote_code: bool,
) -> AnswerDifference:
    """Let both models answer, one after the other."""
    from vlm_cli.differences.answers import find_parting

    media = load_images(words, reading.loader(None, ()))
    device, dtype = devices.resolve()
    how: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}

    def ask(side: Side, revision: str | None) -> Answered:
        from vlm_cli.checkpoint.directory import load
        from vlm_cli.differences.answers import answer_greedily, greedy
        from vlm_cli.generation.plan import GenerationPlan
        from vlm_cli.models import hub_arguments
        from vlm_cli.writing.writer import PromptWriter

        assert side.place is not None
        model, processor = load(side.place, **how, **hub_arguments(revision))
        if reading.max_tiles is not None:
            processor.image_processor.limit_tiles(reading.max_tiles)
        special = reading.special_tokens
        writer = PromptWriter(processor, reading.choice, system=reading.system, parse_special_tokens=special)
        plan = GenerationPlan(model, processor, greedy(max_new_tokens), writer=writer)
        return answer_greedily(plan, words.parts, media, console.note)

    first, second = (ask(side, revision) for side, revision in zip(sides, revisions, strict=True))
    return find_parting(first, second)


# -- printing ----------------------------------------------------------------------------------------------------------


def _print(found: Difference) -> None:
    from vlm_cli.differences.compare import SECTIONS

    console.print_line(f"A is {found.a.name}, B is {found.b.name}.")
    same = []
    for section, title in SECTIONS.items():
        if changes := found.changes.get(section):
            _print_changes(title, [(x.key, _write(x.a), _write(x.b)) for x in changes])
        elif section in found.changes:
            same.append(title.lower())
    same += _print_vocabulary(found)
    same += _print_parameters(found)
    same += _print_tensors(found)
    if same:
        _print_text(f"The same: {', '.join(same)}.")
    for sentence in found.unknown:
        _print_text(sentence)


def _print_changes(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print settings that differ as a table, or, where a terminal is too narrow for their words, below their names."""
    words = ((key, _longest(a), _longest(b)) for key, a, b in rows)
    longest = [max(map(len, column)) for column in zip(*words, strict=True)]
    if not terminal.is_terminal(sys.stdout) or sum(longest) + 8 <= terminal.width():
        console.print_table((title, "A", "B"), rows)
        return
    console.print_line("")
    console.print_line(title)
    for key, *values in rows:
        console.print_line(f"  {key}")
        for name, value in zip("AB", values, strict=True):
            _print_text(f"{name} {value or '-'}", 4)
    console.print_line("")


def _longest(text: str) -> str:
    """Return the longest word of a text."""
    return max(text.split(), key=len, default="")


def _print_text(text: str, indent: int = 0) -> None:
    for line in console.wrapped(text, indent):
        console.print_line(line)


def _write(value: Any) -> str:
    """Write a setting on one line."""
    if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
        return ", ".join(value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _print_vocabulary(found: Difference) -> list[str]:
    words = found.vocabulary
    if words is None or not words.differs:
        return [] if words is None else ["vocabulary"]
    _print_text(f"Vocabulary: A has {words.a:,} tokens, B has {words.b:,}.")
    for what, tokens in (
        ("only in A", words.only_a),
        ("only in B", words.only_b),
        ("with another id", words.moved),
    ):
        if tokens.count:
            more = ", …" if tokens.count > len(tokens.first) else ""
            _print_text(f"{tokens.count:,} {what}: {', '.join(map(repr, tokens.first))}{more}", 2)
    return []


def _print_parameters(found: Difference) -> list[str]:
    if not found.parameters:
        return []
    rows = [
        [part, f"{x:,}", f"{y:,}", f"{y - x:+,}" if x != y else "0"]
        for part, (x, y) in found.parameters.items()
        if x != y or part == "total"
    ]
    if len(rows) == 1 and rows[0][3] == "0":
        return [f"parameters ({rows[0][1]})"]
    console.print_table(("Parameters", "A", "B", "B - A"), rows, total=True)
    return []


def _print_tensors(found: Difference) -> list[str]:
    """Print how many tensors of each part differ, and those that differ most."""
    if found.tensors is None:
        return []
    tensors = [x for part in found.tensors for x in part.tensors]
    if all(x.state == "equal" for x in tensors):
        return [f"all {len(tensors):,} tensors"]
    shown: dict[TensorState, str] = {
        "equal": "Equal",
        "rounded": "Rounded",
        "changed": "Changed",
        "other_shape": "Shape",
        "only_a": "Only A",
        "only_b": "Only B",
        "unknown": "Unknown",
    }
    kept = {state: name for state, name in shown.items() if any(x.state == state for x in tensors)}
    rows = [[part.name, *(str(part.counts[state]) for state in kept), _share(part.moved)] for part in found.tensors]
    console.print_table(("Tensors", *kept.values(), "Change"), rows)
    changed = sorted((x for x in tensors if x.state == "changed"), key=lambda x: -(x.moved or 0))
    if changed:
        _print_text("Change is the norm of the difference, as a share of the norm in A. The largest:")
        for x in changed[:_MOST_TENSORS]:
            _print_text(f"{_share(x.moved):>8}  {x.name}", 2)
        if len(changed) > _MOST_TENSORS:
            _print_text(f"and {len(changed) - _MOST_TENSORS} more; --json lists them all", 2)
    return []


def _share(moved: float | None) -> str:
    if moved is None:
        return ""
    return "0%" if moved == 0 else f"{moved:.2%}" if moved >= 0.001 else f"{moved:.4%}" if moved >= 1e-6 else "~0%"


def _probability(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _print_answers(answers: AnswerDifference) -> None:
    console.print_line("")
    if answers.before is None or answers.token is None:
        console.print_line("Both answer the same:")
        console.print_answer(answers.a)
        return
    for name, text in (("A", answers.a), ("B", answers.b)):
        console.print_answer(f"{name} answers: {text}")
    where = f"token {answers.token[0]}"
    if answers.token[0] != answers.token[1]:
        where += f" of A and {answers.token[1]} of B"
    _print_text(f"They part at {where}, after {answers.before!r}:")
    rows = [[repr(way.text), *map(_probability, (way.a, way.b))] for way in answers.ways]
    console.print_table(("Token", "Probability in A", "in B"), rows)
    if answers.note:
        console.print_line(answers.note)
