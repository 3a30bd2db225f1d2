"""Writing a model as a folder: factorised, multiplied back, or as an ONNX file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MissingArgumentError, OutputExistsError
from lowrank_pl.export.atomic import all_or_nothing, check_output
from lowrank_pl.export.card import model_card
from lowrank_pl.export.loading import factorised_class
from lowrank_pl.export.onnx_file import check_packages, write_onnx
from lowrank_pl.hub import load_tokenizer
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.surgery import densify_
from lowrank_pl.tasks.checksums import write_checksums
from lowrank_pl.tasks.rebuilt import rebuilt
from lowrank_pl.tasks.saved import SavedModel, read_saved_model


def export(
    ckpt_path: str,
    output: str,
    format: Literal["factored", "dense", "onnx"] = "factored",
    tokenizer: str | None = None,
    report: str | None = None,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Writes a trained model as a folder that Hugging Face tools load.

    Args:
        ckpt_path: A Lightning checkpoint of this package, or the output folder of `compress`.
        output: The folder to write; must be new or empty.
        format: `factored` keeps the factors; such a folder loads by `lowrank_pl.from_pretrained`, by
            `AutoModelFor….from_pretrained(folder, trust_remote_code=True)` where this package is not installed, and as
            `init_from`. `dense` multiplies them back for any tool. `onnx` keeps the factors in a `model.onnx` for
            onnxruntime, of which nothing is read back; it needs the extra `onnx`.
        tokenizer: Where the tokenizer is; by default the encoder that the model was made from.
        report: A report.json to take along and to quote in the model card; by default that of the checkpoint's run.
        overwrite: Replace a folder that exists.
        max_shard_size: Split larger weights into files of at most this size, e.g. `"5GB"`, in KB, MB, GB or TB; by
            default that of transformers. A single tensor is never split.

    Returns:
        The folder.

    Raises:
        NotACheckpointError, LayoutVersionError: `ckpt_path` holds no model of this package.
        OutputExistsError, OutputNotWritableError: see `output` and `overwrite`.
        MissingArgumentError: the tokenizer cannot be found.
        RangeError: `max_shard_size` is no size.
        MissingPackagesError, OnnxExportError, OnnxMismatchError: see `onnx`, which is written only if onnxruntime
            computes what torch does.
    """
    if format == "onnx":
        check_packages("export --format onnx")
    source, folder = Path(ckpt_path).expanduser(), Path(output).expanduser()
    sharding = _sharding(max_shard_size)
    check_output(folder, overwrite)
    _check_apart(source, folder)
    saved = read_saved_model(ckpt_path, "--ckpt_path")
    told = _report_of(source, report)
    encoder = rebuilt(saved)
    words = load_tokenizer(_tokenizer_of(saved, tokenizer))
    if format == "dense":
        densify_(encoder)
    kind = factorised_class(type(encoder)) if format == "factored" else type(encoder)
    encoder = _as(kind, encoder, saved)
    with all_or_nothing(folder, overwrite) as temporary:
        if format == "onnx":
            told = {**told, "onnx": write_onnx(encoder, temporary)}
        else:
            encoder.save_pretrained(temporary, **sharding)
        write_checksums(temporary)
        words.save_pretrained(temporary)
        card = model_card(encoder, saved, told, format)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if told:
            (temporary / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if saved.compression is not None:
            save_rank_picture(saved.compression.layers, temporary / "ranks.png")
    return folder


def _check_apart(source: Path, folder: Path) -> None:
    """Refuses to replace a folder by what is made from its own content: the checkpoint would be gone."""
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


def _sharding(size: str | None) -> dict[str, Any]:
    if size is not None and not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", size):
        raise RangeError("max_shard_size", size, "a number and KB, MB, GB or TB, such as '5GB'")
    return {} if size is None else {"max_shard_size": size}
