"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowrank_pl import __version__
from lowrank_pl.checkpoint import SavedModel, is_quantized
from lowrank_pl.export.scoring import number, score_lines
from lowrank_pl.files.checksums import CHECKSUMS
from lowrank_pl.monitoring.report import kept_lines
from lowrank_pl.nn import forms_in


def model_card(
    model: PreTrainedModel, saved: SavedModel, report: Mapping[str, Any], form: str, pads: bool = True
) -> str:
    """Composes the card.

    Args:
        model: As it is written.
        saved: Where it came from.
        report: Of the run that made it; may be empty. With `onnx`, what `write_onnx` returned, `int8` where torchao has
            quantised it, and `export_scores` where it was scored.
        form: `"factorised"`, `"dense"` or `"onnx"`.
        pads: Whether its tokenizer has a padding token; many decoders' have none.
    """
    assert saved.target is not None
    base = getattr(saved.config, "_name_or_path", "") or saved.config.model_type
    if Path(base).is_absolute():
        base = f"{saved.config.model_type}, from a local folder"  # whose path would mean nothing to others
    record = saved.compression
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = forms_in(model)
    library = "onnx" if form == "onnx" else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- low-rank", "---", ""]
    lines += [f"# {saved.target.name}, low-rank" if layers else f"# {saved.target.name}", ""]
    lines += [f"* base model: `{base}`", f"* task: {saved.target.name} ({saved.target.kind})"]
    lines += [f"* parameters: {total:,}"]
    if record is not None:
        cost = None if record.cost is None else record.cost.to_dict()
        lines += [
            f"* method: {record.method} of lowrank_pl {__version__}",
            *kept_lines(record.targeted_kept, record.targeted_dense, cost),
        ]
        if not record.at_budget:
            lines.append(f"* **above its budget**: {'; '.join(record.notes)}")
    if "versions" in report:
        lines.append(_score_line(saved, report))
        if data := report.get("data"):
            samples = ", ".join(f"{name} {count:,}" for name, count in data["samples"].items())
            lines.append(f"* samples: {samples}; data fingerprint `{data['fingerprint']}`")
        if report.get("score_dense") is not None:
            lines.append(f"* score before compression: {report['score_dense']:.4f}")
        lines.append(f"* command: `{report.get('command')}`")
        lines += [f"* {name} {version}" for name, version in report.get("versions", {}).items()]
    if form == "onnx":
        lines += _onnx_lines(report["onnx"], pads)
    elif "int8" in report:
        lines += _int8_loading_lines(report["int8"])
    elif form == "factorised":
        lines += _loading_lines(model)
    else:
        lines += _dense_loading_lines(saved.auto_class or "AutoModel")
    if "export_scores" in report:
        lines += ["", "## Scores of this file", "", *score_lines(report["export_scores"])]
    lines += _closing_lines(model)
    return "\n".join([*lines, ""])


