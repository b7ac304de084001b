"""The words of a caption, as the evaluation of COCO captions splits them, without its Java."""

from __future__ import annotations

import re

__all__ = ["split_caption"]

_LEFT_OUT = frozenset("'`.?!,:-;\"“”")
# The evaluation means to leave brackets out, and keeps them, since it looks for them in capitals.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_ENDS = ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")
_SPLIT_WORDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}
_TOKEN = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                                       # u.s.
    | \d+(?:[.,:/]\d+)+                                      # 3,000.5 and 10:45
    | [^\W_]+(?:['&/][^\W_]+|-[^\W_]+)*                      # words, with apostrophes and hyphens inside
    | \S
    """,
    re.VERBOSE,
)


def split_caption(text: str) -> list[str]:
    """Return the words in lower case, a contraction as two, without punctuation.

    The rules are those of the Penn Treebank, as far as captions need them: they give the words of Stanford's tokenizer,
    but for rare abbreviations.

    >>> split_caption("A man's red-brown dog can't sit, at 2:30.")
    ['a', 'man', "'s", 'red-brown', 'dog', 'ca', "n't", 'sit', 'at', '2:30']
    """
    words: list[str] = []
    for found in _TOKEN.findall(text.lower().replace("’", "'").replace("‘", "'")):
        if found not in _LEFT_OUT:
            words += _split_word(found)
    return words


def _split_word(word: str) -> tuple[str, ...]:
    if word in _SPLIT_WORDS:
        return _SPLIT_WORDS[word]
    if word in _BRACKETS:
        return (_BRACKETS[word],)
    for end in _ENDS:
        if word.endswith(end) and len(word) > len(end):
            return word[: -len(end)], end
    return (word,)
