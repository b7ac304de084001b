"""Does the heat map of a word lie on the thing that the word speaks of?

Traces a model's captions of held-out scenes. Where the answer names a thing of the scene in full ("a small red heart"),
the peak of the colour's map and that of the shape's map should lie on that thing. A cell lies on a thing if the thing
covers enough of it to be seen in it, as in the labels by which the vision encoder learned (`draw.COVERED`).

Example: python -m examples.scenes.trace --scenes 200
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.scenes.draw import COVERED, coverage, paint
from examples.scenes.world import COLORS, SHAPES, SIZE_OF_PICTURE, SIZES, Scene, Thing, sample_scene, stream
from vlm_cli.evaluation.intervals import draw_sums, percentile_interval
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import LoadedImage
from vlm_cli.prompt import Medium, Text
from vlm_cli.tracing.run import TraceOptions, trace_prompt
from vlm_cli.tracing.trace import MEASURES, Measure, Trace

__all__ = ["Share", "find_things", "judge", "lies_on", "measure_scenes"]

PROMPT = "Describe the image."
MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Share:
    """How often a peak lies on the thing that the word speaks of.

    Attributes:
        measure: "attention" or "occlusion".
        kind: "colour" or "shape", or "both".
        right: words whose peak does.
        words: all words that were judged.
        interval: between which values the share lies, with a confidence of 95 %; scenes are drawn anew (bootstrap).
        chance: the share that a peak anywhere in the picture would have.
    """

    measure: Measure
    kind: str
    right: int
    words: int
    interval: tuple[float, float]
    chance: float


@dataclass(frozen=True)
class _Judged:
    """One word: what it tells, whether each measure's peak lies on its thing, and the share of cells that do."""

    kind: str
    right: dict[Measure, bool]
    chance: float


def find_things(words: Sequence[str], scene: Scene) -> Iterator[tuple[int, Thing]]:
    """Yield the place of a colour among an answer's words, with a shape behind it, and the thing that both speak of.

    Things that the scene does not show, and those that it shows twice, are left out.
    """
    for i in range(1, len(words) - 1):
        size, color, shape = words[i - 1 : i + 2]
        if size in SIZES and color in COLORS and shape in SHAPES:
            meant = [x for x in scene.things if (x.size, x.color, x.shape) == (size, color, shape)]
            if len(meant) == 1:
                yield i, meant[0]


def lies_on(covered: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Say which cells lie on a thing, from its share of each pixel: float[H, W] -> bool[rows, columns]."""
    height, width = covered.shape
    bands = np.add.reduceat(covered, np.arange(rows) * height // rows, axis=0)
    cells = np.add.reduceat(bands, np.arange(columns) * width // columns, axis=1)
    return cells * rows * columns / (height * width) >= COVERED


def judge(found: Trace, scene: Scene) -> list[_Judged]:
    """Judge the words of one answer that name the colour or the shape of a thing in the scene."""
    shares = coverage(scene)
    judged = []
    for place, thing in find_things([word.text.strip() for word in found.words], scene):
        covered = shares[scene.things.index(thing)]
        for word, kind in ((place, "colour"), (place + 1, "shape")):
            right, chance = {}, 0.0
            for measure in found.measures:
                heat = found.map(word, 0, measure)
                assert heat is not None
                on_thing = lies_on(covered, heat.rows, heat.columns)
                right[measure] = bool(on_thing[heat.peak])
                chance = float(on_thing.mean())
            judged.append(_Judged(kind, right, chance))
    return judged


def measure_scenes(plan: GenerationPlan, num_scenes: int, seed: int = 0, cells: int = 8) -> list[list[_Judged]]:
    """Trace the captions of held-out scenes; return the judged words of each."""
    results = []
    for number in range(num_scenes):
        scene = sample_scene(stream("trace", seed, number), "held-out")
        picture = LoadedImage(Image.fromarray(paint(scene)), "scene.png", SIZE_OF_PICTURE, SIZE_OF_PICTURE)
        parts = [Medium("scene.png", "image"), Text(PROMPT)]
        results.append(judge(trace_prompt(plan, parts, [picture], TraceOptions(cells=cells)), scene))
        if (number + 1) % 20 == 0:
            print(f"{number + 1} of {num_scenes} scenes", file=sys.stderr)
    return results


def summarise(results: Sequence[Sequence[_Judged]]) -> list[Share]:
    """Count how often the peaks lie on the things."""
    shares = []
    for measure in MEASURES:
        for kind in ("colour", "shape", "both"):
            counts = np.array(
                [
                    [sum(x.right[measure] for x in own), len(own)]
                    for own in ([x for x in scene if kind in (x.kind, "both")] for scene in results)
                ],
                float,
            )
            (drawn,) = draw_sums(counts)
            right, words = counts.sum(0)
            interval = percentile_interval(drawn[:, 0] / drawn[:, 1])
            chance = float(np.mean([x.chance for scene in results for x in scene]))
            shares.append(Share(measure, kind, int(right), int(words), interval, chance))
    return shares


def load_plan(name: str) -> GenerationPlan:
    """Load a model, in float32 on the CPU."""
    from vlm_cli.checkpoint.directory import load
    from vlm_cli.models import resolve_built_model

    model, processor = load(resolve_built_model(name, None), dtype="float32", device="cpu")
    return GenerationPlan(model, processor, {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.trace", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="Model that learned the scenes.")
    parser.add_argument("--scenes", type=int, default=200, help="Held-out scenes to describe.")
    parser.add_argument("--seed", type=int, default=0, help="Other numbers give other scenes.")
    parser.add_argument("--grid", type=int, default=8, help="Cells along a side of a map of occlusion.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    args = parser.parse_args(arguments)
    if args.scenes < 1 or args.grid < 1:
        parser.error("--scenes and --grid must be at least 1.")
    start = time.perf_counter()
    results = measure_scenes(load_plan(args.model), args.scenes, args.seed, args.grid)
    if not any(results):
        parser.exit(1, "The model named no thing of these scenes in full, so there is nothing to judge.\n")
    shares = summarise(results)
    if args.json:
        print(json.dumps([vars(share) for share in shares]))
        return
    print("| measure | word | peak on the thing | of | 95 % interval | chance |\n|---|---|--:|--:|---|--:|")
    for x in shares:
        low, high = x.interval
        share = f"{x.right / x.words:.1%}"
        print(f"| {x.measure} | {x.kind} | {share} | {x.words} | {low:.1%} to {high:.1%} | {x.chance:.1%} |")
    print(f"{args.scenes} scenes in {time.perf_counter() - start:.0f} s.", file=sys.stderr)


if __name__ == "__main__":
    main()
