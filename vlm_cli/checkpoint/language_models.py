"""Language models of Transformers by name: hub id, directory or GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import LanguageModelError, first_line
from vlm_cli.modeling.language_model import check_causal
from vlm_cli.registry import suggest

__all__ = ["LanguageModelSource", "find_language_model"]


@dataclass(frozen=True)
class LanguageModelSource:
    """Where a language model is, in Transformers' words."""

    name: str
    location: str  # hub id or directory
    keywords: dict[str, Any]  # gguf_file, revision, trust_remote_code
    config: PreTrainedConfig

    def tokenizer(self, other: str | None = None) -> Tokenizer:
        """The model's own tokenizer, or another one.

        Raises:
            LanguageModelError: if there is none.
        """
        location, keywords = (self.location, self.keywords) if other is None else (other, {})
        try:
            return AutoTokenizer.from_pretrained(location, **keywords)
        except Exception as error:
            raise LanguageModelError(
                f"{other or self.name!r} has no tokenizer that can be read ({first_line(error)}). "
                "Give one: --set language_model.tokenizer=DIRECTORY_OR_HUB_ID"
            ) from None

    def load(self, dtype: Any = "auto") -> PreTrainedModel:
        """The model with its weights.

        Raises:
            LanguageModelError: if they cannot be fetched or read, or do not cover the model.
        """
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.location, dtype=dtype, output_loading_info=True, **self.keywords
            )
        except Exception as error:
            raise LanguageModelError(
                f"cannot load the weights of language model {self.name!r}: {first_line(error)}. {_ADVICE}"
            ) from None
        if missing := sorted(info["missing_keys"]):
            raise LanguageModelError(
                f"the weights of language model {self.name!r} lack {len(missing)} tensors, e.g. {missing[0]!r}; "
                "a model with random parts would answer nonsense."
            )
        if "gguf_file" in self.keywords:
            # The weights were de-quantized while loading; the mark of the quantizer would forbid saving them.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
        return model


_ADVICE = (
    "If this machine is offline, fetch it once where there is a network and copy the cache (HF_HOME), or give a "
    "local directory or GGUF file."
)


def find_language_model(options: LanguageModelOptions, *, trust_remote_code: bool = False) -> LanguageModelSource:
    """Read a language model's configuration, a few kB; weights stay where they are.

    Raises:
        LanguageModelError: if there is none, or if it is no autoregressive decoder of text.
    """
    path = Path(options.name).expanduser()
    keywords: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    location = options.name
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise LanguageModelError(f"there is no GGUF file {options.name!r}.")
        location, keywords = str(path.parent), {**keywords, "gguf_file": path.name}
    elif path.exists():
        location = str(path)
        if not (path / "config.json").is_file():
            raise LanguageModelError(
                f"{options.name!r} is no language model: it has no config.json. Give a directory that "
                "`save_pretrained` wrote, a GGUF file, or a hub id."
            )
    if options.revision is not None:
        keywords["revision"] = options.revision
    try:
        config = AutoConfig.from_pretrained(location, **keywords)
    except Exception as error:
        raise LanguageModelError(_cannot_find(options.name, path.exists(), error)) from None
    check_causal(config, options.name)
    return LanguageModelSource(options.name, location, keywords, config)


def _cannot_find(name: str, exists: bool, error: Exception) -> str:
    if exists:
        return f"cannot read the configuration of language model {name!r}: {first_line(error)}."
    return (
        f"cannot find language model {name!r}: it is no directory here, and the hub did not give it "
        f"({first_line(error)}).{suggest(name, _nearby())} {_ADVICE}"
    )


def _nearby() -> list[str]:
    """Names that the user may have meant: directories here, and models in the cache."""
    here = [str(p.parent) for p in Path().glob("*/config.json")]
    try:
        from huggingface_hub import scan_cache_dir

        return here + [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except Exception:  # no cache is no reason to fail while reporting another failure
        return here
