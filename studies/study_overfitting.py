r"""Does a closer fit to the measured Fisher information help the task? How many calibration samples does it take?

Splits the training data at random into two halves. The first half's Fisher information, from a growing number of its
samples, is what TFWSVD minimises by; the second half's is what nobody fits. For every number of samples, number of
solver steps and shrinkage: the objective under both, and loss and accuracy on the development set without tuning.

    python studies/study_overfitting.py --model RUN/checkpoints/last.ckpt --task MRPC --glue PATH/TO/glue \
        --output logs/overfitting

Writes overfitting.json, overfitting.md and overfitting.png. Objectives are means over the matrices of
`Σ F (W − AB)² / Σ F W²`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from options import glue, parser, read
from tables import header, line, write
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.core import Factors, LinearShape
from lowrank_pl.core.elementwise import PreconditionedLBFGS, WeightedProblem, best_closed_form, shrink_importance
from lowrank_pl.importance import FisherKind, empirical_fisher
from lowrank_pl.nn import LowRankLinear, dense_weight
from lowrank_pl.surgery import Exchange, TargetSelector
from lowrank_pl.tasks import SequenceClassification

Importances = dict[str, Tensor]
PANELS = {
    "fitted": "objective, fitted samples",
    "held_out": "objective, held-out half",
    "loss": "development loss, no tuning",
}


@dataclass
class Row:
    """One setting: what was fitted, how far, and what came out."""

    samples: int
    shrinkage: float
    steps: int
    fitted: float
    held_out: float
    loss: float
    accuracy: float


class Bench:
    """The tuned model, its data and its development score."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.task = SequenceClassification(init_from=arguments.model)
        self.task.build()
        self.task.eval()
        self.data = glue(arguments.task, arguments)
        self.data.prepare_data()
        self.data.setup("fit")
        self.layers = TargetSelector().select(self.task.encoder)
        self.weights = {name: dense_weight(layer).detach().clone() for name, layer in self.layers.items()}
        self.ranks = {}
        for name, weight in self.weights.items():
            shape = LinearShape(*weight.shape)
            self.ranks[name] = int(arguments.keep_ratio * shape.dense_params / shape.params_per_rank)

    def importances(self, sizes: list[int], seed: int) -> tuple[dict[int, Importances], Importances]:
        """`F` of the first half by number of samples (nested), and `F` of the whole second half."""
        total = self.data.calibration_batches(32).num_samples
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        half = total // 2
        sizes = [*(size for size in sizes if size < half), half]
        fitted: dict[int, Importances] = {}
        sums: Importances = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for begin, end in zip([0, *sizes[:-1]], sizes, strict=True):
            piece = self._fisher(order[begin:end])
            sums = {name: sums[name] + (end - begin) * piece[name] for name in sums}
            fitted[end] = {name: value / end for name, value in sums.items()}
        return fitted, self._fisher(order[half:])

    def _fisher(self, indices: list[int]) -> Importances:
        training = list(self.data.calibration_batches(1))  # one sample each, by length
        batches = tqdm([training[index] for index in indices], desc=f"Fisher of {len(indices)}")
        losses = self.task.per_sample_losses
        fisher = empirical_fisher(self.task.encoder, self.layers, batches, losses, FisherKind.FULL)
        return {name: layer.full for name, layer in fisher.layers.items() if layer.full is not None}

    @torch.no_grad()
    def development(self, factors: dict[str, Factors]) -> tuple[float, float]:
        """Loss and accuracy of the development set with these factors in place."""
        replacements = {}
        for name, found in factors.items():
            layer = LowRankLinear.like(self.layers[name], self.ranks[name]).eval()
            layer.assign_(found)
            replacements[name] = layer
        total, right, count = 0.0, 0, 0
        with Exchange(self.task.encoder, replacements):
            for batch in self.data.val_dataloader():
                labels = batch.pop("labels")
                logits = self.task.encoder(**batch).logits
                total += float(self.task.losses(logits, labels).sum())
                right += int((logits.argmax(-1) == labels).sum())
                count += len(labels)
        return total / count, right / count

    def iterates(self, importances: Importances, steps: list[int]) -> dict[int, dict[str, Factors]]:
        """Factors of every layer after so many solver steps; 0 is the best closed form."""
        found: dict[int, dict[str, Factors]] = {step: {} for step in steps}
        for name, weight in tqdm(self.weights.items(), desc="Factorisation"):
            start = best_closed_form(weight, importances[name], self.ranks[name])
            found[0][name] = start
            problem = WeightedProblem.of(weight, importances[name])
            a, b = start.balanced()
            solver = PreconditionedLBFGS(max(steps), tolerance=0)
            with torch.no_grad():
                for step, (a_k, b_k, _) in enumerate(solver.iterate(problem, a, b), start=1):
                    if step in found:
                        found[step][name] = Factors.from_product(a_k.double(), b_k.double()).to(weight.dtype)
                    if step == max(steps):
                        break
        return found

    def objective(self, importances: Importances, factors: dict[str, Factors]) -> float:
        """Mean over matrices of the objective under an importance."""
        values = []
        for name, weight in self.weights.items():
            values.append(WeightedProblem.of(weight, importances[name]).loss(*factors[name].balanced()))
        return sum(values) / len(values)


