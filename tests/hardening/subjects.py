"""The files that the attack damages, and the commands that read them."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples import tiny_language_model
from tests.hardening import interrupting, mutate
from tests.hardening.attempt import Attempt
from tests.hardening.mutate import PLANTED_CODE, Mutation
from tests.support import llava
from tests.support.clips import write_animation, write_video
from tests.support.disk import run
from tests.support.gguf_file import write_gguf

__all__ = ["KINDS", "SLOW_KINDS", "Workshop", "attempts", "make"]

ANSWER = ["--max-new-tokens", "4", "--temperature", "0"]


@dataclass(frozen=True)
class Workshop:
    """Whole files: `lm`, `lm.gguf`, `tower`, `model` (a VLM of both), `delta`, `images` and records."""

    folder: Path

    @property
    def compose(self) -> list[str]:
        """Flags of `vlm build` for a small model of the parts."""
        return ["--family", "llava", "--vision-encoder", f"local-dir:{self.folder / 'tower'}"]

    @property
    def language_model(self) -> list[str]:
        return ["--language-model", str(self.folder / "lm")]


def make(folder: Path) -> Workshop:
    """Make all files that the attack damages."""
    from tests.support.disk import tower

    shop = Workshop(folder)
    tiny_language_model.make(folder / "lm")
    weights = load_file(folder / "lm/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, x in weights.items():  # large weights, so that each layer and each image matters
        if x.ndim == 2:
            weights[name] = torch.randn(x.shape, generator=generator) * (1.0 if "embed" in name else 0.2)
    save_file(weights, folder / "lm/model.safetensors", metadata={"format": "pt"})
    write_gguf(folder / "lm", folder / "lm.gguf")
    shutil.copytree(folder / "lm", folder / "lm-bin")
    (folder / "lm-bin/model.safetensors").unlink()
    torch.save(weights, folder / "lm-bin/pytorch_model.bin")
    tower(folder / "tower")
    for out, flags in (("model", []), ("delta", ["--delta"])):
        result = run("build", folder / out, *shop.compose, *shop.language_model, "--quiet", *flags)
        assert result.exit_code == 0, result.output
    clips = folder / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(write_video(12))
    (clips / "a.webm").write_bytes(write_video(12, format="webm", codec="libvpx-vp9"))
    (clips / "a.avi").write_bytes(write_video(12, format="avi"))
    (clips / "a.gif").write_bytes(write_animation(12, "GIF"))
    images = folder / "images"
    images.mkdir()
    picture = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3 * 40 * 30))
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        picture.save(images / f"a.{kind}")
    (folder / "composition.json").write_text(
        json.dumps(
            {
                "family": "llava",
                "vision_encoder": {"name": f"local-dir:{folder / 'tower'}", "layer": -1},
                "vision_tokenizer": {"type": "perceiver", "depth": 1, "num_heads": 2, "head_dim": 8, "num_latents": 4},
                "fusion": {"type": "language-stream"},
                "language_model": {"name": str(folder / "lm")},
                "added_tokens": ["<image>"],
                "trainable": ["vision_tokenizer", "added_tokens"],
                "weight_decay": 0.1,
            }
        )
    )
    rows = [{"prompt": "<image:images/a.png>What?", "completion": " A.", "kind": "x", "id": i} for i in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The libraries prepare much at the first answer. The forks in which the cases run share what they prepare here.
    assert run(*_answer(folder / "model", shop)[0]).exit_code == 0
    return shop


# -- kinds of file -----------------------------------------------------------------------------------------------------

Make = Callable[[Workshop, random.Random | None, Path], tuple[Mutation, list[list[str]], Path | None]]


def _damaged(rng: random.Random | None, how: Callable[[random.Random, bytes], Mutation], data: bytes) -> Mutation:
    """The bytes that `how` makes of the data, or the data itself where `rng` is None."""
    return Mutation("whole", data) if rng is None else how(rng, data)


def _copy(source: Path, folder: Path, name: str) -> Path:
    """A copy of a directory in which only the file `name` has bytes of its own; the others are links."""
    copied = folder / source.name
    copied.mkdir()
    for file in source.iterdir():
        if file.name != name:
            (copied / file.name).hardlink_to(file)
    return copied


def _answer(model: Path, shop: Workshop) -> list[list[str]]:
    return [["generate", "-m", str(model), "<image>What?", "-i", str(shop.folder / "images/a.png"), *ANSWER]]


def _clip(shop: Workshop, rng: random.Random | None, folder: Path) -> tuple[Mutation, list[list[str]], Path | None]:
    kind = "mp4" if rng is None else rng.choice(["mp4", "webm", "avi", "gif"])
    found = _damaged(rng, mutate.clip, (shop.folder / f"clips/a.{kind}").read_bytes())
    path = folder / f"hostile.{kind}"
    path.write_bytes(found.data)
    if kind != "mp4" and not found.another_answer:  # the whole file of another kind has other pixels
        found = replace(found, another_answer="the codec is another")
    words = ["generate", "-m", str(shop.folder / "model"), "<video>What?", "--video", str(path), *ANSWER]
    return found, [words], None


def _image(shop: Workshop, rng: random.Random | None, folder: Path) -> tuple[Mutation, list[list[str]], Path | None]:
    kind = "png" if rng is None else rng.choice(["png", "png", "jpg", "jpg", "gif", "webp", "bmp", "tiff"])
    data = (shop.folder / f"images/a.{kind}").read_bytes()
    found = _damaged(rng, mutate.image, data)
    path = folder / f"a.{kind}"
    path.write_bytes(found.data)
    if kind == "jpg" and found.data in (data[:-1], data[:-2]):
        # All pixels are there, and they are not quite those of the PNG, which the whole files show.
        found = replace(found, another_answer="the picture lacks nothing but its end marker")
    words = ["generate", "-m", str(shop.folder / "model"), "<image>What?", "-i", str(path), *ANSWER]
    return Mutation(f"{kind}: {found.how}", found.data, found.another_answer), [words], None


def _composition(
    shop: Workshop, rng: random.Random | None, folder: Path
) -> tuple[Mutation, list[list[str]], Path | None]:
    data = (shop.folder / "composition.json").read_bytes()
    is_json = rng is not None and rng.random() < 0.4
    path = folder / ("c.json" if is_json else "c.yaml")
    found = _damaged(rng, mutate.json_file if is_json else mutate.yaml_file, data)
    path.write_bytes(found.data)
    words = ["build", str(folder / "out"), "--config", str(path), "--dry-run"]
    return Mutation(found.how, found.data, "the composition is another one"), [words], None


def _weights(shop: Workshop, rng: random.Random | None, folder: Path) -> tuple[Mutation, list[list[str]], Path | None]:
    model = _copy(shop.folder / "model", folder, "model.safetensors")
    found = _damaged(rng, mutate.safetensors, (shop.folder / "model/model.safetensors").read_bytes())
    (model / "model.safetensors").write_bytes(found.data)
    return found, _answer(model, shop), None


def _language_model_file(source: str, name: str, how: Callable[[random.Random, bytes], Mutation]) -> Make:
    """A file of a language model, which `vlm build` reads; the model that it writes is the answer."""

    def make_attempt(
        shop: Workshop, rng: random.Random | None, folder: Path
    ) -> tuple[Mutation, list[list[str]], Path | None]:
        original = shop.folder / source
        found = _damaged(rng, how, (original / name if original.is_dir() else original).read_bytes())
        if original.is_dir():
            copied = _copy(original, folder, name)
            (copied / name).write_bytes(found.data)
            _plant(copied, found)
        else:
            copied = folder / original.name
            copied.write_bytes(found.data)
        words = [*shop.compose, "--language-model", str(copied), "--quiet"]
        return found, [["build", str(folder / "out"), *words], *_answer(folder / "out", shop)], None

    return make_attempt


def _directory_file(source: str, command: str = "generate") -> Make:
    """One of the small files of a VLM's directory."""

    def make_attempt(
        shop: Workshop, rng: random.Random | None, folder: Path
    ) -> tuple[Mutation, list[list[str]], Path | None]:
        names = sorted(file.name for file in (shop.folder / source).glob("*.json"))
        name = "config.json" if rng is None else rng.choice([*names, "config.json", "index"])
        if name == "index":
            return _index(shop, rng, folder, source)
        model = _copy(shop.folder / source, folder, name)
        found = _damaged(rng, mutate.json_file, (shop.folder / source / name).read_bytes())
        (model / name).write_bytes(found.data)
        _plant(model, found)
        return Mutation(f"{name}: {found.how}", found.data, found.another_answer), _answer(model, shop), None

    return make_attempt


