"""Writing a model as a folder: factorised, multiplied back, or as an ONNX file."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.checkpoint import (
    ONNX_NAME,
    SavedModel,
    Scheme,
    build,
    check_torchao,
    factorised_class,
    read_saved_model,
)
from lowrank_pl.checkpoint.int8 import is_int8
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.errors.export import NonFiniteWeightsError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.pretrained import HubUnreachableError, ModelFolderError, PackageModelError
from lowrank_pl.export.card import model_card
from lowrank_pl.export.int8 import pivoted_in, quantize_int8, ready_for_int8
from lowrank_pl.export.int8_layers import QuantizedLayers
from lowrank_pl.export.onnx_file import check_packages, write_onnx
from lowrank_pl.export.run_report import report_for
from lowrank_pl.export.scoring import (
    DataFactory,
    Scoring,
    as_written,
    check_scoring,
    in_onnxruntime,
    in_torch,
    score_lines,
)
from lowrank_pl.files import OutputFolder
from lowrank_pl.files.checksums import write_checksums
from lowrank_pl.hub import load_tokenizer
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.surgery import densify_

Format = Literal["factorised", "factored", "dense", "onnx"]
Quantization = Literal["int8", "int8_weight_only", "int8_dynamic"]

logger = logging.getLogger(__name__)


def export(
    ckpt_path: str,
    output: str,
    format: Format = "factorised",
    tokenizer: str | None = None,
    report: str | None = None,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    quantize: Quantization | None = None,
    data: DataFactory | None = None,
    max_drop: float | None = None,
    max_samples: int | None = None,
) -> Path:
    """Writes a trained model as a folder that Hugging Face tools load.

    Weights are written in the dtype that the checkpoint has them in, which is that of `trainer.precision` where it is
    `bf16-true`, `16-true` or `64-true`, and float32 else; ONNX files and those in eight bits are made from float32.

    Args:
        ckpt_path: A Lightning checkpoint of this package, or the output folder of `compress`.
        output: The folder to write; must be new or empty.
        format: `factorised` (or `factored`) keeps the factors; such a folder loads by `lowrank_pl.from_pretrained`, by
            `AutoModelFor….from_pretrained(folder, trust_remote_code=True)` where this package is not installed, and as
            `init_from`. `dense` multiplies them back for any tool. `onnx` keeps the factors in a `model.onnx` for
            onnxruntime, of which nothing is read back; it needs the extra `onnx`.
        tokenizer: Where the tokenizer is; by default the encoder that the model was made from.
        report: A report.json to take along and to quote in the model card; by default that of the checkpoint's run.
            Ranks and parameters are those of the checkpoint; the score is left out where it is that of another step.
        overwrite: Replace a folder that exists, with everything that is in it.
        max_shard_size: Split larger weights into files of at most this size, e.g. `"5GB"`, in KB, MB, GB or TB; by
            default that of transformers. A single tensor is never split, nor are ONNX files and those in eight bits.
        quantize: `int8` brings an ONNX file to eight bits, embeddings included: a quarter of the size. A folder
            (`factorised` or `dense`) becomes one for torchao (extra `torchao`) that `lowrank_pl.from_pretrained`,
            `init_from` and `benchmark` read: `int8_weight_only` stores the linear layers of the blocks in eight bits
            and computes in float, `int8_dynamic` also multiplies in eight bits. Neither can be trained. How far logits
            are from float32 on random tokens is measured; `data` tells what that means.
        data: A datamodule, as for other verbs (`--data GLUE --data.init_args.task MRPC`, or the configuration of a run
            by `--config`): the written file and the model are scored on its validation split. From Python, a function
            that makes it for a tokenizer, such as `lambda words: GLUE(words, task="MRPC")`.
        max_drop: By how much the score of the written file may be worse, in its unit; more is an error.
        max_samples: Score on so many samples at most.

    Returns:
        The folder.

    Raises:
        NotACheckpointError, LayoutVersionError: `ckpt_path` holds no model of this package.
        OutputExistsError, OutputNotWritableError: see `output` and `overwrite`.
        MissingArgumentError: the tokenizer cannot be found.
        RangeError: `format` or `quantize` is none of these, or `max_shard_size` is no size; see also `max_drop`.
        CheckpointMismatchError: the tokenizer has tokens that the model has no embedding for, or data of another task.
        NonFiniteWeightsError: a weight is NaN or Inf.
        MissingPackagesError, OnnxExportError, OnnxMismatchError: see `onnx`, which is written only if onnxruntime
            computes what torch does.
        QuantizationError: see `quantize`.
        QuantizedModelError: `ckpt_path` is in eight bits.
        ScoreDropError: see `max_drop`.
    """
    if format not in get_args(Format):
        raise RangeError("format", format, ", ".join(map(repr, get_args(Format))))
    sharding = sharding_of(max_shard_size, one_file=format == "onnx" or quantize is not None)
    scheme = _check_quantization(format, quantize)
    check_scoring(data, max_drop, max_samples)
    if format == "onnx":
        check_packages("export --format onnx")
    form = "factorised" if format == "factored" else format
    source, folder = Path(ckpt_path).expanduser(), OutputFolder(output, overwrite)
    folder.check()
    _check_apart(source, folder.path)
    saved = read_saved_model(ckpt_path, "export --ckpt_path")
    saved.check_float("export")
    if saved.target is None:
        raise NotACheckpointError(saved.source, "it does not tell what it predicts", "export --ckpt_path")
    # Files for torch have the weights' own dtype, as trained; onnxruntime and what is in eight bits start from float32.
    encoder = build(saved, as_saved=format != "onnx" and quantize is None)
    told = report_for(saved, encoder, source, report)
    if saved.compression is not None and not saved.compression.at_budget:
        logger.warning("%s is above its budget: %s", ckpt_path, "; ".join(saved.compression.notes))
    check_finite_weights(encoder, ckpt_path)
    words = _load_tokenizer(saved, tokenizer)
    check_tokenizer(words, saved.config, saved.source)
    scoring = None if data is None else Scoring(saved, data, _tokenizer_of(saved, tokenizer), max_samples)
    changed = format == "dense" or scheme is not None
    original = copy.deepcopy(encoder) if scoring is not None and changed else encoder
    if format == "dense":
        densify_(encoder)
    layers = None if scheme is None else QuantizedLayers(encoder, scheme)
    own = form == "factorised" or scheme is not None
    kind = factorised_class(type(encoder), saved.auto_class) if own else type(encoder)
    encoder = _as(kind, encoder, saved)
    pivoted = pivoted_in(encoder)
    if format == "onnx" and quantize is not None:
        encoder = ready_for_int8(encoder)
    with folder.written_whole() as temporary:
        if format == "onnx":
            told = {**told, "onnx": write_onnx(encoder, temporary)}
            if quantize is not None:
                told["onnx"]["int8"] = {**quantize_int8(encoder, temporary), "pivoted_as_two_factors": len(pivoted)}
        else:
            encoder.save_pretrained(temporary, **sharding)
        write_checksums(temporary)
        if layers is not None:
            told = {**told, "int8": layers.compare(temporary)}
        if scoring is not None:
            written = (
                in_onnxruntime(temporary / ONNX_NAME) if format == "onnx" else in_torch(as_written(temporary, saved))
            )
            told = {**told, "export_scores": scoring.compare(in_torch(original), written, max_drop)}
        words.save_pretrained(temporary)
        card = model_card(encoder, saved, told, form, words.pad_token is not None)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if told:
            (temporary / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if scores := told.get("export_scores"):
            text = "\n".join(
                [f"# export: {scores['task']}, {format} {quantize or ''}".rstrip(), "", *score_lines(scores)]
            )
            (temporary / "report.md").write_text(f"{text}\n", encoding="utf-8")
        if saved.compression is not None:
            save_rank_picture(saved.compression.layers, temporary / "ranks.png")
    return folder.path


def _check_quantization(format: Format, quantize: Quantization | None) -> Scheme | None:
    """What torchao quantises, if anything.

    Raises:
        RangeError: the format has no such quantisation.
        MissingPackagesError: torchao is not installed.
    """
    if quantize is None:
        return None
    if quantize == "int8" and format == "onnx":
        return None
    if (quantize == "int8_weight_only" or quantize == "int8_dynamic") and format != "onnx":
        check_torchao(f"export --quantize {quantize}")
        return quantize
    schemes = " or ".join(map(repr, get_args(Scheme)))
    raise RangeError("quantize", quantize, f"'int8' with format 'onnx', {schemes} with the others, or null")


def _check_apart(source: Path, folder: Path) -> None:
    """Raises an error for an output folder that contains the checkpoint: replacing it would delete the checkpoint."""
    if folder.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise OutputExistsError(str(folder), f"It holds the checkpoint {str(source)!r} itself; give another --output.")


def _as(kind: type[PreTrainedModel], model: PreTrainedModel, saved: SavedModel) -> PreTrainedModel:
    """The same model under another class, without the marks of a folder that it may once have come from."""
    model.__class__ = kind
    for name in ("auto_map", "lowrank_base", "lowrank_layout"):
        if hasattr(saved.config, name):
            delattr(saved.config, name)
    return model


def _tokenizer_of(saved: SavedModel, asked: str | None) -> str:
    name = asked or saved.tokenizer
    if not name:
        raise MissingArgumentError("the tokenizer", "The checkpoint does not tell where it was; give --tokenizer.")
    return str(name)


def _load_tokenizer(saved: SavedModel, asked: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that is asked for, or that of the model.

    Raises:
        MissingArgumentError: that of the model is nowhere, or not where it was.
        LowRankError: that which is asked for cannot be read; see `load_tokenizer`.
    """
    name = _tokenizer_of(saved, asked)
    try:
        return load_tokenizer(name)
    except (HubUnreachableError, ModelFolderError, PackageModelError) as error:
        if asked is not None:
            raise
        remedy = "The checkpoint may come from another machine; say where its tokenizer is here with --tokenizer."
        raise MissingArgumentError(f"the tokenizer {name!r} that the checkpoint tells of", remedy) from error


