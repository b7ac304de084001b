"""Run llama.cpp on two GGUF files, in a process of its own: a program that ends itself on an error, and writes notes.

python -m vlm_cli.checkpoint.export.gguf.llama_cpp < request.json > answer.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import parse_json

__all__ = ["Answer", "ask_llama_cpp", "llama_cpp_version"]

MARKER = "<__media__>"  # stands for a picture in a prompt
_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a prompt.

    Attributes:
        tokens: of the answer.
        logprobs: token -> logarithm of its probability, of the most probable first tokens. Empty if the answer is one
            token that is a part of a character.
        num_prompt: positions of the prompt.
    """

    tokens: list[int]
    logprobs: dict[int, float]
    num_prompt: int


def llama_cpp_version() -> str | None:
    """Return the version of the package that runs llama.cpp; None if it is not installed."""
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


def ask_llama_cpp(
    language_model: Path,
    mmproj: Path,
    prompts: Sequence[tuple[str, str | None]],
    *,
    num_tokens: int,
    top: int,
    messages: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[Answer], str]:
    """Let llama.cpp answer prompts greedily, in float32 throughout.

    Args:
        language_model: GGUF file.
        mmproj: GGUF file of the vision side.
        prompts: each a text, with `MARKER` where the picture stands, and the picture as base64.
        num_tokens: of each answer.
        top: how many of the most probable first tokens to return.
        messages: of a chat, in OpenAI's form.

    Returns:
        The answers, and how llama.cpp writes the messages, with `MARKER` where a picture stands.

    Raises:
        CheckpointError: if llama.cpp cannot read the files, or ends.
    """
    request = {
        "language_model": str(language_model),
        "mmproj": str(mmproj),
        "prompts": prompts,
        "num_tokens": num_tokens,
        "top": top,
        "messages": messages,
    }
    module = f"{__package__}.llama_cpp"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"llama.cpp did not answer within {_SECONDS} seconds. Nothing was written. Add --no-check to write the "
            "files without asking it."
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        notes = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
        last = (notes or done.stderr.splitlines() or ["no message"])[-1][:300]
        raise CheckpointError(f"llama.cpp cannot use the files: {last} Nothing was written; please report it.")
    found = parse_json(lines[-1])
    answers = [
        Answer(x["tokens"], {int(i): p for i, p in x["logprobs"].items()}, x["num_prompt"]) for x in found["answers"]
    ]
    return answers, found["rendered"]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = request["language_model"], request["mmproj"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.mmproj_use_gpu = 0, 1, 0, False
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // 2)
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # would round to float16
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.port = 0  # any that is free
    server = xllamacpp.Server(params)
    address = server.listening_address
    marker = _ask(f"{address}/props")["media_marker"]  # which each start draws anew
    prompts = [(text.replace(MARKER, marker), picture) for text, picture in request["prompts"]]
    answers = [_complete(address, text, picture, request) for text, picture in prompts]
    rendered = ""
    if request["messages"]:
        rendered = _ask(f"{address}/apply-template", {"messages": request["messages"]})["prompt"]
    return {"answers": answers, "rendered": rendered.replace(marker, MARKER)}


def _complete(address: str, text: str, picture: str | None, request: dict[str, Any]) -> dict[str, Any]:
    found = _ask(
        f"{address}/completion",
        {
            "prompt": {"prompt_string": text, "multimodal_data": [picture]} if picture else text,
            "n_predict": request["num_tokens"],
            "n_probs": request["top"],
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        },
    )
    first = (found.get("completion_probabilities") or [{}])[0].get("top_logprobs", [])
    return {
        "tokens": found["tokens"],
        "logprobs": {x["id"]: x["logprob"] for x in first},
        "num_prompt": found["tokens_evaluated"],
    }


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the server, which listens on this machine alone."""
    data = None if body is None else json.dumps(body).encode()
    asked = Request(url, data, {"Content-Type": "application/json"})
    try:
        with build_opener(ProxyHandler({})).open(asked) as answer:
            return parse_json(answer.read().decode())
    except HTTPError as error:
        raise SystemExit(f"error: {error.read().decode()[:1000]}") from None


if __name__ == "__main__":
    answers = _answer(parse_json(sys.stdin.read()))
    print("\n" + json.dumps(answers), flush=True)
    os._exit(0)  # the destructors of some versions end the process with an error
