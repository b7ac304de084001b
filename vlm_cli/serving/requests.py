"""What a request of OpenAI's protocol asks for, and whether this server can do it.

    {"model": "demo", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},
        {"type": "text", "text": "What is it?"}]}]}

Keys that would change the answer and that the server does not know are errors: nothing is left out in silence.
Source: the API reference of OpenAI, chat completions and completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from vlm_cli.errors import VLMError
from vlm_cli.prompt import Medium, Text
from vlm_cli.schema import Kind, list_of, mapping, number, optional, show, text, truth, whole
from vlm_cli.serving.limits import Limits
from vlm_cli.serving.sampling import Sampling
from vlm_cli.templates.conversation import Message

__all__ = ["Ask", "BadRequest", "read_chat", "read_completion"]

MAX_TEXT = 10_000_000  # characters; the body has a limit of its own
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MEDIA: dict[str, Literal["image", "video"]] = {"image_url": "image", "video_url": "video"}

#: Keys that say nothing about the answer, or what this server does anyway.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_STOPS = Kind(
    "a text, or a list of at most 16 texts",
    lambda x: isinstance(x, str) or (isinstance(x, list) and len(x) <= 16 and all(isinstance(s, str) for s in x)),
)


class BadRequest(VLMError):
    """A request that cannot be answered.

    Attributes:
        param: the key at fault; None for the whole request.
        status: of HTTP.
        code: OpenAI's name of the error; None without one.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Attributes:
        prompts: each as the messages of a conversation, or as a text without turns.
        sampling: how tokens are chosen.
        new_tokens: of each answer, at most; None for the default.
        stops: texts that end an answer.
        num_answers: to each prompt.
        streams: answers are sent while the model writes them.
        tells_usage: a stream ends with the numbers of tokens.
    """

    prompts: tuple[tuple[Message, ...] | str, ...]
    sampling: Sampling
    new_tokens: int | None
    stops: tuple[str, ...]
    num_answers: int
    streams: bool
    tells_usage: bool


def _common(limits: Limits) -> dict[str, Kind]:
    return {
        "model": optional(text(most=1000)),
        "temperature": optional(number(0, 2)),
        "top_p": optional(number(0, 1, above=True)),
        "frequency_penalty": optional(number(-2, 2)),
        "presence_penalty": optional(number(-2, 2)),
        "seed": optional(whole(-(2**63), 2**63 - 1)),
        "n": optional(whole(1, limits.answers)),
        "max_tokens": optional(whole(1, limits.most_new_tokens)),
        "stop": optional(_STOPS),
        "stream": optional(truth()),
        "stream_options": optional(mapping({}, {"include_usage": optional(truth())})),
    }


def read_chat(data: Mapping[str, Any], limits: Limits, *, temperature: float, opens_files: bool = False) -> Ask:
    """Read a request to `/v1/chat/completions`.

    Args:
        data: the body.
        limits: of the server.
        temperature: of a request that names none.
        opens_files: an address may be the name of a file, since who asks is who answers.

    Raises:
        BadRequest: naming the key.
    """
    own = {
        "max_completion_tokens": optional(whole(1, limits.most_new_tokens)),
        "logprobs": optional(truth()),
        "top_logprobs": optional(whole(0, 20)),
        "response_format": optional(_only("type", "text")),
        "modalities": optional(Kind('["text"]', lambda x: x == ["text"])),
        "tools": optional(Kind("left out: the server calls no tools", lambda x: x == [])),
        "tool_choice": optional(Kind("left out, or 'none'", lambda x: x == "none")),
    }
    messages = list_of(mapping({"role": text(most=100)}), least=1, most=limits.messages)
    _check(data, {"messages": messages}, {**_common(limits), **own})
    if data.get("top_logprobs") is not None and not data.get("logprobs"):
        raise BadRequest("top_logprobs needs logprobs: true.", "top_logprobs")
    chances = (data.get("top_logprobs") or 0) if data.get("logprobs") else None
    conversation = tuple(_read_message(x, f"messages[{i}]", opens_files) for i, x in enumerate(data["messages"]))
    _check_order(conversation)
    most = data.get("max_completion_tokens") or data.get("max_tokens")
    return _make_ask(data, (conversation,), temperature, chances, most)


def read_completion(data: Mapping[str, Any], limits: Limits, *, temperature: float) -> Ask:
    """Read a request to `/v1/completions`: texts that the model continues as they stand.

    Args:
        data: the body.
        limits: of the server.
        temperature: of a request that names none.

    Raises:
        BadRequest: naming the key.
    """
    prompt = Kind(
        f"a text, or a list of 1 to {limits.answers} texts",
        lambda x: (
            isinstance(x, str)
            or (isinstance(x, list) and 1 <= len(x) <= limits.answers and all(isinstance(s, str) for s in x))
        ),
    )
    own = {
        "logprobs": optional(whole(0, 20)),
        "echo": optional(Kind("false", lambda x: x is False)),
        "suffix": optional(Kind("left out", lambda x: x == "")),
        "best_of": optional(Kind("1", lambda x: x == 1)),
    }
    _check(data, {"prompt": prompt}, {**_common(limits), **own})
    prompts = (data["prompt"],) if isinstance(data["prompt"], str) else tuple(data["prompt"])
    if any(not x for x in prompts):
        raise BadRequest("prompt is empty. Give a text.", "prompt")
    if len(prompts) * (data.get("n") or 1) > limits.answers:
        raise BadRequest(f"the request asks for more than {limits.answers} answers.", "n")
    return _make_ask(data, prompts, temperature, data.get("logprobs"), data.get("max_tokens"))


def _make_ask(
    data: Mapping[str, Any],
    prompts: tuple[tuple[Message, ...] | str, ...],
    temperature: float,
    num_chances: int | None,
    new_tokens: int | None,
) -> Ask:
    def get(name: str, default: float) -> float:
        return default if data.get(name) is None else data[name]

    sampling = Sampling(
        get("temperature", temperature),
        get("top_p", 1.0),
        data.get("seed"),
        get("frequency_penalty", 0.0),
        get("presence_penalty", 0.0),
        num_chances,
    )
    stops = data.get("stop") or []
    options = data.get("stream_options") or {}
    if options and not data.get("stream"):
        raise BadRequest("stream_options needs stream: true.", "stream_options")
    return Ask(
        prompts=prompts,
        sampling=sampling,
        new_tokens=new_tokens,
        stops=tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
        num_answers=data.get("n") or 1,
        streams=bool(data.get("stream")),
        tells_usage=bool(options.get("include_usage")),
    )


def _check(data: Mapping[str, Any], required: Mapping[str, Kind], given: Mapping[str, Kind]) -> None:
    known = {*required, *given, *_IGNORED}
    for key, value in data.items():
        if key not in known and value is not None:
            raise BadRequest(
                f"{show(key)} is not known here, and the answer would ignore it. Known: "
                f"{', '.join(sorted({*required, *given}))}.",
                str(key)[:100],
                code="unknown_parameter",
            )
    problems = list(islice(mapping(required, given).find_problems(data), 1))
    if problems:
        raise BadRequest(problems[0], problems[0].split(" ")[0])


def _only(key: str, value: str) -> Kind:
    return Kind(f'{{"{key}": "{value}"}}', lambda x: isinstance(x, Mapping) and x.get(key) == value)


# -- messages ----------------------------------------------------------------------------------------------------------


def _read_message(data: Mapping[str, Any], place: str, opens_files: bool) -> Message:
    role = _ROLES.get(data["role"])
    if role is None:
        raise BadRequest(f"{place}.role is {show(data['role'])}. Known: {', '.join(_ROLES)}.", f"{place}.role")
    if data.get("tool_calls") or data.get("function_call"):
        raise BadRequest(f"{place} calls a tool, and the server knows no tools.", f"{place}.tool_calls")
    parts = tuple(_read_content(data.get("content"), f"{place}.content", opens_files))
    if role != "user" and any(isinstance(part, Medium) for part in parts):
        raise BadRequest(
            f"{place} has an image, and its role is {data['role']}. Images stand in messages of the user.",
            f"{place}.content",
        )
    return Message(role, parts)  # type: ignore[arg-type]


def _read_content(content: Any, place: str, opens_files: bool) -> list[Text | Medium]:
    if isinstance(content, str):
        return [Text(content)] if content else []
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise BadRequest(f"{place} must be a text or a list of parts, but is {show(content)}.", place)
    parts: list[Text | Medium] = []
    for i, part in enumerate(content):
        here = f"{place}[{i}]"
        if not isinstance(part, Mapping):
            raise BadRequest(f"{here} must be a part such as {{'type': 'text', 'text': …}}, but is {show(part)}.", here)
        parts += _read_part(part, here, opens_files)
    return parts


def _read_part(part: Mapping[str, Any], place: str, opens_files: bool) -> list[Text | Medium]:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{place}.text must be a text, but is {show(part.get('text'))}.", f"{place}.text")
        return [Text(part["text"])] if part["text"] else []
    if kind not in _MEDIA:
        raise BadRequest(f"{place}.type is {show(kind)}. Known: text, image_url, video_url.", f"{place}.type")
    where = part.get(kind)
    url = where.get("url") if isinstance(where, Mapping) else where
    if not isinstance(url, str) or not url:
        raise BadRequest(
            f"{place} has no picture: {kind} must be {{'url': 'data:…'}}, but is {show(where)}.", f"{place}.{kind}"
        )
    if not opens_files and not url[:8].lower().startswith(("data:", "http://", "https://")):
        raise BadRequest(
            f"{place}.{kind}.url begins with {show(url[:20])}. It must be a data: URI or an http(s) address; the "
            "server opens no files.",
            f"{place}.{kind}",
        )
    return [Medium(url, _MEDIA[kind])]


def _check_order(conversation: Sequence[Message]) -> None:
    if conversation[-1].role != "user":
        raise BadRequest(
            f"the last message has the role {conversation[-1].role}. The model answers a message of the user.",
            "messages",
        )
    if late := [i for i, message in enumerate(conversation) if i and message.role == "system"]:
        raise BadRequest(f"messages[{late[0]}] is a system message, which may only stand first.", "messages")
