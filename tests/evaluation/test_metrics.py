"""Metrics against independent implementations: other packages, slow loops, and published examples."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

from vlm_cli.errors import DataError, UnknownNameError, UsageError
from vlm_cli.evaluation.metrics import METRICS, Sample, check_metrics, find_default, parse_metrics
from vlm_cli.evaluation.metrics.anls import edit_distance, similarity
from vlm_cli.evaluation.metrics.caption_words import split_caption
from vlm_cli.evaluation.metrics.choice import choose
from vlm_cli.evaluation.metrics.vqa import normalise_vqa, soft_accuracy


def sample(answer: str, *accepted: str, **more: object) -> Sample:
    return Sample(answer, accepted[0], accepted, place="line 1 of a.jsonl", **more)  # type: ignore[arg-type]


def figures(name: str, samples: Sequence[Sample]) -> dict[str, float]:
    metric = METRICS[name]
    values = metric.values(metric.measure(samples).sum(axis=0))
    return dict(zip((x.name for x in metric.figures), map(float, values), strict=True))


def mark(name: str, one: Sample) -> float:
    return figures(name, [one])[name]


# -- VQA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The examples of https://visualqa.org/evaluation.html.
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("girls", "girls"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # Its rules, one by one.
        ("Red", "red"),
        ("2.5.", "2.5"),
        ("yes.", "yes"),
        ("three", "3"),
        ("none", "0"),
        ("the cat and a dog", "cat and dog"),
        ("red/white & blue", "red white blue"),
        ("a, b", "b"),
        ("  a  tall\nman ", "tall man"),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize("people", [4, 10])
def test_soft_accuracy_is_the_mean_over_those_that_leave_one_out(people: int) -> None:
    for matches in range(people + 1):
        said = [i < matches for i in range(people)]
        left = [sum(others) / 3 for others in itertools.combinations(said, people - 1)]
        slow = float(np.mean([min(1.0, x) for x in left]))
        assert soft_accuracy(matches, people) == pytest.approx(slow, abs=1e-12)


def test_vqa_needs_people() -> None:
    ten = ("red", "red", "Red.", "dark red", *["blue"] * 6)
    assert mark("vqa", sample("the red", *ten)) == pytest.approx(0.9)
    assert mark("vqa", sample("green", *ten)) == 0
    with pytest.raises(DataError, match=r"at least 4 and usually ten, and line 1 of a\.jsonl has 1"):
        check_metrics([METRICS["vqa"]], [sample("", "red")])


# -- ANLS --------------------------------------------------------------------------------------------------------------


def slow_distance(a: str, b: str) -> int:
    """The definition, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_is_the_definition() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("abc") for _ in range(rng.randrange(6))) for _ in range(12)]
    assert all(edit_distance(a, b) == slow_distance(a, b) for a in words for b in words)


def test_anls_is_that_of_the_package() -> None:
    package = pytest.importorskip("anls.metrics.score", reason="the package anls is not installed")
    rng = random.Random(1)
    pairs = [("".join(rng.choices("ab c", k=8)), "".join(rng.choices("ab c", k=9))) for _ in range(200)]
    pairs += [("Paris", "paris"), ("", "x"), ("12", "13"), ("abcd", "abxy"), ("a  b", "a b")]
    for a, b in pairs:
        assert similarity(a, b) == pytest.approx(package.anls_score(a, [b])), (a, b)
    assert {similarity(a, b) for a, b in pairs} >= {0.0, 1.0}


def test_the_nearest_accepted_answer_counts() -> None:
    assert mark("anls", sample("unversity", "college", "university")) == pytest.approx(0.9)


# -- relaxed, exact, normalised ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "accepted", "expected"),
    [
        ("relaxed", "95", ["100"], 1),
        ("relaxed", "94.9", ["100"], 0),
        ("relaxed", "-105", ["-100"], 1),
        ("relaxed", "5%", ["0.05"], 1),
        ("relaxed", "0.04", ["0"], 0),
        ("relaxed", "BLUE", ["blue"], 1),
        ("relaxed", "blue", ["3"], 0),
        ("relaxed", "3", ["9", "3"], 1),
        ("exact", " Red ", ["Red"], 1),
        ("exact", "red", ["Red"], 0),
        ("exact", "crimson", ["red", "crimson"], 1),
        ("normalised", "The  red, car!", ["red car"], 1),
        ("normalised", "1,000", ["1000"], 0),
        ("normalised", "a", ["A"], 1),
        ("yes-no", "Yes, it is.", ["yes"], 1),
        ("yes-no", "yesterday", ["yes"], 0),
    ],
)
def test_marks(name: str, answer: str, accepted: list[str], expected: float) -> None:
    assert mark(name, sample(answer, *accepted)) == expected


