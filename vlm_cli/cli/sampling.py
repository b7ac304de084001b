"""Options that say how a model chooses the tokens of an answer, and when the answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.options import MAX_SEED
from vlm_cli.errors import UsageError
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.generation.plan import Answer

__all__ = ["MAX_NEW_TOKENS", "SamplingOptions", "SearchOptions", "cut_note"]

SAMPLING = "Sampling"  # heading of these options in --help

MAX_SEQUENCES = 1_000  # beams, or answers, that the model follows at once
MAX_NEW_TOKENS = 1_000_000  # the longest answer
MAX_TEMPERATURE = 1_000.0
MAX_TOP_K = 1_000_000  # tokens; no vocabulary has more
MAX_REPETITION_PENALTY = 100.0


def cut_note(cut: int, answers: int, longest: int, most: int) -> str:
    """Say that answers were cut before they ended.

    >>> cut_note(1, 1, 64, 64)
    'Note: the answer was cut at 64 tokens, before a stop token; --max-new-tokens allows more.'

    Args:
        cut: how many answers were cut.
        answers: how many there are.
        longest: tokens of the longest of those that were cut.
        most: tokens that --max-new-tokens allows.
    """
    which = "the answer was" if answers == 1 else f"{cut:,} of {answers:,} answers {'was' if cut == 1 else 'were'}"
    if longest < most:
        return f"Note: {which} cut at {count_of(longest, 'token')}, where the context of the model ends."
    return f"Note: {which} cut at {count_of(most, 'token')}, before a stop token; --max-new-tokens allows more."


@dataclass(frozen=True)
class SearchOptions:
    """How many answers the model follows at once, and how many it returns."""

    num_beams: Annotated[
        int,
        option(SAMPLING, "Search with N beams; 1 is no beam search.", min=1, max=MAX_SEQUENCES, metavar="N"),
    ] = 1
    num_return_sequences: Annotated[
        int,
        option(SAMPLING, "Write N answers to each prompt.", min=1, max=MAX_SEQUENCES, metavar="N"),
    ] = 1


@dataclass(frozen=True)
class SamplingOptions:
    """How the model chooses each token, and when an answer ends."""

    max_new_tokens: Annotated[
        int,
        option(
            SAMPLING,
            "Stop an answer after N new tokens.",
            "--max-new-tokens",
            "--max-tokens",
            "-n",
            min=1,
            max=MAX_NEW_TOKENS,
            metavar="N",
        ),
    ] = 64
    temperature: Annotated[
        float | None,
        option(
            SAMPLING,
            "Randomness: 0 takes the most likely token each time (the default); 1 samples from the model's own "
            "probabilities; more than 1 favours unlikely tokens.",
            min=0.0,
            max=MAX_TEMPERATURE,
            metavar="X",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            SAMPLING,
            "Sample only from the most likely tokens that together have probability P.",
            min=0.0,
            max=1.0,
            metavar="P",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option(SAMPLING, "Sample only from the K most likely tokens.", min=1, max=MAX_TOP_K, metavar="K"),
    ] = None
    repetition_penalty: Annotated[
        float,
        option(
            SAMPLING,
            "Values above 1 make tokens that occurred before less likely.",
            min=0.01,
            max=MAX_REPETITION_PENALTY,
            metavar="X",
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        option(SAMPLING, "End an answer before TEXT. Repeat the option for several texts.", metavar="TEXT"),
    ] = None
    seed: Annotated[
        int | None,
        option(SAMPLING, "Seed for sampling: the same seed gives the same answers.", min=0, max=MAX_SEED, metavar="N"),
    ] = None

    def tell_cut(self, answers: Sequence[Answer]) -> None:
        """Tell the user of answers that `--max-new-tokens` or the context of the model has cut."""
        if cut := [answer.new_tokens for answer in answers if answer.finish_reason == "length"]:
            console.note(cut_note(len(cut), len(answers), max(cut), self.max_new_tokens))

    def keywords(self, search: SearchOptions = SearchOptions()) -> dict[str, Any]:
        """Return the arguments of `generate`; each flag takes effect or is refused.

        Raises:
            UsageError: for flags that contradict each other.
        """
        narrowed = [flag for flag, x in (("--top-p", self.top_p), ("--top-k", self.top_k)) if x is not None]
        if self.temperature == 0 and narrowed:
            raise UsageError(f"--temperature 0 is greedy, so {narrowed[0]} has no effect. Leave one of them out.")
        sample = bool(self.temperature) or bool(narrowed)
        if not sample and search.num_return_sequences > search.num_beams:
            raise UsageError(
                f"greedy search gives one answer, but --num-return-sequences is {search.num_return_sequences}. Add "
                f"--temperature 1 to sample, or --num-beams {search.num_return_sequences}."
            )
        if any(not text for text in self.stop or ()):
            raise UsageError("--stop needs a text, got ''.")
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sample,
            "temperature": (self.temperature or 1.0) if sample else None,
            "top_p": (1.0 if self.top_p is None else self.top_p) if sample else None,
            "top_k": (self.top_k or 0) if sample else None,
            "num_beams": search.num_beams,
            "num_return_sequences": search.num_return_sequences,
            "repetition_penalty": self.repetition_penalty,
        }