def check_tokenizer(words: PreTrainedTokenizerBase, config: PreTrainedConfig, source: str) -> None:
    """Raises an error for a tokenizer with more tokens than embeddings, and warns of one that pads otherwise.

    Args:
        words: The tokenizer.
        config: Of the model.
        source: Where the model comes from, for messages.

    Raises:
        CheckpointMismatchError: it has too many tokens.
    """
    size = getattr(config, "vocab_size", None)
    if size is not None and len(words) > size:
        problem = f"the tokenizer {words.name_or_path!r} has {len(words)} tokens and the model embeddings for {size}"
        raise CheckpointMismatchError(source, f"{problem}; give its own with --tokenizer")
    own, theirs = getattr(config, "pad_token_id", None), words.pad_token_id
    if own is not None and theirs is not None and own != theirs:
        told = (words.name_or_path, theirs, own)
        logger.warning("the tokenizer %r pads with token %d, the model with %d: is it the model's own?", *told)


def check_finite_weights(model: PreTrainedModel, source: str) -> None:
    """Raises an error for writing a model that computes nothing: its training has diverged.

    Raises:
        NonFiniteWeightsError: a parameter contains NaN or Inf.
    """
    for name, parameter in model.named_parameters():
        values: Any = parameter
        if not bool(torch.isfinite(values.scale if is_int8(parameter) else values).all()):
            raise NonFiniteWeightsError(source, name)


def sharding_of(size: str | None, one_file: bool) -> dict[str, Any]:
    """The argument of transformers' `save_pretrained`.

    Args:
        size: Of the largest file, `None` for transformers' own.
        one_file: Whether weights are not split, as in ONNX files and in eight bits.

    Raises:
        RangeError: it is no size, or nothing is split.
    """
    if size is not None and one_file:
        raise RangeError("max_shard_size", size, "null for ONNX files and models in eight bits, which are not split")
    if size is not None and not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", size):
        raise RangeError("max_shard_size", size, "a number and KB, MB, GB or TB, such as '5GB'")
    return {} if size is None else {"max_shard_size": size}
