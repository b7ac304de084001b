"""Write records that no template writes: contexts and targets are the very texts, and a token ends each target.

With `I` for the media token and `E` for the end token:

    prompt "<image:a.png>Q: How many? A:", completion " Two."

    ids          I   Q  :  How many ?  A  :   Two  .   E
    is_target    no  no no no  no   no no no  yes  yes yes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from vlm_cli.composition import END_OF_CHUNK
from vlm_cli.data.record import Segment
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.prompt import Medium, Slot, Text

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = ["PlainWriter", "PlainlyWritten", "find_end_token"]


def find_end_token(model: VLM, processor: VLMProcessor) -> int:
    """Return the id of the token that ends each target: `<|endofchunk|>` if the composition has it, else end-of-text.

    Raises:
        LanguageModelError: if the model has neither.
    """
    if END_OF_CHUNK in model.config.composition.added_tokens:
        return int(processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK))
    found = stop_token_ids(processor.tokenizer, model.config)
    if not found:
        raise LanguageModelError(
            f"the model has no token that ends an answer: neither {END_OF_CHUNK} nor an end-of-text token. Build it "
            f"again with --set 'added_tokens=[{END_OF_CHUNK!r}, <image>]'."
        )
    return found[0]


@dataclass
class PlainlyWritten:
    """Tokens of contexts and targets.

    Attributes:
        ids: the tokens.
        is_target: for each token, whether the model learns it.
        was_split: a token would have held the end of a context and the start of its target, and was split there.
    """

    ids: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)
    was_split: bool = False


class PlainWriter:
    """Writes contexts and targets for one model.

    Args:
        processor: of the model.
        end_id: the token that ends each target.
        parse_special_tokens: read the spelling of a special token as that token.
    """

    def __init__(self, processor: VLMProcessor, end_id: int, *, parse_special_tokens: bool = False) -> None:
        self.processor, self.end_id, self.parse_special_tokens = processor, end_id, parse_special_tokens
        self._media_id = processor.media_token_id
        # Many records ask the same question.
        self._encode_cached = lru_cache(maxsize=2**16)(self._encode_texts)

    def write(self, segments: Sequence[Segment], before: Sequence[Text | Medium] = ()) -> PlainlyWritten:
        """Write segments that alternate: context, target, context, … The last may be a context, which asks.

        Args:
            segments: in their order.
            before: what stands before the first context.
        """
        written = PlainlyWritten()
        for number in range(0, len(segments), 2):
            context, *target = segments[number : number + 2]
            parts = (*(() if number else before), *context.parts)
            if not target:
                self._add(written, self._encode_parts(parts, number > 0), [])
                continue
            asked, answer, was_split = self._encode_pair(parts, target[0].parts, continues=number > 0)
            self._add(written, asked, answer if answer[-1:] == [self.end_id] else [*answer, self.end_id])
            written.was_split |= was_split
        return written

    def _add(self, written: PlainlyWritten, asked: Sequence[int], answer: Sequence[int]) -> None:
        written.ids += [*asked, *answer]
        written.is_target += [False] * len(asked) + [token != self._media_id for token in answer]

    def _encode_pair(
        self, context: Sequence[Text | Medium], target: Sequence[Text | Medium], *, continues: bool
    ) -> tuple[list[int], list[int], bool]:
        """Encode a context and its target; tell whether a token that both would share was split."""
        before = self._encode_parts(context, continues)
        both = self._encode_parts([*context, *target], continues)
        if both[: len(before)] == before:
            return before, both[len(before) :], False
        # At inference the prompt ends where the context ends, so its last token must end there in training too.
        return before, self._encode_parts(target, True), True

    def _encode_parts(self, parts: Sequence[Text | Medium], continues: bool) -> list[int]:
        """Encode the start of a prompt or, if it `continues`, the text after a special token."""
        key = tuple(part.text if isinstance(part, Text) else None for part in parts)
        return self._encode_cached(key, continues)

    def _encode_texts(self, texts: tuple[str | None, ...], continues: bool) -> list[int]:
        """Encode texts, with None for each medium."""
        parts = [Slot() if text is None else Text(text) for text in texts]
        if not continues:
            return self.processor.encode(parts, parse_special_tokens=self.parse_special_tokens)
        # The tokens after a media token are those after any special token.
        ids = self.processor.encode([Slot(), *parts], parse_special_tokens=self.parse_special_tokens)
        return ids[ids.index(self._media_id) + 1 :]
