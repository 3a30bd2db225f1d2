"""Scores static methods on GLUE tasks, before and after tuning, against the dense model: one table.

For each task: fine-tune the dense encoder; factorise it with every method and keep_ratio and score it as it is; tune
it again where asked. Every step is an ordinary `python -m lowrank_pl` run with its own report.json, so a stopped grid
goes on where it was, and every number of the table can be looked up.

    python studies/static_grid.py --glue PATH/TO/glue --tasks MRPC STS-B --tune MRPC:0.33 MRPC:0.2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from options import limit_of, parser, read
from tables import Report, describe, header, line, write

METHODS: dict[str, list[str]] = {
    "SVD": [],
    "FWSVD input": ["input"],
    "FWSVD output": ["output"],
    "FWSVD both": ["both"],
    "TFWSVD": [],
    "KroneckerSVD": [],
}


def lowrank(*arguments: str, log: Path) -> None:
    """Runs the command line with its output in a log file."""
    print("·", " ".join(arguments), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "lowrank_pl", *arguments, "--trainer.enable_progress_bar", "false"]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"failed with exit code {code}; see {log}")


class Grid:
    """The runs of one task."""

    def __init__(self, arguments: argparse.Namespace, task: str, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.folder = Path(arguments.output) / f"{task}-seed{seed}"
        self.common = ["--config", "configs/recipes/glue_finetune.yaml", f"--seed_everything={seed}"]
        self.common += [f"--model.init_args.pretrained={arguments.pretrained}"]
        self.common += [f"--model.init_args.optimizer.init_args.lr={arguments.lr}"]
        self.common += [f"--data.init_args.task={task}", f"--data.init_args.path={arguments.glue}/{task}"]
        self.common += [f"--data.init_args.seed={seed}", f"--trainer.max_epochs={arguments.epochs}"]
        limit = limit_of(task, arguments)
        if limit is not None:
            self.common.append(f"--data.init_args.max_train_samples={limit}")

    def fit(self, name: str, *extra: str) -> tuple[Report, Path]:
        """A fit with its report and the checkpoint of its last epoch."""
        run = self.folder / name
        logger = [f"--trainer.logger.init_args.{k}={v}" for k, v in (("save_dir", self.folder), ("name", name))]
        report = run / "version_0" / "report.json"
        if not report.exists():
            logger.append("--trainer.logger.init_args.version=version_0")
            lowrank("fit", *self.common, *extra, *logger, log=self.folder / f"{name}.log")
        return json.loads(report.read_text(encoding="utf-8")), run / "version_0" / "checkpoints" / "last.ckpt"

    def compress(self, method: str, ratio: str, dense: Path) -> tuple[Report, Path]:
        """A compress with its report and folder."""
        folder = self.folder / f"compress-{method.replace(' ', '-')}-{ratio}"
        if not (folder / "report.json").exists():
            logs = f"--trainer.logger.init_args.save_dir={self.folder}"
            strategy = [f"--model.init_args.strategy={method.split()[0]}"]
            strategy += [f"--model.init_args.strategy.init_args.keep_ratio={ratio}"]
            strategy += [f"--model.init_args.strategy.init_args.side={side}" for side in METHODS[method]]
            start = f"--model.init_args.init_from={dense}"
            arguments = [*self.common, start, *strategy, logs, f"--output={folder}"]
            lowrank("compress", *arguments, log=folder.parent / f"{folder.name}.log")
        return json.loads((folder / "report.json").read_text(encoding="utf-8")), folder


def main() -> None:
    """Runs the grid and writes grid.md and grid.json."""
    options = parser(
        __doc__,
        "glue",
        "max_train_samples",
        "seeds",
        "pretrained",
        "lr",
        "epochs",
        output=Path("logs/static_grid"),
        tasks=["MRPC", "STS-B", "SST-2"],
        ratios=["0.5", "0.33", "0.2", "0.1"],
        methods=METHODS,
    )
    options.add_argument("--tune", nargs="*", default=["MRPC:0.33", "MRPC:0.2"], metavar="TASK:RATIO")
    arguments = read(options)
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks:
        for seed in arguments.seeds:
            grid = Grid(arguments, task, seed)
            report, dense = grid.fit("dense")
            rows.append({"task": task, "seed": seed, "method": "dense", "ratio": "1", "before": report, "after": None})
            for ratio in arguments.ratios:
                for method in arguments.methods:
                    before, folder = grid.compress(method, ratio, dense)
                    after = None
                    if f"{task}:{ratio}" in arguments.tune:
                        name = f"tuned-{method.replace(' ', '-')}-{ratio}"
                        after, _ = grid.fit(name, f"--model.init_args.init_from={folder}")
                    rows.append(
                        {"task": task, "seed": seed, "method": method, "ratio": ratio, "before": before, "after": after}
                    )
    lines = header("task", "seed", "method", "keep_ratio", "parameters", "before tuning", "after tuning")
    for row in rows:
        before, after = row["before"], row["after"]
        told = [row["task"], row["seed"], row["method"], f"{before['keep_ratio']:.3f}"]
        told += [f"{before['parameters']['total']:,}", describe(before), describe(after) if after else ""]
        lines.append(line(*told))
    write(arguments.output, "grid", lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
