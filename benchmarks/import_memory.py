"""Peak memory of `vlm build --from` over the model's own bytes, in units of the largest shard.

python -m benchmarks.import_memory             a synthetic LLaVA of 2 GB in shards of 500 MB
python -m benchmarks.import_memory 0.5 100MB   of 0.5 GB in shards of 100 MB
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def write(folder: Path, gigabytes: float, shard: str) -> None:
    """A LLaVA of that many bytes in float32, in the layout of Transformers."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.initialization import no_init_weights

    per_layer = 12 * 1024**2 * 4
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=1024,
        intermediate_size=2731,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 2 * 32064 * 1024 * 4) / per_layer)),
        num_attention_heads=16,
    )
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    with no_init_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder, max_shard_size=shard)
    vocabulary = models.WordLevel({f"w{i}": i for i in range(32000)}, "w0")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
    words.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(folder)


def measure(folder: Path, out: Path) -> None:
    """In a process of its own: peak bytes before and after, as JSON. Linux only."""
    from vlm_cli.checkpoint.published.importing import import_checkpoint
    from vlm_cli.checkpoint.saving import save
    from vlm_cli.files import replacing_directory

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the process that started this one
    libraries = peak()
    imported = import_checkpoint(folder)
    assert imported.model is not None
    filled = peak()
    with replacing_directory(out) as partial:
        save(imported.model, imported.processor, partial)
    size = sum(p.numel() * p.element_size() for p in imported.model.parameters())
    print(json.dumps({"libraries": libraries, "filled": filled, "written": peak(), "model": size}))


def main(gigabytes: str = "2", shard: str = "500MB") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "llava"
        write(folder, float(gigabytes), shard)
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.import_memory", "--measure", str(folder), f"{scratch}/out"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for stage in ("filled", "written"):
            above = found[stage] - found["libraries"] - found["model"]
            whole, libraries, model = (found[name] / 1e9 for name in (stage, "libraries", "model"))
            print(
                f"{stage}: {whole:.2f} GB, of which libraries {libraries:.2f} and model {model:.2f}; above both "
                f"{above / 1e9:.2f} GB = {above / largest:.2f} × the largest shard"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
