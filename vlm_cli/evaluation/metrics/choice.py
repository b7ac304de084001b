"""Questions with choices: which one an answer means, and which one the model finds likeliest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from vlm_cli.evaluation.metrics.exact import normalise
from vlm_cli.evaluation.metrics.metric import Figure, PerItemMetric, Sample

__all__ = ["ChoiceLikelihood", "MeanChoiceLikelihood", "MultipleChoice", "candidates", "choose", "right_choice"]

MOST = len(ascii_uppercase)

_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:,)]?")
_AT_START = re.compile(r"\(?([A-Z])(?:\)|[.:](?=\s|$))")
_SAID = re.compile(r"(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*\(?([A-Z])\b(?!['’])")
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")


def choose(answer: str, choices: Sequence[str]) -> int | None:
    """Return which choice an answer means, by its letter or its text; None if it means none, or several.

    >>> choices = ["red", "red car", "blue"]
    >>> [choose(x, choices) for x in ("B", "(b).", "Red.", "The answer is C", "it is a red car", "red or blue", "?")]
    [1, 1, 0, 2, 1, None, None]
    >>> [choose(x, ["5", "-5"]) for x in ("5", "-5", "It is -5.")]
    [0, 1, 1]
    """
    if (equal := _find_equal(answer, choices)) is not None:
        return equal
    letters = {letter: i for i, letter in enumerate(ascii_uppercase[: len(choices)])}
    if not _are_letters(choices):
        stripped = answer.strip()
        if found := _ALONE.fullmatch(stripped):
            return letters.get(found[1].upper())
        if found := _AT_START.match(stripped) or _SAID.search(stripped):
            return letters.get(found[1])
        if len(named := set(_IN_BRACKETS.findall(stripped))) == 1:
            return letters.get(named.pop())
    return _find_text(answer, choices)


def _find_equal(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice that a text equals; None if there is none, or several.

    They are compared as they stand, then in any case, and then without marks and articles: choices may differ in a sign
    or a capital alone.
    """
    for write in (str.strip, lambda x: x.strip().casefold(), normalise):
        said = write(text)
        if found := [i for i, x in enumerate(choices) if said and write(x) == said]:
            return found[0] if len(found) == 1 else None
    return None


def _are_letters(choices: Sequence[str]) -> bool:
    """Tell whether the texts of choices are letters themselves, which then do not number them."""
    return all(len(x.strip()) == 1 and x.strip().isalpha() for x in choices)


def _find_text(answer: str, choices: Sequence[str]) -> int | None:
    """Return the only choice whose text stands in an answer; one that stands inside of a longer one does not count."""
    texts = [normalise(x) for x in choices]
    rest, found = f" {normalise(answer)} ", []
    for text in sorted(set(texts) - {""}, key=len, reverse=True):
        if f" {text} " in rest:
            found.append(text)
            rest = rest.replace(f" {text} ", " \0 ")
    meant = [i for i, text in enumerate(texts) if found == [text]]
    if len(meant) > 1:  # apart from marks and case they are the same
        meant = [i for i in meant if _stands_in(choices[i], answer)]
    return meant[0] if len(meant) == 1 else None


def _stands_in(choice: str, answer: str) -> bool:
    """Tell whether an answer holds a choice as it is written, as whole words."""
    return re.search(rf"(?<!\S){re.escape(choice.strip())}(?=[.,;:!?]*(?:\s|$))", answer) is not None


def right_choice(sample: Sample) -> int | None:
    """Return which choice is right: the one whose text is expected, or else whose letter is. None for neither."""
    if (equal := _find_equal(sample.expected, sample.choices)) is not None:
        return equal
    letter = sample.expected.strip().strip("().").upper()
    place = ascii_uppercase.find(letter) if len(letter) == 1 else -1
    return place if 0 <= place < len(sample.choices) else None


