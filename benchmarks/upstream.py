"""What fails in Transformers and OpenCLIP themselves, each as the shortest call that shows it; nothing of ours runs.

    python -m benchmarks.upstream            all
    python -m benchmarks.upstream jamba      one

Each prints the largest difference of logits that should be equal, or what was found instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from benchmarks.compatibility.language_models import VOCABULARY, tiny_config

Case = Callable[[], "float | str"]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def tiny(model_type: str, **changes: object) -> torch.nn.Module:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(length: int = 11) -> Tensor:
    return torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def in_pieces(lm: torch.nn.Module) -> float:
    """Four tokens, then seven with the cache of the first, against all eleven at once."""
    ids = tokens()
    first = lm(ids[:, :4], use_cache=True)
    cache = {name: first[name] for name in ("cache", "past_key_values", "cache_params") if first.get(name) is not None}
    return distance(lm(ids[:, 4:], **cache).logits, lm(ids).logits[:, 4:])


def left_padded(lm: torch.nn.Module) -> float:
    """Eleven tokens with three of padding before them, against the eleven alone."""
    ids = tokens()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    return distance(lm(padded, attention_mask=mask).logits[:, 3:], lm(ids).logits)


def decoded(lm: torch.nn.Module) -> float:
    """Four greedy steps with a cache, against one pass over the result."""
    lm.generation_config = GenerationConfig(pad_token_id=0)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = lm.generate(tokens(), **options)
    return distance(torch.stack(output.logits, dim=1), lm(output.sequences).logits[:, -5:-1])


def lengthened(lm: torch.nn.Module) -> float:
    """Nine tokens, against the first nine of eleven."""
    ids = tokens()
    return distance(lm(ids[:, :9]).logits, lm(ids).logits[:, :9])


@case
def mamba_reads_a_cache_one_token_at_a_time() -> float:
    return in_pieces(tiny("mamba"))


@case
def falcon_mamba_reads_a_cache_one_token_at_a_time() -> float:
    return in_pieces(tiny("falcon_mamba"))


@case
def jamba_starts_its_state_anew() -> float:
    return in_pieces(tiny("jamba"))


@case
def zamba_starts_its_state_anew() -> float:
    return in_pieces(tiny("zamba"))


@case
def recurrent_gemma_reads_padding() -> float:
    return left_padded(tiny("recurrent_gemma"))


@case
def deepseek_v4_counts_padding() -> float:
    return left_padded(tiny("deepseek_v4"))


@case
def git_forgets_the_mask() -> float:
    return left_padded(tiny("git"))


@case
def rwkv_takes_no_mask() -> float:
    return left_padded(tiny("rwkv"))


@case
def xlstm_takes_no_mask() -> float:
    return left_padded(tiny("xlstm"))


@case
def zamba2_decodes_with_other_rounding() -> float:
    return decoded(tiny("zamba2"))


@case
def moshi_decodes_past_its_window() -> float:
    return decoded(tiny("moshi", sliding_window=5))


@case
def doge_depends_on_the_length_past_its_window() -> float:
    return lengthened(tiny("doge", keep_window_size=5))


def tower(name: str, **changes: object) -> torch.nn.Module:
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**{**config["vision_cfg"], "timm_model_pretrained": False, **changes})
    return _build_vision_tower(config["embed_dim"], vision).eval()


def raised(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:  # which one, is what is asked
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@case
def openclip_vitamin_xl_384_declares_another_size() -> str:
    return f"{open_clip.get_model_config('ViTamin-XL-384')['vision_cfg']['image_size']} pixels"


@case
def openclip_coca_norms_patches_with_the_norm_of_its_pooler() -> str:
    coca, pixels = tower("coca_ViT-B-32"), torch.zeros(1, 3, 224, 224)
    return raised(lambda: coca.forward_intermediates(pixels, indices=1, normalize_intermediates=True))


@case
def openclip_fastvit_intermediates_stop_early() -> str:
    fastvit, pixels = tower("MobileCLIP2-S0"), torch.zeros(1, 3, 256, 256)
    last = fastvit.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][0]
    return f"{last.shape[1]} channels, and {fastvit.trunk.forward_features(pixels).shape[1]} of forward_features"


@case
def openclip_resnet_takes_no_pair_as_image_size() -> str:
    return raised(lambda: tower("RN50", image_size=(224, 224)))


@case
def openclip_siglip_has_another_gelu_than_its_weights() -> str:
    """Transformers' configuration of the same weights says gelu_pytorch_tanh."""
    kinds = {x.approximate for x in tower("ViT-B-16-SigLIP").modules() if isinstance(x, torch.nn.GELU)}
    return f"approximate={', '.join(sorted(kinds))}"


def main(word: str = "") -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, measure in CASES.items():
            if word in name:
                found = measure()
                print(f"{name.replace('_', ' '):60} {found if isinstance(found, str) else f'{found:.1e}'}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
