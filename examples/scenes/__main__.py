"""Draw scenes and write what `vlm train` and `vlm eval` read.

Example: python -m examples.scenes data --split train --num 1000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from examples.scenes.write import Form, Series, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.scenes", description="Draw scenes and write records.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to write: data.jsonl and images/.")
    parser.add_argument("--split", choices=("train", "held-out"), default="train", help="What the scenes may show.")
    parser.add_argument("--num", type=int, default=1000, help="Records to write.")
    parser.add_argument("--seed", type=int, default=0, help="Other numbers give other scenes.")
    parser.add_argument("--form", choices=("turns", "single"), help="Default: turns for train, single for held-out.")
    parser.add_argument("--wrong-image", action="store_true", help="Ask about another scene's picture (single).")
    parser.add_argument("--workers", type=int, default=1, help="Processes that draw.")
    args = parser.parse_args()
    form: Form = args.form or ("turns" if args.split == "train" else "single")
    if args.num < 1 or args.workers < 1:
        parser.error("--num and --workers must be at least 1.")
    if args.wrong_image and form != "single":
        parser.error("--wrong-image asks single questions: add --form single.")
    if (args.out / "data.jsonl").exists():
        parser.error(f"{str(args.out / 'data.jsonl')!r} exists. Choose another directory, or delete it.")
    start = time.perf_counter()
    series = Series(split=args.split, seed=args.seed, form=form, wrong_image=args.wrong_image)
    path = write(args.out, series, args.num, workers=args.workers)
    print(f"{args.num} records in {time.perf_counter() - start:.1f} s.", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    main()
