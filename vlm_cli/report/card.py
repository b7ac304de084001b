"""The model card: the README.md of a directory that `vlm` writes."""

from __future__ import annotations

import shlex

from huggingface_hub import ModelCardData

from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of, escape_controls, markdown_code, markdown_text
from vlm_cli.report.base_models import base_models
from vlm_cli.report.card_sections import sign_section
from vlm_cli.report.parameters import ParameterReport, count_parameters
from vlm_cli.report.tables import parameters_markdown

__all__ = ["METADATA", "UNTRAINED", "model_card", "training_story"]

#: Metadata of every card.
METADATA = {"library_name": "vlm-cli", "pipeline_tag": "image-text-to-text", "tags": ["vision-language-model"]}

UNTRAINED = "Parts that no\npretrained weights fill are untrained until you train them."


def model_card(model: VLM, name: str, story: str = UNTRAINED, parameters: ParameterReport | None = None) -> str:
    """Write a short model card: the parts, how they were trained, and the table of parameters.

    Names show as they are, whatever characters they have; none of them formats the card.

    Args:
        model: the model.
        name: of the directory.
        story: sentences on how the model was trained, in Markdown.
        parameters: the model's parameters, if the caller counted them already.
    """
    parts = model.config.composition
    table = parameters_markdown(parameters or count_parameters(model))
    is_random = getattr(model.config, "random_weights", None)
    bases = [] if is_random else [x for x in base_models(parts).values() if x is not None]
    metadata = ModelCardData(base_model=bases or None, **METADATA)  # type: ignore[arg-type]
    body = f"""
# {markdown_text(name)}

A vision-language model composed with `vlm` (the Python package vlm-cli). {story}

| part | choice |
|---|---|
| vision encoder | {markdown_code(parts.vision_encoder.name)} |
| its weights | {markdown_code(parts.vision_encoder.pretrained or "none named")} |
| vision tokenizer | {markdown_code(parts.vision_tokenizer.type)} |
| fusion | {markdown_code(parts.fusion.type)} |
| language model | {markdown_code(parts.language_model.name)} |

{table}
With `vlm` installed:

```
vlm generate --model {shlex.quote(escape_controls(name))} "<image:photo.jpg>A photo of"
```
"""
    return f"---\n{metadata.to_yaml()}\n---\n\n{sign_section('model', body)}\n"


def training_story(model: VLM, *, steps: int, records: int, loss: float | None, eval_loss: float | None) -> str:
    """Write how a model was trained.

    Args:
        model: tells which parts were trained.
        steps: number of optimizer steps.
        records: number of training records.
        loss: last loss per token on the training records; None if none was logged.
        eval_loss: last loss per token on held-out records; None without such records.
    """
    trained = ", ".join(model.trained_names())
    held_out = "" if eval_loss is None else f", {eval_loss:.4f} on held-out records"
    last = "unknown" if loss is None else f"{loss:.4f}"
    return (
        f"Trained:\n{trained}, {count_of(steps, 'step')} on {count_of(records, 'record')}.\n"
        f"Loss per token: {last}{held_out};\nthe curve is in `loss.png`."
    )
