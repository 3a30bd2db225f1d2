"""Scores RankDyna on GLUE tasks against the two-round static methods at equal epochs in all: one table.

RankDyna trains once for `2 · epochs` from the pre-trained encoder; the static methods tune for `epochs`, factorise and
tune for `epochs` again (the runs of static_grid.py, used if they are there). Every run is an ordinary `python -m
lowrank_pl` run with its own report.json, so a stopped grid goes on where it was.

    python studies/rankdyna_grid.py --glue PATH/TO/glue --tasks MRPC STS-B --ratios 0.33 0.1 --seeds 0 1 2

`--variant NAME ARGUMENT…` runs other settings under that name.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from options import parser, read
from static_grid import METHODS, Grid
from tables import Report, describe, header, line, write

STRATEGY = "--model.init_args.strategy"
CHECKPOINTS = "configs/recipes/glue_rankdyna.yaml"


class RankDynaGrid(Grid):
    """The runs of one task and seed, RankDyna's among them."""

    def rankdyna(self, ratio: str, variant: str, extra: list[str]) -> Report:
        """One round for as many epochs as the two rounds of the others have together."""
        epochs = 2 * int(self.arguments.epochs)
        strategy = ["--config", CHECKPOINTS, f"{STRATEGY}.init_args.keep_ratio={ratio}"]
        # A later argument wins, so everything that the static methods share stays as it is.
        again = [argument for argument in self.common if not argument.startswith("--trainer.max_epochs")][2:]
        name = f"rankdyna-{ratio}-{variant}"
        report, _ = self.fit(name, *strategy, *again, f"--trainer.max_epochs={epochs}", *extra)
        return report

    def static(self, method: str, ratio: str) -> Report:
        """Tune, factorise, tune."""
        _, dense = self.fit("dense")
        _, folder = self.compress(method, ratio, dense)
        name = f"tuned-{method.replace(' ', '-')}-{ratio}"
        report, _ = self.fit(name, f"--model.init_args.init_from={folder}")
        return report


def main() -> None:
    """Runs the grid and writes rankdyna.md and rankdyna.json."""
    options = parser(
        __doc__,
        "glue",
        "max_train_samples",
        "pretrained",
        "lr",
        "epochs",
        output=Path("logs/static_grid"),
        tasks=["MRPC", "STS-B"],
        ratios=["0.33", "0.1"],
        seeds=[0, 1, 2],
    )
    options.add_argument("--methods", nargs="*", default=["FWSVD input", "FWSVD both"], choices=list(METHODS))
    options.add_argument("--variant", nargs=argparse.REMAINDER, default=[], help="a name and arguments, last of all")
    arguments = read(options)
    variant, *extra = arguments.variant or ["default"]
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks:
        for ratio in arguments.ratios:
            for seed in arguments.seeds:
                grid = RankDynaGrid(arguments, task, seed)
                told = {"task": task, "ratio": ratio, "seed": seed}
                report = grid.rankdyna(ratio, variant, extra)
                rows.append({**told, "method": f"RankDyna {variant}", "report": report})
                for method in arguments.methods:
                    rows.append({**told, "method": method, "report": grid.static(method, ratio)})
    lines = tables(rows)
    write(arguments.output, "rankdyna", lines, rows)
    print("\n".join(lines))


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Every run, and means with standard deviations over seeds."""
    lines = header("task", "keep_ratio", "method", "seed", "score", "metrics")
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        report, key = row["report"], (row["task"], row["ratio"], row["method"])
        groups.setdefault(key, []).append(report["score"])
        lines.append(line(*key, row["seed"], f"{report['score']:.4f}", describe(report)))
    lines += ["", *header("task", "keep_ratio", "method", "seeds", "score, mean ± standard deviation")]
    for key, scores in groups.items():
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.append(line(*key, len(scores), f"{statistics.mean(scores):.4f} ± {spread:.4f}"))
    return lines


if __name__ == "__main__":
    main()
