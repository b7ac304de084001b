r"""vlm's own records: prompts and completions in the grammar of `vlm generate`.

    {"prompt": "<image:a.png>What is it? Answer:", "completion": " A cat."}
    {"prompt": "<image>Caption:", "completion": " A cat.", "images": ["a.png"], "id": "7", "kind": "caption"}
    {"prompt": "<image:a.png>", "turns": [{"prompt": "How many?", "completion": " Two."}, …]}
    {"prompt": "<video>What happens?", "completion": " A cat jumps.", "videos": ["a.mp4?frames=4"]}
    {"prompt": "<image:a.png>Which one?", "completion": " cat", "answers": ["cat", "kitten"], "choices": ["cat", "dog"]}
    {"text": "A page with <image:a.png> and the text that follows the image."}

`\<image>` is text, a relative path starts at the folder of the file, a bare `<image>` takes the next file in "images",
and a bare `<video>` the next in "videos". Without any placeholder, the images and then the clips stand before the text.
The model learns to write the completions; of a "text", it learns everything after the first image or clip. A record may
be text alone. "answers" holds further right answers, and "choices" those among which the prompt lets one choose: `vlm
eval` marks by them. Other keys have no effect, but a key that plainly names pictures or clips is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_cli.data.formats.format import ANSWERED, Format
from vlm_cli.data.formats.marking import read_own_marking
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.data.meant import check_picture_keys
from vlm_cli.data.record import Content, Segment
from vlm_cli.data.sources.base import Embedded
from vlm_cli.errors import PromptError
from vlm_cli.prompt import KINDS, Kind, Medium, Slot, Text, interleave, parse
from vlm_cli.registry import suggest

__all__ = ["OwnRecords"]


_OTHERS = (
    'Other formats have "conversations", "messages" or "texts"; of any other row, name the columns: '
    "--columns prompt=COLUMN,completion=COLUMN,images=COLUMN"
)


class OwnRecords(Format):
    """Prompts and completions in the grammar of `vlm generate`."""

    name = "records of vlm"
    keys = '"prompt" with "completion" or "turns", or "text"'

    def matches(self, data: dict[str, Any]) -> bool:
        has_answer = "completion" in data or "turns" in data
        return isinstance(data.get("text"), str) or (isinstance(data.get("prompt"), str) and has_answer)

    def read(self, data: dict[str, Any]) -> Content:
        identity = get_field(data, "id", (str, int), "text or a number", None)
        segments = tuple(_find_segments(data))
        return Content(
            segments=segments,
            id=None if identity is None else str(identity),
            kind=get_field(data, "kind", str, "text", None),
            marking=read_own_marking(data, num_turns=len(segments) // 2),
        )

    def asks(self, data: dict[str, Any]) -> bool:
        return isinstance(data.get("prompt"), str)

    def read_question(self, data: dict[str, Any]) -> Content:
        if "turns" in data:
            texts = _collect_texts(data, is_open=True)
            notes = (ANSWERED,) if texts[-1][0] == "completion" else ()
            texts = texts[:-1] if notes else texts
        else:
            texts, notes = [("prompt", get_field(data, "prompt", str, "text"))], ()
        check_picture_keys(data, [text for _, text in texts])
        files = {kind: _get_files(data, kind) for kind in KINDS}
        if len(texts) == 1:
            parts = interleave(texts[0][1], files["image"], files["video"], given_with='"images"').parts
            return Content((Segment(tuple(parts), False),))
        segments = tuple(_pair_segments(_insert_files(texts, files)))
        if not any(isinstance(part, Medium) or part.text.strip() for part in segments[-1].parts):
            raise RecordError("asks nothing: its last prompt is empty.")
        return Content(segments, notes=notes)


def _get_files(data: dict[str, Any], kind: Kind) -> list[str]:
    """Return the files that a record lists beside its texts, under "images" or "videos".

    Raises:
        RecordError: if that is not a list of names.
    """
    files = get_field(data, f"{kind}s", list, "a list of files", [])
    for file in files:
        if not isinstance(file, (str, Embedded)) or not file:
            raise RecordError(f'"{kind}s" must be a list of files, got {file!r} in it.')
    return [file.reference if isinstance(file, Embedded) else file for file in files]


def _find_segments(data: dict[str, Any]) -> list[Segment]:
    """Split a record into contexts and targets."""
    forms = [key for key in ("text", "prompt") if key in data]
    if not forms:
        known = ("prompt", "text")
        near = next((hint for key in data if (hint := suggest(key, known))), "")
        raise RecordError(f'has neither "prompt" nor "text".{near} {_OTHERS}')
    if len(forms) > 1:
        raise RecordError('has both "text" and "prompt". Give a "text", or a "prompt" with its "completion".')
    if "completion" in data and "turns" in data:
        raise RecordError('has both "completion" and "turns". Give one of them.')
    texts = [("text", get_field(data, "text", str, "text"))] if forms == ["text"] else _collect_texts(data)
    check_picture_keys(data, [text for _, text in texts])
    parsed = _insert_files(texts, {kind: _get_files(data, kind) for kind in KINDS})
    return _split_text(parsed[0][1]) if forms == ["text"] else _pair_segments(parsed)


def _collect_texts(data: dict[str, Any], *, is_open: bool = False) -> list[tuple[str, str]]:
    """Return (key, text) of each prompt and completion, in reading order; of a question, the last may be missing."""
    prompt = get_field(data, "prompt", str, "text")
    if "turns" not in data:
        return [("prompt", prompt), ("completion", _get_completion(data))]
    texts: list[tuple[str, str]] = []
    turns = get_field(data, "turns", list, "a list of objects")
    if not turns:
        raise RecordError('"turns" is empty. Give at least one {"prompt": …, "completion": …}.')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError(f"turn {number} must be an object, got {describe_type(turn)}.")
        try:
            texts.append(("prompt", get_field(turn, "prompt", str, "text")))
            if not (is_open and number == len(turns) and "completion" not in turn):
                texts.append(("completion", _get_completion(turn)))
            check_picture_keys(turn, [text for _, text in texts], in_turn=True)
        except RecordError as error:
            raise RecordError(f"turn {number}: {error}") from None
    # The record's own prompt stands before its first turn.
    return [("prompt", prompt), *texts]


def _get_completion(data: dict[str, Any]) -> str:
    completion: str = get_field(data, "completion", str, "text")
    if not completion.strip():
        raise RecordError(f'"completion" is empty, got {completion!r}: the model would have nothing to learn.')
    return completion


def _insert_files(
    texts: Sequence[tuple[str, str]], files: Mapping[Kind, Sequence[str]]
) -> list[tuple[str, list[Text | Medium]]]:
    """Parse each text, and give each bare placeholder the next of the images or of the clips."""
    parsed = [(key, _parse_text(key, text)) for key, text in texts]
    if not any(not isinstance(part, Text) for _, parts in parsed for part in parts):  # the files come first
        key, parts = parsed[0]
        parsed[0] = (key, [*(Slot(kind=kind) for kind in KINDS for _ in files[kind]), *parts])
    for kind in KINDS:
        slots = sum(isinstance(part, Slot) and part.kind == kind for _, parts in parsed for part in parts)
        given = len(files[kind])
        if slots != given:
            raise RecordError(
                f"has {slots} bare <{kind}> placeholder{'' if slots == 1 else 's'}, but {given} "
                f'file{"" if given == 1 else "s"} in "{kind}s". Give one for each, or write <{kind}:FILE>.'
            )
    left = {kind: iter(files[kind]) for kind in KINDS}
    return [
        (key, [Medium(next(left[p.kind]), p.kind) if isinstance(p, Slot) else p for p in parts])
        for key, parts in parsed
    ]


def _parse_text(key: str, text: str) -> list[Text | Medium | Slot]:
    try:
        parts = parse(text)
    except PromptError as error:
        raise RecordError(f'"{key}": {error}') from None
    if key == "completion" and any(not isinstance(part, Text) for part in parts):
        raise RecordError(
            r'"completion" has a placeholder; images and clips belong in prompts. For the text, write \<image>.'
        )
    return parts


def _split_text(parts: Sequence[Text | Medium]) -> list[Segment]:
    """Split a "text" after its first image: context, target. Without an image, all of it is target."""
    first = next((i for i, part in enumerate(parts) if isinstance(part, Medium)), -1)
    rest = tuple(parts[first + 1 :])
    if not any(isinstance(part, Text) and part.text.strip() for part in rest):
        what = "is empty" if first < 0 else "ends with its images"
        raise RecordError(f'"text" {what}: the model would have nothing to learn.')
    return [Segment(tuple(parts[: first + 1]), False), Segment(rest, True)]


def _pair_segments(parsed: Sequence[tuple[str, list[Text | Medium]]]) -> list[Segment]:
    """Pair each completion with the prompts before it, which together are its context; the last may be a question."""
    result: list[Segment] = []
    context: list[Text | Medium] = []
    for key, parts in parsed:
        if key == "prompt":
            context += parts
        else:
            result += [Segment(tuple(context), False), Segment(tuple(parts), True)]
            context = []
    return [*result, Segment(tuple(context), False)] if context else result
