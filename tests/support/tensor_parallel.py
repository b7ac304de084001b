"""Compare a model whose layers several processes share with the whole model; `torchrun` starts this module.

Example: torchrun --nproc-per-node 2 -m tests.support.tensor_parallel FOLDER
"""

from __future__ import annotations

import json
import os
import sys

import torch
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import vlm_cli
from tests.support import seed_torch, tiny


def main(folder: str) -> None:
    """Print a line of JSON from the first process."""
    torch.set_num_threads(1)
    whole, processor = vlm_cli.load(folder)
    seed_torch(0)
    photo = Image.effect_noise((32, 40), 80).convert("RGB")
    batch = processor(text="The <image> cat", images=[[photo]])
    split, _ = vlm_cli.load(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    new = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected, found = whole(**batch).logits, split(**batch).logits
        answers = [model.generate(**batch, **new).tolist() for model in (whole, split)]
        with tiny.nudged(whole.lang_model.model.norm.weight):
            other = whole(**batch).logits
    shared = {name: p.to_local().shape for name, p in split.named_parameters() if isinstance(p, DTensor)}
    result = {
        "error": (found - expected).abs().max().item(),
        "twin": (other - expected).abs().max().item(),
        "answers": answers,
        "shared": {name: list(shape) for name, shape in shared.items()},
        "whole": {name: list(p.shape) for name, p in whole.named_parameters()},
    }
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
