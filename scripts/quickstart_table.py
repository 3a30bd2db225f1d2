"""Prints the table at the end of the quick start from the reports that its runs left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = {"dense": "test-dense", "factorised": "test-factorised", "factorised, tuned": "test-tuned"}


def read(folder: Path) -> dict[str, Any]:
    """The report of a run."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    """Reads `<folder>/test-*/report.json` and prints."""
    folder = Path(sys.argv[1])
    reports = {name: read(folder / run) for name, run in ROWS.items()}
    first = reports["dense"]
    print(f"\n{first['task']}: {first['metric']} on the {first['split']} split, {first['pretrained']}\n")
    print(f"{'model':<20}{'score':>8}{'parameters':>14}{'encoder linears':>18}{'keep_ratio':>12}")
    for name, report in reports.items():
        parameters = report["parameters"]
        print(
            f"{name:<20}{report['score']:>8.4f}{parameters['total']:>14,}{parameters['targeted_kept']:>18,}"
            f"{report['keep_ratio']:>12.3f}"
        )
    seconds = {name: read(folder / name)["seconds"] for name in ("dense", "factorised", "tuned")}
    print(f"\nseconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    print(f"TensorBoard:  tensorboard --logdir {folder}")
    print(f"report:       {folder / 'factorised' / 'report.md'}")
    print(f"ranks:        {folder / 'factorised' / 'ranks.png'}")
    print(f"the model:    {folder / 'tuned' / 'checkpoints' / 'best.ckpt'}")


if __name__ == "__main__":
    main()
