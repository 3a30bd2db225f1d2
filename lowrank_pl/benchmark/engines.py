"""What runs a model: torch as it is, torch.compile, or onnxruntime, in float32 or in eight bits."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import ONNX_NAME, is_quantized
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.run import EngineError, NotOfTextsAloneError
from lowrank_pl.export.int8 import quantize_int8, ready_for_int8
from lowrank_pl.export.onnx_file import check_packages, write_onnx
from lowrank_pl.hub import first_line

Engine = Literal["eager", "compile", "onnxruntime", "onnxruntime-int8"]
ONNXRUNTIME: tuple[Engine, ...] = ("onnxruntime", "onnxruntime-int8")
Run = Callable[[], object]
Prepared = Callable[[Mapping[str, Tensor]], Run]


def check_engines(engines: list[Engine], device: str, dtype: str) -> None:
    """Raises an error for what cannot run.

    Raises:
        MissingPackagesError: onnxruntime, or what writes its files, is not installed.
        MissingArgumentError: onnxruntime elsewhere than on the CPU, or in another precision than float32.
        EngineError: torch.compile finds no compiler, for instance.
    """
    if "compile" in engines:
        _check_compiler(device)
    if any(engine in engines for engine in ONNXRUNTIME):
        check_packages("benchmark --engines onnxruntime")
        if device != "cpu" or dtype != "float32":
            remedy = "Use --device cpu --dtype float32, or leave onnxruntime out of --engines."
            raise MissingArgumentError(f"onnxruntime for {dtype} on {device}", remedy)


def _check_compiler(device: str) -> None:
    """Compiles one line of code, so that a missing compiler raises an error before any time is spent."""
    new = random.SystemRandom().random()  # torch keeps what it has compiled, for which it needs no compiler
    try:
        torch.compile(lambda x: (x + new).relu())(torch.ones(64, device=device))
    except Exception as error:  # of the compiler, of Triton, or of torch; they have no common base
        needs = "a C++ compiler (g++ or clang++; the variable CXX names another)" if device == "cpu" else "Triton"
        raise EngineError("compile", device, first_line(error), needs) from error


def check_runs(name: str, model: PreTrainedModel, engines: list[Engine], inputs: Mapping[str, Tensor]) -> None:
    """Runs a model once.

    Raises:
        MissingArgumentError: it has no logits, which a file for onnxruntime is compared by, or is in eight bits.
        NotOfTextsAloneError: it needs something else, as a choice among several texts or a decoder with an encoder.
    """
    in_onnxruntime = any(engine in engines for engine in ONNXRUNTIME)
    if in_onnxruntime and is_quantized(model):
        remedy = "It is in int8 for torch: name the model that it was exported from, or use --engines eager."
        raise MissingArgumentError(f"the float weights of {name!r}, for onnxruntime", remedy)
    try:
        with torch.inference_mode():
            output = model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # of the architecture's own code
        raise NotOfTextsAloneError(type(model).__name__, first_line(error)) from error
    if in_onnxruntime and "logits" not in output:
        remedy = "It is an encoder without a head: name a fine-tuned model, or leave onnxruntime out of --engines."
        raise MissingArgumentError(f"the head of {name!r}, for onnxruntime", remedy)


def prepare(model: PreTrainedModel, engine: Engine, threads: int, scratch: Path) -> Prepared:
    """Makes a model ready to run under an engine.

    Args:
        model: In eval mode.
        engine: Which one.
        threads: For onnxruntime, which does not heed torch's.
        scratch: An existing folder for what onnxruntime reads.

    Returns:
        A function that turns an input into a function without arguments, which runs the model on it.
    """
    if engine in ONNXRUNTIME:
        return _onnxruntime(model, threads, scratch, engine == "onnxruntime-int8")
    # Every length would be compiled anew otherwise.
    call: Any = _compiled(model) if engine == "compile" else model

    def ready(inputs: Mapping[str, Tensor]) -> Run:
        @torch.inference_mode()
        def run() -> object:
            return call(**inputs)

        return run

    return ready


def _compiled(model: PreTrainedModel) -> Any:
    options: dict[str, Any] = {"dynamic": True}
    # Models of one class share their code, and beyond a number of versions of it torch falls back to eager silently.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(model, **options)


def _onnxruntime(model: PreTrainedModel, threads: int, scratch: Path, int8: bool) -> Prepared:
    import onnxruntime

    model = ready_for_int8(model) if int8 else model
    write_onnx(model, scratch)
    if int8:
        quantize_int8(model, scratch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(scratch / ONNX_NAME, options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]

    def ready(inputs: Mapping[str, Tensor]) -> Run:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        # A model with token types wants them said.
        arrays |= {name: arrays["input_ids"] * 0 for name in wanted if name not in arrays}
        return lambda: session.run(None, arrays)

    return ready
