"""What each JSON file of a model must hold: tables for `vlm_cli.schema`.

Each function checks what was read from one kind of file. Its message names the file, the key, what the key holds and
what it must hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.inside import check_named_files
from vlm_cli.composition import read_tiling
from vlm_cli.composition.adapters import ADAPTABLE_PARTS
from vlm_cli.errors import (
    CheckpointError,
    CompositionError,
    LanguageModelError,
    VisionEncoderError,
    VLMError,
    explain_reading,
)
from vlm_cli.plain_data import read_json
from vlm_cli.schema import (
    ANYTHING,
    Kind,
    check,
    choice,
    either,
    list_of,
    mapping,
    mapping_of,
    number,
    optional,
    show,
    text,
    truth,
    whole,
)
from vlm_cli.timm_sizes import TIMM_ARGUMENTS

__all__ = [
    "check_generation_config",
    "check_is_mapping",
    "check_openclip_config",
    "check_processor_files",
    "check_text_config",
    "check_text_config_file",
    "check_tokenizer",
    "check_training_manifest",
    "check_vlm_config",
]

_MOST_ID = 2**31 - 1  # the largest token id
_MOST_CHANNELS = 10_000_000  # width of a layer, or rows of a table
_MOST_LAYERS = 10_000

_ID = whole(0, _MOST_ID)
_ONE_ID = whole(-1, _MOST_ID)
_IDS = either(_ONE_ID, list_of(_ID, least=1, most=10_000))
_DTYPE = choice("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
_PIXELS = whole(1, 16_384)
_IMAGE_SIZE = either(_PIXELS, list_of(_PIXELS, least=2, most=2))

# -- the vision encoder ------------------------------------------------------------------------------------------------

_COLOUR = either(number(-1_000, 1_000), list_of(number(-1_000, 1_000), least=1, most=4))
_PREPROCESS = mapping(
    {},
    {
        "size": _IMAGE_SIZE,
        "mode": text(most=8),
        "mean": list_of(number(-1_000, 1_000), least=3, most=3),
        "std": list_of(number(0, 1_000, above=True), least=3, most=3),
        "interpolation": text(most=20),
        "resize_mode": text(most=20),
        "fill_color": _COLOUR,
        "crop": choice("round", "down"),
        "shortest_edge": _PIXELS,
        "least_side": _PIXELS,
        "squashed": list_of(_PIXELS, least=2, most=2),
    },
)
_PREPROCESS_OF_SEVERAL = mapping(
    {"size": list_of(_PIXELS, least=2, most=2), "encoders": list_of(_PREPROCESS, least=2, most=8)}
)
_PREPROCESS_OF_ANY = Kind(
    "a mapping of keys to values",
    lambda x: isinstance(x, Mapping),
    lambda x, key: (_PREPROCESS_OF_SEVERAL if "encoders" in x else _PREPROCESS).find_problems(x, key),
)
_VISION_SIZES = {
    "layers": either(whole(1, 1_000), list_of(whole(1, 1_000), least=1, most=16)),
    "width": whole(1, 1_000_000),
    "head_width": whole(1, 16_384),
    "patch_size": optional(either(whole(1, 1_024), list_of(whole(1, 1_024), least=2, most=2))),  # null: a ResNet
    "image_size": _IMAGE_SIZE,
    "mlp_ratio": number(0, 64, above=True),
    "ls_init_value": optional(number(-1e6, 1e6)),
    "patch_dropout": number(0, 1),
    "attentional_pool": either(truth(), text(most=40)),
    "attn_pooler_queries": whole(1, 65_536),
    "attn_pooler_heads": whole(1, 1_024),
    "no_ln_pre": truth(),
    "final_ln_after_pool": truth(),
    "output_tokens": truth(),
    "pool_type": text(most=40),
    "timm_model_name": optional(text(most=200)),
    "timm_pool": text(most=40, empty=True),
    "timm_proj": optional(text(most=40, empty=True)),
    "timm_drop": number(0, 1),
    "timm_drop_path": optional(number(0, 1)),
    "act_kwargs": optional(mapping_of(ANYTHING)),
    "norm_kwargs": optional(mapping_of(ANYTHING)),
    "block_type": optional(text(most=40)),
}
_VISION_CFG = mapping({}, _VISION_SIZES)
_VISION_CONFIG = mapping(
    {
        "vision_cfg": _VISION_CFG,
        "preprocess": _PREPROCESS_OF_ANY,
        "num_patches": whole(1, 1_048_576),
        "dim": whole(1, 1_000_000),
    },
    {
        "embed_dim": whole(1, 1_000_000),
        "quick_gelu": truth(),
        "depth": optional(whole(1, 1_000)),
        "type": text(most=200),
        "grid": list_of(whole(1, 16_384), least=2, most=2),
        "config": mapping({"model_type": text(most=100)}),
        "name": text(most=100),
        "encoders": list_of(mapping({"vision_cfg": _VISION_CFG}), least=2, most=8),
    },
)
_OPENCLIP_MODEL = mapping(
    {"embed_dim": whole(1, 1_000_000), "vision_cfg": _VISION_CFG},
    {"quick_gelu": truth(), "text_cfg": mapping_of(ANYTHING), "custom_text": optional(truth())},
)


def check_openclip_config(data: Mapping[str, Any], name: str) -> None:
    """Check an OpenCLIP JSON file: a model's configuration, or `model_cfg` and `preprocess_cfg`.

    Raises:
        VisionEncoderError: naming the key.
    """
    where = f"the OpenCLIP configuration {name!r}"
    if "model_cfg" in data:
        whole_file = mapping({"model_cfg": _OPENCLIP_MODEL}, {"preprocess_cfg": _PREPROCESS})
        check(data, whole_file, where, VisionEncoderError)
        model = data["model_cfg"]
    else:
        check(data, _OPENCLIP_MODEL, where, VisionEncoderError)
        model = data
    if problem := _patches_problem(model["vision_cfg"]):
        raise VisionEncoderError(f"{where} is not valid: {problem}")


def _patches_problem(vision_cfg: Mapping[str, Any]) -> str | None:
    """Say that an image size and a patch size give too many patches, or none; None if they fit."""
    size, patch = vision_cfg.get("image_size", 224), vision_cfg.get("patch_size") or 16
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    if not 1 <= (height // rows) * (width // columns) <= 1_048_576 and "timm_model_name" not in vision_cfg:
        return (
            f"vision_cfg.image_size is {size} and vision_cfg.patch_size is {patch}, which gives "
            f"{(height // rows) * (width // columns):,} patches; an image has 1 to 1,048,576."
        )
    return None


# -- the language model ------------------------------------------------------------------------------------------------

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_REQUIRED: dict[str, Kind] = {
    **dict.fromkeys(_DEPTHS, whole(1, _MOST_LAYERS)),
    **dict.fromkeys(_WIDTHS, whole(1, _MOST_CHANNELS)),
    **dict.fromkeys(_HEADS, whole(1, 100_000)),
}


def check_text_config(data: Any, where: str, key: str = "", error: type[VLMError] = LanguageModelError) -> None:
    """Check the configuration of a language model.

    Its keys differ from type to type: what a value must be follows from the default value that Transformers'
    configuration class of the type has for the key.

    Args:
        data: the configuration.
        where: how the message names the file.
        key: key of the configuration in the file; empty if it is the file.
        error: class of the error.

    Raises:
        VLMError: of the class `error`, naming the key.
    """
    kind = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_text_problems)
    check({key: data} if key else data, mapping({key: kind}) if key else kind, where, error)


def check_text_config_file(name: str, place: str, **keywords: Any) -> None:
    """Check config.json of a language model's directory or hub id; Transformers reports a missing one.

    Raises:
        LanguageModelError: naming the key.
    """
    try:
        data = _read(place, "config.json", keywords)
    except CheckpointError as error:
        raise LanguageModelError(str(error)) from None
    if data is not None and "model_type" in data:
        check_text_config(data, f"config.json of language model {name!r}")


_COUNT_OF_LAYERS = re.compile(r"(^|_)(layers?|depth|blocks)$")
_COUNT_OF_CHANNELS = re.compile(r"(size|dim|width|heads|latents|queries)$|^n_embd$")


def check_sizes(data: Mapping[str, Any], where: str) -> None:
    """Check that no count of layers or channels in a configuration of another project is beyond all models.

    Args:
        data: the configuration; it may hold others.
        where: how the message names the file.

    Raises:
        CheckpointError: naming the key.
    """
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{place}.{key}".lstrip("."), x) for key, x in value.items()]
        name = place.rpartition(".")[2]
        most = _MOST_LAYERS if _COUNT_OF_LAYERS.search(name) else _MOST_CHANNELS
        is_count = most == _MOST_LAYERS or _COUNT_OF_CHANNELS.search(name)
        if is_count and isinstance(value, (int, float)) and value > most:
            raise CheckpointError(f"{where} is not valid: {place} must be at most {most:,}, but is {show(value)}.")


def _find_text_problems(data: Mapping[str, Any], key: str) -> Iterator[str]:
    prefix = f"{key}." if key else ""
    yield from text(most=100).find_problems(data.get("model_type"), f"{prefix}model_type")
    defaults = _defaults(data.get("model_type"))
    found = 0 if isinstance(data.get("model_type"), str) else 1
    for name, value in data.items():
        if name == "text_config" and isinstance(value, Mapping) and "model_type" in value:
            yield from _find_text_problems(value, f"{prefix}text_config")  # of a model that reads images itself
            continue
        problems = list(_text_kind(str(name), value, defaults).find_problems(value, f"{prefix}{str(name)[:60]}"))
        found += len(problems)
        yield from problems
    if not found and (problem := _problem_of_transformers(data, prefix)):
        yield problem


def _problem_of_transformers(data: Mapping[str, Any], prefix: str) -> str | None:
    """Let Transformers check a configuration; return a sentence that names the key, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if data["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    except Exception as error:
        named = re.search(r"field '(\w+)'", str(error))
        if named and named[1] in data:
            return (
                f"{prefix}{named[1]} is {show(data[named[1]])}, which a model of type {data['model_type']} cannot have."
            )
        return f"{prefix or 'the content'} does not fit a model of type {data['model_type']}: {explain_reading(error)}."
    return None


#: Names of settings that are a number of heads or channels.
_SIZES = re.compile(r"(_heads|head_dim|(hidden|intermediate|ffn|inner|embedding|embed|mlp)_(size|dim))$")


def _activation() -> Kind:
    """The name of an activation function that Transformers has."""
    from transformers.activations import ACT2FN

    words = f"an activation function, such as {', '.join(sorted(ACT2FN)[:8])}"
    return Kind(words, lambda value: isinstance(value, str) and value in ACT2FN)


def _defaults(model_type: Any) -> Mapping[str, Any]:
    """Return the default values of Transformers' configuration of a type; empty for an unknown type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from vlm_cli.quiet import quiet_libraries

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    try:
        with quiet_libraries():
            return CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # a class that cannot be made without arguments has no defaults to compare with
        return {}


def _text_kind(name: str, value: Any, defaults: Mapping[str, Any]) -> Kind:
    """Return what a key of a language model's configuration must hold."""
    default = defaults.get(name)
    if name in _REQUIRED and (type(default) is int or not defaults):
        return _REQUIRED[name]
    if name.endswith(("_eps", "epsilon")) and type(default) is float:
        return optional(number(0, 1, above=True))
    if name.endswith(("_eps", "epsilon")) and type(value) in (int, float):
        return number(0, 1)
    if name in _ROPE_BASES:
        return optional(either(_BASE, list_of(_BASE)))
    if name.endswith("_layers") and type(default) is int:
        return optional(either(whole(0, _MOST_LAYERS), list_of(ANYTHING)))
    if name.endswith(("token_id", "token_ids")):
        return optional(_IDS if name.startswith("eos") else _ONE_ID if name.endswith("id") else ANYTHING)
    if name in ("dtype", "torch_dtype"):
        return optional(_DTYPE)
    if name in ("hidden_act", "activation_function") and isinstance(default, str):
        return _activation()
    if _SIZES.search(name) and type(value) in (int, float):
        return whole(0, _MOST_CHANNELS)
    if type(default) is bool:
        return optional(either(truth(), list_of(truth())))
    if type(default) is int:
        return optional(either(number(-(2**31), 2**40), list_of(ANYTHING)))
    if type(default) is float:
        return optional(either(number(-1e30, 1e30), list_of(ANYTHING)))
    if isinstance(default, str):
        return optional(text(most=10_000, empty=True))
    if isinstance(default, Mapping) and name in ("rope_parameters", "rope_scaling"):
        return optional(_ROPE)
    if isinstance(default, Mapping):
        return optional(mapping_of(ANYTHING))
    if isinstance(default, (list, tuple)):
        return optional(list_of(ANYTHING))
    if type(value) in (int, float):
        return Kind("a finite number of at most 20 digits", lambda x: -1e20 <= x <= 1e20)
    return ANYTHING


#: Names of the base of rotary position embeddings; a list has one base for each layer.
_ROPE_BASES = ("rope_theta", "global_rope_theta", "local_rope_theta", "rope_local_base_freq", "rotary_emb_base")
_BASE = number(0, 1e15, above=True)
#: Numbers of a mapping of rotary position embeddings that divide or scale.
_ROPE_SCALES = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
)