# -- choices -----------------------------------------------------------------------------------------------------------

CHOICES = ("red", "red car", "the sea", "12")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("D.", 3),
        ("A. red", 0),
        ("C: the sea", 2),
        ("Answer: B", 1),
        ("The correct answer is (D).", 3),
        ("Red", 0),
        ("a red car", 1),  # one text begins with another: the longer one is meant
        ("I see the sea", 2),
        ("12", 3),
        ("E", None),
        ("red or blue", 0),
        ("red or sea", None),
        ("red and the sea", None),
        ("A dog is there", None),
        ("", None),
    ],
)
def test_choose(answer: str, choice: int | None) -> None:
    assert choose(answer, CHOICES) == choice


def test_letters_that_are_texts() -> None:
    assert [choose(x, ("B", "A")) for x in ("A", "B", "C")] == [1, 0, None]


@pytest.mark.parametrize(
    "choices",
    [("5", "-5"), ("+", "-"), ("Dear Aunt Sue,", "dear aunt sue,"), ("x > y", "x < y"), ("same", "same")],
)
def test_choices_that_differ_in_marks_and_case_alone(choices: tuple[str, str]) -> None:
    """Benchmarks have them: of signs, of capitals, of punctuation."""
    asked = [
        sample(answer, "B", choices=choices) for answer in ("B", choices[1], "A", choices[0], f"Is it {choices[0]}?")
    ]
    check_metrics([METRICS["multiple-choice"]], asked)
    marks = [mark("multiple-choice", x) for x in asked]
    assert marks == [1, choices[0] != choices[1], 0, 0, 0]


@pytest.mark.parametrize(
    ("choices", "expected", "says"),
    [
        ((), "B", "needs choices, and no item has any"),
        (("cat", "cat "), "cat", "two choices of line 1 of a.jsonl are the same and right, 'cat'"),
        (("cat", " "), "A", "a choice of line 1 of a.jsonl is empty"),
        (("cat", "dog"), "C", "'C', is neither the letter nor the text of one of its 2 choices"),
        (tuple(map(str, range(27))), "1", "has 27 choices; letters number at most 26"),
    ],
)
def test_choices_that_do_not_fit(choices: tuple[str, ...], expected: str, says: str) -> None:
    with pytest.raises(DataError, match="the metric multiple-choice does not fit these records") as caught:
        check_metrics([METRICS["multiple-choice"]], [sample("", expected, choices=choices)])
    assert says in str(caught.value)


# -- yes and no --------------------------------------------------------------------------------------------------------


def test_yes_no_figures_are_those_of_counting() -> None:
    rng = random.Random(0)
    pairs = [(rng.choice(["yes", "No.", "maybe"]), rng.choice(["yes", "no"])) for _ in range(60)]
    found = figures("yes-no", [sample(a, b) for a, b in pairs])
    tp = sum(a == b == "yes" for a, b in pairs)
    said, positive = sum(a == "yes" for a, _ in pairs), sum(b == "yes" for _, b in pairs)
    right = tp + sum(a == "No." and b == "no" for a, b in pairs)
    precision, recall = tp / said, tp / positive
    assert found == pytest.approx(
        {
            "yes-no": right / 60,
            "yes-no precision": precision,
            "yes-no recall": recall,
            "yes-no F1": 2 * precision * recall / (precision + recall),
            "yes-no yes-rate": said / 60,
        }
    )


def test_yes_no_refuses_other_answers() -> None:
    with pytest.raises(DataError, match=r"counts answers yes and no, and the answer of line 1 of a\.jsonl is 'red'"):
        check_metrics([METRICS["yes-no"]], [sample("", "red")])


def test_mme_counts_pictures() -> None:
    samples = [sample(a, "yes", group=g) for g, a in (("1", "yes"), ("1", "yes"), ("2", "yes"), ("2", "no"))]
    assert figures("mme", samples) == {"mme": 1.25, "mme accuracy": 0.75, "mme accuracy+": 0.5}


# -- captions ----------------------------------------------------------------------------------------------------------

