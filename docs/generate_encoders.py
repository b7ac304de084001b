"""Write vlm_cli/report/encoders.json and other_encoders.json: the vision encoders of the installed libraries.

The first has the sizes and tags of OpenCLIP's, the second the names of those of Transformers and timm. Run it after an
upgrade of one of them. It takes a minute or two, and reads no weights.

Example: python docs/generate_encoders.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import timm

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is the only one that Python looks into

from benchmarks.compatibility.encoders import check_vision_type, vision_types
from vlm_cli.checkpoint.parts.openclip import openclip_files
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.report.encoders import EncoderFacts, EncoderTable, measure_encoders
from vlm_cli.report.other_encoders import write_other_encoders


def measure(names: list[str]) -> Iterator[tuple[str, EncoderFacts]]:
    """Measure encoders of OpenCLIP, and show which one is next."""

    def announce() -> Iterator[str]:
        for number, name in enumerate(names, start=1):
            print(f"{number:4} of {len(names)}: {name}")
            yield name

    return measure_encoders(announce(), lambda name: find_tower(VisionEncoderOptions(name=name)).config)


def name_others() -> None:
    """Write the names of encoders of Transformers and timm."""
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for whole in timm.list_pretrained():
        name, _, tag = whole.partition(".")
        tags[name].append(tag)
    rows = [check_vision_type(kind) for kind in vision_types()]
    write_other_encoders({row.name: row.model for row in rows if row.shape is not None}, tags)


if __name__ == "__main__":
    name_others()
    files = openclip_files()
    EncoderTable.of(dict(measure(list(files))), files).write()
    print("Wrote vlm_cli/report/encoders.json and other_encoders.json.")
