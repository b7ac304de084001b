"""What the recipe `smollm2-scenes` reads: drawn scenes as chat messages, texts that keep the language, and its measure.

    data/train.jsonl         pictures with several questions each
    data/held-out.jsonl      one question about each of other scenes
    data/wrong-image.jsonl   the same questions, each about another scene's picture: what can be guessed
    data/words.jsonl         what the language model writes by itself, before it is trained

Example: python -m examples.recipes.smollm2_scenes data data --num 4000 --held-out 600
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from examples.scenes.draw import draw
from examples.scenes.texts import QUESTION_KINDS, Question, ask, ask_about, caption
from examples.scenes.world import Scene, sample_scene, stream
from vlm_cli.errors import VLMError

QUESTIONS = 4  # about each picture of the training records
CAPTIONS = 0.25  # share of the held-out questions that ask for a description
#: How texts begin that the language model writes by itself; each is a token of SmolLM2.
OPENINGS = (
    "The A In I It When How What Why If We You This There He She They For To On At With After Before One Many Some All "
    "As By From No My Our Let Here Once But And An"
)
LENGTH = 240  # tokens that the language model adds to an opening
SHORTEST = 9  # tokens; a shorter text would teach little but its end
ROWS = 128  # texts that it writes at once
WINDOW = 512  # tokens of text that the language model reads at once
WINDOWS = 32


# -- records -----------------------------------------------------------------------------------------------------------


def write_records(out: Path, num_train: int, num_held_out: int, seed: int) -> None:
    """Write the three files of records, and their pictures."""
    (out / "images").mkdir(parents=True)
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for index in range(num_train):
            rng = stream("smollm2", seed, "train", index)
            scene = sample_scene(rng)
            turns = list(islice(_turns(rng, scene), QUESTIONS))
            file.write(json.dumps(_record(_save(out, scene, f"train-{index:05}"), turns)) + "\n")
    with (
        open(out / "held-out.jsonl", "w", encoding="utf-8") as held_out,
        open(out / "wrong-image.jsonl", "w", encoding="utf-8") as wrong,
    ):
        for index in range(num_held_out):
            rng = stream("smollm2", seed, "held-out", index)
            scene, kind, turn = _question(rng)
            other = sample_scene(rng, num_things=len(scene.things))
            for file, shown, name in ((held_out, scene, "held-out"), (wrong, other, "wrong")):
                image = _save(out, shown, f"{name}-{index:05}")
                file.write(json.dumps({**_record(image, [turn]), "kind": kind}) + "\n")


def _turns(rng: Random, scene: Scene) -> Iterator[tuple[str, str]]:
    """Questions about a scene in any order, with a description first or among them."""
    questions = ((question.text, _sentence(question)) for question in ask_about(rng, scene, "train"))
    before = rng.randrange(QUESTIONS)
    yield from islice(questions, before)
    yield "Describe the image.", caption(scene).strip().capitalize()
    yield from questions


def _question(rng: Random) -> tuple[Scene, str, tuple[str, str]]:
    """A scene, and one question about it: all kinds are asked as often, beside descriptions."""
    if rng.random() < CAPTIONS:
        scene = sample_scene(rng)
        return scene, f"describe-{len(scene.things)}", ("Describe the image.", caption(scene).strip().capitalize())
    kind = rng.choice(QUESTION_KINDS)
    while True:
        scene = sample_scene(rng)
        if question := ask(rng, scene, kind, "train"):
            return scene, kind, (question.text, _sentence(question))


def _sentence(question: Question) -> str:
    return question.answer.strip().capitalize()


def _save(out: Path, scene: Scene, name: str) -> str:
    draw(scene).save(out / "images" / f"{name}.png", compress_level=1)
    return f"images/{name}.png"


def _record(image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Write turns as messages. The picture stands in the first one."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        parts: list[dict[str, str]] = [] if messages else [{"type": "image"}]
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return {"messages": messages, "images": [image]}


# -- the language model's own words ------------------------------------------------------------------------------------


def write_words(name: str, out: Path, number: int, seed: int) -> None:
    """Let a language model write texts: samples of the distribution that training shall not change."""
    import torch

    import vlm_cli
    from vlm_cli.prompt import escape
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    model, processor = vlm_cli.load(name)
    tokenizer = processor.tokenizer
    words, ends = OPENINGS.split(), sorted(tokenizer.all_special_ids)
    torch.manual_seed(seed)
    lines = []
    for start in range(0, number, ROWS):
        openings = [words[i % len(words)] for i in range(start, min(start + ROWS, number))]
        ids = torch.tensor([[tokenizer.encode(word, add_special_tokens=False)[0]] for word in openings])
        written = model.lang_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        for row in written.tolist():
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            if length < SHORTEST:
                continue
            lines.append(json.dumps({"text": escape(tokenizer.decode(row[:length]))}) + "\n")
    out.write_text("".join(lines), encoding="utf-8")


# -- adapters ----------------------------------------------------------------------------------------------------------


def scale_adapters(name: Path, out: Path, factor: float) -> None:
    """Write a model again whose adapters count less: between the language model before training and after it.

    Weights between both keep most of what both can (WiSE-FT, arXiv:2109.01903).

    Raises:
        CheckpointError: if the model has no adapter, or OUT exists.
    """
    from vlm_cli.errors import CheckpointError
    from vlm_cli.manifest import sign

    configs = sorted(name.glob("adapters/*/adapter_config.json"))
    if not configs:
        raise CheckpointError(f"{str(name)!r} has no adapter.")
    if out.exists():
        raise CheckpointError(f"{str(out)!r} exists. Choose another name.")
    shutil.copytree(name, out)
    for path in configs:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["lora_alpha"] *= factor
        (out / path.relative_to(name)).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    sign(out)


# -- perplexity --------------------------------------------------------------------------------------------------------


def perplexity(name: str) -> float:
    """Return the perplexity of a model, without a picture, on the first topics of Python's documentation."""
    import pydoc_data.topics

    import torch

    import vlm_cli
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    model, processor = vlm_cli.load(name)
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    ids = processor.tokenizer(text[: WINDOW * WINDOWS * 8], return_tensors="pt").input_ids[0]
    windows = ids[: WINDOW * WINDOWS].unflatten(0, (WINDOWS, WINDOW))
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(lang_x=window[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    return math.exp(total / WINDOWS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the recipe smollm2-scenes reads, and measure a text.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="Write records.")
    data.add_argument("out", type=Path, metavar="OUT", help="Directory to write.")
    data.add_argument("--num", type=int, default=4000, help="Training records.")
    data.add_argument("--held-out", type=int, default=600, help="Held-out records.")
    data.add_argument("--seed", type=int, default=0, help="Other numbers give other scenes.")
    words = commands.add_parser("words", help="Write what the language model of MODEL writes by itself.")
    words.add_argument("model", metavar="MODEL", help="Directory of a model.")
    words.add_argument("out", type=Path, metavar="FILE", help="JSON lines to write.")
    words.add_argument("--num", type=int, default=128, help="Texts.")
    words.add_argument("--seed", type=int, default=5, help="Other numbers give other texts.")
    scale = commands.add_parser("scale", help="Write MODEL again with adapters that count less.")
    scale.add_argument("model", type=Path, metavar="MODEL", help="Directory of a model with adapters.")
    scale.add_argument("out", type=Path, metavar="OUT", help="Directory to write.")
    scale.add_argument("--by", type=float, default=0.6, help="Factor.")
    measure = commands.add_parser("perplexity", help="Measure the perplexity of Python's documentation.")
    measure.add_argument("model", metavar="MODEL", help="Directory of a model.")
    args = parser.parse_args()
    try:
        if args.command == "data":
            write_records(args.out, args.num, args.held_out, args.seed)
        elif args.command == "words":
            write_words(args.model, args.out, args.num, args.seed)
        elif args.command == "scale":
            scale_adapters(args.model, args.out, args.by)
        else:
            print(f"{perplexity(args.model):.3f}")
    except (VLMError, OSError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
