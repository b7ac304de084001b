"""Captions: CIDEr, BLEU and ROUGE-L, which pycocoevalcap computes; no Java is needed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vlm_cli.errors import UsageError
from vlm_cli.evaluation.metrics.caption_words import split_caption
from vlm_cli.evaluation.metrics.metric import Figure, Metric, Sample, divide

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BLEU", "CIDEr", "CaptionMetric", "Rouge"]

_ORDER = 4  # words of the longest n-gram
_PACKAGE = "pycocoevalcap"


class CaptionMetric(Metric):
    """Compares the words of a caption with those of several people."""

    source = "COCO captions, https://arxiv.org/abs/1504.00325; computed by pycocoevalcap, words split by vlm"

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if find_spec(_PACKAGE) is None:
            raise UsageError(
                f"the metric {self.name} is computed by {_PACKAGE}, which is not installed: "
                "pip install 'vlm-cli[captions]'"
            )
        if empty := next((x for x in samples if not all(map(split_caption, x.accepted))), None):
            return f"it compares words, and an accepted answer of {empty.place} has none."
        return None


def _texts(samples: Sequence[Sample]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return the accepted captions and the answer of each item, in words, as pycocoevalcap takes them."""
    right = {i: [" ".join(split_caption(x)) for x in sample.accepted] for i, sample in enumerate(samples)}
    return right, {i: [" ".join(split_caption(sample.answer))] for i, sample in enumerate(samples)}


class CIDEr(CaptionMetric):
    """The similarity of n-grams, weighted by how rare they are among all accepted captions (CIDEr-D)."""

    name = "cider"
    summary = (
        "CIDEr-D: the cosine of the counts of 1- to 4-grams, weighted by their rarity among the accepted captions of "
        "all items, averaged over them; × 100, at most 1000."
    )
    source = "CIDEr, https://arxiv.org/abs/1411.5726; computed by pycocoevalcap, words split by vlm"
    figures = (Figure("cider", is_share=False),)

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        if problem := super().find_problem(samples):
            return problem
        if len(samples) < 2:
            return "it weighs words by how many items have them, and there is only one item."
        return None

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        import numpy as np
        from pycocoevalcap.cider.cider import Cider

        _, scores = Cider(n=_ORDER).compute_score(*_texts(samples))
        return np.stack((np.ones(len(samples)), np.asarray(scores, dtype=np.float64)), axis=1)

    def values(self, sums: np.ndarray) -> np.ndarray:
        return divide(sums[..., 1:], sums[..., :1])


class Rouge(CaptionMetric):
    """The longest common subsequence of words."""

    name = "rouge-l"
    summary = (
        "The F-measure (beta 1.2) of the longest common subsequence of words, with the best precision and recall "
        "among the accepted answers."
    )
    source = "ROUGE, https://aclanthology.org/W04-1013; computed by pycocoevalcap, words split by vlm"
    figures = (Figure("rouge-l"),)

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        import numpy as np
        from pycocoevalcap.rouge.rouge import Rouge as Published

        _, scores = Published().compute_score(*_texts(samples))
        return np.stack((np.ones(len(samples)), np.asarray(scores, dtype=np.float64)), axis=1)

    def values(self, sums: np.ndarray) -> np.ndarray:
        return divide(sums[..., 1:], sums[..., :1])


class BLEU(CaptionMetric):
    """The precision of n-grams over all items together."""

    name = "bleu"
    summary = (
        "BLEU-4 of all items together: the geometric mean of the precisions of 1- to 4-grams, less for answers that "
        "are shorter than the nearest accepted ones. BLEU-1 to BLEU-3 stop at shorter n-grams."
    )
    source = "BLEU, https://aclanthology.org/P02-1040; counted by pycocoevalcap, words split by vlm"
    figures = tuple(Figure(f"bleu{x}") for x in ("", "-1", "-2", "-3"))

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        """Of each item: its length, that of the nearest accepted answer, and n-grams: right ones, then all, by n."""
        import numpy as np
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        scorer = BleuScorer(n=_ORDER)
        right, given = _texts(samples)
        for i in right:
            scorer += (given[i][0], right[i])
        rows = []
        for counts in scorer.ctest:
            length = counts["testlen"]
            nearest = min((abs(x - length), x) for x in counts["reflen"])[1]
            rows.append((length, nearest, *counts["correct"], *counts["guess"]))
        return np.array(rows, dtype=np.float64).reshape(-1, 2 + 2 * _ORDER)

    def values(self, sums: np.ndarray) -> np.ndarray:
        import numpy as np

        length, nearest = sums[..., 0], sums[..., 1]
        precisions = divide(sums[..., 2 : 2 + _ORDER], sums[..., 2 + _ORDER :])
        products = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, _ORDER + 1))
        ratio = divide(nearest, length)
        brevity = np.where(length > 0, np.exp(np.minimum(0.0, 1 - ratio)), 0.0)[..., None]
        return np.concatenate((products[..., -1:], products[..., :-1]), axis=-1) * brevity
