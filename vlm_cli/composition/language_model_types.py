"""Types of language models in Transformers that cannot be the language model of a VLM."""

from __future__ import annotations

__all__ = ["UNSUITABLE_LANGUAGE_MODELS"]

#: Reason -> types. AutoModelForCausalLM lists them, but none of them alone writes text from left to right.
_UNSUITABLE = {
    "an encoder whose published weights are not causal": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
    ),
    "the decoder half of an encoder-decoder model": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper"
    ),
    "not causal: later tokens change earlier logits": "xlm xlnet cpmant",
    "a model of audio codebooks, not of text": "musicgen musicgen_melody",
    "a drafter that needs the cache of another model": "gemma4_assistant gemma4_unified_assistant",
    "a model of byte patches whose forward fails in Transformers itself": "blt",
    "a reversible model, whose backward pass runs its layers again without the hooks on them": "reformer",
}
#: Type -> reason.
UNSUITABLE_LANGUAGE_MODELS = {name: reason for reason, names in _UNSUITABLE.items() for name in names.split()}
