"""What is written for others: folders, ONNX files, models in eight bits."""

from __future__ import annotations

from lowrank_pl.errors.base import LowRankError


class NotSavableError(LowRankError):
    """A model cannot be written as a Hugging Face folder."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"{model} cannot be written as a Hugging Face folder: {problem}. Allowed are models of a class of "
            "transformers, such as BertForSequenceClassification, whose training with shrinking ranks has ended. Save "
            "the model inside a module of your own, bring layers to their final form with "
            "lowrank_pl.surgery.compact_(model), or save the state dict beside "
            "lowrank_pl.surgery.read_layout(model).to_dict()."
        )


class UntoldChangeError(LowRankError):
    """A model that is to be written is another one than its configuration makes."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"this {model} was not written, because it would not load again: compared with what its configuration "
            f"makes, {problem}. Allowed are changes that model.config tells of, such as num_labels, vocab_size and "
            "tie_word_embeddings: set them there, make the model without further arguments (add_pooling_layer), or "
            "save the state dict beside lowrank_pl.surgery.read_layout(model).to_dict()."
        )


class NonFiniteWeightsError(LowRankError):
    """A model that is to be exported has NaN or Inf among its weights."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__(
            f"the model of {source!r} was not written: {name!r} contains NaN or Inf, so every output would. Its "
            "training has diverged; export an earlier checkpoint, or train again with a lower learning rate."
        )


class OnnxExportError(LowRankError):
    """A model's code cannot be turned into an ONNX graph."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(
            f"{model} cannot be written as ONNX: torch.export could not follow its code ({reason}). Allowed are "
            "architectures whose code branches on no values and fixes no lengths, such as BERT, RoBERTa, DistilBERT, "
            "ALBERT, ELECTRA, DeBERTa-v2, MPNet, ModernBERT and MobileBERT. Use --format factorised or dense, which "
            "write every architecture."
        )


class OnnxMismatchError(LowRankError):
    """An ONNX file does not compute what the model does."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"the ONNX file of {model} does not compute what torch does: {problem}; nothing was written. Try other "
            "versions of torch, onnxscript and onnxruntime, or use --format factorised or dense, and please report it."
        )


class QuantizationError(LowRankError):
    """A model or an ONNX file cannot be brought to eight bits."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"{model} was not brought to int8: {problem}; nothing was written. Leave --quantize out (of benchmark: the "
            "engine onnxruntime-int8) for the same model in float32."
        )
