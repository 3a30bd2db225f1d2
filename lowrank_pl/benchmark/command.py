"""The verb `benchmark`: dense against factorised models on the user's own shapes."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl import __version__
from lowrank_pl.benchmark.engines import Engine, check_engines, prepare
from lowrank_pl.benchmark.figure import benchmark_figure
from lowrank_pl.benchmark.layers import (
    LayerTimes,
    Workload,
    latency_table,
    linear_shapes,
    measure_layers,
    number_of_measurements,
)
from lowrank_pl.benchmark.models import count_flops, inputs_for, load_model, peak_memory
from lowrank_pl.benchmark.results import Measurement, Results
from lowrank_pl.benchmark.timing import timed_in_turn
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MissingArgumentError, OutputExistsError, OutputNotWritableError
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
) -> Path:
    """Times models against the first of them, and layers of their shapes at many ranks.

    Models are timed in turn, round by round, and a speed-up is the median over rounds of two times of the same round.
    Run it with nothing else running.

    Args:
        models: Checkpoints, output folders of `compress`, exported folders, or dense models as `pretrained` names
            them. The first is what the others are compared with.
        output: A new or empty folder: benchmark.md, benchmark.json, benchmark.png, latency.json (the times of layers
            at the largest batch and length, for `cost: Latency` of a strategy).
        batch_sizes: Texts per call.
        lengths: Tokens per text; every batch size is run with every length.
        dtype: Of weights and activations.
        device: `cpu`, `cuda`, `cuda:1`, …
        threads: Of the CPU; by default as many as torch uses.
        engines: `eager`, `compile` (torch.compile) and `onnxruntime` (float32 on the CPU; needs the extra `onnx`).
        rounds: How often every model is timed.
        seconds: How long at least, each time.
        layers: Whether to time layers.

    Returns:
        The folder.

    Raises:
        OutputExistsError, OutputNotWritableError: see `output`.
        RangeError: an impossible number.
        MissingArgumentError: no model, or a device that is not there or not for this engine.
        MissingPackagesError: see `engines`.
    """
    folder = Path(output).expanduser()
    threads = torch.get_num_threads() if threads is None else threads
    whole = {"batch_sizes": batch_sizes, "lengths": lengths, "rounds": [rounds], "threads": [threads]}
    _check(folder, models, device, whole, seconds)
    check_engines(engines, device, dtype)
    loaded = {label: _load(path, device, _DTYPES[dtype]) for label, path in _labels(models).items()}
    sizes = [(batch, length) for batch in batch_sizes for length in lengths]
    for model in loaded.values():
        inputs_for(model, 1, max(lengths))
    work = Workload(max(batch_sizes) * max(lengths), _DTYPES[dtype], device, threads, rounds, seconds)
    shapes = [shape for model in loaded.values() for shape in linear_shapes(model, TargetSelector()) if layers]
    shapes = list(dict.fromkeys(shapes))
    total = len(engines) * len(sizes) * len(models) * rounds + number_of_measurements(shapes, rounds)
    with tqdm(total=total, desc="Benchmark", file=sys.stdout) as bar:
        measurements = [found for engine in engines for found in _models(loaded, engine, sizes, work, bar)]
        times: Sequence[LayerTimes] = measure_layers(shapes, work, bar.update)
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in loaded.items()}
    results = Results(measurements, parameters, times, _circumstances(device, dtype, threads, _labels(models)))
    _write(folder, results, work)
    print(results.to_markdown())
    return folder


def _models(
    loaded: dict[str, PreTrainedModel], engine: Engine, sizes: Sequence[tuple[int, int]], work: Workload, bar: Any
) -> list[Measurement]:
    found = []
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
            for name, model in loaded.items():
                flops, peak = count_flops(model, inputs[name]), peak_memory(runs[name], work.device)
                found.append(Measurement(name, engine, batch, length, times[name], flops, peak))
    return found


def _check(folder: Path, models: list[str], device: str, whole: dict[str, list[int]], seconds: float) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(str(folder))
    if not models:
        raise MissingArgumentError("a model", "Name at least one with --models, the one to compare with first.")
    if len(set(models)) < len(models):
        raise MissingArgumentError("a second model", "A model is named twice in --models; name each once.")
    for name, values in whole.items():
        for value in values or [0]:
            if value < 1:
                raise RangeError(name, value, "whole numbers from 1")
    if not seconds > 0:
        raise RangeError("seconds", seconds, "a positive number")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingArgumentError(f"the device {device!r}", "torch finds no CUDA here; use --device cpu.")


def _labels(paths: list[str]) -> dict[str, str]:
    """Paths by short names: what is left of them without what they have in common at both ends."""
    parts = [Path(path).parts for path in paths]
    if len(parts) == 1:
        return {Path(paths[0]).name: paths[0]}
    start = next(i for i, row in enumerate(zip_longest(*parts)) if len(set(row)) > 1)
    ends = [row[start:][::-1] for row in parts]
    same = next((i for i, row in enumerate(zip_longest(*ends)) if len(set(row)) > 1), 0)
    labels = ["/".join(row[start : len(row) - same]) or path for row, path in zip(parts, paths, strict=True)]
    return dict(zip(labels, paths, strict=True))


def _load(path: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_model(path)
    # Called as the parent's: transformers' own is wrapped in a way that types do not survive.
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model


def _circumstances(device: str, dtype: str, threads: int, models: dict[str, str]) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    return {
        "device": f"{device} ({name})",
        "dtype": dtype,
        "threads": threads,
        "torch": torch.__version__,
        "lowrank_pl": __version__,
        **models,
    }


def _cpu() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _write(folder: Path, results: Results, work: Workload) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.json").write_text(json.dumps(results.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "benchmark.md").write_text(results.to_markdown(), encoding="utf-8")
        benchmark_figure(results).savefig(folder / "benchmark.png", dpi=130)
        if results.layers:
            table = json.dumps(latency_table(results.layers, work), indent=1)
            (folder / "latency.json").write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error
