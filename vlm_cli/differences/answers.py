"""Where the answers of two models to one prompt part, and how likely each found both ways to go on.

One model is in memory at a time. A tokens of an answer, V tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_cli.decoding import decode_after, split_after
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts, chosen_of, split_clips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlm_cli.media import LoadedClip, LoadedImage

__all__ = ["AnswerDifference", "Answered", "WayOn", "answer_greedily", "find_parting", "greedy"]


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of `VLM.generate` for the likeliest token at each place."""
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}


@dataclass(frozen=True)
class Answered:
    """A greedy answer.

    Attributes:
        text: of the answer.
        ids: A tokens, the one that stopped it included.
        pieces: the text that each token adds; that of a stop token is empty.
        log_probabilities: float[A, V], of all tokens at each place.
        tokenizer: of the model.
    """

    text: str
    ids: Sequence[int]
    pieces: Sequence[str]
    log_probabilities: Tensor = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def at(self, character: int) -> int:
        """Return the number of the token that writes a character of the text; behind the text, of the last token."""
        end = 0
        for i, piece in enumerate(self.pieces):
            end += len(piece)
            if character < end:
                return i
        return max(len(self.ids) - 1, 0)

    def start(self, number: int) -> int:
        """Return how many characters stand before a token."""
        return sum(map(len, self.pieces[:number]))

    @property
    def is_cut(self) -> bool:
        """Whether the limit of tokens ended the answer, and no stop token."""
        return bool(self.pieces) and bool(self.pieces[-1])

    def rate(self, number: int, token: int | None) -> float | None:
        """Return the probability of a token at a place; None for no token."""
        return None if token is None else float(self.log_probabilities[number, token].exp())

    def name(self, number: int) -> str:
        """Return the text of a token, or the name of one without text."""
        return self.pieces[number] or str(self.tokenizer.convert_ids_to_tokens(self.ids[number]))


@dataclass(frozen=True)
class WayOn:
    """A token with which an answer goes on.

    Attributes:
        text: that it adds, or its name.
        a, b: its probability by each model; None if the model's tokenizer has no such token here.
    """

    text: str
    a: float | None
    b: float | None


@dataclass(frozen=True)
class AnswerDifference:
    """Two answers to one prompt.

    Attributes:
        a, b: their texts.
        before: what both wrote before they part; None if the answers are the same.
        token: number of the first token that differs, in each answer, from 1.
        ways: the token with which A goes on, and that with which B does.
        note: why a probability is not known; empty if all are.
    """

    a: str
    b: str
    before: str | None = None
    token: tuple[int, int] | None = None
    ways: tuple[WayOn, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "same": self.before is None,
            "before": self.before,
            "token": None if self.token is None else {"a": self.token[0], "b": self.token[1]},
            "ways": [vars(way) for way in self.ways],
            "note": self.note or None,
        }


@torch.inference_mode()
def answer_greedily(
    plan: GenerationPlan,
    parts: Sequence[Text | Medium],
    media: Sequence[LoadedImage | LoadedClip],
    notify: Callable[[str], None],
) -> Answered:
    """Answer a prompt with the likeliest token at each place, and rate all tokens at each place.

    Args:
        plan: how the model answers.
        parts: the prompt, in reading order.
        media: its images and clips.
        notify: receives what the user should know.

    Raises:
        PromptError: if the prompt has too many positions or images for the model.
    """
    model, tokenizer = plan.model, plan.processor.tokenizer
    written = add_clip_texts(parts, plan.processor, chosen_of(media))
    pixels = [plan.processor.image_processor.read(medium) for medium in split_clips(media, plan.processor)]
    sizes = [medium.size for medium in pixels]
    plan.budget.check_media(sizes)
    prompt = plan.writer.encode(written)
    room = plan.room(plan.budget.positions(len(prompt), sizes), notify, sizes)
    shown: dict[str, Any] = {name: x.to(model.device) for name, x in (stack_pixels([pixels]) if media else {}).items()}
    ids, mask = (x.to(model.device) for x in pad_left([prompt], 0))
    keywords = plan.keywords | {"max_new_tokens": room}
    output = model.generate(input_ids=ids, attention_mask=mask, **shown, **keywords)[0].tolist()
    answer = plan.read(prompt, output[len(prompt) :], room)
    own = output[len(prompt) : len(prompt) + answer.new_tokens]
    whole = torch.tensor([[*prompt, *own]], device=model.device)
    in_prompt = torch.arange(whole.shape[1], device=model.device)[None] < len(prompt)
    logits = model(input_ids=whole, **shown, prefix_mask=in_prompt, use_cache=False).logits[0]  # [tokens, V]
    rated = logits[len(prompt) - 1 : len(prompt) - 1 + len(own)].float()
    rated[:, model.config.media_token_id] = float("-inf")  # no answer holds it
    stop = [""] if answer.finish_reason == "stop_token" else []
    pieces = [*split_after(tokenizer, prompt, own[: len(own) - len(stop)]), *stop]
    return Answered(answer.text, own, pieces, rated.log_softmax(-1).cpu(), tokenizer)


def find_parting(a: Answered, b: Answered) -> AnswerDifference:
    """Find the first token at which two answers differ, whatever their tokenizers are.

    An answer that only the limit of tokens ended counts as the same as far as it goes.
    """
    length = min(len(a.text), len(b.text))
    character = next((i for i in range(length) if a.text[i] != b.text[i]), length)
    if len(a.text) == len(b.text) == character or any(len(x.text) == character and x.is_cut for x in (a, b)):
        return AnswerDifference(a.text, b.text)
    i, j = a.at(character), b.at(character)
    own_a, own_b = a.rate(i, a.ids[i]), b.rate(j, b.ids[j])
    before, numbers = a.text[: min(a.start(i), b.start(j))], (i + 1, j + 1)
    if a.start(i) != b.start(j):
        ways = (WayOn(a.name(i), own_a, None), WayOn(b.name(j), None, own_b))
        return AnswerDifference(a.text, b.text, before, numbers, ways, "The tokenizers cut the text in other places.")
    other_a, other_b = a.rate(i, _same_token(b, j, a)), b.rate(j, _same_token(a, i, b))
    ways = (WayOn(a.name(i), own_a, other_b), WayOn(b.name(j), other_a, own_b))
    note = "A tokenizer has no such token." if None in (other_a, other_b) else ""
    return AnswerDifference(a.text, b.text, before, numbers, ways, note)


def _same_token(of: Answered, number: int, other: Answered) -> int | None:
    """Return the id that a token of one answer has in the tokenizer of the other; None if it has no such token."""
    token = of.ids[number]
    name = of.tokenizer.convert_ids_to_tokens(token)
    vocabulary = other.tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    piece = of.pieces[number]
    if not piece:  # each tokenizer has its own name of the end
        stop = other.tokenizer.eos_token_id
        return stop if isinstance(stop, int) else None
    found = other.tokenizer.encode(piece, add_special_tokens=False)
    return found[0] if len(found) == 1 and decode_after(other.tokenizer, other.ids[:1], found) == piece else None