def _find_rope_problems(data: Mapping[str, Any], key: str) -> Iterator[str]:
    """Check the settings of rotary position embeddings; some models have one such mapping for each kind of layer."""
    numbers = number(-1e15, 1e15)
    for name, value in data.items():
        place = f"{key}.{name}"
        if name in ("rope_type", "type"):
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            yield from choice("default", "mrope", *sorted(ROPE_INIT_FUNCTIONS)).find_problems(value, place)
        elif name == "rope_theta":
            yield from _BASE.find_problems(value, place)
        elif name in _ROPE_SCALES and value is not None:
            yield from either(_BASE, list_of(_BASE)).find_problems(value, place)
        elif name == "partial_rotary_factor" and value is not None:
            yield from number(0, 1, above=True).find_problems(value, place)
        elif isinstance(value, Mapping):
            yield from _find_rope_problems(value, place)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from numbers.find_problems(value, place)


_ROPE = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_rope_problems)


# -- the whole model ---------------------------------------------------------------------------------------------------

_ONE_ENCODER = mapping({"name": text(empty=True)})
_SEVERAL_ENCODERS = list_of(_ONE_ENCODER, least=2, most=8)
_ENCODER_SETTINGS = Kind(
    "a mapping of keys to values, or a list of several",
    lambda x: isinstance(x, (Mapping, list)),
    lambda x, key: (_SEVERAL_ENCODERS if isinstance(x, list) else _ONE_ENCODER).find_problems(x, key),
)

