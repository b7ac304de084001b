"""How long a clip of a minute takes until it is 8 frames, next to their encoding.

python -m benchmarks.speed.clip
"""

from __future__ import annotations

import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.encode import timed
from benchmarks.speed.measure import Pairs, Run, Subject, compare
from benchmarks.speed.models import Models, Prompt
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report

FRAMES = 8
RATE = 30  # frames a second
OURS = "ours, load_clip"
SIZES = {"640x360": (640, 360), "1280x720": (1280, 720)}  # width and height in pixels


def measure(report: Report, models: Models, settings: Settings) -> None:
    is_tiny = models.size.name == "tiny"
    encoder = models.ours("llava").model.vision_encoder
    pixels = Prompt(FRAMES).pixels(models.image_size)
    for case, size in {"64x36": (64, 36)}.items() if is_tiny else SIZES.items():
        path = models.scratch / f"{case}.mp4"
        seconds = 2 if is_tiny else 60
        write_clip(path, size, seconds)
        ours = Subject(OURS, partial(_load, path))
        peers = [Subject("ours, vision encoder", partial(timed, encoder, pixels))]
        outcomes = compare(ours, peers, settings.pairs)
        report.add(models.size.name, f"{FRAMES} frames of {seconds} s, {case}, H.264", OURS, outcomes)
        pairs = outcomes["ours, vision encoder"]
        ratio = pairs.ratio if isinstance(pairs, Pairs) else None
        name = f"clip, {models.size.name}, {case}: {FRAMES} frames of a minute, decoding / encoding"
        report.bars.append(Bar(name=name, value=ratio, limit=None if is_tiny else 1))


def _load(path: Path) -> Run:
    from vlm_cli.media import MediaLoader

    def load() -> float:
        started = time.perf_counter()
        assert len(MediaLoader().load_clip(f"{path}?frames={FRAMES}").frames) == FRAMES
        return time.perf_counter() - started

    return load


def write_clip(path: Path, size: tuple[int, int], seconds: int) -> None:
    """Encode a picture of coarse noise that moves, with x264's usual key frames and B-frames."""
    import av

    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height // 8 + 64, width // 8 + 64, 3), np.uint8)
    ground = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * RATE):
            x, y = 3 * i % 512, 2 * i % 512
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ground[y : y + height, x : x + width]), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode())


QUESTION = Question(
    name="clip",
    asks="Does it take less time to read 8 frames of a clip of a minute than to encode them?",
    measure=measure,
    devices=("cpu",),
)

if __name__ == "__main__":
    run(QUESTION)
