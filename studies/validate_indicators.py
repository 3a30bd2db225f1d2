r"""Which indicator predicts the damage that plain SVD does to a matrix?

Factorises every targeted matrix of a tuned model alone, by SVD at one keep_ratio, and reports the rank correlation of
each indicator of `lowrank-pl diagnose` with two measures of damage: the rise of the development loss, and the
divergence of the predictions from the dense model's (an overconfident model's loss may fall when it is damaged).

    python studies/validate_indicators.py --model RUN/checkpoints/last.ckpt --diagnosis DIR/diagnosis.json \
        --task MRPC --glue PATH/TO/glue --output logs/indicators

Writes indicators.json, indicators.md and indicators.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from options import glue, parser, read
from tables import header, line, write
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torchmetrics.functional import spearman_corrcoef
from tqdm.auto import tqdm

from lowrank_pl.core import truncated_svd
from lowrank_pl.data import GLUE
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery import Exchange
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
DAMAGES = ("rise", "drift")


@torch.no_grad()
def development(task: SequenceClassification, data: GLUE) -> tuple[float, Tensor]:
    """Mean loss over the validation split, and the logarithms of the predicted probabilities `[samples, classes]`."""
    losses, predicted = [], []
    for batch in data.val_dataloader():
        logits = task(batch).float()
        losses.append(task.losses(logits, batch["labels"]))
        predicted.append(logits.log_softmax(-1))
    return float(torch.cat(losses).mean()), torch.cat(predicted)


def main() -> None:
    """Measures and writes."""
    options = parser(
        __doc__, "model", "task", "glue", "pretrained", max_train_samples=[], output=Path("logs/indicators")
    )
    options.add_argument("--diagnosis", type=Path, required=True, help="diagnosis.json of the same model")
    arguments = read(options)
    task = SequenceClassification(init_from=arguments.model)
    task.build()
    task.eval()
    data = glue(arguments.task, arguments)
    data.prepare_data()
    data.setup("validate")
    dense, reference = development(task, data)
    rows: list[dict[str, Any]] = []
    for layer in tqdm(json.loads(arguments.diagnosis.read_text(encoding="utf-8"))["layers"], desc="layers"):
        linear = task.encoder.get_submodule(layer["name"])
        assert isinstance(linear, nn.Linear)
        factorised = LowRankLinear.like(linear, layer["rank"]).eval()
        factors = truncated_svd(linear.weight.detach(), layer["rank"])
        factorised.assign_(factors)
        with Exchange(task.encoder, {layer["name"]: factorised}):
            loss, predicted = development(task, data)
        drift = float(kl_div(predicted, reference, reduction="batchmean", log_target=True))
        error = float(torch.linalg.norm(linear.weight - factors.product()) / torch.linalg.norm(linear.weight))
        told = {key: layer[key] for key in ("variance", "relative_variance", "within_input", "rank_one_residual")}
        told |= {"expected_rise": layer["expected_rise"]["SVD"], "svd_objective": layer["objective"]["SVD"]}
        rows.append({"name": layer["name"], "rise": loss - dense, "drift": drift, **told, "svd_error": error})
    columns = {key: torch.tensor([row[key] for row in rows]) for key in (*INDICATORS, *DAMAGES)}
    correlations = {
        damage: {name: float(spearman_corrcoef(columns[name], columns[damage])) for name in INDICATORS}
        for damage in DAMAGES
    }
    lines = header("indicator", "rank correlation with the rise of the loss", "with the divergence")
    for name in sorted(INDICATORS, key=lambda name: -correlations["drift"][name]):
        lines.append(line(name, f"{correlations['rise'][name]:+.3f}", f"{correlations['drift'][name]:+.3f}"))
    figures = {"task": arguments.task, "dense_loss": dense, "spearman": correlations, "layers": rows}
    write(arguments.output, "indicators", lines, figures)
    print("\n".join(lines))
    plot(rows, correlations["drift"], arguments.output / "indicators.png")


def plot(rows: list[dict[str, Any]], correlations: dict[str, float], path: Path) -> None:
    """Every indicator against the divergence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, name in enumerate(INDICATORS, start=1):
        axes = figure.add_subplot(2, 4, place)
        axes.scatter([row[name] for row in rows], [row["drift"] for row in rows], s=12)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{name}: {correlations[name]:+.2f}", fontsize=9)
        axes.set_ylabel("divergence of the predictions", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
