"""Write the demo as parts that you can compose again, offline.

    OUT/vision/             the vision encoder, a folder of OpenCLIP: `--vision-encoder local-dir:OUT/vision`
    OUT/language/           the language model, a folder of Transformers: `--language-model OUT/language`
    OUT/composition.yaml    the demo's composition of the two
    OUT/model.safetensors   the demo's trained weights, for `--weights`

Both parts have the form in which such parts are published, so you can try `vlm build` without a download. They know the
drawn scenes of `examples/scenes` and nothing else.

Example: python examples/demo_parts.py parts
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers.utils import logging

import vlm_cli
from vlm_cli.checkpoint.export.language_model import export_language_model
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import DEMO

#: `vlm` never builds a text tower, but OpenCLIP's configuration must describe one.
TEXT_TOWER = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def write_vision_encoder(model: VLM, out: Path) -> None:
    """Write the model's vision encoder as a folder of OpenCLIP."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = model.vision_encoder.visual.state_dict()
    state = {f"visual.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    kept = model.config.vision_config
    sizes = {"embed_dim": kept["embed_dim"], "vision_cfg": kept["vision_cfg"], "text_cfg": TEXT_TOWER}
    config = {"model_cfg": sizes, "preprocess_cfg": kept["preprocess"]}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(out: Path) -> None:
    """Write the parts, the composition and the weights."""
    model, processor = vlm_cli.load("demo")
    write_vision_encoder(model, out / "vision")
    (out / "language").mkdir(exist_ok=True)
    export_language_model(model, processor, out / "language")
    for name in ("composition.yaml", "model.safetensors"):
        shutil.copyfile(DEMO / name, out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo as parts that you can compose again.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Folder to write, e.g. parts.")
    out = parser.parse_args().out
    logging.disable_progress_bar()
    write(out)
    print(f"Wrote {out}. Next: vlm build OUT --config {out}/composition.yaml --weights {out}/model.safetensors")
