"""The soft accuracy of VQA: how many of ten people gave the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm_cli.evaluation.metrics.metric import Figure, PerItemMetric, Sample

__all__ = ["VQA", "normalise_vqa", "soft_accuracy"]

FULL = 3  # people who must have given an answer, so that it counts as wholly right

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_MARKS = re.compile(r"[^\w\s':.]|_")

# English contractions by their parts. A form that is another word without its apostrophe, such as its, well, were, wed,
# shed, shell, hell, ill or id, stays as it is.
_PAIRS = {
    "n't": "are ca could did does do had has have is might must need should was were wo would ai",
    "'ve": "could i might must should they we what who would you there",
    "'d": "how it someone that there they what who you somebody everyone everybody where why",
    "'ll": "it that there they what who you somebody someone how why when",
    "'s": "he how let she that there what when where who why somebody someone something",
    "'re": "they you what why there how",
    "'d've": "he how i it she someone somebody that there they we what where who why you",
}
_OTHERS = ("i'm", "ma'am", "o'clock", "y'all", "'twas", "'tis", "couldn't've", "shouldn't've", "wouldn't've")
_SPELLED = [f"{word}{end}" for end, words in _PAIRS.items() for word in words.split()] + list(_OTHERS)
_CONTRACTIONS = {word.replace("'", ""): word for word in _SPELLED}


def normalise_vqa(text: str) -> str:
    """Write an answer as VQA's evaluation compares it.

    Source, in our words: https://visualqa.org/evaluation.html, the steps before answers are compared: lower case, no
    periods outside of numbers, digits for number words up to ten, no articles, the apostrophes of contractions, and a
    space for any other mark but the apostrophe and the colon. A comma between digits vanishes.

    >>> normalise_vqa("Two cats, dont the 100,978 at 2:50 pm.")
    "2 cats don't 100978 at 2:50 pm"
    """
    text = _COMMA.sub("", text.lower().replace("’", "'"))
    text = _MARKS.sub(" ", _PERIOD.sub("", text))
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(matches: int, people: int) -> float:
    """Return min(matches among the others / 3, 1), averaged over each person who is left out.

    >>> [round(soft_accuracy(x, 10), 2) for x in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]

    Args:
        matches: people who gave the answer.
        people: all of them.
    """
    of_matching, of_others = min(1.0, (matches - 1) / FULL), min(1.0, matches / FULL)
    return (matches * of_matching + (people - matches) * of_others) / people


class VQA(PerItemMetric):
    """The share of full agreement with ten people, three of whom suffice."""

    name = "vqa"
    summary = (
        "An answer scores min(people who gave it / 3, 1), averaged over all sets that leave one person out, after "
        "VQA's normalisation."
    )
    source = "VQA, https://arxiv.org/abs/1505.00468, and https://visualqa.org/evaluation.html"
    figures = (Figure("vqa"),)

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if few := next((x for x in samples if len(x.accepted) <= FULL), None):
            return (
                f"it compares with the answers of several people, at least {FULL + 1} and usually ten, and "
                f'{few.place} has {len(few.accepted)}. Give them as "answers", or use --metric normalised.'
            )
        return None

    def score(self, sample: Sample) -> float:
        answer = normalise_vqa(sample.answer)
        return soft_accuracy(sum(answer == normalise_vqa(x) for x in sample.accepted), len(sample.accepted))
