r"""Scores encoders with fewer heads and narrower feed-forward layers, tuned again: Torch-Pruning, at sizes of low rank.

    pip install --no-deps --target PACKAGES torch-pruning==1.6.1
    python studies/pruning.py --glue PATH/TO/glue --packages PACKAGES --tasks MRPC --ratios 0.33 0.2

A dense model is tuned, loses whole attention heads and neurons of feed-forward layers until the linears of its blocks
have --ratios of their weights, and is tuned for as long again. What goes is chosen by first-order Taylor scores of
groups, from 512 training samples; the same share of every layer (`uniform`), or the lowest of all layers, each score
over the mean of its layer (`global`), where every layer keeps a head and as large a share of its neurons at least. The
models are no longer of their architecture, so what is scored besides is an ONNX file, in float32 and in eight bits.
BERT and its like only. A finished cell is not run again. Writes pruning.md and pruning.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from grid import Cells
from lightning.pytorch.loggers import TensorBoardLogger
from options import TRAINING, glue, parser, read
from runs import run_all
from tables import header, line, write
from torch import nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

from lowrank_pl.checkpoint import load_model, read_saved_model
from lowrank_pl.checkpoint.folders import ONNX_NAME
from lowrank_pl.export.int8 import quantize_int8
from lowrank_pl.export.onnx_file import write_onnx
from lowrank_pl.export.scoring import Scoring, in_onnxruntime, in_torch
from lowrank_pl.monitoring import ReportWriter
from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer

BATCHES = 16


def prunable(model: nn.Module) -> int:
    """Weights of the linears inside blocks."""
    blocks = [block for block in model.modules() if isinstance(block, BertLayer)]
    return sum(linear.weight.numel() for b in blocks for linear in b.modules() if isinstance(linear, nn.Linear))


def prune_(
    model: PreTrainedModel, share: float, of_heads: float, everywhere: bool, example: dict[str, torch.Tensor]
) -> None:
    """Takes heads and neurons out, by the gradients that are there.

    Args:
        model: With gradients.
        share: Of neurons, to be taken out.
        of_heads: The same of heads.
        everywhere: Rank those of all layers together, instead of taking the same share of each.
        example: Inputs, by which dependencies are found.
    """
    import torch_pruning

    blocks = [block for block in model.modules() if isinstance(block, BertLayer)]
    heads = {
        linear: block.attention.self.num_attention_heads
        for block in blocks
        for linear in (block.attention.self.query, block.attention.self.key, block.attention.self.value)
    }
    narrower = {*heads, *(block.intermediate.dense for block in blocks)}
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    taylor = torch_pruning.importance.GroupTaylorImportance()
    most = max(heads.values())  # heads of a layer

    def bounded(group: Any) -> Any:
        found = taylor(group)
        count = next((heads[dep.target.module] for dep, _ in group if dep.target.module in heads), len(found))
        # Torch-Pruning has no such bound per layer, and leaves one whole that should lose everything.
        each = found.view(count, -1)
        each[each.mean(1).topk(math.ceil(count / most)).indices] *= 1e6
        return found

    if everywhere:
        share, of_heads = (min(each, 1 - 1 / most - 1e-9) for each in (share, of_heads))  # what the bounds leave
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        bounded if everywhere else taylor,
        global_pruning=everywhere,
        pruning_ratio=share,
        head_pruning_ratio=of_heads,
        # The residual stream keeps its width.
        ignored_layers=[part for part in model.modules() if isinstance(part, kinds) and part not in narrower],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    for block in blocks:
        attention = block.attention.self
        attention.all_head_size = attention.query.out_features
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size


class Pruning(CompressionStrategy):
    """Takes heads and neurons out before training, down to a share of the weights of the blocks' linears."""

    def __init__(self, keep_ratio: float, everywhere: bool) -> None:
        super().__init__()
        self.keep_ratio = keep_ratio
        self.everywhere = everywhere

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores on training samples, and searches the share that leaves what is asked for."""
        data = getattr(trainer, "datamodule")  # noqa: B009, set without a type
        module, model = as_compressible(pl_module), as_compressible(pl_module).encoder
        assert isinstance(model, PreTrainedModel)
        model.eval().zero_grad()
        for batch, _ in zip(data.train_dataloader(), range(BATCHES), strict=False):
            model(**batch).loss.backward()
        example = {name: tensor[:2] for name, tensor in batch.items() if name != "labels"}
        wanted = self.keep_ratio * prunable(model)
        low, high = 0.0, 1.0
        # Few heads do not come in every share: neurons make up for it.
        heads = int(model.config.num_attention_heads)
        of_heads = min(round((1 - self.keep_ratio) * heads), heads - 1) / heads - 1e-9  # a share that is rounded up
        for _ in range(12):
            share = (low + high) / 2
            made = copy.deepcopy(model)
            for own, other in zip(made.parameters(), model.parameters(), strict=True):
                own.grad = None if other.grad is None else other.grad.clone()
            prune_(made, share, share if self.everywhere else of_heads, self.everywhere, example)
            low, high = (share, high) if prunable(made) > wanted else (low, share)
        made.zero_grad()
        module.encoder = made.train()


def files_of(task: SequenceClassification, folder: Path, scoring: Scoring) -> dict[str, Any]:
    """The scores and sizes of an ONNX file in float32 and in eight bits."""
    model = task.encoder.eval()
    assert isinstance(model, PreTrainedModel)
    write_onnx(model, folder)
    path, told = folder / ONNX_NAME, {}
    for kind in ("float32", "int8"):
        if kind == "int8":
            quantize_int8(model, folder)
        scores = scoring.compare(in_torch(model), in_onnxruntime(path))
        told[kind] = {"megabytes": path.stat().st_size / 1e6, **scores["after"]}
    return told


def cell(arguments: argparse.Namespace, cells: Cells, name: str, ratio: float, everywhere: bool) -> dict[str, Any]:
    """One model: pruned, tuned, and scored as a file; what was found before, if it was."""
    folder = cells.folder / f"{'global' if everywhere else 'uniform'}-{ratio:g}"
    path = folder / "pruning.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    start = str(cells.dense.folder / "checkpoints" / "last.ckpt")
    pl.seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=float(arguments.lr), weight_decay=0.01, fused=True)
    task = SequenceClassification(
        arguments.pretrained, start, Pruning(ratio, everywhere), optimizer=optimizer, warmup=0.1
    )
    trainer = LowRankTrainer(
        max_epochs=int(arguments.epochs),
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(folder.parent, folder.name, version=""),
        callbacks=[ReportWriter()],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(task, datamodule=glue(name, arguments))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    scoring = Scoring(read_saved_model(start), lambda _: glue(name, arguments), arguments.pretrained)
    dense = cells.dense.report
    assert dense is not None
    blocks = [block for block in task.encoder.modules() if isinstance(block, BertLayer)]
    told = {
        "task": name,
        "ratio": ratio,
        "global": everywhere,
        "kept": prunable(task.encoder) / prunable(load_model(start)),
        "heads": [block.attention.self.num_attention_heads for block in blocks],
        "neurons": [block.intermediate.dense.out_features for block in blocks],
        "score": report["score"],
        "metrics": report["metrics"],
        "dense": dense["score"],
        "seconds": report["seconds"],
        "files": files_of(task, folder, scoring),
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def main() -> None:
    """Does what is missing and writes the table."""
    options = parser(
        __doc__,
        *TRAINING,
        glue="glue",
        ratios=["0.33", "0.2"],
        output=Path("logs/pruning"),
        tasks=["MRPC", "STS-B", "SST-2"],
    )
    options.add_argument("--packages", required=True, help="where torch-pruning was installed")
    options.add_argument("--accelerator", default="cpu", help=argparse.SUPPRESS)
    arguments = read(options)
    sys.path.insert(0, arguments.packages)
    every = {task: Cells(arguments, task, 0) for task in arguments.tasks}
    if run_all([cells.dense for cells in every.values()], 1, arguments.threads):
        sys.exit(1)
    found = [
        cell(arguments, cells, task, float(ratio), everywhere)
        for task, cells in every.items()
        for ratio in arguments.ratios
        for everywhere in (False, True)
    ]
    lines = header("task", "what goes", "asked, kept", "score (loss)", "dense", "MB", "int8", "MB", "heads", "neurons")
    for told in found:
        files = told["files"]
        lines.append(
            line(
                told["task"],
                "global" if told["global"] else "uniform",
                f"{told['ratio']:g}, {told['kept']:.3f}",
                f"{told['score']:.3f} ({told['metrics']['loss']:.3f})",
                f"{told['dense']:.3f}",
                f"{files['float32']['megabytes']:.1f}",
                f"{files['int8']['score']:.3f} ({files['int8']['loss']:.3f})",
                f"{files['int8']['megabytes']:.1f}",
                " ".join(map(str, told["heads"])),
                " ".join(map(str, told["neurons"])),
            )
        )
    write(arguments.output, "pruning", lines, found)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