def _index(
    shop: Workshop, rng: random.Random | None, folder: Path, source: str
) -> tuple[Mutation, list[list[str]], Path | None]:
    """A directory whose weights have an index of shards that names other files."""
    weights = next((shop.folder / source).glob("*.safetensors")).name
    model = _copy(shop.folder / source, folder, weights)
    shard = weights.replace(".safetensors", "-00001-of-00001.safetensors")
    (model / shard).hardlink_to(shop.folder / source / weights)
    tensors = load_file(model / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for name in tensors}}
    found = _damaged(rng, mutate.json_file, json.dumps(index).encode())
    (model / f"{weights}.index.json").write_bytes(found.data)
    return Mutation(f"index: {found.how}", found.data, found.another_answer), _answer(model, shop), None


def _plant(folder: Path, found: Mutation) -> None:
    """Code that a directory's `auto_map` names."""
    if b"planted" in found.data:
        (folder / "planted.py").write_text(PLANTED_CODE)


def _records(command: str) -> Make:
    def make_attempt(
        shop: Workshop, rng: random.Random | None, folder: Path
    ) -> tuple[Mutation, list[list[str]], Path | None]:
        found = _damaged(rng, mutate.lines, (shop.folder / "records.jsonl").read_bytes())
        (folder / "images").symlink_to(shop.folder / "images")
        path, out, model = folder / "records.jsonl", folder / "out.jsonl", str(shop.folder / "model")
        path.write_bytes(found.data)
        words = {
            "eval": ["eval", model, "--data", str(path), "-o", str(out), "-n", "2"],
            "batch": ["batch", str(path), "-m", model, "-o", str(out), "-n", "2", "--workers", "0"],
            "train": ["train", model, "-d", str(path), "-o", str(folder / "out"), "--max-steps", "1", "-b", "2"],
        }[command]
        return found, [words], out

    return make_attempt


