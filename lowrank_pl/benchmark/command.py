"""The verb `benchmark`: dense against factorised models on the user's own shapes."""

from __future__ import annotations

import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl import __version__
from lowrank_pl.benchmark.engines import Engine, check_engines, check_runs, prepare
from lowrank_pl.benchmark.figure import benchmark_figure
from lowrank_pl.benchmark.layers import (
    LayerTimes,
    Workload,
    latency_table,
    linear_shapes,
    measure_layers,
    number_of_measurements,
)
from lowrank_pl.benchmark.models import count_flops, inputs_for, load_model, peak_memory, weight_bytes
from lowrank_pl.benchmark.request import check_request, labels
from lowrank_pl.benchmark.results import Measurement, Results
from lowrank_pl.benchmark.timing import timed_in_turn
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import OutputNotWritableError
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
        output: A new or empty folder: benchmark.md, benchmark.json, benchmark.png and, with `layers`, latency.json (the
            times of layers at the largest batch and length, for `cost: Latency` of a strategy).
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
    check_request(folder, models, engines, device, whole)
    if not seconds > 0:
        raise RangeError("seconds", seconds, "a positive number")
    check_engines(engines, device, dtype)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)  # the one that the timer waits for
    loaded = {label: _load(path, device, _DTYPES[dtype]) for label, path in labels(models).items()}
    sizes = [(batch, length) for batch in batch_sizes for length in lengths]
    for name, model in loaded.items():
        check_runs(name, model, engines, inputs_for(model, 1, max(lengths)))
    work = Workload(max(batch_sizes) * max(lengths), _DTYPES[dtype], device, threads, rounds, seconds)
    shapes = [shape for model in loaded.values() for shape in linear_shapes(model, TargetSelector())] if layers else []
    shapes = list(dict.fromkeys(shapes))
    _make(folder)
    total = len(engines) * len(sizes) * len(models) * rounds + number_of_measurements(shapes, rounds)
    with tqdm(total=total, desc="Benchmark", file=sys.stdout) as bar:
        measurements = [found for engine in engines for found in _models(loaded, engine, sizes, work, bar)]
        times: Sequence[LayerTimes] = measure_layers(shapes, work, bar.update)
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in loaded.items()}
    size = {name: weight_bytes(model) for name, model in loaded.items()}
    results = Results(measurements, parameters, times, _circumstances(work, labels(models)), size)
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
                flops, peak = count_flops(model, inputs[name]), peak_memory(model, runs[name])
                found.append(Measurement(name, engine, batch, length, times[name], flops, peak))
    return found


def _load(path: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_model(path)
    # Called as the parent's: transformers' own is wrapped in a way that types do not survive.
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model


def _circumstances(work: Workload, models: dict[str, str]) -> dict[str, Any]:
    name = torch.cuda.get_device_name(work.device) if work.device.startswith("cuda") else _cpu()
    packages = ("torch", "transformers", "onnxruntime")
    return {
        "device": f"{work.device} ({name})",
        "dtype": str(work.dtype).removeprefix("torch."),
        "threads": work.threads,
        "rounds": work.rounds,
        "seconds": work.seconds,
        "lowrank_pl": __version__,
        **{name: version(name) for name in packages if importlib.util.find_spec(name) is not None},
        "models": models,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _make(folder: Path) -> None:
    """Before anything is timed: what cannot be written should not be measured for minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error


def _write(folder: Path, results: Results, work: Workload) -> None:
    try:
        (folder / "benchmark.json").write_text(json.dumps(results.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "benchmark.md").write_text(results.to_markdown(), encoding="utf-8")
        benchmark_figure(results).savefig(folder / "benchmark.png", dpi=130)
        if results.layers:
            table = json.dumps(latency_table(results.layers, work), indent=1)
            (folder / "latency.json").write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error
