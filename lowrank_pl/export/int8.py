"""An ONNX file in eight bits: weights once, activations while it runs."""

from __future__ import annotations

import copy
import errno
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import ONNX_NAME
from lowrank_pl.errors.export import QuantizationError
from lowrank_pl.export.onnx_file import OPSET, model_inputs, open_session, outputs_of, quiet, shapes_to_compare
from lowrank_pl.hub import first_line
from lowrank_pl.nn import PivotedLinear, forms_in, in_two_factors
from lowrank_pl.surgery import replace_module_

# Half of the logits' size: eight bits cost a trained model a few per cent, and a broken one all of it.
ALLOWED = 0.5
_CPU_FLAGS = Path("/proc/cpuinfo")
_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8")


def ready_for_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy with pivoted layers as two factors of the same function.

    onnxruntime has one scale for all that a product puts out. The other rows of a pivoted layer are computed from what
    its pivot rows put out, and with coefficients above 1 they enlarge the error of that scale.
    """
    names = pivoted_in(model)
    if names:
        model = copy.deepcopy(model)
    for name in names:
        replace_module_(model, name, in_two_factors(model.get_submodule(name)))
    return model


def pivoted_in(model: PreTrainedModel) -> list[str]:
    """Names of the pivoted layers of a model."""
    return [name for name, layer in forms_in(model).items() if isinstance(layer, PivotedLinear)]


def quantize_int8(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Turns the float32 `model.onnx` of a folder into one with int8 weights, by onnxruntime's dynamic quantisation.

    Weights of matrix products, thin factors included, have a scale per output channel, embeddings one per table;
    activations get theirs for every input. Without instructions that add up products of eight bits exactly
    (VNNI) weights have seven bits, which loses less than sums that overflow.

    Args:
        model: What the file computes, in eval mode, on the CPU, in float32; see `ready_for_int8`.
        folder: With `model.onnx`, which is replaced.

    Returns:
        For report.json: `bytes` before and after, `reduce_range`, and how far the logits on random tokens and padding
        are from torch's: `relative_difference` in the Frobenius norm, and `agreement`, the share of equal largest
        logits (`None` for a single output).

    Raises:
        QuantizationError: the file is of another opset, onnxruntime cannot quantise or run it, or the logits are too
            far away.
        OSError: the disk is full, for instance.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    name, path, small = f"the ONNX file of {type(model).__name__}", folder / ONNX_NAME, folder / "int8.onnx"
    _check_opset(name, path)
    before = _bytes(folder)
    reduced = needs_reduced_range()
    try:
        with quiet():
            quantize_dynamic(path, small, per_channel=True, reduce_range=reduced, weight_type=QuantType.QInt8)
        _forget_shapes(small)
    except OSError:
        raise  # a full disk, say, which whoever makes the folder tells
    except Exception as error:  # of onnx or onnxruntime; they have no common base
        if shutil.disk_usage(folder).free < before:
            # It writes the file once more, with shapes, and does not notice that only a part of it has found room.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise QuantizationError(name, f"onnxruntime cannot quantise it ({first_line(error)})") from error
    for old in folder.glob(f"{ONNX_NAME}*"):  # with the weights beside it, where one file could not hold them
        old.unlink()
    small.rename(path)
    return {"bytes": [before, _bytes(folder)], "reduce_range": reduced, **_compare(model, path, name)}


def _forget_shapes(path: Path) -> None:
    """Takes out the shapes that the quantiser has noted in between.

    With them onnxruntime joins sums and norms to one operator, which on a CPU takes longer than the two.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"{ONNX_NAME}*"))


def _check_opset(name: str, path: Path) -> None:
    """Raises an error for a file that another exporter has written: what is quantised in it was never tried."""
    import onnx

    try:
        imports = onnx.load(str(path), load_external_data=False).opset_import
    except OSError:
        raise
    except Exception as error:  # of protobuf, which has a class of its own in every release
        raise QuantizationError(name, f"it cannot be read ({first_line(error)})") from error
    found = {entry.domain or "ai.onnx": entry.version for entry in imports}
    if found.get("ai.onnx") != OPSET:
        raise QuantizationError(name, f"it is written in the operators {found}, allowed is opset {OPSET} of 'ai.onnx'")


def _compare(model: PreTrainedModel, path: Path, name: str) -> dict[str, Any]:
    try:
        session = open_session(path)
        pairs = []
        for batch, length in shapes_to_compare(model):
            inputs = model_inputs(model, batch, length)
            with torch.no_grad():
                expected = model(**inputs).logits
            pairs.append((outputs_of(session, inputs), expected))
    except Exception as error:  # of onnxruntime; see above
        raise QuantizationError(name, f"onnxruntime does not run it ({first_line(error)})") from error
    return distance_told(pairs, name)


def distance_told(pairs: Sequence[tuple[Tensor, Tensor]], name: str) -> dict[str, Any]:
    """How far logits are from those in float32.

    Args:
        pairs: Logits and those in float32, classes last.
        name: Of what computes them, for messages.

    Returns:
        `relative_difference` and `agreement`; see `quantize_int8`.

    Raises:
        QuantizationError: they are too far away.
    """
    found, expected = (torch.cat([logits.flatten(0, -2) for logits in side]) for side in zip(*pairs, strict=True))
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    if not difference <= ALLOWED:  # also for NaN
        raise QuantizationError(name, f"its logits are {difference:.0%} of their size away, allowed is {ALLOWED:.0%}")
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean()) if expected.shape[-1] > 1 else None
    return {"relative_difference": difference, "agreement": same}


def needs_reduced_range() -> bool:
    """Whether this machine's processor adds up products of eight bits in sixteen, where they can overflow."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # ARM's instructions add up exactly
    try:
        flags = _CPU_FLAGS.read_text(encoding="utf-8").split()
    except OSError:
        return True  # not Linux: nobody knows
    return not any(flag in flags for flag in _EXACT)
