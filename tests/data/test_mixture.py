"""Mixtures: what a user may say of several sources, and what is told of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_cli.data.mixture import Ingredient, Mixture
from vlm_cli.errors import UsageError

FILE = """
seed: 7
sources:
  - {data: a.jsonl, weight: 2}
  - {data: "hf:org/set:default", weight: 1, columns: {prompt: question, completion: answer}}
  - {data: "b-{0..3}.tar", share: 0.4, image_folder: pictures}
"""


def test_a_file_says_all_of_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(FILE)
    mixture = Mixture.of([tmp_path / "m.yaml"])
    assert [x.data for x in mixture.ingredients] == [
        str(tmp_path / "a.jsonl"),
        "hf:org/set:default",
        str(tmp_path / "b-{0..3}.tar"),
    ]
    assert mixture.weights == pytest.approx((0.4, 0.2, 0.4)) and mixture.seed == 7
    assert mixture.ingredients[2].image_folder == tmp_path / "pictures"
    columns = mixture.ingredients[1].columns
    assert columns is not None and dict(columns.columns) == {"prompt": "question", "completion": "answer"}
    assert mixture.to_dict()["sources"][0] == {"data": str(tmp_path / "a.jsonl"), "weight": 2}


def test_sources_without_weights_are_one_long_file() -> None:
    assert Mixture.of(["a", "b"]).weights is None
    assert Mixture.of(["a", "b"], [3, 1]).weights == (0.75, 0.25)
    assert Mixture.of(["a", "b"], [3, 0]).weights == (1, 0)
    assert Mixture((Ingredient("a", share=0.25), Ingredient("b", share=0.75))).weights == (0.25, 0.75)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mixture.of(["a", "a"]), "two sources have the name 'a'"),
        (lambda: Mixture.of(["a", "b"], [1]), "--weights gives 1 numbers for 2 sources"),
        (lambda: Mixture.of(["a", "b"], [0, 0]), "the weights of the sources sum to 0"),
        (lambda: Mixture.of(["a", "b"], [1, -1]), "the weight of 'b' must be from 0 to 1e+09, but is -1"),
        (lambda: Mixture.of(["a", "b"], [1, float("nan")]), "the weight of 'b' must be"),
        (lambda: Mixture.of(["a", "m.yaml"]), "'m.yaml' is a mixture. Give it alone"),
        (lambda: Mixture.of(["m.yaml"], [1]), "'m.yaml' is a mixture. Give it alone"),
        (lambda: Mixture((Ingredient("a", 1.0), Ingredient("b"))), "'b' has neither a weight nor a share"),
        (lambda: Mixture((Ingredient("a", 1.0, 0.5), Ingredient("b", 1.0))), "'a' has both a weight and a share"),
        (lambda: Mixture((Ingredient("a", share=0.5),)), "the shares of the sources sum to 0.5; they must sum to 1."),
        (lambda: Mixture((Ingredient("a", share=1.0), Ingredient("b", 1.0))), "they must sum to less than 1"),
        (lambda: Mixture((Ingredient("a", share=0.7), Ingredient("b", share=0.7))), "sum to 1.4; they must sum to 1."),
    ],
)
def test_what_is_no_mixture_is_told(make: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sources: []", "sources must be a list"),
        ("[]", "must be a mapping"),
        ("sources: [{weight: 1}]", "data"),
        ("sources: [{data: a, wieght: 1}]", "has an unknown key 'wieght'. Did you mean 'weight'?"),
        ("sources: [{data: a}]\nsed: 1", "has an unknown key 'sed'. Did you mean 'seed'?"),
        ("sources: [{data: a, weight: x}]", "weight must be a number from 0"),
        ("sources: [{data: a, share: 2}]", "share must be a number from 0 to 1"),
        ("sources: [{data: a, columns: {prompt: q}}]", "--columns must name the answer"),
        ("sources: [", "is not valid: line 1"),
        ("sources: [{data: a}, {data: a}]", "two sources have the name"),
    ],
)
def test_a_file_that_is_no_mixture_is_told(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(UsageError) as error:
        Mixture.of([tmp_path / "m.yaml"])
    assert words in str(error.value)
    with pytest.raises(UsageError, match="cannot read the mixture"):
        Mixture.of([tmp_path / "gone.yaml"])