def candidates(sample: Sample) -> tuple[str, ...]:
    """Return what the model may answer to a question: the letters of the choices if a letter is right, or their texts.

    >>> candidates(Sample("", "B", ("B",), ("cat", "dog"))), candidates(Sample("", " dog", (" dog",), ("cat", "dog")))
    (('A', 'B'), ('cat', 'dog'))
    """
    says_letter = _find_equal(sample.expected, sample.choices) is None
    return tuple(ascii_uppercase[: len(sample.choices)]) if says_letter else sample.choices


def _find_bad_choices(samples: Sequence[Sample]) -> str | None:
    """Say which choices leave open which one is meant, or hold no right one."""
    for sample in samples:
        texts = [x.strip() for x in sample.choices]
        if not texts:
            continue
        if len(texts) > MOST:
            return f"{sample.place} has {len(texts)} choices; letters number at most {MOST}."
        if not all(texts):
            return f"a choice of {sample.place} is empty."
        if texts.count(sample.expected.strip()) > 1:
            return f"two choices of {sample.place} are the same and right, {sample.expected.strip()!r}."
        if right_choice(sample) is None:
            return (
                f"the answer of {sample.place}, {sample.expected.strip()[:40]!r}, is neither the letter nor the text "
                f"of one of its {len(texts)} choices."
            )
    return None


class MultipleChoice(PerItemMetric):
    """1 if the answer means the right choice, by letter or text."""

    name = "multiple-choice"
    summary = (
        "An answer is right if it means the right choice, by its letter or its text. One that means several is wrong. "
        "An item without choices is marked as by normalised."
    )
    source = "MMBench, https://arxiv.org/abs/2307.06281, without its language model as a judge"
    figures = (Figure("multiple-choice"),)
    is_binary = True

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if not any(x.choices for x in samples):
            return 'it needs choices, and no item has any. Give them as "choices", a list of texts.'
        return _find_bad_choices(samples)

    def score(self, sample: Sample) -> float:
        if not sample.choices:
            said = normalise(sample.answer)
            return float(any(said == normalise(x) for x in sample.accepted))
        return float(choose(sample.answer, sample.choices) == right_choice(sample))


class ChoiceLikelihood(PerItemMetric):
    """1 if the right choice has the highest log-probability behind the prompt."""

    name = "choice-likelihood"
    summary = "The model answers with the choice whose tokens together are likeliest behind the prompt."
    source = "GPT-3, https://arxiv.org/abs/2005.14165, section 2.4"
    figures = (Figure("choice-likelihood"),)
    is_binary = True
    needs_answers = False
    needs_likelihoods = True

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if without := next((x for x in samples if not x.choices), None):
            return f'it rates choices, and {without.place} has none. Give them as "choices", a list of texts.'
        return _find_bad_choices(samples) or self._find_prefix(samples)

    def _find_prefix(self, samples: Sequence[Sample]) -> str | None:
        """Say which choice begins another: it is likelier than that one whatever the model knows."""
        for sample in samples:
            texts = [x.strip() for x in candidates(sample)]
            for text in texts:
                if longer := next((x for x in texts if x != text and x.startswith(text)), None):
                    return (
                        f"of {sample.place}, the choice {text!r} is the beginning of {longer!r}, so that it is always "
                        "the likelier one. Use --metric choice-likelihood-mean, which divides by the length."
                    )
        return None

    def rate(self, likelihood: float, num_tokens: int) -> float:
        """Return by what choices are compared."""
        return likelihood

    def best(self, likelihoods: Sequence[tuple[float, int]]) -> int:
        """Return which choice is the best one."""
        rated = [self.rate(*x) for x in likelihoods]
        return rated.index(max(rated))

    def score(self, sample: Sample) -> float:
        return float(self.best(sample.likelihoods) == right_choice(sample))


class MeanChoiceLikelihood(ChoiceLikelihood):
    """1 if the right choice has the highest log-probability per token."""

    name = "choice-likelihood-mean"
    summary = "The model answers with the choice whose tokens are likeliest on average behind the prompt."
    figures = (Figure("choice-likelihood-mean"),)

    def _find_prefix(self, samples: Sequence[Sample]) -> str | None:
        return None

    def rate(self, likelihood: float, num_tokens: int) -> float:
        return likelihood / num_tokens
