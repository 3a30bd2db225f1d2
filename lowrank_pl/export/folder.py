"""Writing a model as a Hugging Face folder, factorised or multiplied back, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lowrank_pl.contract import TargetKind
from lowrank_pl.errors.model import NotACheckpointError
from lowrank_pl.errors.run import MissingArgumentError, OutputExistsError, OutputNotWritableError
from lowrank_pl.export.card import model_card
from lowrank_pl.export.loading import factorised_class
from lowrank_pl.export.onnx_file import check_packages, write_onnx
from lowrank_pl.hub import load_tokenizer
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.surgery import densify_
from lowrank_pl.tasks import EncoderTask, MaskedLM, SequenceClassification, TokenClassification
from lowrank_pl.tasks.saved import SavedModel, read_saved_model

_TASKS: dict[TargetKind, type[EncoderTask]] = {
    "classification": SequenceClassification,
    "regression": SequenceClassification,
    "token_classification": TokenClassification,
    "masked_lm": MaskedLM,
}


def export(
    ckpt_path: str,
    output: str,
    format: Literal["factored", "dense", "onnx"] = "factored",
    tokenizer: str | None = None,
    report: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a trained model as a folder that Hugging Face tools load.

    Args:
        ckpt_path: A Lightning checkpoint of this package, or the output folder of `compress`.
        output: The folder to write; must be new or empty.
        format: `factored` keeps the factors; such a folder loads by `lowrank_pl.export.from_pretrained`, by
            `AutoModelFor….from_pretrained(folder, trust_remote_code=True)` where this package is not installed, and as
            `init_from`. `dense` multiplies them back for any tool. `onnx` keeps the factors in a `model.onnx` for
            onnxruntime, of which nothing is read back; it needs the extra `onnx`.
        tokenizer: Where the tokenizer is; by default the encoder that the model was made from.
        report: A report.json to take along and to quote in the model card; by default that of the checkpoint's run.
        overwrite: Replace a folder that exists.

    Returns:
        The folder.

    Raises:
        NotACheckpointError, LayoutVersionError: `ckpt_path` holds no model of this package.
        OutputExistsError, OutputNotWritableError: see `output` and `overwrite`.
        MissingArgumentError: the tokenizer cannot be found.
        MissingPackagesError, OnnxExportError, OnnxMismatchError: see `onnx`, which is written only if onnxruntime
            computes what torch does.
    """
    if format == "onnx":
        check_packages()
    folder = Path(output).expanduser()
    _check_output(folder, overwrite)
    saved = read_saved_model(ckpt_path)
    if saved.target is None:
        raise NotACheckpointError(ckpt_path, "it does not tell what it predicts", "--ckpt_path")
    words = load_tokenizer(_tokenizer_of(saved, tokenizer))
    told = _report_of(Path(ckpt_path).expanduser(), report)
    encoder = _build(saved)
    if format == "dense":
        densify_(encoder)
    kind = factorised_class(type(encoder)) if format == "factored" else type(encoder)
    encoder = _as(kind, encoder, saved)
    with _all_or_nothing(folder, overwrite) as temporary:
        if format == "onnx":
            told = {**told, "onnx": write_onnx(encoder, temporary)}
        else:
            encoder.save_pretrained(temporary)
        words.save_pretrained(temporary)
        card = model_card(encoder, saved, told, format)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if told:
            (temporary / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if saved.compression is not None:
            save_rank_picture(saved.compression.layers, temporary / "ranks.png")
    return folder


def _build(saved: SavedModel) -> PreTrainedModel:
    assert saved.target is not None
    auto_class = _TASKS[saved.target.kind].auto_class
    encoder: PreTrainedModel = auto_class.from_config(saved.config, dtype=torch.get_default_dtype())
    saved.load_into_(encoder)
    encoder.eval()
    return encoder


def _as(kind: type[PreTrainedModel], model: PreTrainedModel, saved: SavedModel) -> PreTrainedModel:
    """The same model under another class, without the marks of a folder that it may once have come from."""
    model.__class__ = kind
    for name in ("auto_map", "lowrank_base", "lowrank_layout"):
        if hasattr(saved.config, name):
            delattr(saved.config, name)
    return model


def _tokenizer_of(saved: SavedModel, asked: str | None) -> str:
    name = asked or getattr(saved.config, "_name_or_path", "")
    if not name:
        raise MissingArgumentError("the tokenizer", "The checkpoint does not tell where it was; give --tokenizer.")
    return str(name)


def _report_of(checkpoint: Path, asked: str | None) -> dict[str, Any]:
    places = [Path(asked).expanduser()] if asked else []
    if not asked:
        start = checkpoint if checkpoint.is_dir() else checkpoint.parent
        places = [start / "report.json", start.parent / "report.json"]
    for place in places:
        if place.is_file():
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return found
    if asked:
        raise MissingArgumentError(f"the report {asked!r}", "Give a report.json, or leave --report out.")
    return {}


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (overwrite and folder.is_dir()):
        raise OutputExistsError(str(folder), "Give another --output, or --overwrite true to replace the folder.")


@contextmanager
def _all_or_nothing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the final one that takes its place at the end; an interruption leaves no half model."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error
    try:
        yield temporary
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            _check_output(folder, overwrite)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
