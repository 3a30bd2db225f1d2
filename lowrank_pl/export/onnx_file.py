"""A model as one ONNX file, compared with torch in onnxruntime before anyone relies on it."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import ONNX_NAME
from lowrank_pl.errors.export import OnnxExportError, OnnxMismatchError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export.counted_positions import count_positions_
from lowrank_pl.hub import first_line, longest_input

# The first with GELU as one operator, which runtimes compute in one go. onnxruntime reads it since 1.17.
OPSET = 20
# Of the largest logit, or of 1 where all are smaller: far above what another order of summation does in float32 (about
# 1e-6), far below what changes a prediction.
TOLERANCE = 1e-4
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OUTPUT = "logits"
_EXAMPLE = (2, 8)  # traced; must not be among the shapes that are compared
_LONGEST = 512  # compared at most: attention over some models' thousands of positions would take gigabytes


def check_packages(asked: str) -> None:
    """Raises `MissingPackagesError` unless everything is installed that writing and comparing needs."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackagesError(asked, missing, "onnx")


def write_onnx(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Writes `model.onnx` with its config.json and runs it; weights too many for one file go to `model.onnx.data`.

    Inputs are `input_ids`, `attention_mask` and, where the model has more than one token type, `token_type_ids`, all
    int64 `[batch, length]` with both axes free; the output is `logits`. Factorised layers keep their two factors.

    Args:
        model: In eval mode, on the CPU, in float32.
        folder: Where to write; must exist.

    Returns:
        For report.json: `inputs`, `opset`, the version of `onnxruntime`, the `shapes` (batch, length) that were
        compared with torch on random tokens and padding, and `max_abs_difference` over all their logits.

    Raises:
        OnnxExportError: the exporter cannot follow the model's code.
        OnnxMismatchError: onnxruntime cannot run the file, or computes something else.
    """
    path = folder / ONNX_NAME
    program = _program(model)
    program.save(path, external_data=False)  # where one file cannot hold the weights, torch decides otherwise
    model.config.architectures = [type(model).__name__]  # as save_pretrained does
    model.config.save_pretrained(folder)
    return _compare(model, path)


def _program(model: PreTrainedModel) -> torch.onnx.ONNXProgram:
    # dynamo=True: torch.export raises where the code would fix an axis to the example's size or branch on a value. The
    # TorchScript exporter wrote equally exact files for the families of the tests in a tenth of the time, but it takes
    # down whatever the example happens to do, tells so only in warnings, and is deprecated.
    from onnxscript import ir

    example = model_inputs(model, *_EXAMPLE)
    try:
        with quiet(), _without_cache(model), _eager_attention(model):
            program = torch.onnx.export(
                model,
                kwargs=example,
                dynamo=True,
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in example},
                input_names=list(example),
                output_names=[_OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise OnnxExportError(type(model).__name__, first_line(error.__cause__ or error)) from error
    assert program is not None
    # Stack traces of every node: the paths of the machine that exported.
    ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    count_positions_(program.model.graph)
    # Types and shapes in between, where the exporter has noted the example's for free axes: what other tools infer,
    # such as onnxruntime's quantiser, would contradict them.
    graph = program.model.graph
    inner = [value for node in graph.all_nodes() for value in node.outputs if value not in graph.outputs]
    for value in (*inner, *graph.initializers.values()):
        value.shape = value.type = None
    return program


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Lets a decoder return logits alone: its cache is no tensor."""
    cached = getattr(model.config, "use_cache", None)
    try:
        if cached:
            model.config.use_cache = False
        yield
    finally:
        if cached:
            model.config.use_cache = cached


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets attention be products and a softmax: torch's fused one is exported with three passes more over all scores.

    Those put zeros where a token sees nothing at all, which no real token does.
    """
    before = model.config._attn_implementation
    try:
        if before == "sdpa":
            model.set_attn_implementation("eager")
        yield
    finally:
        if before == "sdpa":
            model.set_attn_implementation(before)


def _compare(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    import onnxruntime

    name, largest = type(model).__name__, 0.0
    shapes = shapes_to_compare(model)
    try:
        session = open_session(path)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise OnnxMismatchError(name, f"onnxruntime does not load it ({first_line(error)})") from error
    for batch, length in shapes:
        inputs = model_inputs(model, batch, length)
        where = f"at batch {batch} and length {length}"
        with torch.no_grad():
            expected: Tensor = model(**inputs).logits
        try:
            found = outputs_of(session, inputs)
        except Exception as error:  # see above
            raise OnnxMismatchError(name, f"onnxruntime fails {where} ({first_line(error)})") from error
        if found.shape != expected.shape:
            problem = f"its logits {where} have shape {list(found.shape)}, not {list(expected.shape)}"
            raise OnnxMismatchError(name, problem)
        difference = float((found - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= allowed:  # also for NaN
            problem = f"its logits {where} differ by {difference:.2g}, allowed is {allowed:.2g}"
            raise OnnxMismatchError(name, problem)
        largest = max(largest, difference)
    return {
        "inputs": list(model_inputs(model, *_EXAMPLE)),
        "opset": OPSET,
        "onnxruntime": onnxruntime.__version__,
        "shapes": [list(shape) for shape in shapes],
        "max_abs_difference": largest,
    }


def open_session(path: Path) -> Any:
    """The file in onnxruntime, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs_of(session: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits that a session computes."""
    (found,) = session.run([_OUTPUT], {key: tensor.numpy() for key, tensor in inputs.items()})
    return torch.from_numpy(found)


def model_inputs(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, the later rows of a batch with ever more padding; every tensor int64 `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    real = (length - torch.arange(batch) * length // (batch + 1)).clamp(min=1)
    mask = (torch.arange(length) < real[:, None]).long()
    ids[mask == 0] = getattr(config, "pad_token_id", None) or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = getattr(config, "type_vocab_size", 0)
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.randint(types, (batch, length), generator=generator)
    return inputs


def shapes_to_compare(model: PreTrainedModel) -> list[tuple[int, int]]:
    """A single token, the longest input, and batches of other sizes than the traced example's."""
    longest = min(longest_input(model), _LONGEST)
    wanted = ((1, 1), (2, 5), (3, 33), (1, longest))
    return [(batch, length) for batch, length in wanted if length <= longest]


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes what exporter and quantiser say of themselves; what may be wrong is measured."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