def main() -> None:
    """Measures and writes."""
    options = parser(
        __doc__, "model", "task", "glue", "pretrained", max_train_samples=[], output=Path("logs/overfitting")
    )
    options.add_argument("--keep_ratio", type=float, default=0.33)
    options.add_argument("--samples", nargs="+", type=int, default=[64, 256, 1024])
    options.add_argument("--steps", nargs="+", type=int, default=[0, 2, 5, 10, 20, 60])
    options.add_argument("--shrinkages", nargs="+", type=float, default=[0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
    options.add_argument("--shrunk_steps", type=int, default=20, help="solver steps under shrinkage")
    options.add_argument("--seed", type=int, default=0, help="of the split into halves")
    arguments = read(options)
    bench = Bench(arguments)
    fitted, held_out = bench.importances(list(arguments.samples), arguments.seed)
    rows: list[Row] = []
    for samples, importances in fitted.items():
        for shrinkage in arguments.shrinkages:
            shrunk = {name: shrink_importance(value, shrinkage) for name, value in importances.items()}
            # The whole curve without shrinkage; with it, only near convergence.
            steps = arguments.steps if shrinkage == 0 else [arguments.shrunk_steps]
            for step, factors in bench.iterates(shrunk, sorted({0, *steps})).items():
                objectives = bench.objective(importances, factors), bench.objective(held_out, factors)
                rows.append(Row(samples, shrinkage, step, *objectives, *bench.development(factors)))
                print(rows[-1], flush=True)
            tell(arguments, rows)


def tell(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Writes table, figures and plot."""
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    lines = header(*(field.name for field in fields(Row)))
    for row in rows:
        lines.append(line(*(f"{value:.4f}" if isinstance(value, float) else value for value in asdict(row).values())))
    write(arguments.output, "overfitting", lines, {"arguments": told, "rows": [asdict(row) for row in rows]})
    figure = Figure(figsize=(13, 4), layout="constrained")
    for place, (key, label) in enumerate(PANELS.items(), start=1):
        axes = figure.add_subplot(1, len(PANELS), place)
        for samples in dict.fromkeys(row.samples for row in rows):
            mine = [row for row in rows if row.samples == samples and row.shrinkage == 0]
            values = [getattr(row, key) for row in mine]
            axes.plot([row.steps for row in mine], values, marker="o", label=f"{samples} samples")
        axes.set_xscale("symlog", linthresh=2)
        axes.set_xlabel("solver steps")
        axes.set_title(label, fontsize=9)
        axes.legend(fontsize=7)
    figure.savefig(arguments.output / "overfitting.png", dpi=110)


if __name__ == "__main__":
    main()
