"""Find and load language models of Transformers by name: a hub id, a directory or a GGUF file."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from vlm_cli.checkpoint.inside import check_folder, check_index, read_index
from vlm_cli.checkpoint.parts.gguf_tensors import count_gguf_elements
from vlm_cli.checkpoint.parts.remote_code import adopt_from_config
from vlm_cli.checkpoint.parts.tokenizer_packages import explain_missing_packages
from vlm_cli.checkpoint.schemas.generation_config import check_generation_config
from vlm_cli.checkpoint.schemas.text_config import check_text_config, check_text_config_file
from vlm_cli.checkpoint.schemas.tokenizer import check_tokenizer
from vlm_cli.checkpoint.size_limits import limited_size, weight_files
from vlm_cli.checkpoint.surplus import find_surplus
from vlm_cli.checkpoint.torch_files import describe_load_error, read_shapes
from vlm_cli.checkpoint.whole import check_files
from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import CheckpointError, LanguageModelError, UntrustedCodeError, explain_reading, first_line
from vlm_cli.hub_ids import check_hub_id, is_hub_id
from vlm_cli.lookalike import find_named
from vlm_cli.modeling.language_model import check_causal
from vlm_cli.offline import use_cache_without_network
from vlm_cli.printable import count_of
from vlm_cli.registry import suggest
from vlm_cli.trust import load_config, load_generation_config, load_language_model, load_tokenizer, match_weights

__all__ = ["LanguageModelSource", "find_language_model"]


@dataclass(frozen=True)
class LanguageModelSource:
    """Where a language model is, and its configuration.

    Attributes:
        name: what the user called it.
        location: hub id or directory.
        keywords: `gguf_file`, `revision` and `trust_remote_code` of Transformers' `from_pretrained`.
        config: its configuration.
    """

    name: str
    location: str
    keywords: dict[str, Any]
    config: PreTrainedConfig

    def tokenizer(self, other: str | None = None) -> Tokenizer:
        """Load the model's own tokenizer, or that of another hub id or directory.

        Raises:
            LanguageModelError: if there is no tokenizer.
            UntrustedCodeError: if the tokenizer needs code that may not run.
        """
        location, keywords = self.location, self.keywords
        if other is not None:
            here = find_named(other)
            location = str(here) if here.exists() else other
            if not here.exists():
                check_hub_id(other, _SAVED, error=LanguageModelError)
                use_cache_without_network()
            check_folder(here)
            keywords = {"trust_remote_code": self.keywords.get("trust_remote_code", False)}
        advice = "Give one: --set language_model.tokenizer=DIRECTORY_OR_HUB_ID"
        try:
            if "gguf_file" not in keywords:
                check_tokenizer(location, **{key: x for key, x in keywords.items() if key == "revision"})
            tokenizer = load_tokenizer(location, **keywords)
        except UntrustedCodeError:
            raise
        except Exception as error:
            why = explain_reading(error)
            if why.startswith("Couldn't instantiate the backend tokenizer"):
                why = "there is no tokenizer.json, nor a file it could be made of"
            if "gguf_file" not in keywords:
                why = explain_missing_packages(location, keywords.get("revision")) or why
            raise LanguageModelError(
                f"{other or self.name!r} has no tokenizer that can be read ({why}). {advice}"
            ) from None
        # Without tokenizer files, Transformers makes an empty tokenizer for many types of models.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise LanguageModelError(f"{other or self.name!r} has no tokenizer: its vocabulary is empty. {advice}")
        return tokenizer

    def generation_config(self) -> GenerationConfig:
        """Read how the model ends and samples its answers, a file of a few hundred bytes.

        Raises:
            CheckpointError: if the file is not valid.
        """
        if "gguf_file" not in self.keywords:
            hub = {key: x for key, x in self.keywords.items() if key == "revision"}
            check_generation_config(self.location, **hub)
            try:
                return load_generation_config(self.location, **hub)
            except OSError:  # there is none
                pass
            except ValueError as error:
                raise LanguageModelError(
                    f"generation_config.json of {self.name!r} is not valid: {first_line(error)} Correct the file, or "
                    "delete it."
                ) from None
        return GenerationConfig.from_model_config(self.config)

    def check_files(self, model: PreTrainedModel) -> None:
        """Check that the files in a directory cover a model and hold no tensor beyond it, before they are loaded.

        Only names and shapes are read. A hub id is checked when its files are here, and a quantized model by its
        quantizer, when it is loaded.

        Args:
            model: of this configuration, on the meta device.

        Raises:
            VLMError: if weights are missing, cannot be read or do not fit, or their index names another place.
        """
        if "gguf_file" in self.keywords:
            self._check_uses_all(model, {})
            return
        if not (folder := Path(self.location)).is_dir():
            return
        check_index(self.location, self.keywords)
        if not weight_files(self.location):
            raise LanguageModelError(
                f"cannot load the weights of language model {self.name!r}: there is no file named model.safetensors in "
                "its directory. Fetch it again, or add --random-weights."
            )
        if getattr(self.config, "quantization_config", None) is not None or (folder / "adapter_config.json").exists():
            return
        state: dict[str, Any] = {}
        try:
            for file in _files_to_load(folder):
                state |= read_shapes(file)
        except CheckpointError:
            raise
        except Exception as error:
            raise self._unreadable(error) from None
        if state:
            info = match_weights(model, state)
            _check_complete(self.name, info)
            self._check_uses_all(model, info)

    def _limited_size(self) -> AbstractContextManager[None]:
        """Refuse a configuration that asks for more numbers than the weight files hold; quantized files hold more."""
        file = self.keywords.get("gguf_file")
        is_quantized = file is not None or getattr(self.config, "quantization_config", None) is not None
        files = weight_files(self.location if file is None else Path(self.location) / file)
        return limited_size(f"language model {self.name!r}", files, elements_per_byte=8 if is_quantized else 1)

    def load(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """Load the model with its weights.

        Raises:
            LanguageModelError: if they cannot be fetched or read, or do not cover the model.
            UntrustedCodeError: if the model needs code that may not run.
        """
        is_gguf = "gguf_file" in self.keywords
        if not is_gguf:
            check_index(self.location, self.keywords)
        try:
            with self._limited_size(), _names_in_gguf_made_once() if is_gguf else nullcontext():
                loaded: Any = load_language_model(
                    self.location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **self.keywords
                )
            model, info = loaded
        except UntrustedCodeError:
            raise
        except CheckpointError as error:
            raise LanguageModelError(str(error)) from None
        except Exception as error:
            raise self._unreadable(error) from None
        _check_complete(self.name, info)
        self._check_uses_all(model, info)
        if is_gguf:
            # Loading turned the weights into plain floats. The quantizer's mark would still forbid saving them.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
        return model

    def _unreadable(self, error: Exception) -> LanguageModelError:
        """Make the error for weights that cannot be fetched or read."""
        advice = "" if Path(self.location).exists() else f" {_ADVICE}"
        return LanguageModelError(
            f"cannot load the weights of language model {self.name!r}: {describe_load_error(error)}.{advice}"
        )

    def _check_uses_all(self, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
        """Check that the model uses every tensor that its files hold.

        Raises:
            LanguageModelError: if the configuration builds a model with fewer tensors.
        """
        if (file := self.keywords.get("gguf_file")) is not None:
            surplus = _find_gguf_surplus(Path(self.location) / file, model)
        else:
            surplus = find_surplus(info["unexpected_keys"], model.config, model.state_dict())
        if surplus:
            layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", "?")
            raise LanguageModelError(
                f"the files of language model {self.name!r} hold {count_of(len(surplus), 'tensor')} that a model of "
                f"its configuration does not have, e.g. {surplus[0]!r}. Without them it answers as another model. The "
                f"configuration says num_hidden_layers={layers}: does it belong to these weights? Fetch both again. If "
                "the tensors are meant to be left out, load and save the model once with Transformers."
            )


def _find_gguf_surplus(path: Path, model: PreTrainedModel) -> list[str]:
    """Return the names of tensors in a GGUF file for which a loaded model has no place.

    Transformers drops such tensors without a word. Where no tensor is missing and all shapes fit, a file that holds
    more numbers than the model holds such tensors. The blocks that the model lacks come first.
    """
    try:
        held = count_gguf_elements(path)
    except (OSError, ValueError, struct.error) as error:
        raise LanguageModelError(f"cannot read the names of tensors in {str(path)!r}: {error}.") from None
    # Rotary frequencies follow from the configuration, and a tied head may be stored beside the embedding.
    text = model.config.get_text_config(decoder=True)
    is_tied = getattr(text, "tie_word_embeddings", False)
    held = {k: n for k, n in held.items() if not k.startswith("rope_") and not (is_tied and k == "output.weight")}
    places = {id(x): x.numel() for x in model.state_dict(keep_vars=True).values()}
    if sum(held.values()) <= sum(places.values()):
        return []
    blocks = {name: re.match(r"blk\.(\d+)\.", name) for name in held}
    beyond = sorted(name for name, block in blocks.items() if block and int(block[1]) >= text.num_hidden_layers)
    return beyond or sorted(held)


@contextmanager
def _names_in_gguf_made_once() -> Iterator[None]:
    """Keep the table of the names that tensors have in GGUF files.

    Transformers makes it anew for each module of a model. For a model of 32 layers, this takes ten seconds and more.
    """
    import gguf  # takes a tenth of a second, which commands without such files do not spend

    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


def _files_to_load(folder: Path) -> list[Path]:
    """List the weight files that Transformers loads from a directory: whole or in shards, safetensors first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / file for file in sorted(set(read_index(index).values()))]
    return []


