"""The README of a directory that `vlm` writes."""

from __future__ import annotations

from typing import Any

from vlm_cli.cli.count_params import markdown
from vlm_cli.report.parameters import count_parameters

__all__ = ["model_card"]

UNTRAINED = "New parts are untrained until someone\ntrains them."


def model_card(model: Any, name: str, story: str = UNTRAINED) -> str:
    """A short model card: the parts, how they were trained, and the table of parameters."""
    parts = model.config.composition
    table = markdown(count_parameters(model))
    return f"""---
library_name: vlm-cli
pipeline_tag: image-text-to-text
---

# {name}

A vision-language model composed with [vlm](https://pypi.org/project/vlm-cli/). {story}

| part | choice |
|---|---|
| vision encoder | `{parts.vision_encoder.name}` |
| its weights | `{parts.vision_encoder.pretrained or "none named"}` |
| vision tokenizer | `{parts.vision_tokenizer.type}` |
| fusion | `{parts.fusion.type}` |
| language model | `{parts.language_model.name}` |

{table}
```
pip install vlm-cli
vlm generate --model {name} "<image:photo.jpg>A photo of"
```
"""
