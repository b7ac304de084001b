"""Train the vision encoder: each patch learns to say what it shows.

An OpenCLIP `VisionTransformer` of our own small size reads fresh scenes of the training split; a linear head, thrown
away at the end, reads shape, colour, size and place of the thing in each patch. The labels are what the generator
knows: this is not contrastive training, and the encoder knows no text. It is written as a folder that `vlm` takes as
`local-dir:OUT`.

Example: python -m examples.scenes.vision OUT --minutes 10

B batch, v patches, d channels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.scenes.draw import IGNORE, PATCH, PatchLabels, coverage, label_patches, paint
from examples.scenes.world import (
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZE_OF_PICTURE,
    SIZES,
    Scene,
    Split,
    Thing,
    sample_scene,
    stream,
)
from vlm_cli.modeling.towers import build_tower, patch_features

__all__ = ["CONFIG", "Training", "evaluate", "save", "train"]

#: OpenCLIP's `open_clip_config.json`. The text tower is never built; OpenCLIP wants to see one.
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": SIZE_OF_PICTURE,
            "patch_size": PATCH,
            "width": 128,
            "layers": 4,
            "head_width": 32,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
UNNAMED = "unnamed"  # colour of a thing that is not of the palette; its label is left out


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the encoder learns."""

    batch_size: int = 48  # scenes
    learning_rate: float = 3e-3  # of Muon, for matrices; falls linearly to zero
    learning_rate_vectors: float = 1.5e-3  # of AdamW, for the rest
    weight_decay: float = 0.05  # of matrices
    warmup: int = 50  # steps
    clip: float = 1.0  # norm of the gradient
    recolored: float = 0.4  # share of things in a colour off the palette, so that shapes do not depend on it
    shape_weight: float = 1.5  # of the loss of shapes, which are learned last; that of all else is 1


@dataclass(frozen=True)
class Batch:
    """Scenes as tensors: float[B, 3, H, W], and `PatchLabels` with B in front."""

    pixels: Tensor
    labels: dict[str, Tensor]


class PatchHead(nn.Module):
    """What a patch's features say about it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        classes = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES)}
        self.sizes = classes | {"thing": 1, "offset": 2, "centre": 2}
        self.proj = nn.Linear(dim, sum(self.sizes.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """float[B, v, d] -> float[B, v, …] by name."""
        parts = self.proj(features).float().split(list(self.sizes.values()), dim=-1)
        return dict(zip(self.sizes, parts, strict=True))


# -- data -------------------------------------------------------------------------------------------------------------


def make_batch(rng: Random, size: int, *, split: Split = "train", recolored: float = 0.0) -> Batch:
    """Draw scenes; a share of their things is recoloured."""
    scenes = [_recolor(rng, sample_scene(rng, split), recolored) for _ in range(size)]
    covered = [coverage(scene) for scene in scenes]
    pixels = torch.stack([torch.from_numpy(paint(*x)) for x in zip(scenes, covered, strict=True)])  # [B, H, W, 3]
    labels = [asdict(label_patches(*x)) for x in zip(scenes, covered, strict=True)]
    return Batch(
        normalize(pixels),
        {name: torch.stack([torch.from_numpy(x[name]) for x in labels]) for name in PatchLabels.__dataclass_fields__},
    )


def normalize(pixels: Tensor) -> Tensor:
    """uint8[B, H, W, 3] -> float[B, 3, H, W], as the processor of the finished model does it."""
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][x]).view(3, 1, 1) for x in ("mean", "std"))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


def _recolor(rng: Random, scene: Scene, share: float) -> Scene:
    return replace(scene, things=tuple(_off_palette(rng, x) if rng.random() < share else x for x in scene.things))


def _off_palette(rng: Random, thing: Thing) -> Thing:
    """The thing in any colour but one that looks like a pair that is held out."""
    while True:
        rgb = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        nearest = min(COLORS, key=lambda name: math.dist(rgb, COLORS[name]))
        if (nearest, thing.shape) not in HELD_OUT_PAIRS:
            return replace(thing, color=UNNAMED, rgb=rgb)


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    training: Training,
    *,
    seed: int = 0,
    steps: int | None = None,
    minutes: float | None = None,
    bf16: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> tuple[nn.Module, PatchHead]:
    """Train an encoder; return it and its head, which nobody needs later.

    Args:
        training: how it learns.
        seed: of the scenes and the first weights.
        steps: how many; None goes by `minutes`.
        minutes: processor time of each thread; the same seed then gives other weights on another machine.
        bf16: multiply matrices in bfloat16.
        report: is told the losses and accuracies of each 100 steps, measured on scenes before they are learned.
    """
    torch.manual_seed(seed)
    tower = build_tower(CONFIG["model_cfg"]).train()
    head = PatchHead(CONFIG["model_cfg"]["vision_cfg"]["width"])
    optimizers = make_optimizers([tower, head], training)
    clock, window, step, progress = _Clock(steps, minutes), [], 0, 0.0
    while progress < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1, (step + 1) / training.warmup) * (1 - progress)
        batch = make_batch(stream("vision", seed, step), training.batch_size, recolored=training.recolored)
        window.append(train_step(tower, head, optimizers, batch, training, bf16=bf16))
        step += 1
        progress = clock.progress(step)
        if step % 100 == 0 or progress >= 1:
            means = {name: round(sum(x[name] for x in window) / len(window), 4) for name in window[0]}
            report({"step": step, "minutes": round(clock.minutes(), 2), **means})
            window.clear()
    return tower.eval(), head


def make_optimizers(modules: Sequence[nn.Module], training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside (https://kellerjordan.github.io/posts/muon/), AdamW for the rest."""
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    # What maps pixels in and answers out has rows with a meaning of their own, which Muon would mix.
    inside = {name for name, p in named if p.ndim == 2 and "embedding" not in name and not name.startswith("proj")}
    matrices = [p for name, p in named if name in inside]
    others = [p for name, p in named if name not in inside]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=training.learning_rate, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=training.learning_rate_vectors, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def train_step(
    tower: nn.Module,
    head: PatchHead,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    training: Training,
    *,
    bf16: bool,
) -> dict[str, float]:
    """One step; its loss and accuracies."""
    with _bf16() if bf16 else nullcontext():
        answers = head(patch_features(tower, batch.pixels))
        losses = patch_losses(answers, batch.labels)
        loss = sum(losses.values()) + (training.shape_weight - 1) * losses["shape"]
        loss.backward()
    parameters = [p for x in (tower, head) for p in x.parameters()]
    nn.utils.clip_grad_norm_(parameters, training.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss.item(), **accuracies(answers, batch.labels)}


