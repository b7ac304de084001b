"""How much memory loading and generating take, and how long loading takes; whole processes.

python -m benchmarks.speed.memory
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.measure import Pairs, Subject, alternate, compare
from benchmarks.speed.models import Models
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report

#: Programs of the processes; each gets a directory.
_BEGIN = "import sys; folder = sys.argv[1]; open('/proc/self/clear_refs', 'w').write('5')"
_LIBRARIES = """
import torch, open_clip
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
import vlm_cli.checkpoint.create, vlm_cli.checkpoint.directory, vlm_cli.processor
torch.set_num_threads(1)
"""
_READ = """
from pathlib import Path
buffer = memoryview(bytearray(1 << 24))
for file in Path(folder).glob("*.safetensors"):
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
"""
_LOAD = "import vlm_cli; model, processor = vlm_cli.load(folder)"
# Files are mapped into memory, so that their bytes are read when a weight is first used.
_TOUCH = """
with torch.no_grad():
    for parameter in model.parameters():
        parameter.sum()
"""
_GENERATE = """
size = model.config.vision_config["vision_cfg"]["image_size"]
from PIL import Image
inputs = processor(text="<image>w5 w6 w7", images=[Image.new("RGB", (size, size))])
with torch.inference_mode():
    model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
"""
_LLAVA = "model = LlavaForConditionalGeneration.from_pretrained(folder)"
_END = "print(*[x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')])"

LIBRARIES, GENERATE = "libraries", "load + generate"
READ, THEIRS = "reading the files + imports", "HF LLaVA, from_pretrained"


class Process:
    """A fresh interpreter with the libraries, and what it does with a directory; Linux only.

    Attributes:
        peaks: bytes of each run so far.
    """

    def __init__(self, folder: Path, *parts: str) -> None:
        self.code = "\n".join((_BEGIN, _LIBRARIES, *parts, _END))
        self.folder = folder
        self.peaks: list[float] = []

    def __call__(self) -> float:
        """Seconds of one run."""
        command = [sys.executable, "-c", self.code, str(self.folder)]
        started = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        spent = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        self.peaks.append(int(done.stdout.split()[-1]) * 1024)
        return spent


def measure(report: Report, models: Models, settings: Settings) -> None:
    size, folder = models.size.name, models.directory("llava")
    theirs = models.scratch / "hf-llava"
    models.llava().model.save_pretrained(theirs)
    load, their_load = Process(folder, _LOAD, _TOUCH), Process(theirs, _LLAVA, _TOUCH)
    read = Process(folder, _READ)
    peers = [Subject(READ, lambda: read), Subject(THEIRS, lambda: their_load)]
    ours = Subject("vlm_cli.load, llava", lambda: load)
    outcomes = compare(ours, peers, settings.pairs)
    report.add(size, f"loading {_size(folder) / 1e6:.0f} MB, each weight used once", ours.name, outcomes)
    others = {LIBRARIES: Process(folder)}
    others |= {f"{GENERATE}, {x}": Process(models.directory(x), _LOAD, _GENERATE) for x in ("llava", "flamingo")}
    alternate(others, settings.few, warm_up=False)
    loads = {"load, llava": load, "load, HF LLaVA": their_load}
    for name, process in {**loads, **others}.items():
        if process is not others[LIBRARIES]:
            _tell(report, size, name, process, others[LIBRARIES])
    if size == "standard":
        read_ratio = report.ratio(report.rows[0].case, ours.name, READ, size)
        report.bars.append(Bar(name="loading, llava / (reading its bytes + imports)", value=read_ratio, limit=1.3))


def _tell(report: Report, size: str, name: str, process: Process, libraries: Process) -> None:
    """A peak over the bytes of the weights and the peak of the libraries."""
    weights = _size(process.folder)
    floor = statistics.median(libraries.peaks) + weights
    pairs = Pairs(process.peaks, [floor] * len(process.peaks))
    report.add(size, f"peak memory, {weights / 1e6:.0f} MB of weights", name, {"weights + libraries": pairs}, unit="B")
    if size == "standard" and name.startswith(GENERATE):
        report.bars.append(Bar(name=f"memory: {name} / (weights + libraries)", value=pairs.ratio, limit=1.15))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


QUESTION = Question(
    name="memory",
    asks="What do loading and generating take above the bytes of the weights, in memory and in time?",
    measure=measure,
    devices=("cpu",),
    sizes=("tiny", "small", "standard"),
)

if __name__ == "__main__":
    run(QUESTION)