def _tower(shop: Workshop, rng: random.Random | None, folder: Path) -> tuple[Mutation, list[list[str]], Path | None]:
    """A directory of OpenCLIP."""
    name = "open_clip_config.json" if rng is None else rng.choice(_names(shop.folder / "tower"))
    copied = _copy(shop.folder / "tower", folder, name)
    found = _damage_any(rng, shop.folder / "tower" / name, copied / name)
    words = ["--family", "llava", "--vision-encoder", f"local-dir:{copied}", *shop.language_model, "--quiet"]
    return found, [["build", str(folder / "out"), *words], *_answer(folder / "out", shop)], None


def _published(
    shop: Workshop, rng: random.Random | None, folder: Path
) -> tuple[Mutation, list[list[str]], Path | None]:
    """A checkpoint in the layout of another project."""
    source = shop.folder / "published"
    if not source.exists():
        llava.huggingface(source)
    name = "config.json" if rng is None else rng.choice([*_names(source), "config.json"])
    copied = _copy(source, folder, name)
    found = _damage_any(rng, source / name, copied / name)
    _plant(copied, found)
    words = ["build", str(folder / "out"), "--from", str(copied), "--quiet"]
    return found, [words, *_answer(folder / "out", shop)], None


def _interrupted_run(shop: Workshop, folder: Path, words: list[str], text: str) -> Path:
    """Make the folder of a run that Ctrl-C ended after it had printed a text, once."""
    if not folder.exists():
        folder.mkdir()
        (folder / "images").symlink_to(shop.folder / "images")
        (folder / "records.jsonl").hardlink_to(shop.folder / "records.jsonl")
        ended = interrupting.run(words, folder, interrupt=(signal.SIGINT, interrupting.Moment(text=text)))
        assert ended.code == 130, ended.printed
    return folder


