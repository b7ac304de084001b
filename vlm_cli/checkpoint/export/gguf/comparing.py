"""Compare llama.cpp with the model, on the files that were written: a text, and a text with a picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from vlm_cli.checkpoint.create import cast
from vlm_cli.checkpoint.export.agreement import check_agreement
from vlm_cli.checkpoint.export.gguf.llama_cpp import MARKER, Answer, ask_llama_cpp, llama_cpp_version
from vlm_cli.checkpoint.export.gguf.rounding import rounding_as_llama_cpp
from vlm_cli.checkpoint.size_limits import check_free_memory
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.media.decode import decode_image
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import ChatFormat, Markers, Message
from vlm_cli.tiling import MediumSize

__all__ = ["UNCHECKED", "check_room", "compare_with_llama_cpp"]

#: Type of the weights -> the largest difference of the logarithms of probabilities, as a fraction of the largest one.
#: llama.cpp multiplies in the type of the weights, which tells how far it is off.
TOLERANCES = {"f32": 1e-3, "f16": 5e-3, "bf16": 5e-2, "q8_0": 1e-1}
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.1}  # of a weight in a file
_TOKENS = 16  # of the compared answers
_TOP = 512  # compared probabilities of the first token
_TEXTS = ("What is in the image?", "Describe it", "1 2 3", "The colour of the sky is")
_NOT_CHECKED = (
    "llama.cpp did not read the files, so their answers are not compared with the model's. pip install 'vlm-cli[gguf]' "
    "brings it, and --overwrite writes and compares again."
)
UNCHECKED = (
    "nothing was checked. With --no-check, llama.cpp did not read the files, and its answers are not compared with the "
    "model's."
)


@dataclass(frozen=True)
class _Prompt:
    text: str  # with MARKER for the picture
    picture: str | None  # base64
    size: MediumSize | None  # of the picture
    inputs: dict[str, Tensor]


def check_room(model: VLM, out_type: str) -> None:
    """Check that there is memory for the comparison: first llama.cpp holds the files, then the model is in float32.

    Args:
        model: the model, which is loaded.
        out_type: type of the weights in the files.

    Raises:
        CheckpointError: if there is too little.
    """
    if llama_cpp_version() is None:
        return
    weights = list(model.parameters())
    count, held = sum(x.numel() for x in weights), sum(x.nbytes for x in weights)
    check_free_memory(
        max(count * _BYTES[out_type], 4 * count - held),
        "comparing llama.cpp with the model",
        "Nothing was written. Close other programs, or add --no-check: the files are then written, and not compared.",
    )


def compare_with_llama_cpp(
    model: VLM,
    processor: VLMProcessor,
    out: Path,
    *,
    out_type: str,
    language_model: str,
    mmproj: str,
    kept: list[int],
    adds_bos: bool,
    splits_linear: bool,
    picture_size: tuple[int, int],
) -> dict[str, Any]:
    """Return what the comparison found: `largest_difference`, `equal_tokens` and `notes`.

    Args:
        model: the model; it is in float32 during the comparison.
        processor: of the model.
        out: directory of the files.
        out_type: type of their weights.
        language_model: name of a file.
        mmproj: name of a file.
        kept: ids of the added tokens that have rows in the files.
        adds_bos: whether the files say that a text begins with the tokenizer's first token.
        splits_linear: whether they hold a linear vision tokenizer as two maps.
        picture_size: width and height of the picture, which both show alike.

    Raises:
        CheckpointError: if llama.cpp cannot read the files, reads other tokens, or computes other probabilities.
    """
    version = llama_cpp_version()
    if version is None:
        return {"llama_cpp": None, "notes": [_NOT_CHECKED]}
    prompts = _make_prompts(processor, picture_size, adds_bos)
    pairs = [(prompt.text, prompt.picture) for prompt in prompts]
    files = out / language_model, out / mmproj
    first, rendered = ask_llama_cpp(*files, pairs, num_tokens=1, top=_TOP, messages=_messages(prompts[-1].picture))
    whole, _ = ask_llama_cpp(*files, pairs, num_tokens=_TOKENS, top=0)
    _check_chat(processor, rendered, prompts[-1].text)
    ids = [*range(model.config.first_added_id), *kept]
    dtype = model.dtype
    cast(model, torch.float32)
    try:
        facts = _compare(model, prompts, first, whole, ids, out_type, splits_linear)
    finally:
        cast(model, dtype)
    return {"llama_cpp": f"xllamacpp {version}", **facts}


def _make_prompts(processor: VLMProcessor, picture_size: tuple[int, int], adds_bos: bool) -> list[_Prompt]:
    """Return texts, texts behind a picture, and last a chat about the picture."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (*picture_size[::-1], 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(values.numpy()).save(file, "PNG")
    picture, encoded = decode_image(file.getvalue(), "a picture").image, base64.b64encode(file.getvalue()).decode()
    size = processor.image_processor.measure(*picture_size)
    # Where texts begin with the tokenizer's first token and chats do not, a text spells it for llama.cpp.
    bos = processor.tokenizer.bos_token or ""
    starts = processor.tokenizer("a")["input_ids"][:1]
    opening = bos if starts == [processor.tokenizer.bos_token_id] and not adds_bos else ""
    found = [_Prompt(opening + text, None, None, dict(processor(text=text))) for text in _TEXTS]
    for text in _TEXTS:
        inputs = dict(processor(text=MEDIA_TOKEN + text, images=[picture]))
        found.append(_Prompt(opening + MARKER + text, encoded, size, inputs))
    turn = Message("user", (Medium("picture.png"), Text(_TEXTS[0])))
    chat = ChatFormat(processor, gives_images=False)
    ids = torch.tensor([chat.encode_messages([turn])])
    pixels = processor.image_processor.preprocess([[[picture]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    markers = Markers(MARKER, "", "")
    rendered = chat.render([turn], markers)
    return [*found, _Prompt(rendered.removeprefix(bos) if adds_bos else rendered, encoded, size, inputs)]


def _messages(picture: str | None) -> list[dict[str, Any]]:
    """Return a chat about a picture in OpenAI's form."""
    url = {"url": f"data:image/png;base64,{picture}"}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": _TEXTS[0]}]}]


def _check_chat(processor: VLMProcessor, rendered: str, wanted: str) -> None:
    found = rendered.removeprefix(processor.tokenizer.bos_token or "")
    if found != wanted.removeprefix(processor.tokenizer.bos_token or ""):
        raise CheckpointError(
            f"llama.cpp writes a message with a picture as {found!r}, vlm as {wanted!r}. Nothing was written; please "
            "report it with the chat template."
        )


@torch.no_grad()
def _compare(
    model: VLM,
    prompts: list[_Prompt],
    first: list[Answer],
    whole: list[Answer],
    ids: list[int],
    out_type: str,
    splits: bool,
) -> dict[str, Any]:
    largest = 0.0
    for prompt, answer in zip(prompts, first, strict=True):
        _check_length(model, prompt, answer)
        if answer.logprobs:  # llama.cpp gives none for a token that is a part of a character
            with rounding_as_llama_cpp(model, splits_linear=splits):
                logits = model(**prompt.inputs).logits[0, -1, ids].float()
            found = torch.tensor([*answer.logprobs.values()])
            expected = logits.log_softmax(-1)[[*answer.logprobs]]
            what = "llama.cpp, about a picture," if prompt.picture else "llama.cpp, about a text,"
            largest = max(largest, check_agreement(what, expected, found, TOLERANCES[out_type]))
    equal = {kind: _TOKENS for kind in ("text", "picture")}
    for prompt, answer in zip(prompts, whole, strict=True):
        kind = "picture" if prompt.picture else "text"
        with rounding_as_llama_cpp(model, splits_linear=splits):
            count = _count_equal(_generate(model, prompt, ids), answer.tokens)
        if count < len(answer.tokens) and out_type == "f32":
            raise CheckpointError(
                f"llama.cpp's answer to {prompt.text!r} has another token {count + 1} than the model's. Nothing was "
                "written; please report it with the composition."
            )
        own = _count_equal(_generate(model, prompt, ids), answer.tokens)
        equal[kind] = min(equal[kind], own if own < len(answer.tokens) else _TOKENS)
    return {"largest_difference": largest, "equal_tokens": equal, "notes": _note(equal)}


def _note(equal: dict[str, int]) -> list[str]:
    return [
        f"llama.cpp rounds otherwise than vlm: answers about a {kind} were equal for {count} of {_TOKENS} tokens."
        for kind, count in equal.items()
        if count < _TOKENS
    ]


def _check_length(model: VLM, prompt: _Prompt, answer: Answer) -> None:
    wanted = prompt.inputs["input_ids"].shape[1]
    if prompt.size is not None:
        wanted += model.positions_of(prompt.size) - 1
    if answer.num_prompt != wanted:
        raise CheckpointError(
            f"llama.cpp reads {prompt.text!r} as {answer.num_prompt} tokens, vlm as {wanted}. Nothing was written; "
            "please report it with the composition."
        )


def _generate(model: VLM, prompt: _Prompt, ids: list[int]) -> list[int]:
    """Return the greedy answer of a model, as the files number tokens."""
    absent = sorted(set(range(model.config.first_added_id + len(model.config.added_tokens))) - set(ids))
    settings = GenerationConfig(
        max_new_tokens=_TOKENS, do_sample=False, pad_token_id=model.config.pad_token_id, suppress_tokens=absent or None
    )
    given = prompt.inputs["input_ids"].shape[1]
    inputs: dict[str, Any] = prompt.inputs
    found: Any = model.generate(**inputs, generation_config=settings)
    place = {token: i for i, token in enumerate(ids)}
    return [place[token] for token in found[0, given:].tolist()]


def _count_equal(ours: list[int], theirs: list[int]) -> int:
    """Count the equal tokens at the start; llama.cpp's answer may end earlier, at a stop token."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