def _check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Check that the files held every tensor of the model, in the right shape.

    Raises:
        LanguageModelError: if they did not.
    """
    nonsense = "a model with random parts would answer nonsense"
    if missing := sorted(info["missing_keys"]):
        raise LanguageModelError(
            f"the weights of language model {name!r} lack {count_of(len(missing), 'tensor')}, e.g. {missing[0]!r}; "
            f"{nonsense}."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, given, wanted = mismatched[0]
        raise LanguageModelError(
            f"language model {name!r} has {count_of(len(mismatched), 'tensor')} of another shape than its "
            f"configuration says, e.g. {tensor!r}: {list(given)} in the file, {list(wanted)} wanted. Do they "
            "belong together?"
        )


_SAVED = "a directory that `save_pretrained` wrote"
_ADVICE = (
    "If this machine is offline, fetch it once where there is a network and copy the cache (HF_HOME), or give a "
    "local directory or GGUF file."
)


def find_language_model(options: LanguageModelOptions, *, trust_remote_code: bool = False) -> LanguageModelSource:
    """Find a language model and read its configuration, a few kB. No weight is read.

    Raises:
        LanguageModelError: if there is no such model, or if it does not write text from left to right.
            UntrustedCodeError: if its configuration asks for code that may not run.
    """
    path = find_named(options.name)
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    location = options.name
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise LanguageModelError(f"there is no GGUF file {options.name!r}.")
        location, keywords = str(path.parent), {**keywords, "gguf_file": path.name}
    elif path.exists():
        location = str(path)
        check_folder(path)
        check_files(path)
        if not (path / "config.json").is_file():
            raise LanguageModelError(
                f"{options.name!r} is no language model: it has no config.json. Give a directory that "
                "`save_pretrained` wrote, a GGUF file, or a hub id."
            )
    else:
        near = "" if is_hub_id(options.name) else suggest(options.name, _nearby())
        check_hub_id(options.name, f"{_SAVED}, a GGUF file", near=near, error=LanguageModelError)
        use_cache_without_network()
    if options.revision is not None:
        keywords["revision"] = options.revision
    if "gguf_file" not in keywords:
        check_text_config_file(
            options.name, location, **({} if options.revision is None else {"revision": options.revision})
        )
    try:
        config = load_config(location, **keywords)
    except UntrustedCodeError:
        raise
    except Exception as error:
        raise LanguageModelError(_cannot_find(options.name, path.exists(), error)) from None
    if "gguf_file" in keywords:
        check_text_config(config.to_dict(), f"the metadata of GGUF file {options.name!r}")
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise LanguageModelError(
            f"config.json of language model {options.name!r} is not valid: text_config does not belong there."
        )
    check_causal(config, options.name)
    if trust_remote_code:
        adopt_from_config(config, location, **({} if options.revision is None else {"revision": options.revision}))
    return LanguageModelSource(options.name, location, keywords, config)


def _cannot_find(name: str, exists: bool, error: Exception) -> str:
    if exists:
        return f"cannot read the configuration of language model {name!r}: {explain_reading(error)}."
    return (
        f"cannot find language model {name!r}: it is no directory here, and the hub did not give it "
        f"({first_line(error)}).{suggest(name, _nearby())} {_ADVICE}"
    )


def _nearby() -> list[str]:
    """Return names that the user may have meant: directories here, and models in the cache."""
    here = [str(p.parent) for p in Path().glob("*/config.json")]
    try:
        from huggingface_hub import scan_cache_dir

        return here + [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except Exception:  # without a cache, suggest only directories: the error to report is another one
        return here