_VLM_CONFIG = mapping(
    {
        "composition": mapping(
            {
                "vision_encoder": _ENCODER_SETTINGS,
                "vision_tokenizer": mapping({"type": text(most=200)}),
                "fusion": mapping({"type": text(most=200)}),
                "language_model": mapping({"name": text(empty=True)}),
            }
        ),
        "text_config": mapping({"model_type": text(most=100)}),
        "vision_config": _VISION_CONFIG,
        "added_tokens": list_of(text(most=1_000)),
        "first_added_id": _ID,
        "media_token_id": _ID,
    },
    {
        "pad_token_id": optional(_ID),
        "eos_token_id": optional(_IDS),
        "dtype": optional(_DTYPE),
        "backbones": optional(mapping_of(ANYTHING)),
        "adapters": optional(list_of(choice(*ADAPTABLE_PARTS))),
        "tiling_texts": optional(mapping_of(list_of(_ID))),
        "random_weights": optional(Kind("true or false", lambda x: isinstance(x, bool))),
    },
)


def check_is_mapping(name: str, file: str, **keywords: Any) -> None:
    """Check that a JSON file of a directory or hub id, if it exists, is JSON and holds a mapping.

    Raises:
        CheckpointError: naming the file.
    """
    _read(name, file, keywords)


