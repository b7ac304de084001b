"""Questions whose answer is yes or no: accuracy, precision, recall, F1 and how often a model says yes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from vlm_cli.evaluation.metrics.metric import Figure, Metric, Sample, divide

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MME", "YesNo", "read_yes_no"]

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def read_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Return which of the two words a text has first; None if it has neither.

    >>> read_yes_no(" Yes, there is no dog."), read_yes_no("No."), read_yes_no("Nothing.")
    ('yes', 'no', None)
    """
    found = _WORD.search(text)
    return None if found is None else "yes" if found[1].lower() == "yes" else "no"


def _find_other_answer(samples: Sequence[Sample]) -> str | None:
    """Say which item has another right answer than yes or no."""
    if other := next((x for x in samples if read_yes_no(x.expected) is None), None):
        return f"it counts answers yes and no, and the answer of {other.place} is {other.expected.strip()[:40]!r}."
    return None


class YesNo(Metric):
    """Accuracy, and precision and recall of the answer yes.

    An answer that has neither word is wrong, and is no yes.
    """

    name = "yes-no"
    summary = (
        "The first yes or no of an answer counts. Precision is the share of right ones among the answers yes, recall "
        "the share of answers yes where yes is right, F1 their harmonic mean, and yes-rate the share of answers yes."
    )
    source = "POPE, https://arxiv.org/abs/2305.10355"
    figures = tuple(Figure(f"yes-no{x}") for x in ("", " precision", " recall", " F1", " yes-rate"))
    is_binary = True

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        return _find_other_answer(samples)

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        """Of each item: 1, right, said yes, yes is right, both."""
        import numpy as np

        rows = []
        for sample in samples:
            said, right = read_yes_no(sample.answer), read_yes_no(sample.expected)
            rows.append((1, said == right, said == "yes", right == "yes", said == right == "yes"))
        return np.array(rows, dtype=np.float64).reshape(-1, 5)

    def values(self, sums: np.ndarray) -> np.ndarray:
        import numpy as np

        items, right, said, positive, both = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
        shares = (
            divide(right, items),
            divide(both, said),
            divide(both, positive),
            divide(2 * both, said + positive),
            divide(said, items),
        )
        return np.stack(shares, axis=-1)

    def counts(self, sums: np.ndarray) -> np.ndarray:
        import numpy as np

        items, _, said, positive, _ = sums
        return np.array([items, said, positive, (said + positive) / 2, items])


class MME(Metric):
    """MME's score: the share of right answers, and of pictures whose two questions are both answered right."""

    name = "mme"
    summary = (
        "The score is accuracy + accuracy+, at most 200. Accuracy+ is the share of pictures all of whose questions are "
        "answered right. The first yes or no of an answer counts."
    )
    source = "MME, https://arxiv.org/abs/2306.13394"
    figures = (Figure("mme", is_share=False), Figure("mme accuracy"), Figure("mme accuracy+"))

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if alone := next((x for x in samples if not x.group), None):
            return f"it needs to know which questions are about one picture, and {alone.place} shows none."
        return _find_other_answer(samples)

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        """Of each item: 1, right, its share of a picture, and of a picture all of whose questions are right."""
        import numpy as np

        right = [read_yes_no(x.answer) == read_yes_no(x.expected) for x in samples]
        sizes = Counter(x.group for x in samples)
        wrong = {x.group for x, is_right in zip(samples, right, strict=True) if not is_right}
        rows = [
            (1, is_right, 1 / sizes[x.group], (x.group not in wrong) / sizes[x.group])
            for x, is_right in zip(samples, right, strict=True)
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, 4)

    def values(self, sums: np.ndarray) -> np.ndarray:
        import numpy as np

        items, right, pictures, whole = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
        accuracy, plus = divide(right, items), divide(whole, pictures)
        return np.stack((accuracy + plus, accuracy, plus), axis=-1)

    def counts(self, sums: np.ndarray) -> np.ndarray:
        import numpy as np

        items, _, pictures, _ = sums
        return np.array([items, items, pictures])
