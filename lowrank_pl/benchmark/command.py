"""The verb `benchmark`: dense against factorised models on the user's own shapes."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl import __version__
from lowrank_pl.benchmark.engines import Engine, check_engines, check_runs, prepare
from lowrank_pl.benchmark.layers import Workload, linear_shapes, measure_layer, number_of_measurements
from lowrank_pl.benchmark.models import count_flops, inputs_for, peak_memory, weight_bytes
from lowrank_pl.benchmark.request import check_request, labels
from lowrank_pl.benchmark.results import Measurement, Results
from lowrank_pl.benchmark.saved import check_continues, output_folder, read_stopped, save_all, save_numbers
from lowrank_pl.benchmark.timing import timed_in_turn
from lowrank_pl.checkpoint import load_model
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputNotWritableError
from lowrank_pl.files import OutputFolder
from lowrank_pl.files.command import command_line
from lowrank_pl.nn import FinalForm, final_form
from lowrank_pl.surgery import TargetSelector

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def benchmark(
    models: list[str],
    output: str,
    batch_sizes: list[int] = [1, 8, 32],  # noqa: B006, never changed, and shown in --help
    lengths: list[int] = [16, 64, 128],  # noqa: B006
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    threads: int | None = None,
    engines: list[Engine] = ["eager"],  # noqa: B006
    rounds: int = 5,
    seconds: float = 0.3,
    layers: bool = True,
    resume: bool = False,
    form: FinalForm = "low_rank",
) -> Path:
    """Times models against the first of them, and layers of their shapes at many ranks.

    Models are timed in turn, round by round, and a speed-up is the median over rounds of two times of the same round.
    Run it with nothing else running. benchmark.json is written as times come in; a stopped run leaves what it has.

    Args:
        models: Checkpoints, output folders of `compress`, exported folders (those in int8 with `eager` and
            `compile`), or dense models as `pretrained` names them. The first is what the others are compared with.
        output: A new or empty folder: benchmark.md, benchmark.json, benchmark.png and, with `layers`, latency.json (the
            times of layers at the largest batch and length, for `cost: Latency` of a strategy).
        batch_sizes: Texts per call.
        lengths: Tokens per text; every batch size is run with every length.
        dtype: Of weights and activations.
        device: `cpu`, `cuda`, `cuda:1`, …
        threads: Of the CPU; by default as many as torch uses.
        engines: `eager`, `compile` (torch.compile), `onnxruntime` (float32 on the CPU; needs the extra `onnx`) and
            `onnxruntime-int8` (the same file with weights and activations in eight bits).
        rounds: How often every model is timed.
        seconds: How long at least, each time.
        layers: Whether to time layers.
        resume: Go on in the folder of a stopped run, measuring only what it lacks.
        form: In which form layers are timed, for strategies with the same `form`; models are timed in their own.

    Returns:
        The folder.

    Raises:
        OutputExistsError, OutputNotWritableError: see `output`.
        RangeError: an impossible number.
        MissingArgumentError: no model, or a device that is not there or not for this engine.
        MissingPackagesError, EngineError: see `engines`.
        NotOfTextsAloneError: a model needs something else than texts.
        BenchmarkResumeError: there is nothing to resume, or it was measured in other circumstances.
    """
    folder = output_folder(output)
    threads = torch.get_num_threads() if threads is None else threads
    whole = {"batch_sizes": batch_sizes, "lengths": lengths, "rounds": [rounds], "threads": [threads]}
    final_form(form)
    check_request(folder, models, engines, device, whole, resume)
    before = read_stopped(folder.path) if resume else None
    if not seconds > 0:
        raise RangeError("seconds", seconds, "a positive number")
    check_engines(engines, device, dtype)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)  # the one that the timer waits for
    loaded = {label: _load(path, device, _DTYPES[dtype]) for label, path in labels(models).items()}
    sizes = [(batch, length) for batch in batch_sizes for length in lengths]
    for name, model in loaded.items():
        check_runs(name, model, engines, inputs_for(model, 1, max(lengths)))
    work = Workload(max(batch_sizes) * max(lengths), _DTYPES[dtype], device, threads, rounds, seconds, form)
    shapes = [shape for model in loaded.values() for shape in linear_shapes(model, TargetSelector())] if layers else []
    shapes = list(dict.fromkeys(shapes))
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in loaded.items()}
    size = {name: weight_bytes(model) for name, model in loaded.items()}
    results = Results([], parameters, [], _circumstances(work, labels(models)), size, complete=False)
    if before is not None:
        check_continues(folder.path, before, results)
        kept = [layer for layer in before.layers if layer.tokens == work.tokens]
        results = replace(results, measurements=before.measurements, layers=kept)
    results = _measure(folder, results, loaded, list(engines), sizes, shapes, work)
    print(results.to_markdown())
    return folder.path


def _measure(
    output: OutputFolder,
    results: Results,
    loaded: dict[str, PreTrainedModel],
    engines: Sequence[Engine],
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[LinearShape],
    work: Workload,
) -> Results:
    """Measures what the results lack, writing them all the while."""
    measured, times = list(results.measurements), list(results.layers)
    done = {found.cell for found in measured}
    cells = {engine: [size for size in sizes if (engine, *size) not in done] for engine in engines}
    shapes = [shape for shape in shapes if shape not in {layer.shape for layer in times}]
    total = sum(map(len, cells.values())) * len(loaded) * work.rounds + number_of_measurements(
        shapes, work.rounds, work.form
    )
    folder = output.begun()  # what cannot be written should not be measured for minutes
    results = replace(results, measurements=measured, layers=times)  # which grow
    try:
        with tqdm(total=total, desc="Benchmark", file=sys.stdout) as bar:
            for engine in engines:
                for found in _models(loaded, engine, cells[engine], work, bar):
                    measured += found
                    save_numbers(folder, results)
            for shape in shapes:
                times.append(measure_layer(shape, work, bar.update))
                save_numbers(folder, results)
        results = replace(results, complete=True)
        save_all(folder, results, work)
    except BaseException:
        _tell_stopped(folder, results, work)
        raise
    return results


def _tell_stopped(folder: Path, results: Results, work: Workload) -> None:
    """Leaves what there is, also where an interrupt or a lack of memory has stopped the run."""
    with suppress(OSError):  # not empty: a stopped run left something before
        folder.rmdir()
    if folder.exists():
        with suppress(OutputNotWritableError):  # what has stopped the run is told instead
            save_all(folder, replace(results, complete=False), work)
        print(f"\nstopped: what was measured so far is in {folder}; the same command with --resume true goes on")


def _models(
    loaded: dict[str, PreTrainedModel], engine: Engine, sizes: Sequence[tuple[int, int]], work: Workload, bar: Any
) -> Iterator[list[Measurement]]:
    """Of every size, one measurement per model."""
    if not sizes:
        return
    with TemporaryDirectory() as scratch:
        ready = {}
        for index, (name, model) in enumerate(loaded.items()):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            ready[name] = prepare(model, engine, work.threads, folder)
        for batch, length in sizes:
            inputs = {name: inputs_for(model, batch, length) for name, model in loaded.items()}
            runs = {name: ready[name](inputs[name]) for name in loaded}
            times = timed_in_turn(runs, work.rounds, work.seconds, work.threads, bar.update)
            found = []
            for name, model in loaded.items():
                flops, peak = count_flops(model, inputs[name]), peak_memory(model, runs[name])
                found.append(Measurement(name, engine, batch, length, times[name], flops, peak))
            yield found


def _load(path: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_model(path, "--models")
    # Called as the parent's: transformers' own is wrapped in a way that types do not survive.
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model


def _circumstances(work: Workload, models: dict[str, str]) -> dict[str, Any]:
    name = torch.cuda.get_device_name(work.device) if work.device.startswith("cuda") else _cpu()
    packages = ("torch", "transformers", "onnxruntime", "torchao")
    return {
        "device": f"{work.device} ({name})",
        "dtype": str(work.dtype).removeprefix("torch."),
        "threads": work.threads,
        "rounds": work.rounds,
        "seconds": work.seconds,
        **({} if work.form == "low_rank" else {"form": work.form}),
        "lowrank_pl": __version__,
        **{name: version(name) for name in packages if importlib.util.find_spec(name) is not None},
        "models": models,
        "command": command_line(),
    }


def _cpu() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