@contextmanager
def _bf16() -> Iterator[None]:
    """Matrices in bfloat16. Torch's fused attention would take most of the time: 0.28 s a step against 0.21 s."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def patch_losses(answers: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean loss of each answer, where it has a label."""
    thing = labels["thing"]
    losses = {
        name: F.cross_entropy(answers[name].flatten(0, 1), labels[name].flatten(), ignore_index=IGNORE)
        for name in ("shape", "color", "size")
    }
    losses["thing"] = F.binary_cross_entropy_with_logits(answers["thing"][..., 0], thing.float())
    for name in ("offset", "centre"):
        losses[name] = F.smooth_l1_loss(answers[name][thing], labels[name][thing])
    return losses


@torch.no_grad()
def accuracies(answers: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of right patches among those with a label; pixels from the thing's centre, on average."""
    found = {}
    for name in ("shape", "color", "size"):
        there = labels[name] != IGNORE
        found[name] = (answers[name].argmax(-1) == labels[name])[there].float().mean().item()
    found["thing"] = ((answers["thing"][..., 0] > 0) == labels["thing"]).float().mean().item()
    error = (answers["centre"] - labels["centre"])[labels["thing"]]
    found["centre_px"] = 12 * error.norm(dim=-1).mean().item()
    return found


@dataclass
class _Clock:
    """How far training is, by steps or by processor time of each thread."""

    steps: int | None
    limit: float | None

    def __post_init__(self) -> None:
        self.start = time.process_time()

    def minutes(self) -> float:
        return (time.process_time() - self.start) / 60 / torch.get_num_threads()

    def progress(self, step: int) -> float:
        return step / self.steps if self.steps else self.minutes() / (self.limit or math.inf)


# -- what it has learned ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(tower: nn.Module, head: PatchHead, *, split: Split, num: int = 480, seed: int = 0) -> dict[str, float]:
    """Accuracies on `num` new scenes of a split."""
    batch = make_batch(stream("vision-evaluation", split, seed), num, split=split)
    answers = [head(patch_features(tower, pixels)) for pixels in batch.pixels.split(48)]
    joined = {name: torch.cat([x[name] for x in answers]) for name in answers[0]}
    return {name: round(x, 4) for name, x in accuracies(joined, batch.labels).items()}


def save(tower: nn.Module, out: Path) -> None:
    """Write an OpenCLIP folder, for `--vision-encoder local-dir:OUT`."""
    out.mkdir(parents=True, exist_ok=True)
    state = {f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def run(out: Path, *, seed: int, steps: int | None, minutes: float | None, bf16: bool) -> dict[str, Any]:
    """Train, write `out` with a log of metrics, and return the accuracies of both splits."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log:

        def report(line: dict[str, Any]) -> None:
            text = json.dumps(line)
            print(text, file=log, flush=True)
            print(text, file=sys.stderr, flush=True)

        tower, head = train(Training(), seed=seed, steps=steps, minutes=minutes, bf16=bf16, report=report)
        save(tower, out)
        splits: tuple[Split, ...] = ("train", "held-out")
        result: dict[str, Any] = {split: evaluate(tower, head, split=split) for split in splits}
        report({"evaluation": result})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.vision", description="Train the vision encoder.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to write.")
    parser.add_argument("--minutes", type=float, default=10, help="Processor time of each thread.")
    parser.add_argument("--steps", type=int, help="Instead of --minutes: the same seed then gives the same weights.")
    parser.add_argument("--seed", type=int, default=0, help="Of the scenes and the first weights.")
    parser.add_argument("--threads", type=int, help="Threads of torch; default: its own choice.")
    parser.add_argument("--bf16", action="store_true", help="Multiply matrices in bfloat16.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run(args.out, seed=args.seed, steps=args.steps, minutes=args.minutes, bf16=args.bf16)
    print(f"Wrote {args.out}. Next: vlm build OUT --vision-encoder local-dir:{args.out} …", file=sys.stderr)


if __name__ == "__main__":
    main()
