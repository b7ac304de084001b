"""Write vlm_cli/report/encoders.json: the sizes and tags of every vision encoder of the installed OpenCLIP.

Run it after an upgrade of OpenCLIP. It takes a minute or two, and reads no weights.

Example: python docs/generate_encoders.py
"""

from collections.abc import Iterator

from vlm_cli.checkpoint.parts.openclip import openclip_files
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.report.encoders import EncoderFacts, EncoderTable, measure_encoders


def measure(names: list[str]) -> Iterator[tuple[str, EncoderFacts]]:
    """Measure encoders of OpenCLIP, and show which one is next."""

    def announce() -> Iterator[str]:
        for number, name in enumerate(names, start=1):
            print(f"{number:4} of {len(names)}: {name}")
            yield name

    return measure_encoders(announce(), lambda name: find_tower(VisionEncoderOptions(name=name)).config)


if __name__ == "__main__":
    files = openclip_files()
    EncoderTable.of(dict(measure(list(files))), files).write()
    print("Wrote vlm_cli/report/encoders.json.")
