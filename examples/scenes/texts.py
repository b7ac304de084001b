"""What one can say and ask about scenes: captions, questions with answers, and few-shot prompts.

Answers begin with a space and end with a full stop, as " green.".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from examples.scenes.world import (
    AXIS_RATIO,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZE_OF_PICTURE,
    SIZES,
    Scene,
    Split,
    Thing,
    sample_scene,
)

__all__ = [
    "FEW_SHOT_ATTRIBUTES",
    "QUESTION_KINDS",
    "FewShot",
    "Phrase",
    "Question",
    "ask",
    "ask_about",
    "caption",
    "caption_prompt",
    "describe",
    "question_prompt",
    "sample_few_shot",
]

NUMBERS = ("zero", "one", "two", "three")
ATTRIBUTES = ("size", "color", "shape")  # in the order of English
NOUNS = ("object", "thing")  # for what has no shape in a phrase
FEW_SHOT_ATTRIBUTES = ("color", "shape", "size", "count")
CLEAR = 5.0  # pixels from the middle, so that a thing is clearly at the left or the top

#: Words before a caption, and how often.
CAPTION_PROMPTS = {
    "Describe the image.": 6,
    "Describe the picture.": 2,
    "What is in the image?": 2,
    "Caption:": 1,
    "A picture of": 1,
}
#: Words around a question, and how often.
QUESTION_PROMPTS = {"Q: {} A:": 6, "Question: {} Answer:": 1, "{}": 3}
LOWER_CASE = 0.3  # share of the bare questions that begin with a small letter
#: Words between an example's image and its answer.
FEW_SHOT_PROMPTS = (" Output:", " Answer:", " Label:", " It is")


@dataclass(frozen=True)
class Question:
    """A question about a scene, as "What colour is the star?", and its answer, as " green."."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class FewShot:
    """Pictures of which the earlier ones show what is asked about the last one.

    Attributes:
        num_things: in each scene; None if it varies, as it is what is asked about.
        scenes: at least two; the last one is asked about.
        prompts: what follows each picture, as " Output:".
        answers: what follows that; the last one is the completion.
    """

    num_things: int | None
    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Phrase:
    """Some attributes, as in "large star"; what is None may be anything."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    @classmethod
    def of(cls, thing: Thing, attributes: Sequence[str]) -> Phrase:
        return cls(**{name: getattr(thing, name) for name in attributes})

    def matches(self, thing: Thing) -> bool:
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)

    def count(self, scene: Scene) -> int:
        return sum(map(self.matches, scene.things))

    def words(self, noun: str, *, plural: bool = False) -> str:
        """The phrase without an article; `noun` stands for a shape that is not named.

        >>> Phrase(size="large", shape="cross").words("thing", plural=True)
        'large crosses'
        """
        noun = self.shape or noun
        noun += ("es" if noun.endswith("s") else "s") if plural else ""
        return " ".join(word for word in (self.size, self.color, noun) if word)


# -- captions ---------------------------------------------------------------------------------------------------------


def describe(thing: Thing) -> str:
    """A thing in full: "a large red heart"."""
    return f"a {thing.size} {thing.color} {thing.shape}"


def caption(scene: Scene) -> str:
    """Two things as they lie to each other, three from left to right."""
    if len(scene.things) == 2:
        first, relation, second = relate(scene)
        return f" {describe(first)} {relation} {describe(second)}."
    *others, last = map(describe, sorted(scene.things, key=lambda thing: thing.x))
    return f" {', '.join(others)} and {last}." if others else f" {last}."


def relate(scene: Scene) -> tuple[Thing, str, Thing]:
    """Two things and how the first lies to the second: to its left, or above it."""
    a, b = scene.things
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= AXIS_RATIO * abs(dy):
        return (a, "to the left of", b) if dx < 0 else (b, "to the left of", a)
    return (a, "above", b) if dy < 0 else (b, "above", a)


def caption_prompt(rng: Random) -> str:
    return _choose(rng, CAPTION_PROMPTS)


# -- questions --------------------------------------------------------------------------------------------------------


def question_prompt(rng: Random, question: Question) -> str:
    """A question as one types it: "Q: What colour is the star? A:", or bare."""
    form, text = _choose(rng, QUESTION_PROMPTS), question.text
    if form == "{}" and rng.random() < LOWER_CASE:
        text = text[0].lower() + text[1:]
    return form.format(text)


def ask(rng: Random, scene: Scene, kind: str, split: Split) -> Question | None:
    """A question of this kind, if the scene allows one; in training, it names no pair that is held out."""
    found = _ASK[kind](rng, scene, split)
    return found and Question(kind, found[0], f" {found[1]}.")


def ask_about(rng: Random, scene: Scene, split: Split) -> Iterator[Question]:
    """Questions without end, of all kinds that the scene allows in turn, in random order."""
    while True:
        for kind in rng.sample(QUESTION_KINDS, len(QUESTION_KINDS)):
            if question := ask(rng, scene, kind, split):
                yield question


def _count(rng: Random, scene: Scene, split: Split) -> tuple[str, str]:
    noun = rng.choice(NOUNS)
    forms = (f"How many {noun}s are there?", f"How many {noun}s are in the image?", f"What is the number of {noun}s?")
    return rng.choice(forms), NUMBERS[len(scene.things)]


def _count_attr(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    attributes = rng.choice((("shape",), ("color",), ("size",), ("size", "shape"), ("size", "color")))
    phrase = _phrase(rng, scene, attributes, split, present=0.75)
    if phrase is None:
        return None
    words = phrase.words(rng.choice(NOUNS), plural=True)
    form = rng.choice(("How many {} are there?", "How many {} are in the image?"))
    return form.format(words), NUMBERS[phrase.count(scene)]


def _color(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    thing, name = _refer(rng, scene, hide="color")
    form = rng.choice(("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"))
    return None if thing is None else (form.format(name), thing.color)


def _shape(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    thing, name = _refer(rng, scene, hide="shape")
    form = rng.choice(("What shape is the {}?", "Which shape does the {} have?"))
    return None if thing is None else (form.format(name), thing.shape)


def _size(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    thing, name = _refer(rng, scene, hide="size")
    form = rng.choice(("What size is the {}?", "Is the {} large or small?", "Is the {} small or large?"))
    return None if thing is None else (form.format(name), thing.size)


def _exist(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    attributes = rng.choice((("shape",), ("color",), ("color", "shape"), ("color", "shape"), ("size", "shape")))
    phrase = _phrase(rng, scene, attributes, split, present=0.5)
    if phrase is None:
        return None
    words = phrase.words(rng.choice(NOUNS))
    article = "an" if words[0] in "aeiou" else "a"
    form = rng.choice(("Is there {}?", "Is there {} in the image?", "Do you see {}?"))
    return form.format(f"{article} {words}"), "yes" if phrase.count(scene) else "no"


def _where(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    thing, name = _refer(rng, scene)
    middle = SIZE_OF_PICTURE / 2
    if thing is None or min(abs(thing.x - middle), abs(thing.y - middle)) < CLEAR:
        return None
    place = f"{'top' if thing.y < middle else 'bottom'} {'left' if thing.x < middle else 'right'}"
    form = rng.choice(("Where is the {}?", "In which corner is the {}?"))
    return form.format(name), place


def _what(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    """The other one of two things, by how it lies to the one that is named."""
    if len(scene.things) != 2:
        return None
    first, relation, second = relate(scene)
    if rng.random() < 0.5:
        named, other = second, first
    else:
        named, other, relation = first, second, {"above": "below", "to the left of": "to the right of"}[relation]
    names = _names(scene, named)
    return (f"What is {relation} the {_pick(rng, names)}?", describe(other)) if names else None


def _larger(rng: Random, scene: Scene, split: Split) -> tuple[str, str] | None:
    pairs = [pair for pair in combinations(scene.things, 2) if pair[0].size != pair[1].size]
    if not pairs:
        return None
    pair = rng.sample(rng.choice(pairs), 2)
    names = [Phrase.of(thing, ("color", "shape")) for thing in pair]
    if any(name.count(scene) != 1 for name in names):
        return None
    first, second = (name.words("") for name in names)
    form = rng.choice(("Which is larger, the {} or the {}?", "Which is bigger, the {} or the {}?"))
    return form.format(first, second), f"the {first if pair[0].size == 'large' else second}"


_ASK = {
    "count": _count,
    "count_attr": _count_attr,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "exist": _exist,
    "where": _where,
    "what": _what,
    "larger": _larger,
}
QUESTION_KINDS = tuple(_ASK)


def _refer(rng: Random, scene: Scene, hide: str | None = None) -> tuple[Thing | None, str]:
    """A thing, and words that mean it alone without telling its attribute `hide`; None if nothing can be meant."""
    named = [(thing, names) for thing in scene.things if (names := _names(scene, thing, hide))]
    if not named:
        return None, ""
    thing, names = rng.choice(named)
    return thing, _pick(rng, names)


def _names(scene: Scene, thing: Thing, hide: str | None = None) -> list[Phrase]:
    """Phrases that mean this thing alone, short ones first."""
    shown = [name for name in ATTRIBUTES if name != hide]
    phrases = [Phrase.of(thing, chosen) for number in (1, 2, 3) for chosen in combinations(shown, number)]
    return [phrase for phrase in phrases if phrase.count(scene) == 1]


def _pick(rng: Random, names: Sequence[Phrase]) -> str:
    """One of the names, most often a short one."""
    weights = [4.0 ** -sum(getattr(name, x) is not None for x in ATTRIBUTES) for name in names]
    return rng.choices(names, weights)[0].words(rng.choice(NOUNS))


def _phrase(rng: Random, scene: Scene, attributes: Sequence[str], split: Split, *, present: float) -> Phrase | None:
    """Attributes of some thing with chance `present`, else some that no thing has together."""
    if rng.random() < present:
        return Phrase.of(rng.choice(scene.things), attributes)
    return _absent_phrase(rng, scene, attributes, split)


def _absent_phrase(rng: Random, scene: Scene, attributes: Sequence[str], split: Split) -> Phrase | None:
    """Attributes that no thing of the scene has together; None if none were found.

    Each comes from anywhere, or half of the time from some thing of the scene, which is easy to mistake. Training
    denies no pair that is held out: it would learn that there never is one.
    """
    anywhere = {"size": list(SIZES), "color": list(COLORS), "shape": SHAPES}
    here = {name: [getattr(thing, name) for thing in scene.things] for name in attributes}
    for _ in range(20):  # a scene may have both sizes
        values = here if rng.random() < 0.5 else anywhere
        phrase = Phrase(**{name: rng.choice(values[name]) for name in attributes})
        if not phrase.count(scene) and (split != "train" or (phrase.color, phrase.shape) not in HELD_OUT_PAIRS):
            return phrase
    return None


def _choose(rng: Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


# -- few-shot ---------------------------------------------------------------------------------------------------------


def sample_few_shot(rng: Random, split: Split) -> FewShot:
    """Two to four pictures; only the earlier ones tell which attribute of the last one is asked for.

    The last scene is of the split, the earlier ones show nothing that is held out.
    """
    attribute, prompt, number = rng.choice(FEW_SHOT_ATTRIBUTES), rng.choice(FEW_SHOT_PROMPTS), rng.randint(2, 4)
    num_things = None if attribute == "count" else 1
    shown = [sample_scene(rng, "train", num_things) for _ in range(number - 1)]
    scenes = [*shown, sample_scene(rng, split, num_things)]
    answers = [
        NUMBERS[len(scene.things)] if attribute == "count" else getattr(scene.things[0], attribute) for scene in scenes
    ]
    return FewShot(num_things, tuple(scenes), (prompt,) * number, tuple(f" {answer}." for answer in answers))