def _checkpoint(
    shop: Workshop, rng: random.Random | None, folder: Path
) -> tuple[Mutation, list[list[str]], Path | None]:
    """The checkpoints of a training run, which another run resumes from."""
    words = ["train", str(shop.folder / "model"), "-d", "records.jsonl", "-o", "out", "--max-steps", "40", "-b", "1"]
    words += ["--save-every", "2", "--log-every", "1"]
    source = _interrupted_run(shop, shop.folder / "interrupted-train", words, "step 3/40  loss")
    shutil.copytree(source / "out.checkpoints", folder / "out.checkpoints")
    for name in ("images", "records.jsonl"):
        (folder / name).symlink_to(source / name)
    files = sorted(path for path in (folder / "out.checkpoints").rglob("*") if path.is_file())
    file = next(path for path in files if path.name == "complete.json") if rng is None else rng.choice(files)
    found = _damage_any(rng, file, file)
    return Mutation(found.how, found.data, "the run begins with other numbers"), [[*words, "--resume"]], None


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _DAMAGES)


#: How the files of a directory are damaged, by their suffix.
_DAMAGES: dict[str, Callable[[random.Random, bytes], Mutation]] = {
    ".json": lambda rng, data: mutate.json_file(rng, data, "only the file says what a value was"),
    ".safetensors": mutate.safetensors,
    ".pt": mutate.torch_file,
    ".jsonl": mutate.lines,
    ".jinja": lambda rng, data: Mutation("", mutate.spliced(rng, data).data, "a template may say anything"),
}


def _damage_any(rng: random.Random | None, source: Path, out: Path) -> Mutation:
    """Damage a file of any kind, and write what comes of it."""
    found = _damaged(rng, _DAMAGES.get(source.suffix, mutate.truncated), source.read_bytes())
    out.write_bytes(found.data)
    return Mutation(f"{source.name}: {found.how}", found.data, found.another_answer)


KINDS: dict[str, Make] = {
    "image": _image,
    "clip": _clip,
    "composition": _composition,
    "weights": _weights,
    "directory": _directory_file("model"),
    "delta": _directory_file("delta"),
    "language-model-config": _language_model_file(
        "lm", "config.json", lambda rng, data: mutate.json_file(rng, data, "only the file says what a number was")
    ),
    "language-model-weights": _language_model_file("lm", "model.safetensors", mutate.safetensors),
    "language-model-tokenizer": _language_model_file(
        "lm", "tokenizer.json", lambda rng, data: mutate.json_file(rng, data, "only the file says what a token was")
    ),
    "pickle": _language_model_file("lm-bin", "pytorch_model.bin", mutate.torch_file),
    "gguf": _language_model_file("lm.gguf", "", mutate.gguf),
    "eval": _records("eval"),
    "batch": _records("batch"),
    "train": _records("train"),
}


#: Kinds whose cases take long, or whose whole files do.
SLOW_KINDS: dict[str, Make] = {"tower": _tower, "published": _published, "checkpoint": _checkpoint}


def attempts(shop: Workshop, kind: str, seeds: Sequence[str], folder: Path) -> Iterator[Attempt]:
    """The attempt with whole files, then one for each seed."""
    for number, seed in enumerate([None, *seeds]):
        place = folder / str(number)
        place.mkdir()
        rng = None if seed is None else random.Random(seed)
        found, commands, result = {**KINDS, **SLOW_KINDS}[kind](shop, rng, place)
        yield Attempt(
            name=f"{seed} ({found.how})",
            commands=commands,
            folder=place,
            another_answer=found.another_answer,
            result=result,
            may_open_paths=kind in ("eval", "batch", "train"),
        )
