"""Write a VLM as the two GGUF files that llama.cpp reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from vlm_cli.checkpoint.export.gguf.checking import check_gguf
from vlm_cli.checkpoint.export.gguf.comparing import UNCHECKED, check_room, compare_with_llama_cpp
from vlm_cli.checkpoint.export.gguf.language_models import (
    ARCHITECTURES,
    describe_language_model,
    embedding_factor,
    language_weights,
)
from vlm_cli.checkpoint.export.gguf.projectors import PROJECTORS, find_projector
from vlm_cli.checkpoint.export.gguf.towers import Tower, read_tower
from vlm_cli.checkpoint.export.gguf.vocabulary import read_vocabulary
from vlm_cli.checkpoint.export.gguf.writing import write_file
from vlm_cli.modeling.generation_settings import inherit_settings
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import ChatFormat, Markers, Message
from vlm_cli.templates.pictures import PLAIN, take_pictures

__all__ = ["export_gguf", "kept_tokens", "write_gguf"]

#: Tensors of the vision side that stay float32.
_VISION_EXACT = ("v.position_embd.weight", "v.class_embd")


_AROUND = (
    "llama.cpp gives the chat template texts alone: what the template writes around an image, such as a newline, is "
    "missing there."
)


def export_gguf(
    model: VLM, processor: VLMProcessor, out: Path, *, name: str, out_type: str, check: bool = True
) -> dict[str, Any]:
    """Write the language model and the vision side as GGUF files, and compare llama.cpp with the model.

    Args:
        model: to write.
        processor: of the model.
        out: an existing directory.
        name: of the model, from which the files get their names.
        out_type: a key of `OUT_TYPES`.
        check: whether llama.cpp reads the files and is compared with the model.

    Raises:
        UsageError: if llama.cpp cannot hold the model.
        CheckpointError: if llama.cpp gives other answers, a weight does not fit the type, or there is too little memory
            for the comparison.
    """
    check_gguf(model.config)
    if check:
        check_room(model, out_type)
    files = write_gguf(model, processor, out, name=name, out_type=out_type)
    preprocess, side = processor.image_processor.preprocessing.config, model.vision_encoder.image_size[0]
    projector = PROJECTORS[files["projector"]]
    picture_size = projector.same_size(model.config, side)
    note = projector.picture_note(preprocess, side, picture_size[0])
    notes = [*([note] if note else []), *([_AROUND] if _writes_around_images(processor) else [])]
    if not check:
        return {**files, "llama_cpp": None, "notes": [*notes, UNCHECKED]}
    facts = compare_with_llama_cpp(
        model,
        processor,
        out,
        out_type=out_type,
        language_model=files["language_model"],
        mmproj=files["mmproj"],
        kept=kept_tokens(model),
        adds_bos=begins_with_bos(processor),
        splits_linear=projector.splits_linear,
        picture_size=picture_size,
    )
    return {**files, **facts, "notes": [*notes, *facts["notes"]]}


def _writes_around_images(processor: VLMProcessor) -> bool:
    """Tell whether a chat template writes a message in another way because llama.cpp gives it no image."""
    messages = [Message("user", (Medium(""), Text("a")))]
    markers = Markers.absent_from(processor.chat_program or "")
    given, left = (ChatFormat(processor, gives_images=x).render(messages, markers) for x in (True, False))
    return given != left


def write_gguf(model: VLM, processor: VLMProcessor, out: Path, *, name: str, out_type: str) -> dict[str, Any]:
    """Write both files, and return their names and the projector type."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    language, vision = (f"{prefix}{stem}-{out_type.upper()}.gguf" for prefix in ("", "mmproj-"))
    kept = kept_tokens(model)
    ids = [*range(model.config.first_added_id), *kept]
    text = model.config.text_config
    vocabulary = read_vocabulary(processor.tokenizer, ids)
    settings, _ = inherit_settings(model.generation_config)
    stops = [ids.index(i) for i in stop_token_ids(settings, processor.tokenizer) if i in ids]
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[text.model_type].arch]
    describe = [
        lambda writer: writer.add_name(name),
        describe_language_model(text, len(ids)),
        vocabulary.describe(
            processor.tokenizer, stops, write_chat_template(processor), adds_bos=begins_with_bos(processor)
        ),
    ]
    write_file(out / language, arch, language_weights(model, kept), out_type, describe)
    visual: Any = model.vision_encoder.visual
    tower = read_tower(visual, model.config)
    projector, problems = find_projector(model.config, tower)
    assert not problems  # check_gguf found none
    chosen, tokenizer = PROJECTORS[projector], model.vision_tokenizer
    weights: dict[str, Tensor] = {
        **tower.weights(class_token_last=chosen.class_token_last),
        **chosen.weights(tokenizer, embedding_factor(model)),
    }
    pixels = processor.image_processor.preprocessing.config

    def describe_vision(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name)
        _describe_tower(writer, tower, projector, text.hidden_size)
        writer.add_vision_image_mean(_three(pixels.mean))
        writer.add_vision_image_std(_three(pixels.std))
        chosen.describe(writer, model.config.composition, tower)

    write_file(out / vision, "clip", weights, out_type, [describe_vision], exact=_VISION_EXACT)
    return {"language_model": language, "mmproj": vision, "projector": projector}


def kept_tokens(model: VLM) -> list[int]:
    """Return the added tokens that get rows: all but `<image>` and `<pad>`, which the model never writes."""
    config = model.config
    added = range(config.first_added_id, config.first_added_id + len(config.added_tokens))
    return [i for i in added if i not in (config.media_token_id, config.pad_token_id)]


def _describe_tower(writer: gguf.GGUFWriter, tower: Tower, projector: str, dim_out: int) -> None:
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(dim_out)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.hidden)
    writer.add_vision_block_count(tower.depth)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(tower.eps)
    writer.add_vision_use_gelu(tower.activation != "quick_gelu")


def _three(values: Any) -> list[float]:
    """Return a number for each colour."""
    return [float(x) for x in values] if isinstance(values, (list, tuple)) else [float(values)] * 3


def begins_with_bos(processor: VLMProcessor) -> bool:
    """Tell whether texts and chats both begin with the tokenizer's first token.

    llama.cpp knows one answer for both. Where only texts do, it is no: chats are what people ask.
    """
    bos, turn = processor.tokenizer.bos_token_id, Message("user", (Text("a"),))
    starts = processor.tokenizer("a")["input_ids"][:1], ChatFormat(processor).encode_messages([turn])[:1]
    return bos is not None and all(start == [bos] for start in starts)


def write_chat_template(processor: VLMProcessor) -> str:
    """Return a chat template that takes pictures, and opens the answer as `vlm chat` does."""
    heading = ChatFormat(processor).heading
    opening = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(heading)} }}}}{{% endif %}}" if heading else ""
    special = processor.tokenizer.special_tokens_map
    return take_pictures(processor.chat_program or PLAIN, special, gets_images=False) + opening