def check_vlm_config(data: Mapping[str, Any], name: str) -> None:
    """Check config.json of a VLM. The composition in it is checked where it is read.

    Raises:
        CheckpointError: naming the key.
    """
    where = f"config.json of {name!r}"
    check(data, _VLM_CONFIG, where)
    check_text_config(data["text_config"], where, "text_config", CheckpointError)
    _check_type_is_known(data["text_config"], where)
    first, number_added = data["first_added_id"], len(data["added_tokens"])
    # A tokenizer that knows `<image>` already keeps its id, which then stands before the added ones.
    if not 0 <= data["media_token_id"] < first + number_added:
        raise CheckpointError(
            f"{where} is not valid: media_token_id must be below {first + number_added} (first_added_id and the number "
            f"of added tokens), but is {data['media_token_id']}."
        )
    for words, ids in (data.get("tiling_texts") or {}).items():
        # A media token in a text would take the place of a vision token.
        if any(i >= first + number_added or i == data["media_token_id"] for i in ids):
            raise CheckpointError(
                f"{where} is not valid: tiling_texts must hold ids below {first + number_added}, without that of "
                f"<image>, but those of {show(words)} are {show(ids)}."
            )
    _check_encoder(data["vision_config"], where)


def _check_encoder(vision: Mapping[str, Any], where: str) -> None:
    """Check what a vision encoder of its type needs.

    Raises:
        CheckpointError: naming the key.
    """
    if vision.get("type") == "several":
        one = mapping({"vision_cfg": _VISION_CFG, "preprocess": _PREPROCESS})
        check(vision, mapping({"encoders": list_of(one, least=2, most=8)}), f"vision_config in {where}")
        for encoder in vision["encoders"]:
            if encoder.get("type") == "several":
                raise CheckpointError(f"{where} is not valid: vision_config.encoders may hold no list of encoders.")
            _check_encoder(encoder, where)
        return
    if "type" not in vision:
        check(vision, mapping({"embed_dim": whole(1, 1_000_000)}), f"vision_config in {where}")
        if problem := _patches_problem(vision["vision_cfg"]):
            raise CheckpointError(f"{where} is not valid: {problem}")
    if vision.get("type") == "timm":
        check(vision, mapping({"name": text(most=100)}, {"args": TIMM_ARGUMENTS}), f"vision_config in {where}")
    if vision.get("type") == "hf":
        check(vision, mapping({"config": mapping({"model_type": text(most=100)})}), f"vision_config in {where}")
        check_text_config(vision["config"], where, "vision_config.config", CheckpointError)
        check_sizes(vision["config"], where)