def plain_card(model: PreTrainedModel) -> str:
    """Composes the card of a model of which nothing is known but itself.

    Args:
        model: As it is written, in the factorised form.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = ["---", "library_name: transformers", "tags:", "- low-rank", "---", ""]
    lines += [f"# {model.config.model_type}, low-rank", ""]
    lines += [f"* parameters: {total:,}", f"* written by lowrank_pl {__version__}"]
    loading = _torchao_lines() if is_quantized(model) else _loading_lines(model)
    return "\n".join([*lines, *loading, *_closing_lines(model), ""])


def _loading_lines(model: PreTrainedModel) -> list[str]:
    auto = _auto_class(model)
    return [
        *("", "```python", f"from transformers import {auto}", ""),
        *(f'model = {auto}.from_pretrained("…", trust_remote_code=True)', "```", ""),
        *("or, without running code of this folder,", "", "```python"),
        *("from lowrank_pl import from_pretrained", "", 'model = from_pretrained("…")', "```"),
    ]


def _dense_loading_lines(auto: str) -> list[str]:
    imported = f"from transformers import {auto}"
    return ["", "```python", imported, "", f'model = {auto}.from_pretrained("…")', "```"]


def _torchao_lines() -> list[str]:
    needs = 'Needs torchao (`pip install "lowrank-pl[torchao]"`); transformers itself does not load it:'
    return [
        *("", needs, "", "```python"),
        *("from lowrank_pl import from_pretrained", "", 'model = from_pretrained("…")', "```"),
    ]


def _int8_loading_lines(told: Mapping[str, Any]) -> list[str]:
    activations = "activations as it runs" if told["scheme"] == "int8_dynamic" else "products in float"
    return [
        f"* int8: {_sizes(told)} of parameters; weights of {told['layers']} linear layers in eight bits, {activations}",
        _distance_line(told),
        *_torchao_lines(),
    ]


def _sizes(told: Mapping[str, Any]) -> str:
    before, after = (size / 1e6 for size in told["bytes"])
    return f"{after:,.1f} MB instead of {before:,.1f} MB"


def _distance_line(told: Mapping[str, Any]) -> str:
    agreement = "" if told["agreement"] is None else f", {told['agreement']:.1%} of the largest logits are the same"
    return f"* on random tokens logits are {told['relative_difference']:.1%} of their size away from float32{agreement}"


def _closing_lines(model: PreTrainedModel) -> list[str]:
    layers = forms_in(model)
    rows = [f"| {name} | {layer.rank} | {layer.name} |" for name, layer in layers.items()]
    table = ["", "| layer | rank | form |", "|---|---|---|", *rows] if layers else []
    return [*table, "", f"`sha256sum -c {CHECKSUMS}` tells whether the weights are those that were exported."]


def _score_line(saved: SavedModel, report: Mapping[str, Any]) -> str:
    """The score of this very checkpoint; where the report has none of it, what it was kept for."""
    if "score_note" in report:
        return f"* score: none, {report['score_note']}"
    name, best, value = Path(saved.source).name, report.get("checkpoint"), report.get("checkpoint_score")
    kept = report.get("verb") == "fit" and best is not None and Path(best).name == name != "last.ckpt"
    if kept and report.get("score") is None and value is not None:
        return f"* {report.get('checkpoint_monitor')}: {number(value)}"
    return f"* score: {number(report.get('score'))} ({report.get('metric')}, {report.get('split')} split)"


def _onnx_lines(told: Mapping[str, Any], pads: bool) -> list[str]:
    shapes = ", ".join(f"{batch} by {length}" for batch, length in told["shapes"])
    texts = '["a text", "another"], padding=True' if pads else '["a text"]'
    types = "return_token_type_ids=True, " if "token_type_ids" in told["inputs"] else ""
    return [
        *_int8_lines(told),
        f"* logits in onnxruntime {told['onnxruntime']} and torch: at most {told['max_abs_difference']:.2g} apart"
        + (" in float32" if "int8" in told else ""),
        f"* compared at batch by length {shapes}",
        "",
        "```python",
        "from onnxruntime import InferenceSession",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("…")',
        'session = InferenceSession("…/model.onnx")',
        f'batch = tokenizer({texts}, truncation=True, {types}return_tensors="np")',
        "inputs = {value.name: batch[value.name] for value in session.get_inputs()}",
        '(logits,) = session.run(["logits"], inputs)',
        "```",
    ]


def _int8_lines(told: Mapping[str, Any]) -> list[str]:
    if "int8" not in told:
        return []
    int8 = told["int8"]
    bits = "seven bits, for any processor" if int8["reduce_range"] else "eight bits, for processors with VNNI and ARM"
    lines = [f"* int8: {_sizes(int8)}; weights in {bits}, activations as it runs", _distance_line(int8)]
    if layers := int8["pivoted_as_two_factors"]:
        lines.append(f"* {layers} pivoted layers are two factors of the same function here, with more parameters")
    return lines


def _auto_class(model: PreTrainedModel) -> str:
    return next(iter(getattr(model.config, "auto_map", {})), "AutoModel")
