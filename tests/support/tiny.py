"""Tiny random encoders of every supported family, with a tokenizer, as folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_TEXT = [
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . , ' - _ ( ) :",
    "the of and to in is that it was for on are with as good bad film great awful plot tensor array",
    "##s ##ed ##ing ##er ##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r",
    "##t ##u ##v ##w ##x ##y ##z ##0 ##1 ##2 ##3 ##4 ##5 ##6 ##7 ##8 ##9",
]
VOCAB = {word: index for index, word in enumerate([*SPECIALS, *" ".join(_TEXT).split()])}

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128},
    "albert": {**_SIZES, "embedding_size": 16},
    "electra": {**_SIZES, "embedding_size": 16},
    "deberta-v2": {**_SIZES, **_DEBERTA},
    "mpnet": _SIZES,
    "modernbert": {**_SIZES, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "mobilebert": {
        **_SIZES,
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
        "num_feedforward_networks": 2,
    },
}

_TOKENS: dict[str, Any] = {"vocab_size": len(VOCAB), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
# Four heads of queries share two of keys and values, as in all but the smallest models of today.
_GROUPED: dict[str, Any] = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "gemma": _GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": _SIZES,
}
"""Decoders by family; every one but Llama ties its embeddings or not as the family does by itself."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with a hundred pieces and BERT's special tokens."""
    backend = Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_config(family: str, layers: int = 2) -> Any:
    """The configuration of a 32-wide encoder of a family (keys of `FAMILIES`) with so many layers."""
    depth = "n_layers" if family == "distilbert" else "num_hidden_layers"
    return AutoConfig.for_model(family, vocab_size=len(VOCAB), pad_token_id=0, **{**FAMILIES[family], depth: layers})


def tiny_decoder(family: str, seed: int = 0) -> Any:
    """A random decoder of a family (keys of `DECODERS`), 32 wide, in eval mode; no weight is zero or one."""
    config = AutoConfig.for_model(family, **{**_TOKENS, **DECODERS[family]})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_tiny_decoder(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes a `tiny_decoder` with its tokenizer to `folder` and returns it."""
    tiny_decoder(family, seed).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_model(family: str, folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Writes a tiny random pre-trained encoder with its tokenizer to `folder` and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(tiny_config(family, layers))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
