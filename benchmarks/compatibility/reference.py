"""What the published reference works with.

Measured once by running it: mlfoundations/open_flamingo, branch reduce-scope-mllm at c7a5ae5, with OpenCLIP 3.3 and
Transformers 5.23. A tower works if the reference's own code gets a tensor of patches from it whose width is the one
that it tells the vision tokenizer. A language model is found if the table of names leads to its decoder layers. It
works if it runs with its layers, embedding and head replaced by the reference's, and unopened gates then leave its
logits as they were; for that, the random bias was taken out which the reference adds to a head without one (as
published, only gptj and phi keep their logits).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "REFERENCE_LANGUAGE_MODELS_FOUND",
    "REFERENCE_LANGUAGE_MODELS_WORKING",
    "REFERENCE_LANGUAGE_MODELS_WRONG_PATH",
    "REFERENCE_TOWERS",
    "ReferenceTower",
]


@dataclass(frozen=True)
class ReferenceTower:
    """Whether the reference's code works with a tower at the tower's own image size, and as published.

    Attributes:
        own_size: with the image size that the tower was made for.
        published: with `force_image_size=490`, which the code passes for every tower.
    """

    own_size: bool
    published: bool


_BOTH = """
    coca_base coca_roberta-ViT-B-32 mt5-base-ViT-B-32 mt5-xl-ViT-H-14 nllb-clip-base nllb-clip-large
    roberta-ViT-B-32 ViT-B-16 ViT-B-16-plus ViT-B-16-plus-240 ViT-B-16-quickgelu ViT-B-32 ViT-B-32-256
    ViT-B-32-plus-256 ViT-B-32-quickgelu ViT-bigG-14 ViT-bigG-14-CLIPA ViT-bigG-14-CLIPA-336 ViT-bigG-14-quickgelu
    ViT-bigG-14-worldwide ViT-bigG-14-worldwide-378 ViT-e-14 ViT-g-14 ViT-H-14 ViT-H-14-378 ViT-H-14-378-quickgelu
    ViT-H-14-CLIPA ViT-H-14-CLIPA-336 ViT-H-14-quickgelu ViT-H-14-worldwide ViT-H-14-worldwide-378
    ViT-H-14-worldwide-quickgelu ViT-H-16 ViT-L-14 ViT-L-14-280 ViT-L-14-336 ViT-L-14-336-quickgelu ViT-L-14-CLIPA
    ViT-L-14-CLIPA-336 ViT-L-14-quickgelu ViT-L-14-worldwide ViT-L-14-worldwide-quickgelu ViT-L-16 ViT-L-16-320
    ViT-M-16 ViT-M-16-alt ViT-M-32 ViT-M-32-alt ViT-S-16 ViT-S-16-alt ViT-S-32 ViT-S-32-alt
    xlm-roberta-base-ViT-B-32 xlm-roberta-large-ViT-H-14
"""
_OWN_SIZE = """
    ViT-B-16-SigLIP ViT-B-16-SigLIP2 ViT-B-16-SigLIP2-256 ViT-B-16-SigLIP2-384 ViT-B-16-SigLIP2-512
    ViT-B-16-SigLIP-256 ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512 ViT-B-16-SigLIP-i18n-256 ViT-B-32-SigLIP2-256
    ViT-gopt-16-SigLIP2-256 ViT-gopt-16-SigLIP2-384 ViT-L-16-SigLIP2-256 ViT-L-16-SigLIP2-384 ViT-L-16-SigLIP2-512
    ViT-L-16-SigLIP-256 ViT-L-16-SigLIP-384 ViT-SO400M-14-SigLIP ViT-SO400M-14-SigLIP2 ViT-SO400M-14-SigLIP2-378
    ViT-SO400M-14-SigLIP-378 ViT-SO400M-14-SigLIP-384 ViT-SO400M-16-SigLIP2-256 ViT-SO400M-16-SigLIP2-384
    ViT-SO400M-16-SigLIP2-512 ViT-SO400M-16-SigLIP-i18n-256
"""
_NEITHER = """
    coca_ViT-B-32 coca_ViT-L-14 convnext_base convnext_base_w convnext_base_w_320 convnext_large convnext_large_d
    convnext_large_d_320 convnext_small convnext_tiny convnext_xlarge convnext_xxlarge convnext_xxlarge_320
    EVA01-g-14 EVA01-g-14-plus EVA02-B-16 EVA02-E-14 EVA02-E-14-plus EVA02-L-14 EVA02-L-14-336 MobileCLIP2-B
    MobileCLIP2-L-14 MobileCLIP2-S0 MobileCLIP2-S2 MobileCLIP2-S3 MobileCLIP2-S4 MobileCLIP-B MobileCLIP-S1
    MobileCLIP-S2 nllb-clip-base-siglip nllb-clip-large-siglip PE-Core-B-16 PE-Core-bigG-14-448 PE-Core-L-14-336
    PE-Core-S-16-384 PE-Core-T-16-384 RN50 RN50-quickgelu RN50x4 RN50x4-quickgelu RN50x16 RN50x16-quickgelu RN50x64
    RN50x64-quickgelu RN101 RN101-quickgelu swin_base_patch4_window7_224 vit_medium_patch16_gap_256
    vit_relpos_medium_patch16_cls_224 ViTamin-B ViTamin-B-LTT ViTamin-L ViTamin-L2 ViTamin-L2-256 ViTamin-L2-336
    ViTamin-L2-384 ViTamin-L-256 ViTamin-L-336 ViTamin-L-384 ViTamin-S ViTamin-S-LTT ViTamin-XL-256 ViTamin-XL-336
    ViTamin-XL-384
"""

#: Name -> what works. Of the 144, 80 work at their own size and 54 as published.
REFERENCE_TOWERS = {
    **dict.fromkeys(_BOTH.split(), ReferenceTower(own_size=True, published=True)),
    **dict.fromkeys(_OWN_SIZE.split(), ReferenceTower(own_size=True, published=False)),
    **dict.fromkeys(_NEITHER.split(), ReferenceTower(own_size=False, published=False)),
}

_WORKING = """
    diffllama gpt_neox gptj internlm3 iquestcoder llama llama4 llama4_text mistral mpt opt phi phi3 phi4_multimodal
    phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp
    qwen4_exp_text stablelm
"""
_ONLY_FOUND = """
    gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text minicpm3 mllama recurrent_gemma vaultgemma
"""

#: Types that work from the prompt to the generated text.
REFERENCE_LANGUAGE_MODELS_WORKING = frozenset(_WORKING.split())
#: Types whose decoder layers the table of names finds.
REFERENCE_LANGUAGE_MODELS_FOUND = REFERENCE_LANGUAGE_MODELS_WORKING | frozenset(_ONLY_FOUND.split())
#: Types for which the table has a name that the model does not have.
REFERENCE_LANGUAGE_MODELS_WRONG_PATH = frozenset(("gemma3", "gemma3n", "gemma4", "gemma4_unified"))
