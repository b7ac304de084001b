"""Show what tiles are for: the demo learns pictures of 128 pixels, in one view of 64 pixels and in four tiles of 64.

    128 x 128          one view, 64 x 64     four tiles and the whole picture, 64 x 64 each
    ┌────┬────┐        ┌──┐                  ┌────┐ ┌────┐ ┌────┐ ┌────┐ ┌──┐
    │ ★  │  ■ │   →    │★■│           or     │ ★  │ │  ■ │ │●   │ │   ✚│ │★■│
    ├────┼────┤        │●✚│                  └────┘ └────┘ └────┘ └────┘ │●✚│
    │●   │   ✚│        └──┘                                              └──┘
    └────┴────┘

Each quarter is a scene of one thing, and the question names its colour. A small thing is about 6 pixels across in the
one view. Both models begin with the demo's weights, learn the same records for as many steps, and answer the same
questions.

    OUT/data/, OUT/questions/     pictures and records
    OUT/start/view, …/tiles       the demo with each tiling
    OUT/view, OUT/tiles           what `vlm train` wrote

Example: python -m examples.scenes.tiles OUT --max-steps 1500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

from PIL import Image

from examples.scenes.draw import draw
from examples.scenes.train import Workshop
from examples.scenes.world import SIZE_OF_PICTURE, Scene, sample_scene, stream
from vlm_cli.composition import read_tiling
from vlm_cli.manifest import sign
from vlm_cli.models import DEMO

__all__ = ["TILINGS", "compare", "make_record"]

#: Model -> its tiling.
TILINGS = {"view": {"type": "none"}, "tiles": {"type": "grid", "min_tiles": 4, "max_tiles": 4}}


def make_record(rng: Random) -> tuple[Image.Image, dict[str, str]]:
    """Draw a picture of four things of different colours, and ask about one of them."""
    scenes: list[Scene] = []
    while len(scenes) < 4:
        scene = sample_scene(rng, num_things=1)
        if scene.things[0].color not in {x.things[0].color for x in scenes}:
            scenes.append(scene)
    picture = Image.new("RGB", (2 * SIZE_OF_PICTURE,) * 2)
    for i, scene in enumerate(scenes):
        picture.paste(draw(scene), (i % 2 * SIZE_OF_PICTURE, i // 2 * SIZE_OF_PICTURE))
    asked = rng.choice(scenes).things[0]
    question = f"Q: What shape is the {asked.color} thing? A:"
    return picture, {"kind": f"{asked.size} shapes", "prompt": f"<image>{question}", "completion": f" {asked.shape}."}


def write_records(folder: Path, num: int, *names: object) -> None:
    """Write pictures, and records that `vlm train` and `vlm eval` read."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for i in range(num):
            picture, record = make_record(stream("tiles", *names, i))
            picture.save(folder / "images" / f"{i:05}.png")
            file.write(json.dumps({"id": str(i), "images": [f"images/{i:05}.png"], **record}) + "\n")


def copy_demo(folder: Path, tiling: dict[str, Any]) -> None:
    """Copy the model that ships, with another tiling."""
    copytree(DEMO, folder)
    settings = read_tiling(tiling).to_dict()
    for file, owner in (("config.json", "composition"), ("processor_config.json", "image_processor")):
        data = json.loads((folder / file).read_text(encoding="utf-8"))
        data.get(owner, data)["tiling"] = settings
        (folder / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sign(folder)


def compare(
    folder: Path, *, max_steps: int, num_train: int, num_questions: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train and question both models.

    Returns:
        Model -> kind of question -> share of exact answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop(folder.resolve(), None)
    for name, num in (("data", num_train), ("questions", num_questions)):
        if not shop.has(name):
            write_records(shop.folder / name, num, name, seed)
    (shop.folder / "start").mkdir(exist_ok=True)
    found = {}
    for name, tiling in TILINGS.items():
        start = f"start/{name}"
        if not shop.has(start):
            copy_demo(shop.folder / start, tiling)
        if not shop.has(name):
            flags = ("--max-steps", max_steps, "--batch-size", 24, "--learning-rate", "1e-3", "--seed", seed)
            shop.run("vlm_cli", "train", start, "--data", "data/data.jsonl", "--output", name, *flags, "--quiet")
        answers = json.loads(shop.run("vlm_cli", "eval", name, "--data", "questions/data.jsonl", "--json", "--quiet"))
        found[name] = {kind["kind"]: kind["scores"]["exact"]["value"] for kind in answers["kinds"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.tiles", description="Compare tiles with one view.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to work in; give it again to go on.")
    parser.add_argument("--max-steps", type=int, default=1500, help="Of training, for each model.")
    parser.add_argument("--num-train", type=int, default=12_000, help="Records to learn.")
    parser.add_argument("--num-questions", type=int, default=600, help="Records to be asked.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything.")
    args = parser.parse_args()
    sizes = {"num_train": args.num_train, "num_questions": args.num_questions}
    for name, kinds in compare(args.out, max_steps=args.max_steps, seed=args.seed, **sizes).items():
        print(f"{name:6}", ", ".join(f"{kind}: {share:.1%}" for kind, share in sorted(kinds.items())))


if __name__ == "__main__":
    main()