CAPTIONS = [
    ("a man riding a bike fast", ("A man riding a bike.", "The man's bike, ridden.")),
    ("two dogs on a couch", ("Two dogs (brown) sit on a couch!", "dogs on the couch")),
    ("a red-brown cat", ("A cat can't sleep at 2:30.", "a red-brown cat sleeps")),
    ("", ("Nothing to see", "an empty room")),
]


def test_captions_are_those_of_pycocoevalcap() -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    samples = [sample(answer, *accepted) for answer, accepted in CAPTIONS]
    right = {i: [" ".join(split_caption(x)) for x in accepted] for i, (_, accepted) in enumerate(CAPTIONS)}
    given = {i: [" ".join(split_caption(answer))] for i, (answer, _) in enumerate(CAPTIONS)}
    found = figures("bleu", samples)
    wanted = bleu.Bleu(4).compute_score(right, given, verbose=0)[0]
    assert [found[x] for x in ("bleu-1", "bleu-2", "bleu-3", "bleu")] == pytest.approx(wanted, abs=1e-4)
    assert figures("cider", samples)["cider"] == pytest.approx(Cider().compute_score(right, given)[0])
    assert figures("rouge-l", samples)["rouge-l"] == pytest.approx(Rouge().compute_score(right, given)[0])
    assert all(0.05 < found[x] < 0.95 for x in ("bleu-1", "bleu-2", "bleu-3", "bleu"))


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java, which vlm does not")
def test_words_of_captions_are_those_of_stanford() -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    texts = [x for answer, accepted in CAPTIONS for x in (answer, *accepted) if x]
    texts += ["it's a t-shirt/jacket; they're #1 at 50% off", "the dogs' U.S. flag & house... cannot be $5", "A/C [on]"]
    found = tokenizer.tokenize({i: [{"caption": x}] for i, x in enumerate(texts)})
    assert [found[i][0].split() for i in range(len(texts))] == [split_caption(x) for x in texts]


def test_captions_need_words_and_items() -> None:
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(DataError, match="there is only one item"):
        check_metrics([METRICS["cider"]], [sample("", "a cat")])
    with pytest.raises(DataError, match=r"an accepted answer of line 1 of a\.jsonl has none"):
        check_metrics([METRICS["bleu"]], [sample("", "...")])


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_cli.evaluation.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vlm-cli\[captions\]'"):
        check_metrics([METRICS["cider"]], [sample("", "a cat")])


# -- which metric ------------------------------------------------------------------------------------------------------


def test_the_default_is_chosen_by_the_data() -> None:
    plain, ten = sample("", "red"), sample("", *["red"] * 10)
    choice = sample("", "A", choices=("cat", "dog"))
    found = [find_default(x)[0].name for x in ([plain], [ten], [choice], [plain, ten], [choice, plain])]
    assert found == ["exact", "vqa", "multiple-choice", "exact", "exact"]
    assert find_default([plain, plain], ["anls", "anls"])[0].name == "anls"
    with pytest.raises(UsageError, match="marked differently, by anls, vqa"):
        find_default([plain, plain], ["anls", "vqa"])


def test_names_of_metrics() -> None:
    assert [x.name for x in parse_metrics("vqa, EXACT")] == ["vqa", "exact"]
    with pytest.raises(UnknownNameError, match=r"unknown metric 'relaxd'\. Did you mean 'relaxed'\?"):
        parse_metrics("relaxd")
    with pytest.raises(UsageError, match="names 'vqa' twice"):
        parse_metrics("vqa,vqa")


TWINS = {"yes-no": ("yes", "no"), "mme": ("yes", "no"), "relaxed": ("12", "15")}


@pytest.mark.parametrize("name", METRICS)
def test_a_wrong_answer_costs(name: str) -> None:
    """The twin of every comparison: full marks for what is accepted, and fewer for another answer."""
    if METRICS[name].source.find("pycocoevalcap") >= 0:
        pytest.importorskip("pycocoevalcap")
    expected, other = TWINS.get(name, ("a big red dog runs", "some cats sit quietly"))
    choices = (expected, other) if "choice" in name else ()
    neighbour = [] if name in TWINS or choices else [sample("x y z w", *["x y z w"] * 10)]
    rated = {expected: ((-1.0, 5), (-2.0, 4)), other: ((-2.0, 5), (-1.0, 4))}
    samples = [sample(x, *[expected] * 10, group="a", choices=choices, likelihoods=rated[x]) for x in (expected, other)]
    right, wrong = (figures(name, [x, *neighbour])[name] for x in samples)
    assert right > wrong