def _check_type_is_known(text_config: Mapping[str, Any], where: str) -> None:
    """Check that Transformers has the type of a language model, or that the language model brings its own code.

    Raises:
        CheckpointError: if neither holds.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = text_config["model_type"]
    if model_type not in CONFIG_MAPPING and not text_config.get("auto_map"):
        raise CheckpointError(
            f"{where} is not valid: text_config.model_type is {show(model_type)}, a type of language model that this "
            "version of Transformers does not have. A newer version may: pip install -U transformers"
        )


# -- files beside it ---------------------------------------------------------------------------------------------------

_GENERATION_CONFIG = mapping(
    {},
    {
        **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(_ONE_ID)),
        "eos_token_id": optional(_IDS),
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), optional(whole(0, _MOST_ID))),
        **dict.fromkeys(("num_beams", "num_return_sequences"), optional(whole(1, 1_000))),
        "num_beam_groups": optional(whole(1, 1_000)),
        "temperature": optional(number(0, 1_000)),
        "top_k": optional(whole(0, _MOST_CHANNELS)),
        **dict.fromkeys(("top_p", "min_p", "typical_p"), optional(number(0, 1))),
        "repetition_penalty": optional(number(0, 1_000, above=True)),
        "length_penalty": optional(number(-1_000, 1_000)),
        "no_repeat_ngram_size": optional(whole(0, _MOST_ID)),
        **dict.fromkeys(("do_sample", "use_cache", "output_attentions", "output_hidden_states"), optional(truth())),
    },
)


def _find_tiling_problems(data: Any, key: str) -> Iterator[str]:
    """Find what keeps the section `tiling` of an image processor from being one."""
    try:
        read_tiling(data)
    except CompositionError as error:
        yield from (f"{key.removesuffix('tiling')}{problem}" for problem in error.problems)


_TILING = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_tiling_problems)
_IMAGE_PROCESSOR = mapping(
    {"preprocess": _PREPROCESS_OF_ANY}, {"image_processor_type": text(most=200), "tiling": optional(_TILING)}
)
_TOKENIZER_CONFIG = mapping(
    {},
    {
        "model_max_length": optional(number(1, 1e31)),
        "added_tokens_decoder": optional(mapping_of(mapping({"content": text(most=10_000)}))),
        "chat_template": optional(either(text(most=10_000_000, empty=True), list_of(mapping_of(ANYTHING)))),
        "tokenizer_class": optional(text(most=200)),
        "padding_side": optional(text(most=10)),
    },
)


def _has_plain_keys(value: Any) -> bool:
    """Tell whether all keys in a value are printable: tokenizers prints the keys of a token that it does not know."""
    waiting = [value]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Mapping):
            if not all(str(key).isprintable() for key in x):
                return False
            waiting.extend(x.values())
        elif isinstance(x, list):
            waiting.extend(x)
    return True


def _has_small_ids(vocabulary: Any) -> bool:
    """Tell whether a vocabulary gives no huge id: tokenizers reserves memory up to the largest one."""
    if isinstance(vocabulary, list):
        return len(vocabulary) <= _MOST_CHANNELS
    return isinstance(vocabulary, Mapping) and all(
        type(x) is int and 0 <= x < _MOST_CHANNELS for x in vocabulary.values()
    )


def _find_model_problems(model: Mapping[str, Any], key: str) -> Iterator[str]:
    """Find what makes tokenizers reserve too much, or panic: it cuts a prefix off the second half of each merge."""
    if "vocab" in model:
        yield from Kind(f"a vocabulary with ids below {_MOST_CHANNELS:,}", _has_small_ids).find_problems(
            model["vocab"], f"{key}.vocab"
        )
    prefix, merges = model.get("continuing_subword_prefix") or "", model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges if prefix else ():
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1] if merge else ""
        if not str(second).startswith(prefix):
            yield f"{key}.merges holds {show(merge)}, whose second half does not begin with {show(prefix)}."
            return


_PLAIN_KEYS = Kind("a value whose keys are printable", _has_plain_keys)
_TOKENIZER = mapping(
    {},
    {
        "added_tokens": optional(_PLAIN_KEYS),
        "model": optional(Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_model_problems)),
    },
)
_LOSS = Kind("a number", lambda value: type(value) in (int, float))  # a loss may be NaN
_TRAINING_MANIFEST = mapping(
    {
        "step": whole(0, 10**12),
        "seconds": number(0, 1e12),
        "images": whole(0, 10**15),
        "run": mapping_of(ANYTHING),
    },
    {"unlogged": optional(mapping({"last_logged": whole(0, 10**12), "total": _LOSS}))},
)


def check_generation_config(name: str, **keywords: Any) -> None:
    """Check generation_config.json of a directory or hub id, if it has one.

    Raises:
        CheckpointError: naming the key.
    """
    if (data := _read(name, "generation_config.json", keywords)) is not None:
        check(data, _GENERATION_CONFIG, f"generation_config.json of {name!r}")


def check_processor_files(name: str, **keywords: Any) -> None:
    """Check the files that describe how a VLM prepares images and reads texts.

    Raises:
        CheckpointError: naming file and key.
    """
    data = _read(name, "processor_config.json", keywords)
    if data is not None and "image_processor" in data:
        check(data, mapping({"image_processor": _IMAGE_PROCESSOR}), f"processor_config.json of {name!r}")
    elif (own := _read(name, "preprocessor_config.json", keywords)) is not None:
        check(own, _IMAGE_PROCESSOR, f"preprocessor_config.json of {name!r}")
    elif data is not None:
        check(data, mapping({"image_processor": _IMAGE_PROCESSOR}), f"processor_config.json of {name!r}")
    check_tokenizer(name, **keywords)


_MOST_GROWTH = 64  # characters that a tokenizer may make of one; a space becomes a mark of one character


def check_tokenizer(name: str, **keywords: Any) -> None:
    """Check the files of a tokenizer in a directory or hub id.

    They may name no other files, bring no text to the terminal and no huge ids, and multiply no text: forty
    replacements that each double a text make gigabytes of a word.

    Raises:
        CheckpointError: naming file and key.
    """
    if (settings := _read(name, "tokenizer_config.json", keywords)) is not None:
        where = f"tokenizer_config.json of {name!r}"
        check(settings, _TOKENIZER_CONFIG, where)
        check(settings, _PLAIN_KEYS, where)
        check_named_files(settings, where)
    if (special := _read(name, "special_tokens_map.json", keywords)) is not None:
        check(special, _PLAIN_KEYS, f"special_tokens_map.json of {name!r}")
    data = _read(name, "tokenizer.json", keywords)
    if data is None:
        return
    check(data, _TOKENIZER, f"tokenizer.json of {name!r}")
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(data.get(key))) > _MOST_GROWTH:
            raise CheckpointError(
                f"tokenizer.json of {name!r} is not valid: {key} makes up to {growth:.3g} characters of one; "
                f"{_MOST_GROWTH} are possible. Fetch it again, or give another tokenizer."
            )


def _growth(step: Any) -> float:
    """Return how many characters a step of a tokenizer, with the steps in it, makes of one at most."""
    if not isinstance(step, Mapping):
        return 1.0
    growth = 1.0
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in step[key] if isinstance(step.get(key), list) else ():
            growth = min(growth * _growth(inner), 1e300)
    pattern, content = step.get("pattern"), step.get("content")
    if step.get("type") == "Replace" and isinstance(content, str):
        # A regular expression may match the empty text, before each character.
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        per_match = len(content) / max(1, len(text)) if isinstance(text, str) else len(content) + 1
        growth *= max(1.0, per_match)
    return growth


def check_training_manifest(data: Any, file: Path) -> None:
    """Check the manifest of a checkpoint of `vlm train`.

    Raises:
        CheckpointError: naming the key.
    """
    check(data, _TRAINING_MANIFEST, repr(str(file)))


def _read(name: str, file: str, keywords: Mapping[str, Any]) -> Any:
    """Read a JSON file of a directory or hub id; None if it has none.

    Raises:
        CheckpointError: if the file is no JSON.
    """
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = Path(name) / file if Path(name).is_dir() else cached_file(name, file, **quiet, **keywords)
    except OSError:  # no such repository or revision, which the loaders report
        return None
    if path is None or not Path(path).exists():
        return None
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {file} of {name!r}: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} of {name!r} is not valid: {error}.") from None
    check(data, mapping({}), f"{file} of {name!r}")
    return data
