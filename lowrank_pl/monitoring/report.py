"""The report of a run: what was scored, what the model costs, what happened to each layer."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lowrank_pl import __version__
from lowrank_pl.contract import DescribesData, TargetSpec
from lowrank_pl.files import replace_text
from lowrank_pl.files.command import command_line
from lowrank_pl.nn import dense_shape, forms_in, forms_in_training
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.surgery import CompressionRecord, CostRecord, LayerRecord, TargetSelector, tied_heads
from lowrank_pl.tasks import Distillation

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics")


def parameter_counts(task: pl.LightningModule) -> dict[str, int]:
    """Parameters of the model now and dense, and of the targeted weights now and dense.

    A model without a record of what was targeted counts its factorised layers as the targeted ones, and a model
    without any counts what the strategy would target.
    """
    layers, encoder = layer_records(task), as_compressible(task).encoder
    total = sum(parameter.numel() for parameter in encoder.parameters())
    if training := forms_in_training(encoder):  # which keep the room they began with, whatever their rank
        recorded = {layer.name: layer.parameters for layer in layers}
        total += sum(recorded[name] - _room(layer) for name, layer in training.items() if name in recorded)
    return _counts(layers, total)


def _room(layer: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")


def layer_records(task: pl.LightningModule) -> tuple[LayerRecord, ...]:
    """The targeted layers as they are."""
    module = as_compressible(task)
    if module.compression is not None:
        return module.compression.layers
    tied = tied_heads(module.encoder)
    factored = {n: form for n, form in forms_in(module.encoder).items() if form.is_final and n not in tied}
    if factored:
        return tuple(LayerRecord.of(name, m.shape, m.spec(), type(m)) for name, m in factored.items())
    strategy = getattr(task, "strategy", None)
    reasons = (strategy.targets if strategy is not None else TargetSelector()).explain(module.encoder)
    targets = [name for name, reason in reasons.items() if reason == "targeted"]
    return tuple(LayerRecord.of(name, dense_shape(module.encoder.get_submodule(name)), None) for name in targets)


def build_report(
    task: pl.LightningModule, verb: str, split: str, metrics: Mapping[str, float], seconds: float, **extra: Any
) -> dict[str, Any]:
    """Assembles a report.

    Args:
        task: The module that was run, with what `Compressible` says.
        verb: `"fit"`, `"test"` or `"compress"`.
        split: What the score was measured on: `"val"` or `"test"`.
        metrics: Logged values; those under `split/` are reported, without the prefix.
        seconds: Wall time of the verb.
        extra: Further entries, e.g. `checkpoint` or `score_dense`.

    Returns:
        JSON-ready; numbers that are not finite appear as `null`. `keep_ratio` is the share of the targeted parameters,
        `cost` the same in the unit of the strategy's budget: `{unit, kept, dense, ratio}`.
    """
    values = {name.removeprefix(f"{split}/"): v for name, v in metrics.items() if name.startswith(f"{split}/")}
    module = as_compressible(task)
    record = module.compression or CompressionRecord("NoCompression")
    target = module.target
    report = {
        "verb": verb,
        "task": target.name if target else type(task).__name__,
        "metric": _metric_name(target),
        "score": values.get("score"),
        "split": split,
        "metrics": values,
        **told_of_model(record, layer_records(task), parameter_counts(task)["total"]),
        **_distillation(task, verb),
        "pretrained": getattr(task, "pretrained", None),
        "init_from": getattr(task, "init_from", None),
        "data": _data(task),
        **extra,
        "seconds": round(seconds, 3),
        "versions": {
            "python": platform.python_version(),
            "lowrank_pl": __version__,
            **{name: version(name) for name in _PACKAGES},
        },
        "command": command_line(),
    }
    finite: dict[str, Any] = without_nan(report)
    return finite


def told_of_model(record: CompressionRecord, layers: Sequence[LayerRecord], total: int) -> dict[str, Any]:
    """The entries of a report about the model: how it was compressed, and what it costs.

    Args:
        record: Of its compression.
        layers: The targeted layers.
        total: Parameters of the whole model.
    """
    parameters = _counts(layers, total)
    dense = parameters["targeted_dense"]
    told: dict[str, Any] = {
        "method": record.method,
        "options": record.options,
        "parameters": parameters,
        "keep_ratio": parameters["targeted_kept"] / dense if dense else 1.0,
        "cost": _cost(record, parameters),
        "layers": [
            {
                "name": layer.name,
                "out": layer.out_features,
                "in": layer.in_features,
                "rank": layer.rank,
                "kind": layer.kind,
                "parameters": layer.parameters,
                "weighted_error": layer.weighted_error,
                "error": layer.error,
                **({"losses": list(layer.losses), "outcome": layer.outcome} if layer.losses else {}),
            }
            for layer in layers
        ],
        "notes": list(record.notes),
    }
    finite: dict[str, Any] = without_nan(told)
    return finite


def _counts(layers: Sequence[LayerRecord], total: int) -> dict[str, int]:
    dense = sum(layer.out_features * layer.in_features for layer in layers)
    kept = sum(layer.parameters for layer in layers)
    return {"total": total, "total_dense": total + dense - kept, "targeted_dense": dense, "targeted_kept": kept}


def _distillation(task: pl.LightningModule, verb: str) -> dict[str, Any]:
    """What a training has learned from besides its labels; nothing without a teacher."""
    asked = getattr(task, "distillation", None)
    return {"distillation": asked.options()} if isinstance(asked, Distillation) and verb == "fit" else {}


def _cost(record: CompressionRecord, parameters: Mapping[str, int]) -> dict[str, Any] | None:
    """What the budget counts, in its own unit; `None` where the record is of a release that did not write it."""
    if record.cost is not None:
        return record.cost.to_dict()
    if record.options.get("cost", {}).get("class", "Parameters") != "Parameters":
        return None
    return CostRecord("parameters", parameters["targeted_kept"], parameters["targeted_dense"]).to_dict()


def _data(task: pl.LightningModule) -> dict[str, Any] | None:
    """Samples by split and a fingerprint; `None` where the data do not provide them."""
    trainer = getattr(task, "_trainer", None)  # the property raises where there is none
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule.describe() if isinstance(datamodule, DescribesData) else None


def _metric_name(target: TargetSpec | None) -> str | None:
    return None if target is None else target.score or " + ".join(target.metrics)


def without_nan(value: Any) -> Any:
    """The same with `None` for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Writes `report.json` and `report.md`; an older report there is kept and the new one numbered.

    Returns:
        The path of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, count = "report", 1
    while (folder / f"{stem}.json").exists():
        count += 1
        stem = f"report-{count}"
    replace_text(folder / f"{stem}.md", to_markdown(report))
    return replace_text(folder / f"{stem}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def to_markdown(report: Mapping[str, Any]) -> str:
    """The same for people."""
    p = report["parameters"]
    lines = [
        f"# {report['verb']}: {report['task']} with {report['method']}",
        "",
        *_score_lines(report),
        *_checkpoint_lines(report),
        *_data_lines(report),
        f"* parameters: {p['total']:,} of {p['total_dense']:,}",
        *kept_lines(p["targeted_kept"], p["targeted_dense"], report.get("cost")),
        f"* seconds: {report['seconds']}",
        *[f"* note: {note}" for note in report["notes"]],
        "",
        "| metric | value |",
        "|---|---|",
        *[f"| {name} | {_number(value)} |" for name, value in report["metrics"].items()],
        "",
        "| layer | out | in | rank | kind | parameters | error | weighted error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        errors = f"{_number(row['error'])} | {_number(row['weighted_error'])}"
        lines.append(
            f"| {row['name']} | {row['out']} | {row['in']} | {row['rank']} | {row['kind']} | {row['parameters']:,} "
            f"| {errors} |"
        )
    lines += ["", f"`{report['command']}`", "", *[f"* {name} {v}" for name, v in report["versions"].items()], ""]
    return "\n".join(lines)


def _score_lines(report: Mapping[str, Any]) -> list[str]:
    """A module that is no task need not say what its score is."""
    if report["metric"] is None and report["score"] is None:
        return []
    lines = [f"* score ({report['metric']}, {report['split']}): **{_number(report['score'])}**"]
    if "distillation" in report:
        told = ", ".join(f"{name} {value}" for name, value in report["distillation"].items())
        lines.append(f"* distillation: {told}")
    if "score_dense" in report:
        lines.append(f"* score before compression: {_number(report['score_dense'])}")
    return lines


def _checkpoint_lines(report: Mapping[str, Any]) -> list[str]:
    """Under a shrinking budget the checkpoint that was kept may be from before it was reached."""
    if "checkpoint_at_budget" not in report:
        return []
    told = {True: "at the budget", False: "**above the budget**"}.get(report["checkpoint_at_budget"], "of unknown size")
    return [f"* checkpoint: `{report['checkpoint']}`, {told}"]


def kept_lines(kept: int, dense: int, cost: Mapping[str, Any] | None) -> list[str]:
    """What is left of the targeted weights, in parameters and in the unit of the budget where that is another.

    Args:
        kept: Parameters now.
        dense: Parameters when dense.
        cost: The entry of that name of a report.
    """
    told = f"* targeted weights: {kept:,} of {dense:,} parameters kept"
    share = kept / dense if dense else 1.0
    if cost is None or cost["unit"] == "parameters":
        return [f"{told}, keep_ratio {share:.4f}"]
    spent = f"* cost: {cost['kept']:,} of {cost['dense']:,} {cost['unit']} kept, keep_ratio {cost['ratio']:.4f}"
    return [f"{told}, a share of {share:.4f}", spent]


def _data_lines(report: Mapping[str, Any]) -> list[str]:
    data = report.get("data")
    if not data:
        return []
    samples = ", ".join(f"{name} {count:,}" for name, count in data["samples"].items())
    lines = [f"* samples: {samples}; data fingerprint `{data['fingerprint']}`"]
    if data.get("scored", report["verb"]) != report["verb"]:
        lines.append(f"* scored: the {data['scored']} split, for want of a test split with labels")
    return lines


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
